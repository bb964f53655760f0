"""The report of an evaluation: from arrays per question to one JSON structure, a page and a terminal table.

Everything shown anywhere is in the JSON, so a page can be drawn again from ``report.json`` alone. Fractions
are of 1, undefined numbers are null.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expertrag_jax.evaluation import gating, intervals, page
from expertrag_jax.evaluation.cost import SpeedUp
from expertrag_jax.evaluation.reliability import expected_calibration_error, reliability_bins
from expertrag_jax.files.writing import whole

STRATA = ("head", "torso", "tail", "never", "volatile")
"""The order in which strata are shown; others follow alphabetically."""

PACKAGES = (
    "expertrag_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "seqio",
    "tensorflow",
    "scann",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class PolicyResult:
    """What one policy did with N questions.

    Attributes:
      correct: [N] bool, exact match.
      retrieve: [N] bool, what it decided.
      encoder_tokens: real encoder tokens per question.
      padded_encoder_tokens: encoder tokens per question, padding included.
      questions_per_second: in batches, gate and search included.
      p50_ms, p95_ms: latency of one question at a time.
    """

    correct: Any
    retrieve: Any
    encoder_tokens: float
    padded_encoder_tokens: float
    questions_per_second: float = math.nan
    p50_ms: float = math.nan
    p95_ms: float = math.nan


@dataclasses.dataclass(frozen=True)
class EditionResult:
    """One edition of the corpus: N test questions under every policy.

    Attributes:
      policies: results by name; "never", "always" and "gate" must be among them.
      p_ret: [N] the gate's calibrated probability.
      facts: [N] id of the fact asked about; intervals resample these.
      strata: [N] name of each question's stratum.
      weights: [N] Zipf weight of each question, or None.
      static: [N] bool, the question's relation never changes; None when that is unknown.
      threshold: the gate's, on p_ret.
      num_passages: K, passages read by a question that retrieves.
      retriever_recall: R@K, fraction of questions with a gold passage among the K.
      speed_up: from interleaved timings. differing: answers of real runs that were not those of the arms; None where
        none was run.
      description: one sentence for the reader of the report.
    """

    policies: Mapping[str, PolicyResult]
    p_ret: Any
    facts: Any
    strata: Any
    weights: Any = None
    static: Any = None
    threshold: float = math.nan
    num_passages: int | None = None
    retriever_recall: float = math.nan
    speed_up: SpeedUp | None = None
    differing: int | None = None
    description: str = ""


def build_report(
    editions: Mapping[str, EditionResult],
    wall_seconds: float,
    *,
    title: str = "ExpertRAG evaluation",
    seed: int | None = None,
    stages: Mapping[str, float] | None = None,
    losses: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    expert_load: Mapping[str, Sequence[float]] | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    checks: Callable[[dict], list[dict]] | None = None,
    replicates: int = intervals.REPLICATES,
) -> dict[str, Any]:
    """The whole report as a JSON-ready dict.

    Args:
      editions: results by edition, in the order to show them.
      wall_seconds: of the whole job.
      title: of the page.
      seed: of the run.
      stages: seconds per stage of the job.
      losses: per training phase, (step, loss) pairs.
      expert_load: per sparse layer, the fraction of its tokens that each expert got.
      settings: what else identifies the run (sizes, command, gin file).
      notes: sentences for "how this was measured".
      checks: given the report, the promises and whether they were kept (see ``checks.py``).
      replicates: bootstrap samples per interval.

    Returns:
      {"wall_seconds", "editions": {name: {"need", "gate_quality", "policies", ...}}, ...}.

    Raises:
      ValueError: an edition without the policies never, always and gate, or arrays of different lengths.
    """
    report = {
        "title": title,
        "wall_seconds": wall_seconds,
        "seed": seed,
        "replicates": replicates,
        "settings": dict(settings or {}),
        "versions": versions(),
        "stages": dict(stages or {}),
        "editions": {
            name: _edition(name, result, seed or 0, replicates) for name, result in editions.items()
        },
        "losses": {name: [[int(s), float(v)] for s, v in points] for name, points in (losses or {}).items()},
        "expert_load": {name: [float(v) for v in load] for name, load in (expert_load or {}).items()},
        "notes": list(notes),
    }
    report = _plain(report)
    report["checks"] = checks(report) if checks else []
    return report


def write_report(report: Mapping[str, Any], directory: str | os.PathLike) -> pathlib.Path:
    """Write ``report.json`` and ``report.html`` into ``directory``; returns the path of the page.

    A reader never sees half of one.
    """
    directory = pathlib.Path(directory)
    for name, text in (
        ("report.json", json.dumps(report, indent=1, allow_nan=False) + "\n"),
        ("report.html", page.render(report)),
    ):
        with whole(directory / name) as file:
            file.write(text)
    return directory / "report.html"


def versions() -> dict[str, str]:
    """Python, machine, and the installed versions of the packages that decide the numbers."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def strata_in_order(names: Any) -> list[str]:
    """Distinct strata, the known ones first and in their order."""
    present = {str(name) for name in names}
    return [name for name in STRATA if name in present] + sorted(present.difference(STRATA))


def _edition(name: str, result: EditionResult, seed: int, replicates: int) -> dict[str, Any]:
    _check(name, result)
    never, always = (np.asarray(result.policies[arm].correct, bool) for arm in ("never", "always"))
    needed = gating.retrieval_needed(never, always)
    gate = gating.accuracy_curve(result.p_ret, never, always).thinned()
    oracle = gating.oracle_curve(never, always).thinned()
    bins = reliability_bins(result.p_ret, needed)
    strata = np.asarray(result.strata).astype(str)
    edition = {
        "description": result.description,
        "questions": len(never),
        "facts": len(np.unique(np.asarray(result.facts))),
        "questions_by_stratum": {s: int((strata == s).sum()) for s in strata_in_order(strata)},
        "need": needed.mean(),
        "harm": gating.retrieval_harmful(never, always).mean(),
        "need_by_stratum": _by_stratum(needed, strata),
        "threshold": result.threshold,
        "num_passages": result.num_passages,
        "retriever_recall": result.retriever_recall,
        "gate_quality": _gate_quality(result, never, always, needed, seed, replicates),
        "policies": {p: _policy(result, p, always, strata, seed, replicates) for p in result.policies},
        "plots": {
            "rate": gate.rate,
            "gate_accuracy": gate.accuracy,
            "oracle_accuracy": oracle.accuracy,
            "reliability": dataclasses.asdict(bins),
        },
    }
    if result.speed_up:
        edition["speed_up"] = dataclasses.asdict(result.speed_up)
    if result.differing is not None:
        edition["answers_changed_by_splitting"] = result.differing
    return edition


def _gate_quality(result, never, always, needed, seed, replicates) -> dict[str, Any]:
    p_ret = np.asarray(result.p_ret, np.float64)
    static = None if result.static is None else np.asarray(result.static, bool)
    interval = intervals.statistic_interval(
        lambda rows: gating.auroc(p_ret[rows], needed[rows]), result.facts, replicates, seed
    )
    return {
        "auroc": gating.auroc(p_ret, needed),
        "auroc_interval": interval,
        "auroc_static_relations": math.nan if static is None else gating.auroc(p_ret[static], needed[static]),
        "average_precision": gating.average_precision(p_ret, needed),
        "ece": expected_calibration_error(p_ret, needed),
        "normalised_area": gating.normalised_area(p_ret, never, always),
    }


def _policy(result: EditionResult, name: str, always, strata, seed: int, replicates: int) -> dict[str, Any]:
    policy = result.policies[name]
    correct, retrieve = np.asarray(policy.correct, np.float64), np.asarray(policy.retrieve, np.float64)
    resample = {"clusters": result.facts, "replicates": replicates, "seed": seed}
    summary = {
        "em": correct.mean(),
        "em_interval": intervals.mean_interval(correct, **resample),
        "em_by_stratum": _by_stratum(correct, strata),
        "em_minus_always": (correct - always).mean(),
        "em_minus_always_interval": intervals.mean_interval(correct - always, **resample),
        "always_right_kept_by_stratum": _by_stratum(correct, strata, among=always),
        "retrieval_rate": retrieve.mean(),
        "retrieval_rate_by_stratum": _by_stratum(retrieve, strata),
        "encoder_tokens": policy.encoder_tokens,
        "padded_encoder_tokens": policy.padded_encoder_tokens,
        "questions_per_second": policy.questions_per_second,
        "p50_ms": policy.p50_ms,
        "p95_ms": policy.p95_ms,
    }
    if result.weights is not None:
        summary["em_zipf"] = intervals.weighted_mean(correct, result.weights)
        summary["em_zipf_interval"] = intervals.mean_interval(correct, weights=result.weights, **resample)
        summary["retrieval_rate_zipf"] = intervals.weighted_mean(retrieve, result.weights)
    return summary


def _by_stratum(values: Any, strata: np.ndarray, among: Any = None) -> dict[str, float]:
    """Mean per stratum, over the questions of ``among`` [N] bool when given; NaN where there are none."""
    values = np.asarray(values, np.float64)
    among = np.ones(len(values), bool) if among is None else np.asarray(among, bool)
    means = {}
    for name in strata_in_order(strata):
        chosen = values[among & (strata == name)]
        means[name] = chosen.mean() if len(chosen) else math.nan
    return means


def _check(name: str, result: EditionResult) -> None:
    missing = [policy for policy in ("never", "always", "gate") if policy not in result.policies]
    if missing:
        raise ValueError(f"edition {name} lacks the policies {', '.join(missing)}")
    lengths = {"p_ret": result.p_ret, "facts": result.facts, "strata": result.strata}
    lengths |= {f"{policy}.correct": found.correct for policy, found in result.policies.items()}
    lengths |= {f"{policy}.retrieve": found.retrieve for policy, found in result.policies.items()}
    lengths |= {
        key: getattr(result, key) for key in ("weights", "static") if getattr(result, key) is not None
    }
    sizes = {key: len(value) for key, value in lengths.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"edition {name} has arrays of different lengths: {sizes}")


def _plain(value: Any) -> Any:
    """Arrays and numpy numbers to Python's, NaN and infinity to None: what JSON can say."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
