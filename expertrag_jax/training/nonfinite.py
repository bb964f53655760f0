"""The watch over the loss: one step behind the device, so that it never waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.partitioning import path_name


class NonFiniteLoss(UserError):
    """A loss or gradient was NaN or infinite; the step's batch is on disk.

    Attributes:
      step: the step that failed; the state before it is untouched.
      directory: ``logs/nonfinite_step_<step>``, with ``batch.npz`` and ``message.txt``.
    """

    def __init__(self, message: str, step: int, directory: Path):
        super().__init__(message)
        self.step = step
        self.directory = directory


class Watch:
    """Keeps the metrics of dispatched steps until they are logged, and the batches until they are known
    good."""

    def __init__(self, logs: str | Path):
        self._logs = Path(logs)
        self._metrics: list[Mapping[str, Any]] = []
        self._unchecked: list[tuple[int, Mapping[str, Any], Any]] = []

    def add(self, step: int, metrics: Mapping[str, Any], batch: Any) -> None:
        """Takes a step that was just dispatched, and checks the one before it.

        Raises:
          NonFiniteLoss: of the step before.
        """
        self._unchecked.append((step, metrics, batch))
        self._metrics.append(metrics)
        while len(self._unchecked) > 1:
            self._check()

    def busy(self) -> bool:
        """Whether the device still works on the last step that was added."""
        return bool(self._unchecked) and not self._unchecked[-1][1]["finite"][0].is_ready()

    def settle(self) -> None:
        """Waits for the last step and checks it; before anything is saved. Raises NonFiniteLoss."""
        while self._unchecked:
            self._check()

    def take(self) -> list[Mapping[str, Any]]:
        """The metrics of all steps since the last call, on the host, in one transfer."""
        self.settle()
        metrics, self._metrics = jax.device_get(self._metrics), []
        return metrics

    def pending(self) -> list[Mapping[str, Any]]:
        """What ``take`` would return, left in place."""
        self.settle()
        return jax.device_get(self._metrics)

    def _check(self) -> None:
        step, metrics, batch = self._unchecked.pop(0)
        if float(metrics["finite"][0]) == 1.0:
            return
        directory = self._logs / f"nonfinite_step_{step}"
        values = {name: total / count for name, (total, count) in jax.device_get(dict(metrics)).items()}
        told = ", ".join(
            f"{name} {float(value):.6g}" for name, value in values.items() if np.ndim(value) == 0
        )
        message = (
            f"The loss or its gradient is not finite at step {step} ({told}): the batch is saved in "
            f"{directory}, the last checkpoint is good; lower the learning rate or clip gradients, and "
            "start again to resume."
        )
        _save(directory, batch, message)
        raise NonFiniteLoss(message, step, directory)


def _save(directory: Path, batch: Any, message: str) -> None:
    """Writes this process's rows; process 0 writes ``batch.npz``, process i ``batch_<i>.npz``."""
    directory.mkdir(parents=True, exist_ok=True)
    suffix = f"_{jax.process_index()}" if jax.process_index() else ""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    np.savez(directory / f"batch{suffix}.npz", **{path_name(path): np.asarray(leaf) for path, leaf in leaves})
    (directory / "message.txt").write_text(message + "\n")
