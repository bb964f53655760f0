"""Which world a demo runs on: what the demo notes in its folder, and what others read there."""

from __future__ import annotations

from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import parsed

WORLD_FILE = "world.json"  # says what is run in the folder


def world_name(digest: str, version: str) -> str:
    """Returns the name of a world in ``world.json``; ``read_world_name`` takes it apart again.

    Args:
      digest: of the world's configuration.
      version: of the program that generates it.
    """
    return f"{digest} {version}"


def read_world_name(directory: Path) -> tuple[str, str]:
    """Returns digest and version of the world that the demo in ``directory`` runs on.

    Args:
      directory: MODEL_DIR of a demo, which its ``check_folder`` has made.

    Raises:
      UserError: the folder has no ``world.json``, or one that this release does not write.
    """
    path = directory / WORLD_FILE
    if not path.is_file():
        raise UserError(f"{directory} holds no demo: name the MODEL_DIR of an `expertrag demo`.")
    remedy = "run `expertrag demo` into a new folder"
    name = parsed(path, remedy).get("world")
    if not isinstance(name, str) or len(name.split()) != 2:
        raise UserError(f"{path} was not written by this release: {remedy}.")
    digest, version = name.split()
    return digest, version
