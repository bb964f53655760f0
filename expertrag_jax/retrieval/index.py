"""Index directories: make an index of any kind, write it so that it can be moved, open it again.

An index directory holds ``manifest.json``, ``passages.tsv.gz`` (ids, texts, titles in DPR's format),
``passage_tokens.npy`` (int32 [N, S], where tokens were given), ``vectors.npy`` (float32 [N, D], where the
kind needs vectors) and ``searcher/`` (the kind's own files). Nothing in it is pickled, nothing names a place
outside.
A directory is never changed: a new version of an index is another directory, see `Retriever.swap`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.files import directories
from expertrag_jax.files.lock import only_writer
from expertrag_jax.files.paths import target
from expertrag_jax.files.sealed import array, sealed
from expertrag_jax.retrieval.corpus import Passages, read_passages_tsv, write_passages_tsv
from expertrag_jax.retrieval.manifest import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    check_files,
    file_entry,
    library_versions,
    read_manifest,
)
from expertrag_jax.retrieval.protocol import ABSENT_ROW, ABSENT_SCORE, REMEDY, Index, Queries, with_settings

__all__ = [
    "ABSENT_ROW",
    "ABSENT_SCORE",
    "Index",
    "LoadedIndex",
    "Queries",
    "check_writable",
    "make_index",
    "open_index",
    "write_index",
]

_VERIFIED_ROWS = 65536  # at a time
# Modules by kind, imported when the kind is asked for: importing scann imports TensorFlow.
KINDS = {
    "scann": ("expertrag_jax.retrieval.scann_index", "ScannIndex"),
    "exact": ("expertrag_jax.retrieval.mesh_index", "ExactIndex"),
    "bm25": ("expertrag_jax.retrieval.lexical_index", "LexicalIndex"),
    "hybrid": ("expertrag_jax.retrieval.hybrid_index", "HybridIndex"),
}

PASSAGES_NAME, TOKENS_NAME, VECTORS_NAME = "passages.tsv.gz", "passage_tokens.npy", "vectors.npy"
SEARCHER_NAME = "searcher"


def make_index(kind: str, **settings) -> Index:
    """An empty index of a kind: "scann", "exact", "bm25" or "hybrid", with that class's settings.

    Raises:
      UserError: no such kind, or no such setting.
    """
    if kind not in KINDS:
        raise UserError(f"unknown kind of index {kind!r}: choose one of {', '.join(KINDS)}")
    module, name = KINDS[kind]
    return with_settings(getattr(importlib.import_module(module), name), settings)


@dataclasses.dataclass
class LoadedIndex:
    """An open index directory.

    Attributes:
      directory: where it lies.
      manifest: what it says about itself.
      index: the searcher.
      tokens: [N, S] int32, `title 1 text` in the reader's vocabulary, 0-padded (memory-mapped); None if not
        stored.
      vectors: [N, D] float32 (memory-mapped); None for a purely lexical index.
      packed_passages: [bytes] uint8, the file of the passages (memory-mapped). What is mapped can be read after the
        directory was removed, as old versions are.
    """

    directory: Path
    manifest: Manifest
    index: Index
    tokens: np.ndarray | None
    vectors: np.ndarray | None
    packed_passages: np.ndarray

    @functools.cached_property
    def passages(self) -> Passages:
        """Ids, titles and texts, read when first asked for: training needs the tokens alone."""
        passages = read_passages_tsv(self.directory / PASSAGES_NAME, memoryview(self.packed_passages), True)
        if len(passages) != len(self):
            raise UserError(f"{self.directory} is damaged ({len(passages)} passages for {len(self)}): {REMEDY}.")
        return passages

    def __len__(self) -> int:
        return self.manifest.count


def check_writable(
    directory: str | Path, overwrite: bool = False, inputs: Iterable[str | os.PathLike | None] = ()
) -> None:
    """Refuse a place where `write_index` would refuse to write; call it before the hours of embedding.

    Raises:
      UserError: an index is there and `overwrite` is False, or something else is there, or one of the `inputs` of the
        command would be replaced.
    """
    directories.check_replaceable(target(directory), "index", FORMAT, overwrite, inputs)


def _check_parts(passages: Passages, tokens: np.ndarray | None, vectors: np.ndarray | None) -> None:
    for name, given in (("passage_tokens", tokens), ("vectors", vectors)):
        if given is not None and (given.ndim != 2 or len(given) != len(passages)):
            raise UserError(
                f"{name} has shape {given.shape} but the corpus has {len(passages)} passages: give one row "
                "per passage"
            )


def write_index(
    directory: str | Path,
    index: Index,
    passages: Passages,
    *,
    passage_tokens: np.ndarray | None = None,
    vectors: np.ndarray | None = None,
    encoder_digest: str | None = None,
    vocabulary_digests: dict[str, str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a built index: beside its place, synced to disk, then renamed, so no reader sees half of it.

    Args:
      directory: where the index shall lie.
      index: built from `passages` and `vectors`.
      passages: the corpus, N passages.
      passage_tokens: [N, S] int32, see `LoadedIndex.tokens`.
      vectors: [N, D] float32, those given to `index.build`.
      encoder_digest: of the passage encoder (`manifest.parameters_digest`).
      vocabulary_digests: {"reader": ..., "retriever": ...}.
      overwrite: replace an index that is there, in one step.

    Returns:
      The manifest as written.

    Raises:
      UserError: see `check_writable`; or the arrays do not fit the corpus.
    """
    directory = target(directory)
    check_writable(directory, overwrite)
    _check_parts(passages, passage_tokens, vectors)
    with only_writer(directory, f"the index {directory}"), directories.built_beside(directory) as built:
        write_passages_tsv(passages, built / PASSAGES_NAME)
        if passage_tokens is not None:
            np.save(built / TOKENS_NAME, np.asarray(passage_tokens, np.int32), allow_pickle=False)
        if vectors is not None:
            np.save(built / VECTORS_NAME, np.asarray(vectors, np.float32), allow_pickle=False)
        (built / SEARCHER_NAME).mkdir()
        index.save(built / SEARCHER_NAME)
        files = sorted(path for path in built.rglob("*") if path.is_file())
        manifest = Manifest(
            kind=index.kind,
            metric=index.metric,
            settings=index.settings,
            count=len(passages),
            dimension=None if vectors is None else int(vectors.shape[1]),
            token_length=None if passage_tokens is None else int(passage_tokens.shape[1]),
            corpus_digest=passages.digest,
            encoder_digest=encoder_digest,
            vocabulary_digests=dict(vocabulary_digests or {}),
            versions=library_versions(),
            files={path.relative_to(built).as_posix(): file_entry(path) for path in files},
        )
        (built / MANIFEST_NAME).write_text(sealed(manifest.fields()), encoding="utf-8")
        for path in [*built.rglob("*"), built]:
            directories.sync(path)
        check_writable(directory, overwrite)
        directories.install(built, directory)
    return manifest


def _load_array(directory: Path, manifest: Manifest, name: str, width: int | None, dtype: str) -> np.ndarray | None:
    """An array of one row per passage, memory-mapped; None where the manifest has none."""
    if (name in manifest.files) != (width is not None):
        told = "and has no file" if width is not None else "of no width and has a file"
        raise UserError(f"{directory / MANIFEST_NAME} is damaged (it names {name} {told}): {REMEDY}.")
    return None if width is None else array(directory / name, (manifest.count, width), dtype, REMEDY)


def open_index(directory: str | Path, *, verify: bool = True, **settings) -> LoadedIndex:
    """Open an index directory.

    Args:
      directory: written by `write_index`, may have been moved or copied since; or a link to one, which is followed
        once, and again where it moved on and its old target was removed meanwhile.
      verify: compare every file's SHA-256 with the manifest; if False, names and sizes only.
      **settings: for the index's class, such as `mesh` for the exact index.

    Raises:
      UserError: the directory is missing, is not an index, is of another format, or a file is missing or
        damaged.
    """
    while True:
        found = Path(os.path.realpath(directory))  # a link that moves on does not mix two versions
        try:
            return _open(found, verify, settings)
        except Exception:  # whatever it looks like when files go while they are read
            if found == Path(os.path.realpath(directory)):
                raise


def _open(directory: Path, verify: bool, settings: dict) -> LoadedIndex:
    manifest = read_manifest(directory)
    check_files(directory, manifest, contents=verify)
    tokens = _load_array(directory, manifest, TOKENS_NAME, manifest.token_length, "int32")
    vectors = _load_array(directory, manifest, VECTORS_NAME, manifest.dimension, "float32")
    index = make_index(manifest.kind, **settings)
    if manifest.metric != index.metric:
        raise UserError(f"{directory} is damaged (a {manifest.kind} index scores by {index.metric}): {REMEDY}.")
    if index.needs_vectors and vectors is None:
        raise UserError(f"{directory} is damaged (a {manifest.kind} index has vectors): {REMEDY}.")
    index.load(directory / SEARCHER_NAME, vectors)
    if index.count != manifest.count:
        raise UserError(f"{directory} is damaged (it indexes {index.count} of {manifest.count} passages): {REMEDY}.")
    packed = np.memmap(directory / PASSAGES_NAME, np.uint8, mode="r")
    return LoadedIndex(directory, manifest, index, tokens, vectors, packed)


def verify_index(directory: str | Path) -> LoadedIndex:
    """Check an index in all its values, not only in those that a search reads: files, counts, pointers, numbers.

    Raises:
      UserError: names what is wrong.
    """
    loaded = open_index(directory)
    loaded.index.verify()
    if loaded.passages.digest != loaded.manifest.corpus_digest:
        raise UserError(f"{directory} is damaged (its passages are not those that were indexed): {REMEDY}.")
    for start in range(0, len(loaded), _VERIFIED_ROWS):
        rows = slice(start, start + _VERIFIED_ROWS)
        if loaded.tokens is not None and loaded.tokens[rows].min(initial=0) < 0:
            raise UserError(f"{directory} is damaged (it stores negative tokens): {REMEDY}.")
        if loaded.vectors is not None and not np.isfinite(loaded.vectors[rows]).all():
            raise UserError(f"{directory} is damaged (it stores vectors that are no numbers): {REMEDY}.")
    return loaded
