"""A question-answering ``seqio.Task`` from any source: normalise, tokenise, retrieve, decide, assemble."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data import preprocessors
from expertrag_jax.data.retrieval import Retrieve
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.gate.policy import Always, Policy
from expertrag_jax.retrieval.corpus import Question

MODES = ("closed_book", "decided", "both_arms")


def number(dtype: tf.DType, rank: int = 0) -> seqio.Feature:
    """A feature that is no text: an id, a decision, a score."""
    vocabulary = seqio.PassThroughVocabulary(0)
    return seqio.Feature(vocabulary, add_eos=False, dtype=dtype, rank=rank)


def output_features(mode: str, vocabularies: Vocabularies) -> dict[str, seqio.Feature]:
    """What the examples of a question task have.

    Args:
      mode: "closed_book" (question alone), "decided" or "both_arms".
      vocabularies: of reader and retriever.
    """
    features = {
        "id": number(tf.int64),
        "inputs": seqio.Feature(vocabularies.reader),
        "targets": seqio.Feature(vocabularies.reader),
    }
    if mode == "decided":
        return features | {"retrieve": number(tf.bool)}
    features["query"] = seqio.Feature(vocabularies.retriever)
    if mode == "closed_book":
        return features
    return features | {
        "passages": seqio.Feature(vocabularies.reader, rank=2),
        "passage_rows": number(tf.int32, 1),
        "passage_scores": number(tf.float32, 1),
        "passage_relevance": number(tf.float32, 1),
        "retrieval_needed": number(tf.float32),
    }


def question_task(
    name: str,
    source: seqio.DataSource,
    to_record: Callable[[Mapping[str, Any]], dict[str, tf.Tensor]],
    vocabularies: Vocabularies,
    mode: str = "closed_book",
    retriever: Any = None,
    num_passages: int = 4,
    policy: Policy | None = None,
    p_ret: Callable[[np.ndarray], np.ndarray] | None = None,
    fusion: str = "per_passage",
) -> seqio.Task:
    """A task over a source of questions; not registered, see ``register``.

    Args:
      name: of the task.
      source: where the records come from.
      to_record: one source record -> ``preprocessors.record(...)``.
      vocabularies: of reader and retriever.
      mode: "closed_book": question and answer; "decided": ``policy`` decides per example whether evidence
        joins ``inputs``; "both_arms": ``num_passages`` passages beside every question.
      retriever: see ``retrieval.Retrieve``; needed for every mode but "closed_book".
      num_passages: K.
      policy: see ``retrieval.Retrieve``; None is ``Always()``.
      p_ret, fusion: see ``retrieval.Retrieve``.

    Raises:
      UserError: an unknown mode, or a mode that retrieves without a retriever.
    """
    if mode not in MODES:
        raise UserError(f"task {name} has mode {mode!r}: choose one of {', '.join(MODES)}")
    steps = [
        preprocessors.normalise(to_record),
        seqio.CacheDatasetPlaceholder(),
        preprocessors.in_chunks,
        preprocessors.TokeniseQuestions(vocabularies),
    ]
    if mode != "closed_book":
        if retriever is None:
            raise UserError(f"task {name} retrieves (mode {mode!r}) but has no retriever: set INDEX_DIR")
        steps.append(Retrieve(retriever, num_passages, mode, policy or Always(), p_ret, fusion))
    steps.append(preprocessors.single_examples)
    return seqio.Task(name, source, output_features(mode, vocabularies), steps)


def register(task: seqio.Task) -> seqio.Task:
    """Puts a task into SeqIO's registry under its name, in the place of an older one, and returns it."""
    if task.name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(task.name)
    seqio.TaskRegistry.add_provider(task.name, task)
    return task


def read_task_questions(task: str | seqio.Task, split: str) -> list[Question]:
    """The questions of a task's split as records, all answers kept, in the order of the source.

    Args:
      task: made by ``question_task``, or the registered name of one.
      split: of the task.

    Raises:
      UserError: no such task or split, or it has no questions.
    """
    if isinstance(task, str):
        try:
            task = seqio.get_mixture_or_task(task)
        except ValueError as error:
            raise UserError(f"MIXTURE_OR_TASK_NAME: {str(error).splitlines()[0]}") from None
    if split not in task.splits:
        known = ", ".join(sorted(task.splits))
        raise UserError(f"task {task.name} has no split {split!r}: choose one of {known}")
    records = task.preprocessors[0](task.source.get_dataset(split, shuffle=False))
    names = ("id", "question", "answers", "gold")
    found = []
    for record in records.map(lambda example: {name: example[name] for name in names}).as_numpy_iterator():
        question, answers, gold = (record[name].decode("utf-8") for name in names[1:])
        parts = (tuple(filter(None, joined.split(preprocessors.SEPARATOR))) for joined in (answers, gold))
        found.append(Question(str(record["id"]), question, *parts))
    if not found:
        raise UserError(f"task {task.name} has no questions in its split {split!r}")
    return found
