"""Whether an error means that a disk is full, whichever library reports it."""

from __future__ import annotations

import errno

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = ("No space left on device", "Disk quota exceeded", "File too large", "ENOSPC", "EDQUOT", "EFBIG")


def is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is for want of space: on the disk, in a quota, or in one file."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if any(word in str(error) for word in _WORDS):
            return True
        if isinstance(error, BaseExceptionGroup) and any(is_full(each) for each in error.exceptions):
            return True
        error = error.__cause__ or error.__context__
    return False
