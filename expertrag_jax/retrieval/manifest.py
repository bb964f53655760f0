"""The manifest of an index directory: what was indexed, with what, and the digest of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

import expertrag_jax
from expertrag_jax.errors import UserError
from expertrag_jax.files import sealed
from expertrag_jax.files.directories import MANIFEST_NAME
from expertrag_jax.ranges import Count
from expertrag_jax.retrieval.protocol import REMEDY

FORMAT = "expertrag_jax.index"
FORMAT_VERSION = 1
_LIBRARIES = ("numpy", "jax", "scann", "bm25s", "PyStemmer")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an index directory says about itself. Every digest is SHA-256 in hex.

    Attributes:
      kind: "scann", "exact", "bm25" or "hybrid".
      metric: what a score means: "dot_product", "bm25" or "hybrid".
      settings: the index's own parameters.
      count: number of passages N.
      dimension: width D of the vectors; None without vectors.
      token_length: width S of the stored passage tokens; None without tokens.
      corpus_digest: `Passages.digest` of what was indexed.
      encoder_digest: digest of the passage encoder's parameters; None where nobody gave one.
      vocabulary_digests: digest by use: "reader" (of the stored tokens), "retriever" (of the encoders'
        input).
      versions: library versions that wrote the index.
      files: size in bytes and digest of every other file, by path inside the directory.
      format_version: of this layout.
    """

    kind: str
    metric: str
    settings: dict
    count: Count
    dimension: Count | None
    token_length: Count | None
    corpus_digest: str
    encoder_digest: str | None
    vocabulary_digests: dict[str, str]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    format_version: Count = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """Identifies the index: two directories with this digest hold equal files."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, so equal manifests have equal text."""
        return json.dumps(self.fields(), indent=1, sort_keys=True) + "\n"

    def fields(self) -> dict[str, Any]:
        """What the file holds beside its checksum."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def read_manifest(directory: str | Path) -> Manifest:
    """Read a directory's manifest.

    Raises:
      UserError: the directory or its manifest is missing, damaged, or of another format.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such index directory: build one with `expertrag index`")
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{directory} is not an index: it has no {MANIFEST_NAME}")
    return sealed.manifest(Manifest, path, "index", FORMAT, FORMAT_VERSION, REMEDY)


def file_entry(path: Path) -> dict:
    """{"bytes": size, "sha256": hex} of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_files(directory: str | Path, manifest: Manifest, contents: bool = True) -> None:
    """Check that the files are those that were written: names and sizes, and their digests if `contents`.

    Raises:
      UserError: names the first missing or damaged file.
    """
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        sealed.check_is_file(path, "the index", REMEDY)
        if path.stat().st_size != entry["bytes"] or (contents and file_entry(path) != entry):
            raise UserError(
                f"{path} is damaged (its SHA-256 is not the manifest's): copy or build the index again"
            )


def _refuse(what: str, index: Any, other: Any, remedy: str) -> None:
    raise UserError(f"the index was built with {what} {index} but {what} {other} is in use: {remedy}")


def check_matches(
    manifest: Manifest,
    *,
    vocabulary_digest: str | None = None,
    retriever_vocabulary_digest: str | None = None,
    encoder_digest: str | None = None,
    dimension: int | None = None,
    corpus_digest: str | None = None,
) -> None:
    """Refuse an index that belongs to another model or corpus; arguments left at None are not compared.

    Args:
      manifest: of the index.
      vocabulary_digest: of the reader's vocabulary (the stored tokens').
      retriever_vocabulary_digest: of the dual encoder's vocabulary.
      encoder_digest: of the passage encoder.
      dimension: width of the query vectors.
      corpus_digest: of the corpus that is expected.

    Raises:
      UserError: names both sides of the first mismatch.
    """
    rebuild = "build the index again, or name the one that belongs to the model"
    digests = manifest.vocabulary_digests
    for what, index, other in (
        ("corpus", manifest.corpus_digest, corpus_digest),
        ("reader vocabulary", digests.get("reader"), vocabulary_digest),
        ("retriever vocabulary", digests.get("retriever"), retriever_vocabulary_digest),
        ("passage encoder", manifest.encoder_digest, encoder_digest),
        ("dimension", manifest.dimension, dimension),
    ):
        if other is not None and index != other:
            _refuse(what, index, other, rebuild)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that shape an index, without importing any."""
    versions = {"expertrag_jax": expertrag_jax.__version__}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def parameters_digest(tree: Any) -> str:
    """SHA-256 (hex) of a nested dict of arrays: paths, dtypes, shapes and bytes, in sorted order of paths."""
    state = hashlib.sha256()

    def visit(path: str, node: Any) -> None:
        if isinstance(node, dict):
            for key in sorted(node):
                visit(f"{path}/{key}", node[key])
            return
        array = np.ascontiguousarray(np.asarray(node))
        state.update(f"{path} {array.dtype} {array.shape}\n".encode())
        state.update(array.tobytes())

    visit("", tree)
    return state.hexdigest()
