"""SeqIO preprocessors from a source's records to task features.

An example on its way through a question task:

  normalised  ``id`` int64, ``question`` and ``answers`` strings (answers joined by ``SEPARATOR``), ``gold``
              string (ids of passages known to support the answer, joined), ``retrieval_needed`` float32
              (NaN unknown)
  in chunks   the same with a leading axis [n]: tokenisation, retrieval and assembly see many questions
  tokenised   ``inputs`` [n, L] (question, EOS), ``query`` [n, Lq] (the same in the retriever's vocabulary),
              ``targets`` [n, T] (first answer, EOS); int32, 0-padded
  with evidence (``expertrag_jax.data.retrieval``), then back to single examples
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data.bridge import numpy_map, texts
from expertrag_jax.data.vocabularies import EOS, Vocabularies
from expertrag_jax.errors import UserError

SEPARATOR = "\x1f"  # ASCII's unit separator: no text contains it
CHUNK = 256  # questions per call of tokeniser and retriever

Lengths = Mapping[str, Any]

_LOG = logging.getLogger(__name__)


def in_chunks(ds: tf.data.Dataset, size: int = CHUNK) -> tf.data.Dataset:
    """Groups ``size`` consecutive examples; the last group may be smaller."""
    return ds.batch(size)


def single_examples(ds: tf.data.Dataset) -> tf.data.Dataset:
    """Undoes ``in_chunks``. Token features keep their chunk's padding; converters and packing ignore it."""
    return ds.unbatch()


def length_limit(sequence_length: Lengths | None, feature: str) -> int | None:
    """The length of ``feature``'s last axis, or None where the task is read without lengths."""
    limit = (sequence_length or {}).get(feature)
    return limit[-1] if isinstance(limit, (tuple, list)) else limit


def with_eos(tokens: tf.RaggedTensor, room: int | None = None) -> tf.Tensor:
    """Appends EOS to every row.

    Args:
      tokens: [n, None] int32.
      room: rows are cut so that EOS still fits into this length; None for no limit.

    Returns:
      [n, longest] int32, 0-padded.
    """
    if room is not None:
        tokens = tokens[:, : max(room - 1, 0)]
    eos = tf.fill([tokens.nrows(), 1], tf.constant(EOS, tf.int32))
    return tf.concat([tokens, eos], axis=1).to_tensor()


def tokenise(vocabulary: seqio.Vocabulary, strings: tf.Tensor) -> tf.RaggedTensor:
    """[n] strings -> [n, None] int32 ids without EOS."""
    return tf.cast(vocabulary.encode_tf(strings), tf.int32)


def check_questions(chunk: Mapping[str, tf.Tensor], limits: Mapping[str, int | None]) -> dict[str, tf.Tensor]:
    """The question is never cut: refuses one that does not fit.

    Args:
      chunk: ``id`` [n], ``question`` [n], and the features that ``limits`` names, [n, L] int32, 0-padded.
      limits: feature -> most tokens of a question, EOS included; None to accept all.

    Returns:
      Those features; iterating raises UserError (through ``bridge.user_errors``) naming the first example too
      long.
    """
    names = list(limits)

    def check(ids: np.ndarray, questions: np.ndarray, *features: np.ndarray) -> list[np.ndarray]:
        for name, tokens in zip(names, features):
            lengths = np.count_nonzero(tokens, axis=1)
            too_long = lengths > (lengths if limits[name] is None else limits[name])
            if too_long.any():
                first = int(np.argmax(too_long))
                raise UserError(
                    f"the question of example {ids[first]} has {lengths[first]} tokens, but {name} holds "
                    f"{limits[name]}: raise TASK_FEATURE_LENGTHS[{name!r}] or shorten it "
                    f"({texts(questions[first : first + 1])[0][:120]!r})"
                )
        return list(features)

    arguments = [chunk[name] for name in ("id", "question", *names)]
    return dict(zip(names, numpy_map(check, arguments, [tf.TensorSpec([None, None], tf.int32)] * len(names))))


def tell_of_cuts(ids: tf.Tensor, lengths: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Warns, at the first of them, where targets were cut.

    Args:
      ids: [n]. lengths: [n], tokens of each whole target, EOS included. targets: [n, T] int32, cut.

    Returns:
      ``targets``.
    """
    told = []

    def check(ids: np.ndarray, lengths: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
        cut = lengths > np.count_nonzero(targets, axis=1)
        if cut.any() and not told:
            told.append(True)
            first = int(np.argmax(cut))
            _LOG.warning(
                "the answer of example %d has %d tokens, but targets holds %d: it is cut, and so is every longer one; "
                "raise TASK_FEATURE_LENGTHS['targets'], and MAX_TARGET_LENGTH with it", ids[first], lengths[first],
                np.count_nonzero(targets[first]),
            )  # fmt: skip
        return [targets]

    return numpy_map(check, [ids, lengths, targets], [tf.TensorSpec([None, None], tf.int32)])[0]


@dataclasses.dataclass
class TokeniseQuestions:
    """Chunks gain ``inputs``, ``query`` and ``targets``.

    Attributes:
      vocabularies: of reader and retriever.
      targets: whether there are answers to learn; the first answer is the target, cut to its length, which the log
        tells of once.
      sequence_length: SeqIO's lengths, filled in by the task.
    """

    vocabularies: Vocabularies
    targets: bool = True
    sequence_length: Lengths | None = None

    def __call__(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of chunks to a dataset of chunks."""
        return ds.map(self._tokenise, num_parallel_calls=tf.data.AUTOTUNE)

    def _tokenise(self, chunk: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        out = dict(chunk)
        out["inputs"] = with_eos(tokenise(self.vocabularies.reader, chunk["question"]))
        if self.vocabularies.shared:
            out["query"] = out["inputs"]
        else:
            out["query"] = with_eos(tokenise(self.vocabularies.retriever, chunk["question"]))
        out |= check_questions(out, {k: length_limit(self.sequence_length, k) for k in ("inputs", "query")})
        if self.targets:
            first = tf.strings.split(chunk["answers"], SEPARATOR)[:, :1].to_tensor(shape=[None, 1])[:, 0]
            limit = length_limit(self.sequence_length, "targets")
            tokens = tokenise(self.vocabularies.reader, first)
            out["targets"] = tell_of_cuts(chunk["id"], tokens.row_lengths() + 1, with_eos(tokens, limit))
        return out


def record(
    question: tf.Tensor,
    answers: tf.Tensor,
    id: tf.Tensor | None = None,
    gold: tf.Tensor | None = None,
    retrieval_needed: tf.Tensor | None = None,
) -> dict[str, tf.Tensor]:
    """A normalised example.

    Args:
      question: string.
      answers: [A] string; the first one is the training target.
      id: int64; by default a fingerprint of the question, so that it does not depend on the order of reading.
      gold: [G] string, ids of supporting passages; None where unknown.
      retrieval_needed: float32; None where unknown.
    """
    if id is None:
        id = tf.strings.to_hash_bucket_fast(question, 2**62)
    return {
        "id": tf.cast(id, tf.int64),
        "question": question,
        "answers": tf.strings.reduce_join(answers, separator=SEPARATOR),
        "gold": tf.constant("") if gold is None else tf.strings.reduce_join(gold, separator=SEPARATOR),
        "retrieval_needed": tf.constant(np.nan, tf.float32) if retrieval_needed is None else retrieval_needed,
    }


def normalise(to_record: Callable[[Mapping[str, Any]], dict[str, tf.Tensor]]) -> Callable:
    """The preprocessor that maps a source's examples to normalised ones.

    Args:
      to_record: one source example -> ``record(...)``.
    """

    def preprocess(ds: tf.data.Dataset) -> tf.data.Dataset:
        return ds.map(to_record)  # too little work per example for threads to pay

    return preprocess
