"""JSON files that say of themselves whether they are what was written: a checksum, and a strict schema.

A manifest that somebody sends is data: nothing in it is believed before the checksum agrees, every field has its type
and range (``ranges``), and the names of files stay inside of the directory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from expertrag_jax import ranges
from expertrag_jax.errors import UserError

CHECKSUM = "checksum"
_MOST_BYTES = 1 << 28  # of a manifest; one of a thousand files has a megabyte
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


def sealed(fields: Mapping[str, Any]) -> str:
    """The text of a file with these fields and their checksum: JSON with sorted keys."""
    return json.dumps({**fields, CHECKSUM: _checksum(fields)}, indent=1, sort_keys=True) + "\n"


def unsealed(path: Path, remedy: str) -> dict[str, Any]:
    """The fields of a file that ``sealed`` made.

    A file without a checksum, as earlier releases wrote it, is read with a warning.

    Raises:
      UserError: it cannot be read, is no JSON object, or is not what was written; ends in ``remedy``.
    """
    return without_seal(parsed(path, remedy), path, remedy)


def without_seal(fields: Mapping[str, Any], path: Path, remedy: str) -> dict[str, Any]:
    """The fields of a parsed file without their checksum, which must agree; see ``unsealed``."""
    fields = dict(fields)
    checksum = fields.pop(CHECKSUM, None)
    if checksum is None:
        _LOG.warning("%s has no checksum, as files of earlier releases: it cannot be told whether it was changed", path)
    elif checksum != _checksum(fields):
        raise UserError(f"{path} is damaged (it is not what was written): {remedy}.")
    return fields


def parsed(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object in a file; UserError as ``unsealed``."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing or no file: {remedy}.")
        if path.stat().st_size > _MOST_BYTES:
            raise UserError(f"{path} is damaged (it has {path.stat().st_size:,} bytes): {remedy}.")
        fields = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}.") from None
    except RecursionError:
        raise UserError(f"{path} is damaged (it is nested too deeply): {remedy}.") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): {remedy}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged (it is no JSON object): {remedy}.")
    return fields


def build(cls: type[_T], fields: Mapping[str, Any], path: Path, remedy: str) -> _T:
    """A dataclass from a file's fields: exactly its own, each of its type and in its range.

    Raises:
      UserError: names the first field that is wrong; ends in ``remedy``.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = ranges.hints_of(cls)
    needed = [name for name, field in known.items() if _has_no_default(field)]
    problems = [f"the field {name!r} is unknown" for name in fields if name not in known]
    problems += [f"the field {name!r} is missing" for name in needed if name not in fields]
    if problems:
        raise UserError(f"{path} is damaged ({sorted(problems)[0]}): {remedy}.")
    check_fields(fields, {name: hints[name] for name in fields}, path, remedy)
    return cls(**{name: _tuples(value, hints[name]) for name, value in fields.items()})


def manifest(cls: type[_T], path: Path, kind: str, format_name: str, version: int, remedy: str) -> _T:
    """The manifest of a directory.

    Args:
      cls: its dataclass, with the fields ``files`` and ``format_version``.
      path: of the file.
      kind: of directory, for messages: "index".
      format_name: what the file says under "format".
      version: that this release reads.
      remedy: what mends a damaged directory.

    Raises:
      UserError: it is damaged, of another format, or of another version.
    """
    fields = parsed(path, remedy)
    if fields.get("format") != format_name:
        raise UserError(f"{path} is not the manifest of an {kind}: name an {kind} directory.")
    if fields.get("format_version") != version:
        found = ranges.shown(fields.get("format_version"))
        raise UserError(f"{path} has format version {found} but this release reads {version}: {remedy}.")
    fields = without_seal(fields, path, remedy)
    del fields["format"]
    made = build(cls, fields, path, remedy)
    check_file_names(made.files, path, remedy)
    return made


def settings(path: Path, hints: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """The fields of a small settings file: exactly those of ``hints``; one that may be None may be missing.

    Raises:
      UserError: as ``build``.
    """
    fields = parsed(path, remedy)
    for name in fields.keys() - hints.keys():
        raise UserError(f"{path} is damaged (the field {name!r} is unknown): {remedy}.")
    check_fields(fields, hints, path, remedy)
    return fields


def check_fields(fields: Mapping[str, Any], hints: Mapping[str, Any], path: Path, remedy: str) -> None:
    """Raises UserError for the first field that is not of its annotation; a missing one counts as None."""
    for name, hint in hints.items():
        wanted = ranges.problem(fields.get(name), hint)
        if wanted is not None:
            told = f"{name} is {ranges.shown(fields.get(name))}, and must be {wanted}"
            raise UserError(f"{path} is damaged ({told}): {remedy}.")


def array(path: Path, shape: tuple[int, ...], dtype: str, remedy: str) -> np.ndarray:
    """A memory-mapped array of exactly this shape and type, in a file of exactly its bytes.

    Raises:
      UserError: it is anything else; nothing was allocated.
    """
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:120]}): {remedy}.") from None
    if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype != np.dtype(dtype):
        described = f"{getattr(found, 'dtype', type(found).__name__)} {getattr(found, 'shape', '')}"
        raise UserError(f"{path} is damaged (it holds {described}, not {dtype} {shape}): {remedy}.")
    return found


def check_file_names(files: Mapping[str, Mapping[str, Any]], path: Path, remedy: str) -> None:
    """Whether a manifest's files are inside of its directory, each with its bytes and SHA-256; UserError if not."""
    for name, entry in files.items():
        place = PurePosixPath(name)
        inside = name == place.as_posix() and not place.is_absolute() and ".." not in place.parts and "\0" not in name
        if not inside or name in ("", "."):
            raise UserError(f"{path} is damaged (it names the file {ranges.shown(name)}): {remedy}.")
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, Mapping) else (None, None)
        good = isinstance(size, int) and not isinstance(size, bool) and size >= 0 and isinstance(digest, str)
        if not good or set(entry) != {"bytes", "sha256"} or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise UserError(f"{path} is damaged (the entry of {name!r} is no size and SHA-256): {remedy}.")


def check_is_file(path: Path, what: str, remedy: str) -> None:
    """UserError unless this is a plain file: a link may lead out of the directory, a pipe may never end."""
    if path.is_symlink() and not os.path.realpath(path).startswith(os.path.realpath(path.parent) + os.sep):
        raise UserError(f"{path} of {what} is a link to another place: {remedy}.")
    if not path.is_file():
        raise UserError(f"{path} is missing from {what}: {remedy}.")


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _tuples(value: Any, hint: Any) -> Any:
    """JSON has lists alone; a field that is a tuple gets one."""
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value


def _checksum(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as they come back from a file."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(fields)), sort_keys=True).encode()).hexdigest()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number")
