"""Several pipelines in one training run, one homogeneous batch after the other.

A batch is of one kind (closed book, open book, retriever ...), because kinds differ in shapes and modes;
kinds alternate in a fixed period, so the position in every pipeline follows from the step number.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Natural, checked

Batches = Callable[[int], Iterator[Batch]]


def check_all(pipelines: Sequence[Batches]) -> None:
    """Lets each of them that can ``check`` what it will serve do so, two at a time, since one leaves processors idle;
    raises what the first bad one raises."""
    with concurrent.futures.ThreadPoolExecutor(2, "check") as threads:
        checks = [threads.submit(getattr(pipeline, "check", lambda: None)) for pipeline in pipelines]
        try:
            for check in checks:
                check.result()
        finally:
            threads.shutdown(cancel_futures=True)  # after a bad one no other is begun


def example_batches_of(pipelines: Sequence[Batches]) -> list[Batch]:
    """One batch of each shape that they serve; none of those that do not tell."""
    return [batch for pipeline in pipelines for batch in getattr(pipeline, "example_batches", lambda: [])()]


def schedule(weights: Sequence[int]) -> np.ndarray:
    """Which pipeline serves each step of a period, spread evenly.

    The n-th batch of a pipeline with weight w has its due time at (n + 1/2) / w of the period; batches stand
    in the order of due times, ties in the order of the pipelines.

    Args:
      weights: batches of each pipeline in a period, whole numbers.

    Returns:
      [sum of weights] int64, indices of pipelines.
    """
    due = [((n + 0.5) / w, index) for index, w in enumerate(weights) for n in range(w)]
    return np.array([index for _, index in sorted(due)], np.int64)


@checked
@dataclasses.dataclass(eq=False)
class Interleave:
    """``interleave(start_step)`` yields the batches of several pipelines in turn.

    Attributes:
      pipelines: callables from a start step to an iterator of batches.
      weights: how many batches of each there are in a period; whole numbers, 0 leaves a pipeline out.

    Raises:
      UserError: no pipeline, or weights that are no whole numbers from 0, or all 0.
    """

    pipelines: Sequence[Batches]
    weights: Sequence[Natural]

    def __post_init__(self):
        if len(self.pipelines) != len(self.weights) or not any(self.weights):
            raise UserError(
                f"interleaving {len(self.pipelines)} pipelines with weights {list(self.weights)}: give each "
                "pipeline a whole number of batches per period, and at least one of them more than 0"
            )
        self.pipelines = [pipeline for pipeline, w in zip(self.pipelines, self.weights) if w]
        self.weights = [int(w) for w in self.weights if w]
        self.period = schedule(self.weights)

    def __call__(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from ``start_step`` on; ends when the pipeline whose turn it is ends."""
        full, rest = divmod(start_step, len(self.period))
        done = [full * w + int((self.period[:rest] == i).sum()) for i, w in enumerate(self.weights)]
        iterators = [pipeline(step) for pipeline, step in zip(self.pipelines, done)]
        step = start_step
        while True:
            batch = next(iterators[self.period[step % len(self.period)]], None)
            if batch is None:
                return
            yield batch
            step += 1

    def check(self) -> None:
        """See ``check_all``."""
        check_all(self.pipelines)

    def example_batches(self, start_step: int = 0) -> list[Batch]:
        """One batch of each shape."""
        return example_batches_of(self.pipelines)


def interleave(weighted: Sequence[tuple[Batches, int]]) -> Interleave:
    """Alternates pipelines: ``interleave([(closed_book, 1), (open_book, 3)])``."""
    pipelines, weights = zip(*weighted) if weighted else ((), ())
    return Interleave(pipelines, weights)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """``weighted(start_step)`` yields a pipeline's batches, their target tokens counted ``weight`` times in the loss.

    A mean over one batch's tokens does not feel it; a loss that is divided by a constant does (T5X's
    LOSS_NORMALIZING_FACTOR), and there small batches of one kind can balance large ones of another.
    """

    pipeline: Batches
    weight: float

    def __call__(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from ``start_step`` on."""
        return map(self._weigh, self.pipeline(start_step))

    def check(self) -> None:
        """See ``check_all``."""
        check_all([self.pipeline])

    def example_batches(self, start_step: int = 0) -> list[Batch]:
        """One batch of each shape."""
        return [self._weigh(batch) for batch in example_batches_of([self.pipeline])]

    def _weigh(self, batch: Batch) -> Batch:
        weights = batch.decoder_loss_weights * np.float32(self.weight)
        return dataclasses.replace(batch, decoder_loss_weights=weights)
