"""An export directory from a trained model, and a service from an export directory."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from expertrag_jax import assembly
from expertrag_jax.assembly import READER_VOCABULARY, RETRIEVER_VOCABULARY
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import local
from expertrag_jax.interop import export_directory, stablehlo
from expertrag_jax.interop.export_directory import MANIFEST_NAME, PARAMETERS, PROGRAMS, ExportManifest
from expertrag_jax.retrieval.manifest import read_manifest as read_index_manifest
from expertrag_jax.service import Service, choose_index
from expertrag_jax.systems.description import describe
from expertrag_jax.trained_model import Model
from expertrag_jax.training import pretrained
from expertrag_jax.vocabulary import Vocabulary


def write_export(
    directory: str | Path,
    model: Model,
    *,
    index_dir: str | Path | None = None,
    platforms: tuple[str, ...] = stablehlo.PLATFORMS,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ExportManifest:
    """Writes a model for serving; `export_directory` lists the files.

    Args:
      directory: new, empty, or (``overwrite``) an earlier export, which is replaced in one step.
      index_dir: the index that the export refers to; it stays where it is. None: whoever serves names one.
      platforms: every program runs on each of them.
      progress: called with the name of each program before it is lowered.

    Raises:
      UserError: the place is taken, or the index belongs to another model.
    """
    export_directory.check_writable(directory, overwrite, inputs=[index_dir])
    dimension = stablehlo.query_dimension(model.system)
    digest = assembly.encoder_digest(model.params)
    index = None if index_dir is None else _refer(directory, index_dir, model, dimension, digest)
    with export_directory.written(directory, overwrite) as (built, fields):
        pretrained.save_parameters(
            built / PARAMETERS, model.params, {"system": describe(model.system), "source": str(model.source)}
        )
        model.reader_vocabulary.save(built / READER_VOCABULARY)
        model.retriever_vocabulary.save(built / RETRIEVER_VOCABULARY)
        (built / PROGRAMS).mkdir()
        programs = {}
        parts = model.system, model.params, model.settings
        for name, exported in stablehlo.lower(*parts, platforms, progress):
            (built / PROGRAMS / f"{name}.jaxexport").write_bytes(exported.serialize())
            programs[name] = stablehlo.interface(exported)
        fields |= {
            "settings": dataclasses.asdict(model.settings),
            "system": describe(model.system),
            "vocabularies": {
                "reader": model.reader_vocabulary.digest,
                "retriever": model.retriever_vocabulary.digest,
            },
            "query_encoder": None if dimension is None else {"dimension": dimension, "digest": digest},
            "index": index,
            "programs": programs,
            "platforms": list(platforms),
        }
    return export_directory.read_manifest(directory)


def _refer(directory, index_dir, model: Model, dimension, digest) -> dict[str, str]:
    """The index reference, after the checks that serving makes."""
    manifest = read_index_manifest(index_dir)
    vocabularies = model.reader_vocabulary.digest, model.retriever_vocabulary.digest
    assembly.check_index(manifest, *vocabularies, digest, dimension)
    return {"path": os.path.relpath(index_dir, directory), "digest": manifest.digest}


def service_from_export(
    directory: str | Path, retrieve: str = "gate", index_dir: str | None = None, verify: bool = True
) -> Service:
    """An export with the index it refers to, or with another edition's.

    Args:
      retrieve: ``gate``, ``always`` or ``never``, which needs no index.
      index_dir: another index of the same encoder and vocabularies; None means the export's own.

    Raises:
      UserError: the export or the index is missing, damaged, changed or of another model.
    """
    programs = stablehlo.ExportedPrograms(directory, verify)
    manifest, settings = programs.manifest, programs.settings
    reader, retriever = (
        Vocabulary.from_file(programs.directory / path) for path in (READER_VOCABULARY, RETRIEVER_VOCABULARY)
    )
    if {"reader": reader.digest, "retriever": retriever.digest} != manifest.vocabularies:
        raise UserError(f"{directory} is damaged (its vocabularies are not those it names): {export_directory.REMEDY}.")
    if settings.fusion != manifest.system["fields"].get("fusion", "per_passage"):
        raise UserError(f"{directory} is damaged (its fusion is not its system's): {export_directory.REMEDY}.")
    reads = any(name.startswith("read_b") for name in manifest.programs)
    own = None if manifest.index is None else local(programs.directory / manifest.index["path"])
    searched = choose_index(retrieve, index_dir or own, reads)
    found = None
    if searched is not None:
        if index_dir is None:
            _check_unchanged(searched, manifest.index["digest"])
        encoder = manifest.query_encoder or {}
        found = assembly.make_retriever(
            searched,
            programs,
            reader_vocabulary=reader.digest,
            retriever_vocabulary=retriever.digest,
            encoder_digest=encoder.get("digest"),
            dimension=encoder.get("dimension"),
            max_batch=settings.buckets[-1],
        )
    policy = assembly.make_policy(retrieve if reads else "never", settings.threshold)
    answerer = assembly.make_answerer(programs, found, policy, settings)
    lowered = {name: entry for name, entry in manifest.files.items() if name.startswith(PROGRAMS)}
    computation = [manifest.system, lowered]
    return Service(answerer, settings, reader, retriever, programs.directory / MANIFEST_NAME, computation)


def _check_unchanged(index_dir: Path, digest: str) -> None:
    if read_index_manifest(index_dir).digest != digest:
        raise UserError(
            f"the index at {index_dir} has changed since the export was written: restore it, or name the one "
            "to use with --index_dir."
        )
