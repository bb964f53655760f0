"""A window of a run under JAX's profiler, for XProf."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from expertrag_jax.errors import UserError

DIRECTORY = "profile"  # in MODEL_DIR/logs
_LOG = logging.getLogger(__name__)


class Profile:
    """Traces the steps of a window into ``logs/profile``; look at it with ``xprof --logdir MODEL_DIR/logs/profile``.

    Process 0 traces its own host and devices. A run that ends before the window, or starts behind it, leaves no trace
    and a warning. A context manager, which ends a trace that the run's end cut short.
    """

    def __init__(self, logs: str | Path, steps: str | None):
        """``steps``: see ``window``; None: nothing is traced."""
        self._directory = Path(logs) / DIRECTORY
        self._steps = range(0) if steps is None or jax.process_index() else window(steps)
        self._tracing = self._traced = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        if self._steps and not self._traced:
            _LOG.warning(
                "profile_steps=%d:%d: the run took none of these steps", self._steps.start, self._steps.stop
            )

    def of(self, train_step: Callable[..., Any], steps_before: int) -> Callable[..., Any]:
        """``train_step``, which will be called for the steps behind ``steps_before``, with the window's ones traced."""
        numbers = itertools.count(steps_before + 1)

        def step(*arguments: Any) -> Any:
            number = next(numbers)
            if number not in self._steps:
                return train_step(*arguments)
            self._start()
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                results = train_step(*arguments)
            if number == self._steps[-1]:
                jax.block_until_ready(results)
                self._stop()
            return results

        return step

    def _start(self) -> None:
        if not self._traced:
            self._directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._directory))
            self._tracing = self._traced = True

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            _LOG.info("profile: %s", self._directory)


def window(text: str) -> range:
    """``"100:105"`` -> the five steps 100 to 104, counted from 1 as in the log.

    Raises:
      UserError: it is not of this form, or holds no step.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text.strip())
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    if not steps:
        raise UserError(f"profile_steps={text}: give the first step and the one behind the last, as in 100:105.")
    return steps
