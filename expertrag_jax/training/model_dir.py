"""A model directory: ``checkpoints/<step>/``, ``config.gin``, ``vocabulary/``, ``logs/``; nothing else is
touched."""

from __future__ import annotations

from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import LOCK
from expertrag_jax.files.paths import target

CHECKPOINTS = "checkpoints"
LOGS = "logs"
_KNOWN = ("config*.gin", "vocabulary*", LOGS, CHECKPOINTS, LOCK)


def open_model_dir(path: str | Path) -> Path:
    """The directory, made if it does not exist, resumed if it is a model directory.

    A model directory has ``checkpoints/``, or holds only what a run writes before its first checkpoint.

    Raises:
      UserError: it is a file, cannot be made, or holds something else, which is left as it is.
    """
    path = target(path)
    if path.exists() and not path.is_dir():
        raise UserError(
            f"MODEL_DIR {path} is a file: name a directory that is new, empty or a model directory."
        )
    strange = _strange_entries(path)
    if strange:
        raise UserError(
            f"MODEL_DIR {path} is not empty and is no model directory (it holds {', '.join(strange[:3])}): "
            "name a new directory; nothing was changed."
        )
    try:
        (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (path / LOGS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"MODEL_DIR {path} cannot be written: {error.strerror}; name another one.") from error
    return path


def _strange_entries(path: Path) -> list[str]:
    """Names that no run writes, unless the directory has checkpoints."""
    if not path.exists() or (path / CHECKPOINTS).is_dir():
        return []
    return sorted(e.name for e in path.iterdir() if not any(e.match(pattern) for pattern in _KNOWN))
