"""The one reader of paths: every path in a flag or a gin value goes through ``local``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from expertrag_jax.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class IsPath:
    """Marks a string in an annotation as a path; see ``LocalPath``."""


LocalPath = Annotated[str | os.PathLike, IsPath()]
"""The annotation of a parameter that is a path: ``ranges.checked`` passes its value through ``local``."""


def local(path: str | os.PathLike) -> Path:
    """The absolute path, with ``~`` expanded and the folders above it resolved; nothing has to be there.

    The last part may be a link. Readers follow it, and writers replace what it points to (``target``).

    Raises:
      UserError: it is empty, has a scheme (``gs://``), cannot be a name on this system, or is a loop of links.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{text!r} is no path: name a file or folder.")
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() != "file":
        raise UserError(
            f"{text} is not on this machine, and {scheme[1]}:// cannot be read or written: copy it here, or mount it "
            "and name the folder."
        )
    expanded = os.path.expanduser(f"/{text[scheme.end() :].lstrip('/')}" if scheme else text)
    if expanded.startswith("~"):
        raise UserError(f"{text} names the home of a user who is not known here: write the whole path.")
    try:
        os.fsencode(expanded).decode("utf-8")
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # the reader or writer reports it
    except ValueError:  # UnicodeError is one
        raise UserError(f"{text!r} cannot be a path: it holds a zero byte or half a character.") from None
    except OSError as error:
        raise UserError(f"{text[:200]} cannot be a path ({error.strerror}): name another one.") from None
    absolute = os.path.abspath(expanded)
    return Path(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))


def target(path: str | os.PathLike) -> Path:
    """``local(path)``, and where that is a link, what it points to: the place to write."""
    return Path(os.path.realpath(local(path)))
