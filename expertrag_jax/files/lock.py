"""One writer at a time: a lock that ends with its process, and says who holds it.

The lock is ``flock`` on a file, which the system releases when the process ends, however it ends. A network file system
must pass ``flock`` on for the lock to hold (NFS 4, Lustre with ``-o flock``). If locks are not supported, a warning
says so and the command continues.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import inspect
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import target
from expertrag_jax.files.writable import check_folder, check_folder_of, check_no_device, folders_above

LOCK = ".lock"
_T = TypeVar("_T", bound=Callable[..., Any])
_LOG = logging.getLogger(__name__)
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(path: str | os.PathLike, what: str, inside: bool = False) -> Iterator[None]:
    """Holds the lock of an output while the block runs.

    Args:
      path: a file or folder, whose lock is the file ``.NAME.lock`` beside it.
      what: describes the output in the message that a second writer gets: ``"MODEL_DIR runs/qa"``.
      inside: the lock is the file ``LOCK`` in the folder, for one that is written in place.

    Raises:
      UserError: another process holds it; names the process.
    """
    check_no_device(path)
    if inside:
        check_folder(target(path))
    else:
        check_folder_of(path)
    path = target(path)
    place = path / LOCK if inside else path.with_name(f".{path.name}.lock")
    with folders_above(place):
        descriptor = _acquire(place, what)
        try:
            yield
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.unlink(place)  # before the release: a process that has opened it tries again (`_acquire`)
                os.close(descriptor)


def one_writer(place: Callable[[Mapping[str, Any]], str | os.PathLike], what: str) -> Callable[[_T], _T]:
    """Decorates a command that writes one output: it holds the output's lock while it runs.

    Args:
      place: from the command's arguments by name to the output.
      what: it is, for the message.
    """

    def decorate(function: _T) -> _T:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            path = place(bound.arguments)
            with only_writer(path, f"{what} {path}"):
                return function(*args, **kwargs)

        return run

    return decorate


def is_dead(path: Path) -> bool:
    """Whether no process holds the lock on a file or folder (``locked``); a new one may not be locked yet."""
    try:
        if time.time() - os.stat(path).st_mtime < 1:
            return False
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a file or folder of this process's own, so that others see that its writer lives (``is_dead``)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # without locks, no other process can lock it either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _acquire(place: Path, what: str) -> int | None:
    """A descriptor that holds the lock; None where locks are not supported."""
    while True:
        try:
            descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(f"{place} is a link, which no lock is: remove it.") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                _LOG.warning("%s is on a file system without locks: nothing keeps a second writer out", what)
                return None
            if error.errno not in _HELD_ELSEWHERE:
                raise
            raise UserError(
                f"{what} is being written by {holder}: wait for it, end it, or name another place; nothing was changed."
            ) from None
        if _is_same(descriptor, place):  # not one that its holder has just removed
            with contextlib.suppress(OSError):  # of a full disk: the lock holds without its holder's name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_self()).encode())
            return descriptor
        os.close(descriptor)


def _is_same(descriptor: int, place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(place))
    except FileNotFoundError:
        return False


def _self() -> dict[str, str | int]:
    command, since = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]), time.strftime("%H:%M:%S")
    return {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {told['process']} on {told['host']} ({told['command']}, since {told['since']})"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"
