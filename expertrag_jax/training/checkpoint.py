"""Checkpoints in Orbax's format: ``checkpoints/<step>/`` with the state, the place in the data, and the
seeds.

A checkpoint appears whole or not at all (it is written beside and renamed), and can be restored onto any
mesh. The optimizer state is stored by path, so that reading a checkpoint needs no optimizer library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from expertrag_jax.errors import UserError
from expertrag_jax.partitioning import path_name
from expertrag_jax.training import parameters
from expertrag_jax.training.state import TrainState

FORMAT = 1


class Checkpoints:
    """The checkpoints of one model directory; a context manager that waits for the last write at its end."""

    def __init__(self, directory: str | Path, keep: int = 3, asynchronous: bool = True):
        """Opens ``MODEL_DIR/checkpoints`` and removes what a killed run left half written.

        Args:
          directory: is made if it does not exist.
          keep: the newest so many stay; 0: all.
          asynchronous: the state is copied to host memory at once, and written while training goes on.
        """
        policies = ocp.training.preservation_policies
        self._asynchronous = asynchronous
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            preservation_policy=policies.LatestN(keep) if keep else None,
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Writes a checkpoint; a step that is already there is left alone.

        Args:
          metadata: JSON: ``phase``, ``phase_step``, seeds, digests, whatever else a restart wants to know.
        """
        if any(checkpoint.step == step for checkpoint in self._checkpointer.checkpoints):
            return
        save = self._checkpointer.save_async if self._asynchronous else self._checkpointer.save
        save(step, _to_tree(state), custom_metadata={"format": FORMAT, "step": step, **metadata}, force=True)

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self._checkpointer.wait()

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON that ``save`` was given."""
        return dict(self._checkpointer.metadata(step).custom_metadata or {})

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, on the mesh that ``abstract_state``'s shardings name.

        Raises:
          UserError: the checkpoint's arrays differ from the model's; it names the first ones and both shapes.
        """
        wanted = _to_tree(abstract_state)
        check_same(
            self._checkpointer.metadata(step).metadata, wanted, f"{self._checkpointer.directory}/{step}"
        )
        return _from_tree(self._checkpointer.load(step, wanted), abstract_state)


def check_same(stored: Any, wanted: Any, where: str) -> None:
    """Compares names and shapes of two trees.

    Raises:
      UserError: names up to three that differ, with both shapes.
    """
    stored, wanted = _shapes(stored), _shapes(wanted)
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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{"a/b/c": shape}; parameters go by their own names."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path).removeprefix("params/"): tuple(leaf.shape) for path, leaf in leaves}


def _to_tree(state: TrainState) -> dict[str, Any]:
    """Plain nested dicts: what is on disk."""
    leaves = jax.tree_util.tree_flatten_with_path(state.optimizer_state)[0]
    moments = {f"optimizer_state/{path_name(path)}": leaf for path, leaf in leaves}
    counters = {"step": state.step, "phase": state.phase, "phase_step": state.phase_step}
    return counters | {"params": state.params} | traverse_util.unflatten_dict(moments, sep="/")


def _from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of ``_to_tree``; ``like`` gives the optimizer state its structure."""
    moments = parameters.flatten(tree.get("optimizer_state", {}))
    optimizer_state = jax.tree_util.tree_map_with_path(
        lambda path, _: moments[path_name(path)], like.optimizer_state
    )
    counters = {name: tree[name] for name in ("step", "phase", "phase_step")}
    return TrainState(**counters, params=tree["params"], optimizer_state=optimizer_state)
