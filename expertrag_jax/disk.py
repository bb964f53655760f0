"""Faults of the machine that a user can mend: a full disk, whichever library reports it, and the others."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

from expertrag_jax.errors import UserError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = (
    "No space left on device", "Disk quota exceeded", "File too large", "ENOSPC", "EDQUOT", "EFBIG",
    "database or disk is full",  # SQLite's
)  # fmt: skip
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's
# Faults of files, folders, devices and limits. EBADF, EINVAL and the like are the program's own.
_ENVIRONMENT = {
    getattr(errno, name)
    for name in (
        "EACCES", "EPERM", "ENOENT", "EEXIST", "ENOTDIR", "EISDIR", "ENOTEMPTY", "EROFS", "ELOOP", "ENAMETOOLONG",
        "ESTALE", "EIO", "EMFILE", "ENFILE", "ENODEV", "ENXIO", "EBUSY", "ETXTBSY", "EXDEV", "EMLINK", "ETIMEDOUT",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "ECONNREFUSED", "ENOTCONN", "EREMOTEIO", "EUCLEAN", "ENOMEM",
        "ENOLCK", "EILSEQ",
    )
    if hasattr(errno, name)
}  # fmt: skip
_NUMBER = re.compile(r"\s*\[Errno (\d+)\]")
_CLASSES = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


@contextlib.contextmanager
def explained(what: str, again: Callable[[], str]) -> Iterator[None]:
    """Turns the many errors of a full disk into one sentence.

    Args:
      what: could not be written, and what is whole.
      again: what the same command does when there is room; asked for when it happens.

    Raises:
      UserError: in place of the error of a full disk; any other goes through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not is_full(error):
            raise
        told = f"The disk is full: {what}. Make room and run the same command again, which {again()}."
        raise UserError(told) from error


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is for want of space: on the disk, in a quota, or in one file."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if any(word in str(error) for word in _WORDS) or _SHORT_WRITE.search(str(error)):
            return True
        if isinstance(error, BaseExceptionGroup) and any(is_full(each) for each in error.exceptions):
            return True
        error = error.__cause__ or error.__context__
    return False


def of_environment(error: BaseException) -> bool:
    """Whether the system refused a file, a folder, a device or one more descriptor: no defect of the program."""
    if not isinstance(error, OSError):
        return False
    told = _NUMBER.match(str(error))  # gin raises a copy of the error, without its number
    number = error.errno if told is None else int(told[1])
    return number in _ENVIRONMENT or isinstance(error, _CLASSES)
