"""Retrieval and the gate's decision inside a SeqIO task.

``Retrieve`` asks the index for a chunk of questions at a time. In *decided* mode the policy speaks first
where it can (``never`` costs no search at all), the index answers for the rows that retrieve, and their
evidence joins the question in ``inputs``. In *both arms* mode every row gets its passages and the model
decides later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from expertrag_jax import evidence
from expertrag_jax.data.bridge import numpy_map, texts
from expertrag_jax.data.preprocessors import SEPARATOR, Lengths, length_limit
from expertrag_jax.errors import UserError
from expertrag_jax.gate.policy import Always, Policy, PolicyInputs

MODES = ("decided", "both_arms")


@dataclasses.dataclass
class Retrieve:
    """Tokenised chunks gain evidence.

    Attributes:
      retriever: an ``expertrag_jax.retrieval.retriever.Retriever`` (with a cache, if it shall keep results)
        over an index that stores passage tokens.
      num_passages: K.
      mode: "decided" or "both_arms".
      policy: who decides, in decided mode.
      p_ret: question tokens [n, L] -> [n] float32, the gate's probability, for policies that need it.
      fusion: of the system; "concatenate" makes one reader input of all passages in both-arms mode.
      sequence_length: SeqIO's lengths, filled in by the task: ``inputs`` holds question and evidence in
        decided mode, ``passages`` one reader input in both-arms mode.
    """

    retriever: Any
    num_passages: int = 4
    mode: str = "decided"
    policy: Policy = Always()
    p_ret: Callable[[np.ndarray], np.ndarray] | None = None
    fusion: str = "per_passage"
    sequence_length: Lengths | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise UserError(f"evidence mode {self.mode!r} is unknown: choose one of {', '.join(MODES)}")

    def __call__(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of tokenised chunks to one with evidence."""
        step = self._decided if self.mode == "decided" else self._both_arms
        return ds.map(step)  # one call at a time: the index itself works on the whole chunk

    def _length(self, feature: str) -> int:
        limit = length_limit(self.sequence_length, feature)
        if limit is None:
            raise UserError(f"a task that retrieves needs a length for {feature!r}: set TASK_FEATURE_LENGTHS")
        return limit

    def _search(self, questions: list[str], query: np.ndarray) -> Any:
        found = self.retriever.retrieve(questions, query, self.num_passages)
        if found.passage_tokens is None:
            raise UserError(
                f"the index at {self.retriever.loaded.directory} stores no passage tokens: build it with the "
                "reader's vocabulary"
            )
        return found

    def _decided(self, chunk: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        length = self._length("inputs")

        def call(ids, needed, questions, inputs, query):
            retrieve, found = self.decide(ids, needed, texts(questions), inputs, query)
            rows = [inputs[row][inputs[row] != 0] for row in range(len(ids))]
            for row, passages in found.items():
                rows[row] = evidence.concatenate(rows[row], passages, length)
            width = max(np.count_nonzero(row) for row in rows)
            padded = np.zeros((len(rows), width), np.int32)
            for row, tokens in enumerate(rows):
                padded[row, : min(width, len(tokens))] = tokens[:width]
            return [padded, retrieve]

        arguments = [chunk[k] for k in ("id", "retrieval_needed", "question", "inputs", "query")]
        specs = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.bool)]
        inputs, retrieve = numpy_map(call, arguments, specs)
        return dict(chunk) | {"inputs": inputs, "retrieve": retrieve}

    def decide(
        self, ids: np.ndarray, needed: np.ndarray, questions: list[str], inputs: np.ndarray, query: np.ndarray
    ) -> tuple[np.ndarray, dict[int, list[tuple[list[int], list[int]]]]]:
        """Decides, and searches for the rows that retrieve (for all rows when the decision needs scores).

        Returns:
          [n] bool, and for each retrieving row its passages as (title ids, text ids), best first.
        """
        needs_scores = "passage_scores" in self.policy.needs
        found = self._search(questions, query) if needs_scores else None
        p_ret = None
        if "p_ret" in self.policy.needs and self.p_ret is not None:
            p_ret = self.p_ret(inputs)
        retrieve = self.policy.decide(
            PolicyInputs(
                example_ids=ids,
                p_ret=p_ret,
                passage_scores=None if found is None else found.scores,
                retrieval_needed=needed,
            )
        )
        chosen = np.flatnonzero(retrieve)
        if not len(chosen):
            return retrieve, {}
        if found is None:
            passage_tokens = self._search([questions[i] for i in chosen], query[chosen]).passage_tokens
        else:
            passage_tokens = found.passage_tokens[chosen]
        return retrieve, {
            int(row): [split_passage(p) for p in passages if p.any()]
            for row, passages in zip(chosen, passage_tokens)
        }

    def _both_arms(self, chunk: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        k, length = self.num_passages, self._length("passages")
        per_question = 1 if self.fusion == "concatenate" else k

        def call(questions, inputs, query, gold):
            found = self._search(texts(questions), query)
            passages = evidence.joined(found.passage_tokens) if per_question == 1 else found.passage_tokens
            tokens = evidence.assemble_batch(inputs, passages, length)
            return [tokens, found.rows, found.scores, self.relevance(found.rows, texts(gold))]

        specs = [tf.TensorSpec([None, per_question, length], tf.int32)]
        specs += [tf.TensorSpec([None, k], dtype) for dtype in (tf.int32, tf.float32, tf.float32)]
        arguments = [chunk[name] for name in ("question", "inputs", "query", "gold")]
        names = ("passages", "passage_rows", "passage_scores", "passage_relevance")
        return dict(chunk) | dict(zip(names, numpy_map(call, arguments, specs)))

    def relevance(self, rows: np.ndarray, gold: list[str]) -> np.ndarray:
        """1 where a row's passage is among the gold ones, 0 where not, NaN where none is known.

        Args:
          rows: [n, k] rows of the index, -1 where nothing was found.
          gold: [n] joined passage ids, empty where unknown.

        Returns:
          [n, k] float32.
        """
        result = np.full(rows.shape, np.nan, np.float32)
        for i, joined in enumerate(gold):
            if joined:
                known = set(joined.split(SEPARATOR))
                ids = self.retriever.loaded.passages.ids
                result[i] = [row >= 0 and ids[row] in known for row in rows[i]]
        return result


def split_passage(tokens: np.ndarray) -> tuple[list[int], list[int]]:
    """An index's stored passage (title 1 text, 0-padded) -> title ids and text ids."""
    tokens = tokens[tokens != 0].tolist()
    cut = tokens.index(evidence.SEPARATOR) if evidence.SEPARATOR in tokens else 0
    return tokens[:cut], tokens[cut + 1 :] if cut or tokens[:1] == [evidence.SEPARATOR] else tokens
