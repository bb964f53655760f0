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
from expertrag_jax.files.writable import check_folder, folders_above

_MARK = ".writing-"


def check_output(path: str | os.PathLike, overwrite: bool, inputs: Iterable[str | os.PathLike | None] = ()) -> None:
    """Whether a file may be written; call it before the work.

    Args:
      path: of the output.
      overwrite: whether a file that is there may be replaced.
      inputs: files that are read, and stay as they are.

    Raises:
      UserError: a folder, a device, an input, a file that is there, or a folder that cannot be written.
    """
    place = target(path)
    if place.is_dir():
        raise UserError(f"{path} is a folder: name a file to write.")
    if place.exists() and not place.is_file():
        raise UserError(f"{path} is a device or a pipe, which no output replaces: name a file to write.")
    for source in inputs:
        if source is not None and place.exists() and os.path.exists(source) and os.path.samefile(place, source):
            raise UserError(f"{path} is read by this command and cannot be its output too: name another file.")
    if place.exists() and not overwrite:
        raise UserError(f"{path} exists: nothing was overwritten; name another file or add --overwrite.")
    check_folder(place.parent)


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
