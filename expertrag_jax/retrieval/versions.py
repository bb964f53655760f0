"""Versions of an index side by side, one of them current: readers see the old one or the new one, never a half.

``root/<name>/`` are index directories and ``root/current`` is a symbolic link to one of them. A new version is written
whole under its own name (``index.write_index`` is atomic), then the link is replaced in one step (rename(2)). A reader
follows the link once, when it opens the index, and keeps what it has opened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertrag_jax.errors import UserError
from expertrag_jax.files import directories
from expertrag_jax.retrieval.manifest import MANIFEST_NAME

CURRENT = "current"
PUBLISHED = ".published"  # names of the versions that were written here, one a line: nothing else is ever removed


def current(root: str | Path) -> Path:
    """The directory of the current version.

    Raises:
      UserError: there is none.
    """
    link = Path(root) / CURRENT
    if not link.exists():
        raise UserError(f"{root} has no current version of an index: publish one first.")
    return Path(os.path.realpath(link))


def name_of(encoder_digest: str, corpus_digest: str) -> str:
    """The version of these passages, embedded by that encoder; digests as in ``manifest.Manifest``."""
    return f"version-{encoder_digest[:16]}-{corpus_digest[:8]}"


def is_of(name: str, encoder_digest: str) -> bool:
    """Whether a version of that name was embedded by that encoder."""
    return name.startswith(name_of(encoder_digest, ""))


def publish(root: str | Path, name: str, write: Callable[[Path], Any], keep: int = 2) -> Path:
    """Writes a version, unless it is there already, and makes it current.

    Args:
      name: of the version; not ``current``.
      write: writes an index into the directory it is given, whole or not at all.
      keep: so many versions stay, the newest ones and the current one; others that were published here are removed.

    Returns:
      Its directory.
    """
    root = Path(os.path.abspath(root))
    root.mkdir(parents=True, exist_ok=True)
    place = root / name
    if not (place / MANIFEST_NAME).is_file():
        write(place)
        with (root / PUBLISHED).open("a") as names:
            names.write(f"{name}\n")
    point(root, name)
    _remove_old(root, keep)
    return place


def point(root: Path, name: str) -> None:
    """Makes the version ``name`` current, in one step."""
    with tempfile.TemporaryDirectory(prefix=".pointing-", dir=root) as folder:
        link = Path(folder) / CURRENT
        os.symlink(name, link, target_is_directory=True)
        os.replace(link, root / CURRENT)
    directories.sync(root)


def _remove_old(root: Path, keep: int) -> None:
    now = current(root)
    ours = set((root / PUBLISHED).read_text().splitlines()) if (root / PUBLISHED).exists() else set()
    versions = [root / name for name in ours if (root / name / MANIFEST_NAME).is_file()]
    versions.sort(key=lambda entry: (entry == now, entry.stat().st_mtime))
    for old in versions[: max(0, len(versions) - keep)]:
        shutil.rmtree(old)
