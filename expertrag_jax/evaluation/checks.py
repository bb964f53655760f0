"""What the almanac's demo promises, and whether a report keeps it.

The bars are those of the almanac: its strata are called head and volatile, and its editions 1 and 2 are the
corpus that the gate was trained for and one that nothing was trained on.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

_COMPARE = {">=": operator.ge, "<=": operator.le}

Check = dict[str, Any]

# What to change if a promise of this kind is missed. A kind that is not here is a promise on speed: a busy machine
# may miss it, so it warns and does not fail.
MENDS = {
    "memory": "raise TRAIN_STEPS or Schedule.closed_book_share",
    "reading": (
        "give the lesson that missed its mark more steps (namesakes/demo.Lesson.steps) or, if none did, a higher mark "
        "(texts/mark.Reached.value), or give reading more weight (crowds/demo.Lesson.weight)"
    ),
    "retriever": "raise DualEncoder.steps",
    "gate": "raise ExpertRAG.gate_steps or AlmanacConfig.gate_facts, or move demo.retrieval_budget",
}
SPEED = "speed"


def almanac_checks(report: dict[str, Any]) -> list[Check]:
    """Every promise as {"name", "kind", "measured", "relation", "bar", "met"}.

    Args:
      report: as ``report.build_report`` makes it, with the editions "1" and "2" (an absent one has no
        checks).
    Returns:
      The promises. ``kind`` is a key of ``MENDS`` or ``SPEED``; ``met`` is None if nothing was measured.
    """
    editions = report["editions"]
    checks = _edition_1(editions["1"]) if "1" in editions else []
    return checks + (_edition_2(editions["2"]) if "2" in editions else [])


def missed_quality(checks: Sequence[Check], stages: Sequence[str] = ()) -> str | None:
    """What a run fell short of and what to change, as sentences; None if every promise on quality was kept.

    Args:
      checks: from ``almanac_checks``.
      stages: sentences about stages of training that did not reach their mark.
    """
    missed = [check for check in checks if check["kind"] != SPEED and check["met"] is False]
    if not missed:
        return None
    count = sum(check["kind"] != SPEED for check in checks)
    listed = "; ".join(f"{c['name']} {c['measured']:.3f} (bar {c['relation']} {c['bar']:g})" for c in missed)
    mends = "; ".join(MENDS[kind] for kind in dict.fromkeys(check["kind"] for check in missed))
    reached = " ".join(stages) if stages else "Every stage with a mark reached it."
    return (
        f"{len(missed)} of {count} promises on quality: {listed}. {reached} To change it: {mends}; then run again in "
        "another MODEL_DIR."
    )


def _edition_1(edition: Mapping[str, Any]) -> list[Check]:
    never, always, gate = (edition["policies"][name] for name in ("never", "always", "gate"))
    quality, speed = edition["gate_quality"], edition.get("speed_up") or {}
    head = never["em_by_stratum"].get("head")
    return [
        _check("closed book, exact match on head facts", "memory", head, ">=", 0.95),
        _check("always retrieve, exact match", "reading", always["em"], ">=", 0.90),
        _check("recall of the retriever at K", "retriever", edition["retriever_recall"], ">=", 0.95),
        _check("questions that need retrieval, at least", "reading", edition["need"], ">=", 0.2),
        _check("questions that need retrieval, at most", "memory", edition["need"], "<=", 0.5),
        _check("always minus never", "reading", always["em"] - never["em"], ">=", 0.15),
        _check("gate minus always", "gate", gate["em_minus_always"], ">=", -0.01),
        _check("retrieval rate of the gate", "gate", gate["retrieval_rate"], "<=", 0.6),
        _check("AUROC against need", "gate", quality["auroc"], ">=", 0.85),
        _check("AUROC within static relations", "gate", quality["auroc_static_relations"], ">=", 0.75),
        _check("normalised area", "gate", quality["normalised_area"], ">=", 0.7),
        _check("speed-up over always", SPEED, speed.get("speed_up"), ">=", 1.4),
        _check("fraction of the possible speed-up", SPEED, speed.get("fraction_of_bound"), ">=", 0.9),
    ]


def _edition_2(edition: Mapping[str, Any]) -> list[Check]:
    gate = edition["policies"]["gate"]
    kept = gate["always_right_kept_by_stratum"].get("volatile")
    return [
        _check("edition 2: retrieval rate of the gate", "gate", gate["retrieval_rate"], "<=", 0.7),
        _check("edition 2: volatile facts that always gets right, right under the gate", "gate", kept, ">=", 0.9),
    ]


def _check(name: str, kind: str, measured: float | None, relation: str, bar: float) -> Check:
    met = None if measured is None else bool(_COMPARE[relation](measured, bar))
    return {"name": name, "kind": kind, "measured": measured, "relation": relation, "bar": bar, "met": met}
