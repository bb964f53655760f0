"""One order of examples: what stands in the batch of a step, as a function of seed and step alone."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

_BLOCK = 1024  # positions over which the shares of several sources are exact


@dataclasses.dataclass(frozen=True)
class Order:
    """The global order of ``count`` examples, pass after pass.

    Attributes:
      count: N examples.
      seed: fixes the order.
      shuffle: whether each pass has its own permutation; else every pass is 0 ... N-1.
    """

    count: int
    seed: int = 0
    shuffle: bool = True

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The examples at positions of the endless sequence of passes: [n] int64 -> [n] int64."""
        passes, offsets = np.divmod(np.asarray(positions, np.int64), self.count)
        if not self.shuffle:
            return offsets
        out = np.empty_like(offsets)
        for number in np.unique(passes):
            here = passes == number
            out[here] = _permutation(self.seed, self.count, int(number))[offsets[here]]
        return out


@dataclasses.dataclass(frozen=True)
class Mixed:
    """An endless mixture of several orders in fixed shares.

    Every block of 1,024 positions holds the same number of examples of each source (their shares by largest
    remainder), in an order of its own. So the position within each source follows from the position in the
    mixture without counting through it.

    Attributes:
      orders: of the sources.
      rates: relative weights, one per source.
      seed: fixes the order inside blocks.
    """

    orders: tuple[Order, ...]
    rates: tuple[float, ...]
    seed: int = 0

    @property
    def quotas(self) -> np.ndarray:
        """[S] int64, examples of each source in a block."""
        ideal = np.asarray(self.rates, np.float64) * (_BLOCK / sum(self.rates))
        quotas = np.floor(ideal).astype(np.int64)
        quotas[np.argsort(quotas - ideal, kind="stable")[: _BLOCK - quotas.sum()]] += 1
        return quotas

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n] positions -> source [n] and example within the source [n], int64."""
        positions = np.asarray(positions, np.int64)
        quotas = self.quotas
        blocks, offsets = np.divmod(positions, _BLOCK)
        source = np.empty_like(positions)
        place = np.empty_like(positions)
        pattern = np.repeat(np.arange(len(quotas)), quotas)
        for block in np.unique(blocks):
            here = blocks == block
            drawn = np.random.default_rng([self.seed, 1, int(block)]).permutation(pattern)
            rank = np.empty(_BLOCK, np.int64)  # how many of the same source stand before, in this block
            for s in range(len(quotas)):
                rank[drawn == s] = np.arange(quotas[s])
            source[here] = drawn[offsets[here]]
            place[here] = block * quotas[source[here]] + rank[offsets[here]]
        example = np.empty_like(positions)
        for s, order in enumerate(self.orders):
            if (source == s).any():
                example[source == s] = order.at(place[source == s])
        return source, example


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, count: int, number: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, 0, number]).permutation(count)
    permutation.setflags(write=False)
    return permutation
