"""Question-answering tasks: the user's JSON lines, and three open-domain sets of TFDS.

Nothing is registered on import, because a task needs vocabularies (and, if it retrieves, an index) that are
known only at run time. The functions here register a task and return it, so a gin file may bind

    Pipeline.mixture_or_task = @questions.register_questions()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data.preprocessors import record
from expertrag_jax.data.question_tasks import question_task, register
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import checked
from expertrag_jax.retrieval.corpus import Question, read_questions_jsonl

Paths = LocalPath | Mapping[str, LocalPath] | None  # None: a gin macro without a value, refused when it is read


@checked
def register_questions(name: str, path: Paths, vocabularies: Vocabularies, **evidence: Any) -> seqio.Task:
    """Registers a task over files of questions (one JSON object per line, plain or gzipped).

    Fields of a line: ``question``, ``answers`` (the first one is the training target), optional
    ``gold_passage_ids``, and optional labels ``closed_book_correct`` and ``retrieval_correct`` from which
    ``retrieval_needed`` follows. An example's id is its place in the file, counted from 0.

    Args:
      name: of the task.
      path: of the file, as split "train", or a map from split to path.
      vocabularies: of reader and retriever.
      **evidence: mode, retriever, num_passages, policy, p_ret, fusion of ``data.question_tasks.question_task``.

    Returns:
      The task. Reading it raises UserError for a missing file or a bad line (file and line).
    """
    paths = dict(path) if isinstance(path, Mapping) else {"train": path}
    source = seqio.FunctionDataSource(_JsonLines(paths), splits=tuple(paths))
    return register(question_task(name, source, lambda example: example, vocabularies, **evidence))


class _JsonLines:
    """``(split, shuffle_files, seed)`` -> dataset of normalised examples; a file is read once."""

    __name__ = "json_lines"

    def __init__(self, paths: Mapping[str, str | os.PathLike]):
        self.paths = paths
        self._read: dict[str, list[Question]] = {}

    def __call__(self, split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # one file; the order is the pipeline's business
        if split not in self._read:
            self._read[split] = read_questions_jsonl(self.paths[split])
        questions = self._read[split]
        return tf.data.Dataset.from_tensor_slices(
            {
                "id": np.arange(len(questions), dtype=np.int64),
                "question": [q.question for q in questions],
                "answers": tf.ragged.constant([q.answers for q in questions], tf.string, ragged_rank=1),
                "gold": tf.ragged.constant([q.gold_passage_ids for q in questions], tf.string, ragged_rank=1),
                "retrieval_needed": np.array([retrieval_needed(q.extra) for q in questions], np.float32),
            }
        ).map(lambda fields: record(**fields), num_parallel_calls=tf.data.AUTOTUNE)


def retrieval_needed(labels: Mapping[str, Any]) -> float:
    """Whether retrieval is needed: wrong without it and right with it; NaN where either is unknown.

    Args:
      labels: may hold ``closed_book_correct`` and ``retrieval_correct`` (true/false or 1/0).
    """
    without, with_evidence = labels.get("closed_book_correct"), labels.get("retrieval_correct")
    if without is None or with_evidence is None:
        return float("nan")
    return float(not without and bool(with_evidence))


def _natural_questions_open(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    return record(example["question"], example["answer"])


def _trivia_qa(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    # The value comes first, so that it is the target; the aliases repeat it.
    answers = tf.concat([example["answer"]["value"][None], example["answer"]["aliases"]], axis=0)
    fingerprint = tf.strings.to_hash_bucket_fast(example["question_id"], 2**62)
    return record(example["question"], tf.unique(answers)[0], id=fingerprint)


def _web_questions(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    return record(example["question"], example["answers"])


# name -> TFDS name, record of one example, default splits (task's name -> TFDS's)
_OPEN_DOMAIN = {
    # The usual open-domain splits hold the end of train out for validation (Roberts et al. 2020, section 3),
    # because the published "validation" serves as the test set.
    "natural_questions_open": (
        "natural_questions_open:1.0.0",
        _natural_questions_open,
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"},
    ),
    "trivia_qa": (
        "trivia_qa/unfiltered.nocontext:1.1.0",
        _trivia_qa,
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "validation"},
    ),
    "web_questions": (
        "web_questions:1.0.0",
        _web_questions,
        {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
    ),
}


def register_open_domain(
    dataset: str,
    vocabularies: Vocabularies,
    name: str | None = None,
    splits: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    **evidence: Any,
) -> seqio.Task:
    """Registers a task over ``natural_questions_open``, ``trivia_qa`` or ``web_questions`` of TFDS.

    TFDS downloads and prepares the data on first use; ids are fingerprints of the question (its id in
    TriviaQA).

    Args:
      dataset: one of the three names.
      vocabularies: of reader and retriever.
      name: of the task; by default ``dataset``.
      splits: the task's splits in terms of TFDS's; by default train, validation (last 10% of train) and test.
      data_dir: of TFDS; None for its default.
      **evidence: mode, retriever, num_passages, policy, p_ret, fusion of ``data.question_tasks.question_task``.

    Raises:
      UserError: another dataset.
    """
    if dataset not in _OPEN_DOMAIN:
        raise UserError(f"no open-domain set {dataset!r}: choose one of {', '.join(_OPEN_DOMAIN)}")
    tfds_name, to_record, default_splits = _OPEN_DOMAIN[dataset]
    source = seqio.TfdsDataSource(tfds_name, tfds_data_dir=data_dir, splits=dict(splits or default_splits))
    return register(question_task(name or dataset, source, to_record, vocabularies, **evidence))
