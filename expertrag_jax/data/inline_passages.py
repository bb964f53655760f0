"""Passages that stand in the examples themselves (reading exercises, positives and hard negatives)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import seqio
import tensorflow as tf

from expertrag_jax import evidence
from expertrag_jax.data.bridge import numpy_map
from expertrag_jax.data.preprocessors import Lengths, length_limit, tokenise
from expertrag_jax.data.vocabularies import EOS
from expertrag_jax.errors import UserError


@dataclasses.dataclass
class InlinePassages:
    """Tokenised chunks with ``titles`` and ``texts`` [n, K] strings gain ``passages`` [n, K, P] int32.

    Attributes:
      vocabulary: of the reader of these passages.
      with_question: whether a passage becomes a reader's input, "question 1 title 1 text 1"
        (``evidence.assemble``), or stands alone, "title 1 text", as the passage encoder reads it.
      sequence_length: SeqIO's lengths, filled in by the task; ``passages`` is P.
    """

    vocabulary: seqio.Vocabulary
    with_question: bool
    sequence_length: Lengths | None = None

    def __call__(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of chunks to a dataset of chunks."""
        return ds.map(self._tokenise, num_parallel_calls=tf.data.AUTOTUNE)

    def _tokenise(self, chunk: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        length = length_limit(self.sequence_length, "passages")
        if length is None:
            raise UserError("a task with passages needs a length for 'passages': set TASK_FEATURE_LENGTHS")
        shape = tf.shape(chunk["titles"])
        titles, texts = (tokenise(self.vocabulary, tf.reshape(chunk[k], [-1])) for k in ("titles", "texts"))
        separators = tf.fill([titles.nrows(), 1], tf.constant(EOS, tf.int32))
        tokens = tf.concat([titles, separators, texts], axis=1).to_tensor(shape=[None, length])
        passages = tf.reshape(tokens, [shape[0], shape[1], length])
        if self.with_question:
            passages = numpy_map(
                lambda questions, passages: [evidence.assemble_batch(questions, passages, length)],
                [chunk["inputs"], passages],
                [tf.TensorSpec([None, None, length], tf.int32)],
            )[0]
        kept = {k: v for k, v in chunk.items() if k not in ("titles", "texts")}
        return kept | {"passages": passages}
