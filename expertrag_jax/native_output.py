"""What C++ libraries print past Python's streams, on the process's standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Keeps what is printed on file descriptor 2 inside the block off the terminal; shows it if the block raises.

    Python's own messages on standard error, of any thread, are held back too: keep the block to one library call.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept:
        terminal = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(terminal, kept.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
