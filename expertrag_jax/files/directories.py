"""Directories that appear whole or not at all: built beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import locked
from expertrag_jax.files.writable import check_folder
from expertrag_jax.files.writing import check_spares, remove_dead, sync, umask

MANIFEST_NAME = "manifest.json"


def check_replaceable(
    directory: Path, kind: str, format_name: str, overwrite: bool, inputs: Iterable[str | os.PathLike | None] = ()
) -> None:
    """Whether a directory of this kind may be written here; call it before the work.

    Args:
      directory: new, empty, or of the same kind if ``overwrite``.
      kind: for messages: "index".
      format_name: what the ``manifest.json`` of this kind says under "format".
      overwrite: whether one that is there may be replaced.
      inputs: see ``writing.check_spares``.

    Raises:
      UserError: something else is there, or one of this kind and not ``overwrite``, or it cannot be written.
    """
    check_spares(directory, inputs)
    check_folder(directory.parent)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        found = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != format_name:
        raise UserError(f"{directory} exists and is not an {kind}: nothing was overwritten; name another directory.")
    if not overwrite:
        raise UserError(
            f"{directory} already holds an {kind}: nothing was overwritten; name another directory or add --overwrite."
        )


@contextlib.contextmanager
def built_beside(directory: Path) -> Iterator[Path]:
    """A new directory beside ``directory``, gone if the block fails; the next start removes a killed writer's."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(directory)
    built = Path(tempfile.mkdtemp(prefix=f".{directory.name}.writing-", dir=directory.parent))
    try:
        with locked(built):
            os.chmod(built, 0o777 & ~umask())  # mkdtemp's 0700 would hide it from other users
            yield built
    except BaseException:
        shutil.rmtree(built, ignore_errors=True)
        raise


def install(built: Path, directory: Path) -> None:
    """Moves a finished directory to its name; what is there is replaced whole, then removed."""
    if directory.exists() and any(directory.iterdir()):
        if exchange(built, directory):
            shutil.rmtree(built)
        else:
            previous = built.with_name(built.name + ".previous")
            os.rename(directory, previous)
            os.rename(built, directory)
            shutil.rmtree(previous)
    else:
        os.rename(built, directory)
    sync(directory.parent)


def exchange(new: Path, old: Path) -> bool:
    """Swaps two directories in one step (Linux renameat2); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, flag = -100, 2
    return renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), flag) == 0
