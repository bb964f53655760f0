"""The arrays of one step.

B examples, K passages, L question length, P reader-input length, T target length, D retriever width.
Token arrays are padded with 0; questions and targets end in EOS (1).

Two modes, never both in one batch:

* *decided*: the data pipeline has applied the gate policy. With concatenation the evidence is part of
  ``encoder_input_tokens`` and ``passage_*`` is absent; ``retrieve`` records the decision.
* *both arms*: ``encoder_input_tokens`` is the question alone and ``passage_*`` is there for every row, so a
  loss can compare answering with and without evidence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import struct

Array = Any  # numpy or jax array


@struct.dataclass
class Batch:
    """One step's examples; a field that a task does not have is None.

    Attributes:
      example_ids: [B] int64, stable ids for joining results.
      encoder_input_tokens: [B, L] int32, the question (decided mode with concatenation: question and evidence).
      encoder_segment_ids: [B, L] int32, 1, 2, ... per packed example and 0 on padding; None when not packed.
      encoder_positions: [B, L] int32, position inside the packed example; None when not packed.
      query_tokens: [B, Lq] int32, the question in the retriever's vocabulary.
      passage_tokens: [B, K, P] int32, ``evidence.assemble``'s output per passage (question included), rank order.
      passage_rows: [B, K] int32, row in the index.
      passage_scores: [B, K] float32, retriever score.
      passage_vectors: [B, K, D] float32, frozen passage embeddings, for p(z|x) in the graph.
      passage_relevance: [B, K] float32, 1 relevant, 0 not, NaN unknown.
      decoder_input_tokens: [B, T] int32, the target shifted right.
      decoder_target_tokens: [B, T] int32.
      decoder_loss_weights: [B, T] float32, weight of a target token in the loss: 0 on padding, mostly 1 elsewhere.
      decoder_segment_ids: [B, T] int32, as for the encoder.
      decoder_positions: [B, T] int32, as for the encoder.
      retrieve: [B] bool, the decision already taken in the pipeline.
      retrieval_needed: [B] float32, supervision for the gate; NaN where unknown.
    """

    example_ids: Array | None = None
    encoder_input_tokens: Array | None = None
    encoder_segment_ids: Array | None = None
    encoder_positions: Array | None = None
    query_tokens: Array | None = None
    passage_tokens: Array | None = None
    passage_rows: Array | None = None
    passage_scores: Array | None = None
    passage_vectors: Array | None = None
    passage_relevance: Array | None = None
    decoder_input_tokens: Array | None = None
    decoder_target_tokens: Array | None = None
    decoder_loss_weights: Array | None = None
    decoder_segment_ids: Array | None = None
    decoder_positions: Array | None = None
    retrieve: Array | None = None
    retrieval_needed: Array | None = None

    @property
    def size(self) -> int:
        """Number of examples (rows) B; raises ValueError on an empty batch."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                return value.shape[0]
        raise ValueError("an empty Batch has no size")
