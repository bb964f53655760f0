"""Checkpoints in Orbax's format: ``checkpoints/<step>/`` with the state, the place in the data, and the
seeds.

A checkpoint appears whole or not at all (it is written beside and renamed), and can be restored onto any
mesh. Beside the arrays stand their shapes and fingerprints, so that what a disk gave back changed, cut or not at
all is known as such; the run then goes on from the checkpoint before it. The optimizer state is stored by path, so
that reading a checkpoint needs no optimizer library.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from expertrag_jax import disk
from expertrag_jax.errors import UserError
from expertrag_jax.partitioning import path_name
from expertrag_jax.training import parameters
from expertrag_jax.training.agreement import any_problem
from expertrag_jax.training.integrity import (
    Damaged,
    check_arrays,
    check_plain,
    check_shapes,
    describe,
    load_alone,
    sealed,
    shapes,
    together,
    unsealed,
)
from expertrag_jax.training.retention import Held, Retention
from expertrag_jax.training.state import TrainState

FORMAT = 2  # 1 had no fingerprints

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class Checkpoints:
    """The checkpoints of one model directory; a context manager that waits for the last write at its end.

    Of several processes all call the same methods in the same order, and get the same answers.
    """

    def __init__(self, directory: str | Path, keep: int | Retention = 3, asynchronous: bool = True):
        """Opens ``MODEL_DIR/checkpoints`` and removes what a killed run left half written, with a warning.

        Args:
          directory: is made if it does not exist.
          keep: which ones stay; a number: the newest so many, 0: all.
          asynchronous: the state is copied to host memory at once, and written while training goes on. What goes
            wrong then is raised by the next ``save`` or ``wait``, or at the end.

        Raises:
          UserError: a checkpoint that is there would stop Orbax from listing the others.
        """
        self._keep = keep if isinstance(keep, Retention) else Retention(keep)
        self._asynchronous = asynchronous
        directory = Path(directory).absolute()
        cut_off = _half_written(directory) if jax.process_index() == 0 else []  # opening removes them
        self._held = Held()
        self._saving: Any = None  # what the last asynchronous save answered: it keeps a thread and three files open
        self._told = False  # whether an error of that save was raised
        with _readable(directory):
            self._checkpointer = ocp.training.Checkpointer(
                directory, preservation_policy=self._keep.policy(self._held), cleanup_tmp_directories=True
            )
        for step in cut_off:
            going_on = "starting from the beginning" if self.latest is None else f"going on from step {self.latest}"
            _LOG.warning("the checkpoint at step %d was cut off while it was written: removed, %s", step, going_on)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            with self._explained():
                try:
                    self._finish()
                finally:
                    self._checkpointer.close()
        except Exception as error:
            if kind is None:
                raise
            if not self._told:
                _LOG.error("%s", error)  # beside the error that ended the run, which is the one to be seen

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint, or None; it may be damaged: see ``newest_whole``."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def hold(self, step: int | None) -> None:
        """Keeps the checkpoint of this step, whatever the retention says, until the next call; None holds nothing."""
        self._held.step = step

    def save(
        self, step: int, state: TrainState, metadata: Mapping[str, Any], metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint; a step that is already there is left alone.

        Args:
          metadata: JSON: ``phase``, ``phase_step``, seeds, digests, whatever else a restart wants to know.
          metrics: what was logged at this step, for a retention by metric.

        Raises:
          UserError: the disk is full, now or while the last checkpoint was written; earlier ones are whole.
        """
        if any(checkpoint.step == step for checkpoint in self._checkpointer.checkpoints):
            return
        tree = _to_tree(state)
        described = {"format": FORMAT, "step": step, **metadata, "arrays": describe(tree)}
        measured = self._keep.measured(step, metadata.get("phase", ""), metrics or {})
        save = self._checkpointer.save_async if self._asynchronous else self._checkpointer.save
        with self._explained():
            self._finish()
            answer = save(step, tree, custom_metadata=sealed(described), metrics=measured, force=True)
        self._saving = answer if self._asynchronous else None

    def wait(self) -> None:
        """Returns when what was saved is on disk; UserError: see ``save``."""
        with self._explained():
            self._finish()
            self._checkpointer.wait()

    def _finish(self) -> None:
        """Waits for the last asynchronous save and frees what it holds."""
        saving, self._saving = self._saving, None
        if saving is not None:
            self._told = True  # what goes wrong now; closing would tell it once more
            saving.result()
            self._told = False

    def newest_whole(self, read: Callable[[int], _T]) -> _T:
        """``read(step)`` of the newest checkpoint for which it does not raise ``Damaged``.

        Damaged ones are renamed ``<step>.damaged`` once an older one has been read, and a warning tells why, so
        that the run can save their steps again.

        Raises:
          UserError: all are damaged; nothing was changed.
        """
        damaged: dict[int, Damaged] = {}
        for step in sorted((checkpoint.step for checkpoint in self._checkpointer.checkpoints), reverse=True):
            try:
                found = read(step)
            except Damaged as error:
                damaged[step] = error
                continue
            if damaged:
                self._set_aside(damaged, step)
            return found
        told = "; ".join(f"{step}: {error}" for step, error in damaged.items())
        raise UserError(
            f"No checkpoint in {self._checkpointer.directory} can be read ({told}): move them away to start anew, or "
            "name another MODEL_DIR; nothing was changed."
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON that ``save`` was given; Damaged where it is not what was written."""
        return together(lambda: unsealed(self._checkpointer.metadata(step).custom_metadata))

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """The state of a step, on the mesh that ``abstract_state``'s shardings name.

        Raises:
          UserError: the checkpoint's arrays differ from the model's; it names the first ones and both shapes.
          Damaged: a file is missing, cut or unreadable, or an array is not what was saved.
        """
        wanted = _to_tree(abstract_state)
        arrays, path = self.metadata(step).get("arrays"), f"{self._checkpointer.directory}/{step}"
        stored = together(lambda: shapes(self._checkpointer.metadata(step).metadata)) if arrays is None else None
        check_shapes(stored or {name: tuple(told["shape"]) for name, told in arrays.items()}, shapes(wanted), path)
        tree = together(lambda: load_alone(path, wanted))
        if arrays is not None:
            check_arrays(arrays, tree)
        return _from_tree(tree, abstract_state)

    def _set_aside(self, damaged: Mapping[int, Damaged], whole: int) -> None:
        """Renames damaged checkpoints and tells so; process 0 does it for all."""
        directory = Path(self._checkpointer.directory)
        for step, error in damaged.items() if jax.process_index() == 0 else ():
            name, number = f"{step}.damaged", 1
            while (directory / name).exists():
                number += 1
                name = f"{step}.damaged-{number}"
            (directory / str(step)).rename(directory / name)
            _LOG.warning(
                "the checkpoint at step %d is damaged (%s): going on from step %d; it is now %s, delete it when "
                "nobody wants to look at it", step, error, whole, directory / name,
            )  # fmt: skip
        any_problem(None)  # nobody looks before all are renamed
        self._checkpointer.reload()

    def _explained(self) -> AbstractContextManager[None]:
        directory = Path(self._checkpointer.directory)

        def again() -> str:
            steps = [int(entry.name) for entry in directory.iterdir() if entry.name.isdigit()]
            return f"goes on from step {max(steps)}" if steps else "starts from the beginning"

        return disk.explained(f"a checkpoint could not be written to {directory}; earlier ones are whole", again)


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Turns what would hang or break Orbax while it lists the checkpoints into a UserError."""
    remedy = "move it away, or name another MODEL_DIR; nothing was changed"
    for step in directory.glob("[0-9]*"):
        try:
            check_plain(step)
        except Damaged as error:
            raise UserError(f"The checkpoint {step} is damaged ({error}): {remedy}.") from None
    try:
        yield
    except RecursionError:
        raise UserError(
            f"A checkpoint in {directory} is damaged (its metadata is nested too deeply): {remedy}."
        ) from None


def _half_written(directory: Path) -> list[int]:
    """Steps whose checkpoint has Orbax's name of one that is being written."""
    names = [path.name.partition(".orbax-checkpoint-tmp") for path in directory.glob("*.orbax-checkpoint-tmp*")]
    return sorted(int(step) for step, _, _ in names if step.isdigit())


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
