"""SeqIO preprocessors from a source's records to task features.

An example on its way through a question task:

  normalised  ``id`` int64, ``question`` and ``answers`` strings (answers joined by ``SEPARATOR``), ``gold`` string
              (ids of passages known to support the answer, joined), ``retrieval_needed`` float32 (NaN unknown)
  in chunks   the same with a leading axis [n]: tokenisation, retrieval and assembly see many questions at once
  tokenised   ``inputs`` [n, L] (question, EOS), ``query`` [n, Lq] (the same in the retriever's vocabulary),
              ``targets`` [n, T] (first answer, EOS); int32, 0-padded
  with evidence (``expertrag_jax.data.retrieval``), then back to single examples
"""

from __future__ import annotations

import dataclasses
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


def in_chunks(ds: tf.data.Dataset, size: int = CHUNK) -> tf.data.Dataset:
    """Groups ``size`` consecutive examples; the last group may be smaller."""
    return ds.batch(size)


def single_examples(ds: tf.data.Dataset) -> tf.data.Dataset:
    """Undoes ``in_chunks``. Token features keep the padding of their chunk, which converters and packing ignore."""
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


def check_questions(tokens: tf.Tensor, limit: int | None, ids: tf.Tensor, questions: tf.Tensor, what: str) -> tf.Tensor:
    """The question is never cut: refuses one that does not fit.

    Args:
      tokens: [n, L] int32, 0-padded.
      limit: most tokens a question may have, EOS included; None to accept all.
      ids: [n] int64.
      questions: [n] string.
      what: name of the feature, for the message.

    Returns:
      ``tokens``; iterating raises UserError (through ``bridge.user_errors``) naming the first example too long.
    """
    if limit is None:
        return tokens

    def check(tokens: np.ndarray, ids: np.ndarray, questions: np.ndarray) -> list[np.ndarray]:
        lengths = np.count_nonzero(tokens, axis=1)
        if (lengths > limit).any():
            worst = int(np.argmax(lengths > limit))
            raise UserError(
                f"the question of example {ids[worst]} has {lengths[worst]} tokens, but {what} holds {limit}: "
                f"raise TASK_FEATURE_LENGTHS[{what!r}] or shorten it ({texts(questions[worst : worst + 1])[0][:120]!r})"
            )
        return [tokens]

    return numpy_map(check, [tokens, ids, questions], [tf.TensorSpec([None, None], tf.int32)])[0]


@dataclasses.dataclass
class TokeniseQuestions:
    """Chunks gain ``inputs``, ``query`` and ``targets``.

    Attributes:
      vocabularies: of reader and retriever.
      targets: whether there are answers to learn; the first answer is the target, cut to its length.
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
        for name in ("inputs", "query"):
            limit = length_limit(self.sequence_length, name)
            out[name] = check_questions(out[name], limit, chunk["id"], chunk["question"], name)
        if self.targets:
            first = tf.strings.split(chunk["answers"], SEPARATOR)[:, :1].to_tensor(shape=[None, 1])[:, 0]
            limit = length_limit(self.sequence_length, "targets")
            out["targets"] = with_eos(tokenise(self.vocabularies.reader, first), limit)
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
