"""Opens what a user names to be read: a file, or a pipe that another program writes."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from expertrag_jax.errors import UserError

WAIT = 10  # seconds for a program that opens a named pipe's other end


def opened(path: str | os.PathLike) -> BinaryIO:
    """A file, a pipe or a terminal, open for reading.

    Raises:
      UserError: it is missing, a folder, a device, or a pipe that no program writes to, or it cannot be read.
    """
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            return os.fdopen(_pipe(path), "rb")
        file = open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or name another file") from None
    if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
        file.close()
        raise UserError(f"{path} is a device: name a file")
    return file


def contents(path: str | os.PathLike) -> bytes:
    """All bytes of a file, a pipe or a terminal; UserError as ``opened``."""
    with opened(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): mend that, or name another file") from None


def _pipe(path: str | os.PathLike) -> int:
    """The descriptor of a pipe; opening a named one waits until another program writes to it."""
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(os.open, path, os.O_RDONLY)
        try:
            return opening.result(WAIT)
        except (TimeoutError, KeyboardInterrupt) as error:
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # ends the thread's wait
            os.close(opening.result())
            if isinstance(error, KeyboardInterrupt):
                raise
            raise UserError(f"{path} is a pipe to which nobody writes: start its writer, or name a file") from None
