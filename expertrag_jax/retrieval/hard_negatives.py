"""Hard negatives: passages that a retriever finds and that answer nothing (DPR, arXiv 2004.04906, section 3.2).

Lexical search finds passages that share words with the question; a dense index of the retriever in training finds those
that it confuses itself (ANCE, arXiv 2007.00808).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.evaluation.answers import has_answer
from expertrag_jax.files.writing import whole
from expertrag_jax.retrieval.corpus import HARD_NEGATIVES, Passages, Question
from expertrag_jax.retrieval.protocol import ABSENT_ROW
from expertrag_jax.retrieval.retriever import Retriever

_BATCH = 512  # questions searched at a time


def mine_hard_negatives(
    retriever: Retriever,
    questions: Sequence[Question],
    count: int,
    query_tokens: np.ndarray | None = None,
    candidates: int = 100,
    rule: str = "squad1",
) -> np.ndarray:
    """The best passages found that are neither gold nor hold an answer.

    Args:
      retriever: over an index of any kind.
      questions: N; without answers only gold passages are left out.
      count: negatives per question.
      query_tokens: [N, Lq] int32 in the retriever's vocabulary, for an index that searches by vectors.
      candidates: passages searched per question.
      rule: how an answer is found in a passage; see ``evaluation.answers.has_answer``.

    Returns:
      [N, count] int32 rows, best first; -1 where there are too few.
    """
    passages = retriever.loaded.passages
    chosen = np.full((len(questions), count), ABSENT_ROW, np.int32)
    for start in range(0, len(questions), _BATCH):
        part = slice(start, start + _BATCH)
        tokens = None if query_tokens is None else query_tokens[part]
        found = retriever.search([question.question for question in questions[part]], tokens, candidates)[0]
        chosen[part] = choose(found, questions[part], passages, count, rule)
    return chosen


def choose(
    found: np.ndarray, questions: Sequence[Question], passages: Passages, count: int, rule: str = "squad1"
) -> np.ndarray:
    """Of rows found [N, C], the first ``count`` that are neither gold nor hold an answer; as `mine_hard_negatives`."""
    chosen = np.full((len(questions), count), ABSENT_ROW, np.int32)
    for place, (question, candidates) in enumerate(zip(questions, found)):
        gold = set(question.gold_passage_ids)
        others = (row for row in candidates.tolist() if row >= 0 and passages.ids[row] not in gold)
        wrong = (row for row in others if not has_answer(passages.texts[row], question.answers, rule))
        for slot, row in zip(range(count), wrong):
            chosen[place, slot] = row
    return chosen


def named_negatives(questions: Sequence[Question], passages: Passages, count: int) -> np.ndarray:
    """The negatives that the questions' records name, rows [N, count] int32; -1 where there are fewer.

    Raises:
      UserError: a name that is not in the corpus.
    """
    row_of = passages.row_of()
    rows = np.full((len(questions), count), ABSENT_ROW, np.int32)
    for place, question in enumerate(questions):
        for slot, name in zip(range(count), question.extra.get(HARD_NEGATIVES, ())):
            if name not in row_of:
                raise UserError(
                    f"question {question.id!r} names the hard negative {name!r}, which is not in the corpus: use the "
                    "corpus that it was mined from"
                )
            rows[place, slot] = row_of[name]
    return rows


def write_questions(path: str | Path, questions: Sequence[Question], negatives: Sequence[Sequence[str]]) -> None:
    """Writes the questions as JSON lines, with the ids of their hard negatives; those named before stay in front."""
    with whole(path) as file:
        for question, names in zip(questions, negatives, strict=True):
            record = {
                "id": question.id,
                "question": question.question,
                "answers": list(question.answers),
                "gold_passage_ids": list(question.gold_passage_ids),
                **question.extra,
            }
            record[HARD_NEGATIVES] = list(dict.fromkeys([*record.get(HARD_NEGATIVES, ()), *names]))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
