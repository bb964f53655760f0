"""Outputs that are whole or not there: written beside their place, synced, and renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import is_dead, locked
from expertrag_jax.files.paths import target
from expertrag_jax.files.writable import check_folder_of, check_no_device, folders_above

_MARK = ".writing-"
_OF_A_MODEL = ("checkpoints", "vocabulary", "logs", "gate.json", "config.gin")
"""What a MODEL_DIR holds of its own; users keep answers and reports beside it."""


def check_output(path: str | os.PathLike, overwrite: bool, inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """Whether a file may be written; call it before the work.

    Args:
      path: of the output.
      overwrite: whether a file that is there may be replaced.
      inputs: see ``check_spares``.

    Raises:
      UserError: a folder, a device, an input, a file that is there, or a folder that cannot be written.
    """
    place = target(path)
    if place.is_dir():
        raise UserError(f"{path} is a folder: name a file to write.")
    check_no_device(path)
    check_spares(path, inputs)
    if place.exists() and not overwrite:
        raise UserError(f"{path} exists: nothing was overwritten; name another file or add --overwrite.")
    check_folder_of(path)


def check_spares(path: str | os.PathLike, inputs: Iterable[str | os.PathLike | None]) -> None:
    """Whether an output leaves a command's inputs as they are.

    Args:
      path: of a file, or of a folder that is replaced.
      inputs: files and folders; None for those that were not given.

    Raises:
      UserError: it is an input, contains one, lies in an index or export that is read, or belongs to a model that is
        read.
    """
    place = target(path)
    for source in inputs:
        if source is None:
            continue
        read = target(source)
        if place == read or (place.exists() and read.exists() and os.path.samefile(place, read)):
            raise UserError(f"{path} is read by this command and cannot be its output too: name another place.")
        if read.is_relative_to(place):
            raise UserError(f"{source} is read by this command and lies in its output {path}: name another place.")
        inside = place.relative_to(read).parts if place.is_relative_to(read) else ("",)
        if inside[0] in _OF_A_MODEL or (inside[0] and (read / "manifest.json").exists()):
            raise UserError(f"{path} lies in {source}, which this command reads: name another place.")


@contextlib.contextmanager
def whole(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """A file to write; it takes its name when the block ends, and is gone if the block fails.

    Args:
      path: of the output; a link stays, and what it points to is replaced.
      mode: "w" (UTF-8 text) or "wb".
    """
    place = target(path)
    with folders_above(place):
        remove_dead(place)
        number, name = tempfile.mkstemp(prefix=f".{place.name}{_MARK}", dir=place.parent)
        built = Path(name)
        try:
            with open(number, mode, encoding=None if "b" in mode else "utf-8") as file, locked(built):
                os.fchmod(file.fileno(), _mode(place))
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(built, place)
            sync(place.parent)
        except BaseException:
            built.unlink(missing_ok=True)
            raise


def remove_dead(place: Path) -> None:
    """Removes what killed writers of this file or folder left beside it; what a living one writes stays."""
    for left in place.parent.glob(f".{glob.escape(place.name)}{_MARK}*"):
        if is_dead(left):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(place: Path) -> int:
    """The rights of the file that is replaced, or those that the umask leaves."""
    if place.exists():
        return stat.S_IMODE(place.stat().st_mode)
    return 0o666 & ~umask()


def umask() -> int:
    """The rights that this process withholds from new files; the system tells them only when they are set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
