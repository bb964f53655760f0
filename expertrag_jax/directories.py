"""Directories that appear whole or not at all: built beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def built_beside(directory: Path) -> Iterator[Path]:
    """A new directory beside ``directory``, gone if the block fails (a killed writer leaves it)."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    built = Path(tempfile.mkdtemp(prefix=f".{directory.name}.writing-", dir=directory.parent))
    try:
        os.chmod(built, 0o777 & ~_umask())  # mkdtemp's 0700 would hide it from other users
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


def sync(path: Path) -> None:
    """Forces a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
