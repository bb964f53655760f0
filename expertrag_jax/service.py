"""Questions in words in, answers in words out: an `Answerer` with its vocabularies and passages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertrag_jax import assembly
from expertrag_jax.answering import Answerer, Answers, Questions
from expertrag_jax.assembly import AnswerSettings
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.systems.description import describe
from expertrag_jax.trained_model import Model
from expertrag_jax.vocabulary import Vocabulary

Progress = Callable[[int], None]
Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Service:
    """What a model and an export both become.

    Attributes:
      answerer: with its policy and retriever. settings: its sizes.
      reader_vocabulary, retriever_vocabulary: as trained.
      source: the checkpoint's directory, or the manifest of the export.
      computation: what is done with the parameters, JSON: the system's description, and of an export its programs.
    """

    answerer: Answerer
    settings: AnswerSettings
    reader_vocabulary: Vocabulary
    retriever_vocabulary: Vocabulary
    source: Path
    computation: Any

    def tokenise(self, questions: Sequence[Question | str]) -> Questions:
        """See ``assembly.tokenise_questions``."""
        lengths = self.settings.question_length, self.settings.query_length
        return assembly.tokenise_questions(
            questions, self.reader_vocabulary, self.retriever_vocabulary, *lengths
        )

    def with_checkpoint(self, model: Model) -> Service:
        """This service with the parameters and the threshold of another checkpoint of the same system.

        Sizes and query encoder must be the same. The compiled programs stay, and so does the index; the old service,
        which shares them, is used up.
        """
        self.answerer.programs.params = model.params
        self.answerer.policy = assembly.make_policy("gate", model.settings.threshold)
        return dataclasses.replace(self, settings=model.settings, source=model.source)

    def check(self, questions: Sequence[Question], answers: bool) -> None:
        """Before anything is answered: raises UserError for a question (``answers``: or an answer) that is too long."""
        self.tokenise(questions)
        if answers:
            given = [answer for question in questions for answer in question.answers]
            assembly.tokenise_answers(given, self.reader_vocabulary, self.settings.answer_length)

    def predict(self, questions: Sequence[Question], progress: Progress | None = None) -> list[Record]:
        """Answers questions.

        Returns:
          one JSON-able record per question: id, question, prediction, score (log-probability in nats), p_ret,
          retrieve, passages [{id, title, score}] in rank order, empty where nothing was retrieved.
        """
        answers = self.answerer.answer(self.tokenise(questions), progress=progress)
        return [
            {
                "id": question.id,
                "question": question.question,
                "prediction": self.reader_vocabulary.decode(answers.tokens[row]),
                "score": _number(answers.scores[row]),
                **self._evidence(answers, row),
            }
            for row, question in enumerate(questions)
        ]

    def score(self, questions: Sequence[Question], progress: Progress | None = None) -> list[Record]:
        """Scores every answer that a question names.

        Returns:
          one record per question: id, question, answers [{answer, score}] as the question lists them (score:
          its log-probability in nats, EOS included), then as in `predict`.

        Raises:
          UserError: a question without answers, or an answer that is too long.
        """
        for question in questions:
            if not question.answers:
                raise UserError(f"question {question.id} has no answers to score: give it 'answers'.")
        counts = [len(question.answers) for question in questions]
        rows = np.repeat(np.arange(len(questions)), counts)
        given = [answer for question in questions for answer in question.answers]
        targets = assembly.tokenise_answers(given, self.reader_vocabulary, self.settings.answer_length)
        asked = self.tokenise(questions).rows(rows)
        answers = self.answerer.answer(asked, targets, progress=progress)
        records = []
        for question, end in zip(questions, np.cumsum(counts)):
            first = int(end) - len(question.answers)
            scored = [
                {"answer": given[row], "score": _number(answers.scores[row])}
                for row in range(first, int(end))
            ]
            evidence = self._evidence(answers, first)
            records.append({"id": question.id, "question": question.question, "answers": scored, **evidence})
        return records

    def _evidence(self, answers: Answers, row: int) -> Record:
        passages = []
        if answers.retrieve[row]:
            corpus = self.answerer.retriever.loaded.passages
            passages = [
                {"id": corpus.ids[place], "title": corpus.titles[place], "score": _number(score)}
                for place, score in zip(answers.passage_rows[row], answers.passage_scores[row])
                if place >= 0
            ]
        return {
            "p_ret": _number(answers.p_ret[row]),
            "retrieve": bool(answers.retrieve[row]),
            "passages": passages,
        }


def service_from_model(model: Model, retrieve: str = "gate", index_dir: str | None = None) -> Service:
    """A trained model with its index, or another edition's.

    Args:
      retrieve: ``gate``, ``always`` or ``never``, which needs no index.
      index_dir: None means the index of the training.

    Raises:
      UserError: there is no index and something may retrieve, or the index belongs to another model; or the training
        put evidence into the questions, which nothing does here.
    """
    reads = hasattr(model.system, "read")
    if not reads and retrieve != "never" and model.index_dir is not None:
        raise UserError(
            "this system was trained on questions with evidence in them, and answers from the question alone: accept "
            "that with `expertrag infer --retrieve=never`, or train systems/expert_rag.gin with FUSION = 'concatenate'."
        )
    own = index_dir is None
    index_dir = choose_index(retrieve, index_dir or model.index_dir, reads)
    if own and index_dir is not None:
        model.check_index()
    policy = assembly.make_policy(retrieve if reads else "never", model.settings.threshold)
    vocabularies = model.reader_vocabulary, model.retriever_vocabulary
    answerer = assembly.answerer_from_model(
        model.system, model.params, index_dir, *vocabularies, policy, model.settings, model.index_dir
    )
    return Service(answerer, model.settings, *vocabularies, model.source, describe(model.system))


def choose_index(retrieve: str, index_dir: str | Path | None, reads: bool) -> str | Path | None:
    """The index to open; None where nothing ever retrieves.

    Args:
      retrieve: see `service_from_model`.
      reads: whether the system has an open-book arm.

    Raises:
      UserError: an index is needed and none is named, or a closed-book system is to retrieve always.
    """
    if not reads and retrieve == "always":
        raise UserError("this system is closed-book, it cannot read passages: use --retrieve=never.")
    if not reads or retrieve == "never":
        return None
    if index_dir is None:
        raise UserError("the model names no index: give --index_dir, or --retrieve=never.")
    return index_dir


def _number(value: Any) -> float:
    """A float32 with the digits that it has."""
    return float(f"{float(value):.7g}")
