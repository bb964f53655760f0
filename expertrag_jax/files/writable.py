"""The folders above an output: whether they can be written, asked before the work, and their making."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import local, target


def check_folder(folder: str | os.PathLike) -> None:
    """Raises UserError if a folder cannot be made, or if nothing can be written into it."""
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{folder} cannot be made: {place} is no folder; name another place.")
    try:
        with tempfile.TemporaryFile(dir=place):  # rights alone do not tell: file systems may be read-only, or no disks
            pass
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}): mend that, or name another place.") from None


def check_folder_of(path: str | os.PathLike) -> None:
    """Calls ``check_folder`` for an output's folder; if the output is a link, the error names it too."""
    try:
        check_folder(target(path).parent)
    except UserError as error:
        if not local(path).is_symlink():
            raise
        raise UserError(f"{path} is a link: {error}") from None


def check_no_device(path: str | os.PathLike) -> None:
    """UserError if an output is there and is neither a file nor a folder; links are followed."""
    found = local(path)  # not where its links lead: a pipe behind one has no path
    if found.exists() and not found.is_file() and not found.is_dir():
        raise UserError(f"{path} is a device or a pipe, which no output replaces: name a file to write.")


@contextlib.contextmanager
def folders_above(place: Path) -> Iterator[None]:
    """Makes the folders above a file or folder. Those that are empty when the block ends are removed again."""
    made = [folder for folder in place.parents if not folder.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for folder in made:  # the deepest one first
                folder.rmdir()
