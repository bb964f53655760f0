"""An alarm for collapsed experts: most of a layer's tokens go to a few experts, and the rest learn nothing."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

ADVICE = (
    "raise AUX_LOSS_FACTOR (or set TransformerConfig.loss_free_balancing), add JITTER_NOISE (0.01), lower the learning "
    "rate or warm up for longer"
)


class CollapseAlarm:
    """Watches a run's records for layers where fewer than half of the experts take ``share`` of the tokens.

    The load is averaged over the records of the last ``window`` steps, so that a batch of one kind is no alarm; nothing
    is said before as many have passed. A layer is named once when it collapses, and again when it has recovered and
    does so once more.
    """

    def __init__(self, window: int = 200, share: float = 0.95):
        """window: steps. share: of a layer's tokens, in (0, 1)."""
        self._window, self._share = window, share
        self._loads: collections.deque = collections.deque()  # (step, [layers, E])
        self._collapsed: set[int] = set()
        self._first: int | None = None  # step of the first record

    def observe(self, record: Mapping[str, Any]) -> list[str]:
        """Takes a record of the log (``step``, ``router/load`` [layers][E]) and gives its warnings, mostly none."""
        if "router/load" not in record:
            return []
        load, step = np.asarray(record["router/load"], np.float64), record["step"]
        if self._loads and self._loads[-1][1].shape != load.shape:  # another phase, another model
            self._loads.clear()
            self._collapsed.clear()
            self._first = step
        self._first = step if self._first is None else self._first
        self._loads.append((step, load))
        while self._loads[0][0] <= step - self._window:
            self._loads.popleft()
        if step - self._first < self._window:
            return []
        mean = np.mean([load for _, load in self._loads], axis=0)
        busy = experts_taking(mean, self._share)
        low = {layer for layer, count in enumerate(busy.tolist()) if 2 * count < mean.shape[1]}
        new, self._collapsed = sorted(low - self._collapsed), low
        return [
            f"Experts collapse at step {step}: in sparse layer {layer + 1}, {busy[layer]} of {mean.shape[1]} take "
            f"{self._share:.0%} of the tokens of the last {self._window} steps; {ADVICE}."
            for layer in new
        ]


def experts_taking(load: np.ndarray, share: float) -> np.ndarray:
    """The least number of experts per layer that take ``share`` of its tokens: load [layers, E] -> [layers]."""
    fractions = load / np.maximum(load.sum(-1, keepdims=True), 1e-12)
    taken = np.cumsum(-np.sort(-fractions, axis=-1), axis=-1)
    return (taken < share - 1e-9).sum(-1) + 1
