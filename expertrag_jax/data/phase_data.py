"""One data set for several phases of a system: the phases of an alternating training see the same questions."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Dataset = Callable[[int], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class _From:
    """A data set whose step 0 is another one's ``start``."""

    dataset: Dataset
    start: int
    check: Callable[[], None]

    def __call__(self, step: int = 0) -> Iterator[Any]:
        return self.dataset(self.start + step)


def where_given(questions: Any, datasets: Mapping[str, Dataset]) -> Mapping[str, Dataset]:
    """The data sets, if there are questions; none otherwise: for EVAL_DATASETS where EVAL_QUESTIONS may be None."""
    return {} if questions is None else datasets


class PhaseData(Mapping):
    """``{phase name: dataset}``, for DATASETS and EVAL_DATASETS.

    Args:
      dataset: gives batches from a step on, without end where it is trained on.
      system: has ``phases``, each with ``name`` and ``steps``.
      phases: regular expression of the names that are in it.
      go_on: each phase starts in the data where the one before it ended; otherwise each starts at its beginning, which
        is right for measuring.
    """

    def __init__(self, dataset: Dataset, system: Any, phases: str = ".*", go_on: bool = True):
        self._dataset, self._starts, position = dataset, {}, 0
        self._check = functools.cache(getattr(dataset, "check", lambda: None))  # once, however many phases ask
        for phase in system.phases:
            if re.fullmatch(phases, phase.name):
                self._starts[phase.name] = position
                position += phase.steps if go_on else 0

    def __getitem__(self, name: str) -> Dataset:
        return _From(self._dataset, self._starts[name], self._check)

    def __iter__(self) -> Iterator[str]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)
