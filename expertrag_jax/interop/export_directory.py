"""The files of an export: its manifest, written whole or not at all, and checked when read.

::

    manifest.json            format, settings, system, programs, digests (see `ExportManifest`)
    parameters/              Orbax directory, also a place to start training from
    programs/NAME.jaxexport  serialised `jax.export` programs, parameters are their first argument
    vocabulary/reader.model, vocabulary/retriever.model
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import expertrag_jax
from expertrag_jax.errors import UserError
from expertrag_jax.files import directories, sealed
from expertrag_jax.files.directories import MANIFEST_NAME
from expertrag_jax.files.lock import only_writer
from expertrag_jax.files.paths import target
from expertrag_jax.ranges import Count
from expertrag_jax.retrieval.manifest import file_entry

PARAMETERS, PROGRAMS = "parameters", "programs"
_FOLDERS = (PARAMETERS, PROGRAMS, "vocabulary")
FORMAT, FORMAT_VERSION = "expertrag_jax.export", 1
REMEDY = "copy the whole directory again, or export again"
_LIBRARIES = ("jax", "jaxlib", "flax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class ExportManifest:
    """What an export says about itself; digests are SHA-256 in hex.

    Attributes:
      settings: ``assembly.AnswerSettings`` as JSON. system: ``systems.description.describe`` of it.
      vocabularies: {"reader": digest, "retriever": digest}.
      query_encoder: {"dimension": D, "digest": of its parameters}, or None.
      index: {"path": relative to the export, "digest": of its manifest}, or None.
      programs: name -> {"arguments", "results"}: shapes and dtypes behind the parameters, for other runtimes.
      platforms: what the programs were lowered for. versions: libraries that wrote the export.
      files: size in bytes and digest of every other file, by path inside the export.
    """

    settings: dict[str, Any]
    system: dict[str, Any]
    vocabularies: dict[str, str]
    query_encoder: dict[str, Any] | None
    index: dict[str, str] | None
    programs: dict[str, dict[str, Any]]
    platforms: list[str]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    format_version: Count = FORMAT_VERSION


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide whether a program can be read."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"expertrag_jax": expertrag_jax.__version__, **found}


def check_writable(
    directory: str | Path, overwrite: bool = False, inputs: Iterable[str | os.PathLike | None] = ()
) -> None:
    """Refuses a place where `written` would refuse to write.

    Raises:
      UserError: an export is there and ``overwrite`` is False, or something else is there, or one of the ``inputs`` of
        the command would be replaced.
    """
    directories.check_replaceable(target(directory), "export", FORMAT, overwrite, inputs)


@contextlib.contextmanager
def written(directory: str | Path, overwrite: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Gives a directory to fill and a dict for the manifest's other fields; at the end it gets its name.

    Raises:
      UserError: see `check_writable`.
    """
    directory = target(directory)
    check_writable(directory, overwrite)
    with only_writer(directory, f"the export {directory}"), directories.built_beside(directory) as built:
        fields: dict[str, Any] = {}
        yield built, fields
        files = sorted(path for path in built.rglob("*") if path.is_file())
        entries = {path.relative_to(built).as_posix(): file_entry(path) for path in files}
        manifest = ExportManifest(versions=library_versions(), files=entries, **fields)
        text = sealed.sealed({"format": FORMAT, **dataclasses.asdict(manifest)})
        (built / MANIFEST_NAME).write_text(text, encoding="utf-8")
        for path in [*built.rglob("*"), built]:
            directories.sync(path)
        check_writable(directory, overwrite)
        directories.install(built, directory)


def read_manifest(directory: str | Path) -> ExportManifest:
    """Reads an export's manifest.

    Raises:
      UserError: the directory or its manifest is missing, damaged, or of another format.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such export directory: write one with `expertrag export`.")
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{directory} is not an export: it has no {MANIFEST_NAME}.")
    found = sealed.manifest(ExportManifest, path, "export", FORMAT, FORMAT_VERSION, REMEDY)
    for name, keys in (("index", {"path", "digest"}), ("vocabularies", {"reader", "retriever"})):
        value = getattr(found, name)
        if value is not None and value.keys() != keys:
            raise UserError(f"{path} is damaged (its {name} has no {' and '.join(sorted(keys))}): {REMEDY}.")
    if not isinstance(found.system.get("class"), str) or not isinstance(found.system.get("fields"), dict):
        raise UserError(f"{path} is damaged (it describes no system): {REMEDY}.")
    for name in found.programs:
        if not re.fullmatch(r"[a-z_]+_b[0-9]+", name):
            raise UserError(f"{path} is damaged (no program is called {name!r}): {REMEDY}.")
    return found


def check_files(directory: str | Path, manifest: ExportManifest) -> None:
    """UserError for the first file that is missing, is not the one that was written, or is not in the manifest."""
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name.split("/")[0] in _FOLDERS and name not in manifest.files:
            raise UserError(f"{path} is not in the export's manifest: {REMEDY}.")
    for name, entry in manifest.files.items():
        path = Path(directory) / name
        sealed.check_is_file(path, "the export", REMEDY)
        if file_entry(path) != entry:
            raise UserError(
                f"{path} is damaged (its SHA-256 is not the manifest's): copy it again, or export again."
            )
