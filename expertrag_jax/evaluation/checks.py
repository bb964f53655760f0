"""What the almanac's demo promises, and whether a report keeps it.

The bars are those of the almanac: its strata are called head and volatile, and its editions 1 and 2 are the
corpus that the gate was trained for and one that nothing was trained on.
"""

from __future__ import annotations

import operator
from typing import Any

_COMPARE = {">=": operator.ge, "<=": operator.le}

Check = dict[str, Any]


def almanac_checks(report: dict[str, Any]) -> list[Check]:
    """Every promise as {"name", "measured", "relation", "bar", "met"}; ``met`` is None where nothing was
    measured.

    Args:
      report: as ``report.build_report`` makes it, with the editions "1" and "2" (an absent one has no
        checks).
    """
    editions = report["editions"]
    checks = _edition_1(editions["1"]) if "1" in editions else []
    return checks + (_edition_2(editions["2"]) if "2" in editions else [])


def _edition_1(edition: dict[str, Any]) -> list[Check]:
    never, always, gate = (edition["policies"][name] for name in ("never", "always", "gate"))
    quality, speed = edition["gate_quality"], edition.get("speed_up") or {}
    return [
        _check("closed book, exact match on head facts", never["em_by_stratum"].get("head"), ">=", 0.95),
        _check("always retrieve, exact match", always["em"], ">=", 0.90),
        _check("recall of the retriever at K", edition["retriever_recall"], ">=", 0.95),
        _check("questions that need retrieval, at least", edition["need"], ">=", 0.2),
        _check("questions that need retrieval, at most", edition["need"], "<=", 0.5),
        _check("always minus never", always["em"] - never["em"], ">=", 0.15),
        _check("gate minus always", gate["em_minus_always"], ">=", -0.01),
        _check("retrieval rate of the gate", gate["retrieval_rate"], "<=", 0.6),
        _check("AUROC against need", quality["auroc"], ">=", 0.85),
        _check("AUROC within static relations", quality["auroc_static_relations"], ">=", 0.75),
        _check("normalised area", quality["normalised_area"], ">=", 0.7),
        _check("speed-up over always", speed.get("speed_up"), ">=", 1.4),
        _check("fraction of the possible speed-up", speed.get("fraction_of_bound"), ">=", 0.9),
    ]


def _edition_2(edition: dict[str, Any]) -> list[Check]:
    gate = edition["policies"]["gate"]
    kept = gate["always_right_kept_by_stratum"].get("volatile")
    return [
        _check("edition 2: retrieval rate of the gate", gate["retrieval_rate"], "<=", 0.7),
        _check("edition 2: volatile facts that always gets right, right under the gate", kept, ">=", 0.9),
    ]


def _check(name: str, measured: float | None, relation: str, bar: float) -> Check:
    met = None if measured is None else bool(_COMPARE[relation](measured, bar))
    return {"name": name, "measured": measured, "relation": relation, "bar": bar, "met": met}
