"""A reader's input from question and passage tokens: the one place that lays it out.

Per passage: ``question 1 title 1 text 1``, padded with 0. The passage is cut where it does not fit, never the
question; a cut row still ends in the separator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from expertrag_jax.errors import UserError

SEPARATOR = 1  # EOS between and after the segments


def assemble(question: Sequence[int], title: Sequence[int], text: Sequence[int], length: int) -> np.ndarray:
    """One passage's reader input.

    Args:
      question: ids; padding and a final EOS are dropped.
      title: ids without EOS.
      text: ids without EOS.
      length: P.

    Returns:
      int32 [P]: question 1 title 1 text 1 0 0 ...

    Raises:
      UserError: the question and its separator do not fit in ``length``.
    """
    return concatenate(question, [(title, text)], length)


def concatenate(
    question: Sequence[int], passages: Iterable[tuple[Sequence[int], Sequence[int]]], length: int
) -> np.ndarray:
    """All passages behind one question in one row: concatenation, as ExpertRAG's paper (2504.08744) has it.

    Args:
      question: ids; padding and a final EOS are dropped.
      passages: (title ids, text ids) in rank order; none gives the question alone.
      length: P.

    Returns:
      int32 [P]: question 1 title 1 text 1 title 1 text 1 ... 0 0 ..., cut from the end where it does not fit.

    Raises:
      UserError: the question and its separator do not fit in ``length``.
    """
    tokens = _question_without_end(question)
    _check_question(len(tokens), length)
    tokens.append(SEPARATOR)
    for title, text in passages:
        tokens.extend([*title, SEPARATOR, *text, SEPARATOR])
    if len(tokens) > length:
        tokens = tokens[: length - 1] + [SEPARATOR]
    row = np.zeros(length, np.int32)
    row[: len(tokens)] = tokens
    return row


def assemble_batch(question_tokens: np.ndarray, passage_tokens: np.ndarray, length: int) -> np.ndarray:
    """``assemble`` for every passage of every question.

    Args:
      question_tokens: [B, L] ints, 0-padded, with or without a final EOS.
      passage_tokens: [B, K, S] ints, ``title 1 text`` 0-padded, as an index stores them; all zeros for an
        absent passage.
      length: P.

    Returns:
      int32 [B, K, P]; an absent passage gives a row of zeros.

    Raises:
      UserError: a question and its separator do not fit in ``length``.
    """
    questions = np.asarray(question_tokens)
    passages = np.asarray(passage_tokens)
    question_sizes = _sizes(questions)
    last = np.take_along_axis(questions, np.maximum(question_sizes - 1, 0)[:, None], axis=1)[:, 0]
    question_sizes = question_sizes - ((question_sizes > 0) & (last == SEPARATOR))
    _check_question(int(question_sizes.max(initial=0)), length)
    passage_sizes = _sizes(passages)  # [B, K]

    position = np.arange(length)
    # Position of each output token in the passage: the question and one separator come before it.
    in_passage = position - (question_sizes[:, None, None] + 1)  # [B, 1, P]
    ends = passage_sizes[..., None]  # [B, K, 1]
    rows = np.take_along_axis(passages, np.clip(in_passage, 0, passages.shape[-1] - 1), axis=-1)
    rows = np.where(in_passage < ends, rows, np.where(in_passage == ends, SEPARATOR, 0))
    padded_questions = _fit(questions, length)[:, None]
    rows = np.where(in_passage < 0, np.where(in_passage == -1, SEPARATOR, padded_questions), rows)
    is_cut = question_sizes[:, None] + passage_sizes + 2 > length
    rows[..., -1] = np.where(is_cut, SEPARATOR, rows[..., -1])
    return np.where(ends > 0, rows, 0).astype(np.int32)


def _question_without_end(question: Sequence[int]) -> list[int]:
    tokens = [int(token) for token in question]
    while tokens and tokens[-1] == 0:
        tokens.pop()
    if tokens and tokens[-1] == SEPARATOR:
        tokens.pop()
    return tokens


def _check_question(size: int, length: int) -> None:
    if size + 1 > length:
        raise UserError(
            f"a question of {size} tokens and its end do not fit in a reader input of {length} tokens; "
            "raise the reader's input length or shorten the question."
        )


def _sizes(tokens: np.ndarray) -> np.ndarray:
    """Number of tokens before the trailing padding along the last axis: [..., n] -> [...]."""
    ends = np.where(tokens != 0, np.arange(1, tokens.shape[-1] + 1), 0)
    return ends.max(axis=-1, initial=0)


def _fit(tokens: np.ndarray, length: int) -> np.ndarray:
    """Cuts or pads the last axis of [B, L] with zeros to ``length``."""
    fitted = np.zeros((tokens.shape[0], length), tokens.dtype)
    kept = min(length, tokens.shape[1])
    fitted[:, :kept] = tokens[:, :kept]
    return fitted


def joined(passage_tokens: np.ndarray) -> np.ndarray:
    """All passages as one, in rank order: [B, K, S] int32, 0-padded -> [B, 1, K * S], padding behind the last one."""
    rows = passage_tokens.reshape(len(passage_tokens), 1, -1)
    order = np.argsort(rows == 0, axis=-1, kind="stable")
    return np.take_along_axis(rows, order, -1)
