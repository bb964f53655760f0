"""How good retrieval is: recall against known passages, and of an approximate index against the exact one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, Question


def gold_rows(questions: Iterable[Question], passages: Passages) -> list[set[int]]:
    """Rows of each question's gold passages.

    Raises:
      UserError: a gold passage is not in the corpus, so the questions belong to another one.
    """
    row_of = passages.row_of()
    rows = []
    for question in questions:
        missing = [name for name in question.gold_passage_ids if name not in row_of]
        if missing:
            raise UserError(
                f"question {question.id!r} names the gold passage {missing[0]!r}, which is not in the "
                "corpus: use the corpus that the questions were made for"
            )
        rows.append({row_of[name] for name in question.gold_passage_ids})
    return rows


def recall_at_k(
    rows: np.ndarray, gold: Sequence[Collection[int]], ks: Sequence[int] = (1, 5, 20, 100)
) -> dict[int, float]:
    """R@k: the share of questions with at least one gold passage among the first k.

    Args:
      rows: [B, K] int32, best first; -1 where absent.
      gold: B collections of rows; questions without gold passages are left out.
      ks: cut-offs, none above K.

    Returns:
      R@k by k, each in [0, 1].

    Raises:
      ValueError: no question has a gold passage, a cut-off exceeds K, or the lengths differ.
    """
    if max(ks) > rows.shape[1]:
        raise ValueError(f"R@{max(ks)} needs {max(ks)} results per question, not {rows.shape[1]}")
    first = first_ranks(rows, gold)
    return {k: float(np.mean(first < k)) for k in ks}


def first_ranks(rows: np.ndarray, gold: Sequence[Collection[int]]) -> np.ndarray:
    """Rank from 0 of the first gold passage of each question that has one, K where it was not found; int64.

    Arguments and errors as in ``recall_at_k``.
    """
    if len(rows) != len(gold):
        raise ValueError(f"{len(rows)} rows of results but {len(gold)} sets of gold passages")
    first = [
        next((rank for rank, row in enumerate(found.tolist()) if row in answers), rows.shape[1])
        for found, answers in zip(rows, gold)
        if answers
    ]
    if not first:
        raise ValueError("no question has a gold passage")
    return np.asarray(first)


def index_recall(rows: np.ndarray, exact_rows: np.ndarray) -> float:
    """The mean share of the exact search's k rows that an approximate search also found.

    Args:
      rows, exact_rows: [B, k] int32, -1 where absent.

    Returns:
      Recall@k in [0, 1].
    """
    if rows.shape != exact_rows.shape:
        raise ValueError(f"results of shape {rows.shape} and {exact_rows.shape} cannot be compared")
    shares = []
    for found, exact in zip(rows.tolist(), exact_rows.tolist()):
        wanted = {row for row in exact if row >= 0}
        if wanted:
            shares.append(len(wanted.intersection(found)) / len(wanted))
    if not shares:
        raise ValueError("the exact search found nothing")
    return float(np.mean(shares))
