"""Questions with gold passages and hard negatives: DPR's training data (arXiv 2004.04906, section 3.2)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data.question_tasks import register
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.evaluation.answers import check_rule
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import Count, checked
from expertrag_jax.retrieval.corpus import Passages, Question, read_passages_tsv, read_questions_jsonl
from expertrag_jax.retrieval.hard_negatives import mine_hard_negatives, named_negatives
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.retrieval.metrics import gold_rows
from expertrag_jax.retrieval.retriever import Retriever
from tasks.inverse_cloze import pair_record, retriever_task

_LOG = logging.getLogger(__name__)
Paths = LocalPath | Mapping[str, LocalPath] | None  # None: a gin macro without a value, refused when it is read
_CANDIDATES = 30  # searched per question: the best of them that hold no answer are hard negatives


@checked
def register_relevant_passages(
    path: Paths,
    corpus: LocalPath,
    vocabularies: Vocabularies,
    name: str = "relevant_passages",
    negatives_from: LocalPath | None = None,
    num_negatives: Count = 1,
    rule: str = "squad1",
) -> seqio.Task:
    """Registers the task over files of questions with ``gold_passage_ids``; questions without are left out.

    Args:
      path: of the file, as split "train", or a map from split to path.
      corpus: the passages' TSV file.
      vocabularies: of reader and retriever; the retriever's is used on both sides.
      name: of the task.
      negatives_from: directory of a BM25 index over the same corpus: its best passages that are no gold
        passage and hold no answer are hard negatives of questions whose record names none
        (``hard_negative_passage_ids``, see `expertrag mine`). None: those have in-batch negatives alone.
      num_negatives: per question.
      rule: how an answer is found in a passage: its words ("squad1") or as a regular expression ("regex").

    Returns:
      The task. Reading it raises UserError for bad files, a gold passage that the corpus lacks, or questions
      without any gold passage.
    """
    paths = dict(path) if isinstance(path, Mapping) else {"train": path}
    read = _Source(paths, corpus, negatives_from, num_negatives, rule)
    source = seqio.FunctionDataSource(read, splits=tuple(paths))
    return register(retriever_task(name, source, vocabularies))


def hard_negatives(
    questions: Sequence[Question],
    passages: Passages,
    index_dir: str | os.PathLike,
    count: int,
    rule: str = "squad1",
) -> np.ndarray:
    """Rows [N, count] int32 of passages that look right and are not; -1 where there are too few.

    Raises:
      UserError: the index is of another corpus, or needs vectors.
    """
    loaded = open_index(index_dir, verify=False)
    if loaded.index.needs_vectors:
        raise UserError(
            f"hard negatives come from a bm25 index, and {index_dir} is {loaded.manifest.kind}: mine them beforehand, "
            "with `expertrag mine`."
        )
    if loaded.manifest.corpus_digest != passages.digest:
        raise UserError(f"the index {index_dir} is of another corpus: build it again from this one.")
    return mine_hard_negatives(Retriever(loaded), questions, count, candidates=_CANDIDATES, rule=rule)


class _Source:
    """``(split, shuffle_files, seed)`` -> dataset of questions with passages; files are read once."""

    __name__ = "relevant_passages"

    def __init__(self, paths, corpus, negatives_from, num_negatives, rule):
        self._paths, self._corpus, self._rule = paths, corpus, rule
        self._negatives_from, self._num_negatives = negatives_from, num_negatives
        self._fields: dict[str, dict] = {}

    def __call__(self, split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one file; the order is the pipeline's business
        if split not in self._fields:
            self._fields[split] = self._read(self._paths[split])
        return tf.data.Dataset.from_tensor_slices(self._fields[split]).map(pair_record)

    def _read(self, path: str | os.PathLike) -> dict[str, Sequence]:
        everything = read_questions_jsonl(path)
        known = [place for place, question in enumerate(everything) if question.gold_passage_ids]
        if not known:
            raise UserError(f"{path}: no question has gold_passage_ids, which training a retriever needs")
        if len(known) < len(everything):
            left_out = len(everything) - len(known)
            _LOG.warning("%s: %d of %d questions have no gold passages: left out", path, left_out, len(everything))
        questions = [everything[place] for place in known]
        passages = read_passages_tsv(self._corpus)
        rows = [[min(gold)] for gold in gold_rows(questions, passages)]
        negatives = named_negatives(questions, passages, self._num_negatives)
        lacking = np.flatnonzero((negatives < 0).all(-1))
        if self._negatives_from is not None and len(lacking):
            without = [questions[place] for place in lacking]
            check_rule(self._rule, (question.answers for question in without))
            negatives[lacking] = hard_negatives(
                without, passages, self._negatives_from, self._num_negatives, self._rule
            )
        if (negatives >= 0).any():
            # Where there are too few the positive fills up: the loss takes equal passages for no negatives.
            filled = np.where(negatives < 0, np.array(rows), negatives)
            rows = [[*gold, *negative] for gold, negative in zip(rows, filled.tolist())]
        return {
            "id": np.array(known, np.int64),
            "question": [question.question for question in questions],
            "titles": [[passages.titles[row] for row in found] for found in rows],
            "texts": [[passages.texts[row] for row in found] for found in rows],
            "rows": np.array(rows, np.int32),
        }
