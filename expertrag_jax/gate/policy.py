"""Who decides to retrieve: the learned gate, and the policies that it is measured against.

A policy is a frozen dataclass with ``decide(inputs) -> bool [B]`` on numpy arrays, so the same object serves
in a data pipeline, in answering and in evaluation, and every field is a gin value. ``needs`` names the inputs
it reads, so a caller computes (and pays for) no others.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Fraction, Number, Seed, checked


@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """What is known of B questions when the decision is due; None where nothing is.

    Attributes:
      example_ids: [B] int64, stable ids.
      p_ret: [B] float32, the gate's calibrated probability.
      passage_scores: [B, K] float32, retriever scores in rank order.
      retrieval_needed: [B] float32, 1 needed, 0 not, NaN unknown.
    """

    example_ids: Any = None
    p_ret: Any = None
    passage_scores: Any = None
    retrieval_needed: Any = None

    def get(self, name: str, policy: str) -> np.ndarray:
        """The array called ``name``; UserError when the caller has none."""
        value = getattr(self, name)
        if value is None:
            raise UserError(
                f"gate policy {policy} needs {name}, which these examples lack: set another GATE."
            )
        return np.asarray(value)


class Policy(Protocol):
    """Decides per example; ``needs`` are the names of the `PolicyInputs` fields that it reads."""

    needs: ClassVar[tuple[str, ...]]

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool, True to retrieve."""


@dataclasses.dataclass(frozen=True)
class Always:
    """Retrieve for every question: classic RAG."""

    needs: ClassVar[tuple[str, ...]] = ("example_ids",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool, all True."""
        return np.ones(len(inputs.get("example_ids", "Always")), bool)


@dataclasses.dataclass(frozen=True)
class Never:
    """Retrieve for no question: closed book."""

    needs: ClassVar[tuple[str, ...]] = ("example_ids",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool, all False."""
        return np.zeros(len(inputs.get("example_ids", "Never")), bool)


@checked
@dataclasses.dataclass(frozen=True)
class Random:
    """Retrieve for a fraction ``rate`` of the questions, chosen by a hash of (seed, example id).

    The decision depends neither on the order of the examples nor on their batch-mates, and the questions
    chosen at a lower rate are among those chosen at a higher one.

    Attributes:
      rate: expected fraction, in [0, 1].
      seed: another seed, other questions.

    Raises:
      UserError: a rate outside [0, 1].
    """

    rate: Fraction = 0.5
    seed: Seed = 0
    needs: ClassVar[tuple[str, ...]] = ("example_ids",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool from ``example_ids`` [B]."""
        return uniform_hash(inputs.get("example_ids", "Random"), self.seed) < self.rate


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Retrieve where it is known to be needed: wrong without, right with. The ceiling, not a competitor.

    Attributes:
      when_unknown: the decision where the label is NaN.
    """

    when_unknown: bool = True
    needs: ClassVar[tuple[str, ...]] = ("retrieval_needed",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool from ``retrieval_needed`` [B]."""
        needed = inputs.get("retrieval_needed", "Oracle").astype(np.float64)
        return np.where(np.isnan(needed), self.when_unknown, needed > 0.5)


@checked
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keep the evidence if the best retriever score reaches ``threshold``: the search is paid anyway.

    Attributes:
      threshold: in the unit of the index's scores (inner product, BM25).
    """

    threshold: Number = 0.0
    needs: ClassVar[tuple[str, ...]] = ("passage_scores",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool from ``passage_scores`` [B, K]; False where nothing was found (K = 0, or all NaN)."""
        scores = inputs.get("passage_scores", "Threshold").astype(np.float64)
        best = np.max(np.nan_to_num(scores, nan=-np.inf), axis=1, initial=-np.inf)
        return best >= self.threshold


@checked
@dataclasses.dataclass(frozen=True)
class Learned:
    """The trained gate: retrieve when ``p_ret >= threshold``.

    Attributes:
      threshold: chosen on validation questions, see ``calibration.choose_threshold``.
    """

    threshold: Number = 0.5
    needs: ClassVar[tuple[str, ...]] = ("p_ret",)

    def decide(self, inputs: PolicyInputs) -> np.ndarray:
        """[B] bool from ``p_ret`` [B]."""
        return inputs.get("p_ret", "Learned").astype(np.float32) >= np.float32(self.threshold)


POLICIES = {
    "always": Always,
    "never": Never,
    "random": Random,
    "oracle": Oracle,
    "threshold": Threshold,
    "learned": Learned,
}


def make_policy(name: str, **fields: Any) -> Policy:
    """The policy called ``name`` with these fields, for flags and configuration files.

    Raises:
      UserError: an unknown name or field.
    """
    if name not in POLICIES:
        raise UserError(f"gate policy {name!r} is unknown: choose one of {', '.join(POLICIES)}.")
    known = {field.name for field in dataclasses.fields(POLICIES[name])}
    if unknown := sorted(set(fields) - known):
        takes = ", ".join(sorted(known)) or "nothing"
        raise UserError(f"gate policy {name!r} has no {', '.join(unknown)}: it takes {takes}.")
    return POLICIES[name](**fields)


def uniform_hash(example_ids: Any, seed: int) -> np.ndarray:
    """[B] integer ids -> [B] float64 in [0, 1), by SplitMix64 (Steele, Lea & Flood 2014) of seed and id."""
    ids = np.atleast_1d(np.asarray(example_ids)).astype(np.int64).view(np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what the hash is made of
        mixed = _splitmix64(ids ^ _splitmix64(np.array([seed], np.int64).view(np.uint64)))
    return (mixed >> np.uint64(11)) * 2.0**-53  # the upper 53 bits: what a float64 holds


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
