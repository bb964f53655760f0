"""A trained retriever from files: its two towers as functions, and the retriever over an index directory.

The towers come from a dual encoder's checkpoint, or from that of a system that carries a query encoder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from expertrag_jax.assembly import RETRIEVER_VOCABULARY, tokenise_questions
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.ranges import checked
from expertrag_jax.retrieval.cache import RetrievalCache
from expertrag_jax.retrieval.index import LoadedIndex, open_index
from expertrag_jax.retrieval.manifest import check_matches, parameters_digest
from expertrag_jax.retrieval.retriever import Retriever
from expertrag_jax.systems.description import rebuild
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.training.pretrained import Stored, read_whole
from expertrag_jax.vocabulary import Vocabulary

Encode = Callable[[np.ndarray], jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainedEncoder:
    """The towers of a trained dual encoder.

    Attributes:
      encode_queries: [B, Lq] int32 -> [B, D] float32 unit vectors, compiled once per shape.
      encode_passages: [N, S] int32 (``title 1 text``) -> [N, D]; None where there is no passage tower.
      dimension: D.
      digest: SHA-256 of the query tower's parameters; an index carries it, for towers come in pairs.
      vocabulary: of both towers.
      query_length, passage_length: Lq and S in training.
    """

    encode_queries: Encode
    encode_passages: Encode | None
    dimension: int
    digest: str
    vocabulary: Vocabulary
    query_length: int
    passage_length: int

    def tokenise(self, texts: list[str]) -> np.ndarray:
        """Questions -> [B, Lq] int32, EOS last, 0-padded.

        Raises:
          UserError: a question is longer than ``query_length``.
        """
        limits = (self.query_length, self.query_length)
        return tokenise_questions(texts, self.vocabulary, None, *limits).query_tokens


def load_encoder(path: str | Path) -> TrainedEncoder:
    """The towers in a checkpoint.

    Args:
      path: MODEL_DIR, or one step of it, of a dual encoder or of a system with a query encoder.

    Raises:
      UserError: there is no checkpoint, a damaged one, or none of a retriever.
    """
    directory, facts, config, params = read_whole(path, _read)
    towers = DualEncoder(config)
    has_passage_tower = config.shared or "passage_encoder" in params
    lengths = facts["task_feature_lengths"]
    return TrainedEncoder(
        encode_queries=_compiled(config, params["query_encoder"]),
        encode_passages=_compiled(config, _passage_tower(towers, params)) if has_passage_tower else None,
        dimension=config.output_dim,
        digest=parameters_digest(params["query_encoder"]),
        vocabulary=_vocabulary(directory, facts),
        query_length=lengths["query"],
        passage_length=lengths["passages"],
    )


@checked
def open_retriever(
    index_dir: LocalPath,
    retriever: LocalPath | TrainedEncoder | None = None,
    cache: LocalPath | None = None,
    reader_vocabulary: LocalPath | None = None,
    verify: bool = True,
) -> Retriever:
    """The retriever over an index directory.

    Args:
      index_dir: written by `expertrag index`.
      retriever: the checkpoint of its towers; needed where the index searches by vectors.
      cache: file of earlier results; None for no cache.
      reader_vocabulary: model file that the index's passage tokens must be of; None: not compared.
      verify: compare every file of the index with its digest.

    Raises:
      UserError: the index needs vectors and no retriever is given, or they do not belong together.
    """
    loaded = open_index(index_dir, verify=verify)
    reader = None if reader_vocabulary is None else Vocabulary.from_file(reader_vocabulary).digest
    check_matches(loaded.manifest, vocabulary_digest=reader)
    found = None if cache is None else RetrievalCache(cache)
    if not loaded.index.needs_vectors:
        return Retriever(loaded, cache=found)
    encoder = load_encoder(retriever) if isinstance(retriever, (str, Path)) else retriever
    if encoder is None:
        kind = loaded.manifest.kind
        raise UserError(f"the {kind} index at {index_dir} searches by vectors: name its retriever.")
    check_encoder(loaded, encoder)
    return Retriever(loaded, encoder.encode_queries, encoder_digest=encoder.digest, cache=found)


def check_encoder(loaded: LoadedIndex, encoder: TrainedEncoder) -> None:
    """Refuses an index of another retriever: UserError for another vocabulary, width or query tower."""
    manifest = loaded.manifest
    check_matches(manifest, retriever_vocabulary_digest=encoder.vocabulary.digest, dimension=encoder.dimension)
    check_matches(manifest, encoder_digest=encoder.digest)  # last, for it differs where any of the others does


def _read(stored: Stored) -> tuple[Path, dict[str, Any], DualEncoderConfig, Any]:
    """(its directory, its metadata, the towers' configuration, the system's parameters)."""
    if "system" not in stored.metadata:
        raise UserError(f"{stored.directory} does not say its system: name a checkpoint of `expertrag train`.")
    system = rebuild(stored.metadata["system"])
    config = _dual_encoder_config(system)
    if config is None:
        raise UserError(f"{stored.directory} holds no retriever but a {type(system).__name__}: name a retriever's.")
    params = stored.restore(jax.eval_shape(system.init, jax.random.PRNGKey(0)))
    return stored.directory, stored.metadata, config, params


def _dual_encoder_config(system: Any) -> DualEncoderConfig | None:
    return system.config if isinstance(system, DualEncoder) else getattr(system, "retriever", None)


def _passage_tower(towers: DualEncoder, params: Any) -> Any:
    return params["query_encoder" if towers.config.shared else "passage_encoder"]


def _compiled(config: DualEncoderConfig, params: Any) -> Encode:
    return functools.partial(jax.jit(lambda p, tokens: Tower(config).apply({"params": p}, tokens)), params)


def _vocabulary(directory: Path, facts: dict[str, Any]) -> Vocabulary:
    """The retriever's vocabulary in the MODEL_DIR that a checkpoint stands in."""
    for folder in (directory, *directory.parents[:2]):
        if (folder / RETRIEVER_VOCABULARY).is_file():
            vocabulary = Vocabulary.from_file(folder / RETRIEVER_VOCABULARY)
            break
    else:
        raise UserError(f"{directory.parents[1]} has no {RETRIEVER_VOCABULARY}: name the MODEL_DIR of a run.")
    trained = facts.get("digests", {}).get("retriever vocabulary", vocabulary.digest)
    if vocabulary.digest != trained:
        raise UserError(
            f"{vocabulary.path} is not the vocabulary that {directory} was trained with: its SHA-256 is "
            f"{vocabulary.digest[:12]}..., not {trained[:12]}...; put the right file there."
        )
    return vocabulary
