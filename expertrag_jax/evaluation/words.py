"""How the report's numbers are written, the same on the page and in the terminal."""

from __future__ import annotations

from typing import Any

MISSING = "–"

STRATUM_NAMES = {"never": "never asked"}
"""A stratum called like a policy gets another name where both stand side by side."""


def percent(value: float | None, digits: int = 1) -> str:
    """0.934 -> "93.4%"."""
    return MISSING if value is None else f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return MISSING if value is None else f"{100 * value:+.1f}"


def number(value: float | None, digits: int = 0) -> str:
    """A number with thousands separated."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def fraction(value: float | None) -> str:
    """A figure of merit between 0 and 1, three digits."""
    return MISSING if value is None else f"{value:.3f}"


def interval(bounds: list[float] | None) -> str:
    """[0.92, 0.95] -> "92.0–95.0"."""
    return MISSING if not bounds or None in bounds else f"{100 * bounds[0]:.1f}–{100 * bounds[1]:.1f}"


def duration(seconds: float) -> str:
    """75.2 -> "1 min 15 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def stratum(name: str) -> str:
    """A stratum's name for the reader."""
    return STRATUM_NAMES.get(name, name)


def measured(check: dict[str, Any], value: float | None) -> str:
    """A check's measurement or bar: AUROC and area as fractions, factors, differences, else percentages."""
    if value is None:
        return MISSING
    if check["name"].startswith(("AUROC", "normalised")):
        return fraction(value)
    if " minus " in check["name"]:
        return f"{points(value)} pt"
    if check["name"].startswith("speed-up"):
        return f"{value:.2f}×"
    return percent(value)


def summary(edition: dict[str, Any]) -> str:
    """One sentence: what the gate gave up and what it saved."""
    gate, always = edition["policies"]["gate"], edition["policies"]["always"]
    text = (
        f"Retrieving for {percent(gate['retrieval_rate'])} of the questions, the gate answers "
        f"{percent(gate['em'])} of all questions exactly right; always retrieving answers"
        f" {percent(always['em'])}."
    )
    if speed := edition.get("speed_up"):
        text += f" The gate is {speed['speed_up']:.2f} times as fast."
    return text
