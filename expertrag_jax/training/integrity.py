"""What a disk gave back, compared with what was written: shapes, fingerprints, and the metadata's checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from expertrag_jax.errors import UserError
from expertrag_jax.partitioning import path_name
from expertrag_jax.training.agreement import any_problem
from expertrag_jax.training.fingerprints import fingerprints, first_difference

_T = TypeVar("_T")


class Damaged(Exception):
    """A checkpoint that is not what was written; says what is wrong, in every process."""


def check_plain(directory: Path) -> None:
    """Damaged if a checkpoint holds a pipe or a device, for reading it may never end."""
    for path in directory.rglob("*"):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Damaged(f"{path.relative_to(directory)} is neither a file nor a folder")


def check_same(stored: Any, wanted: Any, where: str) -> None:
    """Compares names and shapes of two trees; UserError: see ``check_shapes``."""
    check_shapes(shapes(stored), shapes(wanted), where)


def check_shapes(stored: Mapping[str, tuple], wanted: Mapping[str, tuple], where: str) -> None:
    """Compares ``{name: shape}`` of two trees.

    Raises:
      UserError: names up to three that differ, with both shapes.
    """
    names = [n for n in dict.fromkeys([*wanted, *stored]) if stored.get(n) != wanted.get(n)]
    names.sort(key=lambda name: name.startswith("optimizer_state/"))  # parameters say more
    if not names:
        return
    told = "; ".join(
        f"{name} is {stored.get(name, 'absent')} in the checkpoint and {wanted.get(name, 'absent')} in the "
        "model"
        for name in names[:3]
    )
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(
        f"Checkpoint {where} is of another shape: {told}{more}; use the configuration it was trained with, "
        "or another MODEL_DIR."
    )


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"a/b/c": shape}; parameters go by their own names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path).removeprefix("params/"): tuple(leaf.shape) for path, leaf in leaves}


def together(read: Callable[[], _T]) -> _T:
    """``read()``; Damaged in every process where it failed in one, whatever the error was."""
    result, problem = None, None
    try:
        result = read()
    except (UserError, PermissionError, MemoryError):
        raise
    except Exception as error:
        problem = " ".join(str(error).partition(" [tensorstore_spec")[0].split())[:300] or type(error).__name__
    problem = any_problem(problem)
    if problem is not None:
        raise Damaged(problem)
    return result


def load_alone(path: str | Path, wanted: Any, partial: bool = False) -> Any:
    """This process's shards of a tree, or of a part of it. No barrier is inside: a process that fails to read would
    leave the others at it."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    context.pytree.loading.partial_load = partial
    with context:
        return ocp.load(path, wanted)


def describe(tree: Any) -> dict[str, dict[str, Any]]:
    """``{name: {"shape", "fingerprint"}}``, JSON; names as in ``check_shapes``."""
    sizes = shapes(tree)
    return {name: {"shape": list(sizes[name]), "fingerprint": number} for name, number in _fingerprints(tree).items()}


def check_arrays(described: Mapping[str, Mapping[str, Any]], tree: Any) -> None:
    """Damaged where an array is not one of those that ``describe`` described."""
    name = first_difference({name: told["fingerprint"] for name, told in described.items()}, _fingerprints(tree))
    if name is not None:
        raise Damaged(f"{name} is not what was saved")


def sealed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """With a checksum."""
    return {**metadata, "checksum": _checksum(metadata)}


def unsealed(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """What ``sealed`` was given; Damaged where it is not. Format 1 had no checksum."""
    stored = dict(stored or {})
    if "format" not in stored:
        raise Damaged("its metadata is missing or cut")
    checksum = stored.pop("checksum", None)
    if stored["format"] > 1 and checksum != _checksum(stored):
        raise Damaged("its metadata was changed")
    return stored


def _fingerprints(tree: Any) -> dict[str, int]:
    return {name.removeprefix("params/"): number for name, number in fingerprints(tree).items()}


def _checksum(metadata: Mapping[str, Any]) -> int:
    """CRC-32 of the JSON, as it comes back from a file."""
    return zlib.crc32(json.dumps(json.loads(json.dumps(metadata)), sort_keys=True).encode())
