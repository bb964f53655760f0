"""The demo's folder: of one world, seed and recipe, and of no other files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import parsed
from expertrag_jax.systems.description import describe
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.systems.retriever import DualEncoder
from tasks.almanac.demo_world import WORLD_FILE


def recipe(system: ExpertRAG, retriever: DualEncoder, schedule: Any, lengths: Mapping[str, int]) -> str:
    """A digest of what is trained, and for how long; ``schedule`` is a dataclass, whose functions are left out."""
    parts = [describe(system), describe(retriever), dataclasses.asdict(schedule), dict(lengths)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=lambda function: None).encode()).hexdigest()[:16]


def check_folder(directory: Path, world: str, seed: int, trained: str) -> None:
    """Makes the folder and notes in ``world.json`` what is run in it.

    Args:
      directory: MODEL_DIR of the demo.
      world: as ``world_name`` writes it.
      seed: of training and measuring.
      trained: digest of what is trained, from ``recipe``.

    Raises:
      UserError: it holds a run on another world, with another seed or of another recipe, or files that are of no such
        run; before anything is written.
    """
    path, this = directory / WORLD_FILE, {"world": world, "seed": seed, "trained": trained}
    if not path.exists():
        if directory.exists() and any(directory.iterdir()):
            raise UserError(f"{directory} holds files of no demo: name an empty MODEL_DIR; nothing was changed.")
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(this) + "\n")
    elif (found := parsed(path, "name another MODEL_DIR; nothing was changed")) != this:
        other = [name for name in this if found.get(name) != this[name]]
        names = {"world": "on another world", "seed": "with another seed", "trained": "of other models or steps"}
        raise UserError(
            f"{directory} holds a run {names[other[0]] if other else 'of another release'}: name another MODEL_DIR; "
            "nothing was changed."
        )
