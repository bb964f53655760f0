"""From files to a system that answers: parameters, vocabularies and index joined into an `Answerer`.

`answerer_from_model` joins a system, parameters and an index; `tokenise_questions` makes what the answerer is
asked. What must fit together is compared here: the index's vocabularies, width and encoder with the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from expertrag_jax.answering import Answerer, Programs, Questions, SystemPrograms
from expertrag_jax.errors import UserError
from expertrag_jax.gate.policy import Always, Learned, Never, Policy
from expertrag_jax.ranges import Count, Length, Weight, checked
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.retrieval.manifest import Manifest, check_matches, parameters_digest, read_manifest
from expertrag_jax.retrieval.retriever import Retriever
from expertrag_jax.systems.snapshot import SNAPSHOT
from expertrag_jax.training import pretrained
from expertrag_jax.vocabulary import EOS_ID, Vocabulary

READER_VOCABULARY, RETRIEVER_VOCABULARY = "vocabulary/reader.model", "vocabulary/retriever.model"
RETRIEVE = ("gate", "always", "never")


@checked
@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """The static sizes of answering; an export is compiled for one set of them.

    Attributes:
      question_length: L, tokens of a question in the reader's vocabulary, EOS included.
      query_length: Lq, the same in the retriever's. answer_length: T, EOS included. num_passages: K.
      reader_length: P, tokens of question and passage; with ``concatenate``, of question and all passages.
      fusion: see ``model.fusion``. buckets: batch sizes.
      threshold: the gate retrieves where p_ret reaches it.

    Raises:
      UserError: a size below 1, or a question that would not fit in the reader's input.
    """

    question_length: Length
    query_length: Length
    reader_length: Length
    answer_length: Length
    num_passages: Count
    fusion: str = "per_passage"
    buckets: tuple[Count, ...] = (1, 8, 64)
    threshold: Weight = 0.5

    def __post_init__(self):
        object.__setattr__(self, "buckets", tuple(sorted({int(bucket) for bucket in self.buckets})))
        if not self.buckets:
            raise UserError("buckets are empty: name at least one batch size.")
        if self.reader_length < self.question_length:
            raise UserError(
                f"reader_length {self.reader_length} cannot hold a question of question_length "
                f"{self.question_length}: raise reader_length."
            )

    @property
    def read_shape(self) -> tuple[int, int]:
        """(passages, tokens) of one question's reader input: (K, P), or (1, P) with ``concatenate``."""
        return (1 if self.fusion == "concatenate" else self.num_passages), self.reader_length


# Parameters


def load_params(system: Any, checkpoint_path: str | Path) -> Any:
    """Parameters from a MODEL_DIR, a ``checkpoints/<step>`` or exported parameters: see ``pretrained.read_whole``.

    Raises:
      UserError: no checkpoint there, a damaged one, or parameters of other names or shapes.
    """
    abstract = jax.eval_shape(system.init, jax.random.PRNGKey(0))
    return pretrained.restore_parameters(checkpoint_path, abstract)


def check_answers(system: Any) -> None:
    """Raises UserError for a system that cannot be asked: a dual encoder."""
    needed = ("encode_question", "decide", "begin", "decode_step")
    if not all(hasattr(system, name) for name in needed):
        raise UserError(
            f"a {type(system).__name__} does not answer questions: name the directory of a trained ExpertRAG."
        )


# The index


def encoder_digest(params: Any) -> str | None:
    """What an index made by this model's dual encoder carries; None where the model has no query encoder.

    An index carries the digest of the query tower, shared or not: towers come in pairs.
    """
    return _digest(dict(params).get("query_encoder"))


def refreshed_encoder_digest(params: Any) -> str | None:
    """The same of the copy that the last refresh took (``systems.snapshot``); None where nothing is refreshed."""
    copy = dict(params).get(SNAPSHOT)
    return None if copy is None else _digest(copy["encoder"])


def _digest(tower: Any) -> str | None:
    return None if tower is None else parameters_digest(jax.tree.map(np.asarray, dict(tower)))


def expected_encoder(system: Any, params: Any, index_dir: str | Path, trained_index: str | Path | None) -> str | None:
    """What ``manifest.encoder_digest`` of an index must be for this system; None where nobody can tell.

    A system that weighs passages trains its query encoder on frozen passage vectors: its index is of the encoder that
    the training's index was made with, or was made again by the trained one or by the copy of the last refresh.
    """
    own = encoder_digest(params)
    if not getattr(system, "weighs_passages", False):
        return own
    again = refreshed_encoder_digest(params)
    found = read_manifest(index_dir).encoder_digest
    if found is not None and found in (own, again):
        return found
    if trained_index is not None and Path(trained_index).is_dir():
        return read_manifest(trained_index).encoder_digest
    versioned = again is not None and trained_index is not None and versions.is_of(Path(trained_index).name, again)
    return again if versioned else None


def check_index(
    manifest: Manifest,
    reader_vocabulary: str,
    retriever_vocabulary: str,
    encoder_digest: str | None,
    dimension: int | None,
) -> None:
    """Compares an index with a model.

    Args:
      reader_vocabulary, retriever_vocabulary: digests. encoder_digest: see `encoder_digest`.
      dimension: D of the query vectors, None where there is no query encoder.

    Raises:
      UserError: it is of another vocabulary, width or encoder, or stores no tokens.
    """
    dense = manifest.dimension is not None
    if dense and dimension is None:
        raise UserError(
            f"the {manifest.kind} index searches by vectors but the model has no query encoder: name a "
            "lexical index, or train with a retriever."
        )
    if manifest.token_length is None:
        raise UserError("the index stores no passage tokens: build it with the reader's vocabulary.")
    check_matches(
        manifest,
        vocabulary_digest=reader_vocabulary,
        retriever_vocabulary_digest=retriever_vocabulary if dense else None,
        encoder_digest=encoder_digest if dense else None,
        dimension=dimension if dense else None,
    )


def make_retriever(
    index_dir: str | Path,
    programs: Programs,
    *,
    reader_vocabulary: str,
    retriever_vocabulary: str,
    encoder_digest: str | None = None,
    dimension: int | None = None,
    max_batch: int = 64,
) -> Retriever:
    """Opens an index for a model.

    Args:
      programs: gives ``query_vectors``, unless the index is lexical.
      reader_vocabulary, retriever_vocabulary, encoder_digest, dimension: see `check_index`.
      max_batch: queries encoded at a time.

    Raises:
      UserError: no index there, a damaged one, or one of another model.
    """
    check_index(
        read_manifest(index_dir), reader_vocabulary, retriever_vocabulary, encoder_digest, dimension
    )
    loaded = open_index(index_dir)
    encode = programs.query_vectors if loaded.index.needs_vectors else None
    return Retriever(loaded, encode, encoder_digest=encoder_digest, max_batch=max_batch)


# The answerer


def make_policy(retrieve: str, threshold: float) -> Policy:
    """The policy that ``--retrieve`` names: ``gate`` (p_ret reaches the threshold), ``always`` or ``never``.

    Raises:
      UserError: another word.
    """
    if retrieve not in RETRIEVE:
        raise UserError(f"--retrieve={retrieve} is unknown: choose one of {', '.join(RETRIEVE)}.")
    return {"gate": Learned(threshold), "always": Always(), "never": Never()}[retrieve]


def make_answerer(
    programs: Programs, retriever: Retriever | None, policy: Policy, settings: AnswerSettings
) -> Answerer:
    """An Answerer of these sizes."""
    return Answerer(
        programs, retriever, policy, num_passages=settings.num_passages, reader_length=settings.reader_length,
        answer_length=settings.answer_length, buckets=settings.buckets, fusion=settings.fusion,
    )


def answerer_from_model(
    system: Any, params: Any, index_dir: str | Path | None, reader_vocabulary: Vocabulary,
    retriever_vocabulary: Vocabulary | None, policy: Policy, settings: AnswerSettings,
    trained_index: str | Path | None = None,
) -> Answerer:
    """Joins a system, its parameters and an index.

    Args:
      params: the parameters, or the path of a checkpoint (see ``load_params``).
      index_dir: None for a model that never retrieves. retriever_vocabulary: None means the reader's.
      policy: see ``gate.policy`` or ``make_policy``. trained_index: the training's, see ``expected_encoder``.

    Raises:
      UserError: parameters or an index that do not belong to the system.
    """
    check_answers(system)
    if settings.answer_length > system.max_target_length:
        raise UserError(
            f"answer_length is {settings.answer_length} but the system decodes "
            f"{system.max_target_length} tokens: lower answer_length or raise max_target_length."
        )
    if isinstance(params, (str, Path)):
        params = load_params(system, params)
    programs = SystemPrograms(system, params, settings.answer_length)
    retriever = None
    if index_dir is not None:
        config = getattr(system, "retriever", None)
        retriever = make_retriever(
            index_dir,
            programs,
            reader_vocabulary=reader_vocabulary.digest,
            retriever_vocabulary=(retriever_vocabulary or reader_vocabulary).digest,
            encoder_digest=expected_encoder(system, params, index_dir, trained_index),
            dimension=None if config is None else config.output_dim,
            max_batch=settings.buckets[-1],
        )
    return make_answerer(programs, retriever, policy, settings)


# Questions


def tokenise_questions(
    questions: Sequence[Question | str], reader_vocabulary: Vocabulary,
    retriever_vocabulary: Vocabulary | None, question_length: int, query_length: int,
    ids: Sequence[int] | None = None,
) -> Questions:
    """Texts to what an Answerer is asked; every row ends in EOS and is padded with 0.

    Args:
      questions: records of ``retrieval.corpus.read_questions_jsonl``, or texts.
      retriever_vocabulary: None means the reader's.
      question_length: L. query_length: Lq. ids: [N] integers; by default the place in ``questions``.

    Raises:
      UserError: an empty question, or one longer than a limit, by its place, its id and its first words.
    """
    texts = [question if isinstance(question, str) else question.question for question in questions]
    names = [f"{place}" if isinstance(each, str) else each.id for place, each in enumerate(questions)]
    numbers = np.arange(len(texts), dtype=np.int64) if ids is None else np.asarray(ids, np.int64)
    if len(numbers) != len(texts):
        raise ValueError(f"{len(numbers)} ids for {len(texts)} questions")
    tokens = _rows(texts, names, reader_vocabulary, question_length, "question_length")
    same = retriever_vocabulary is None or retriever_vocabulary.digest == reader_vocabulary.digest
    if same and query_length == question_length:
        query = tokens
    else:
        query = _rows(texts, names, retriever_vocabulary or reader_vocabulary, query_length, "query_length")
    return Questions(numbers, texts, tokens, query)


def tokenise_answers(answers: Sequence[str], vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Answers to score: N texts -> [N, T] int32, each ending in EOS; UserError for one that is longer."""
    names = [str(place) for place in range(len(answers))]
    return _rows(answers, names, vocabulary, length, "answer_length", "answer")


def _rows(texts, names, vocabulary: Vocabulary, length: int, limit: str, what: str = "question"):
    rows = np.zeros((len(texts), length), np.int32)
    for row, (text, name, ids) in enumerate(zip(texts, names, vocabulary.encode_batch(texts))):
        shown = text if len(text) <= 60 else text[:57] + "..."
        if not ids:
            raise UserError(f"{what} {name} ({shown!r}) has no words.")
        if len(ids) + 1 > length:
            raise UserError(
                f"{what} {name} ({shown!r}) has {len(ids) + 1} tokens but {limit} is {length}: shorten it, "
                f"or use a model with a larger {limit}."
            )
        rows[row, : len(ids) + 1] = [*ids, EOS_ID]
    return rows
