"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from expertrag_jax.evaluation.checks import SPEED
from expertrag_jax.evaluation.words import (
    MISSING,
    duration,
    fraction,
    interval,
    measured,
    number,
    percent,
    stratum,
    summary,
)


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print every edition's policies and strata, the gate's quality, and the promises; fits 80 columns."""
    console = console or Console()
    for name, edition in report["editions"].items():
        console.print(_policies(name, edition))
        console.print(_strata(edition))
        console.print(_gate_line(edition), highlight=False)
        console.print(summary(edition) + "\n", highlight=False)
    if report["checks"]:
        console.print(_checks(report["checks"]))
    console.print(f"wall time {duration(report['wall_seconds'])}", highlight=False)


def _policies(name: str, edition: Mapping[str, Any]) -> Table:
    title = f"Edition {name}: {number(edition['questions'])} questions"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for column in ("EM %", "95%", "retrieves", "tokens", "padded", "q/s", "p50\nms", "p95\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    for policy, row in edition["policies"].items():
        table.add_row(
            policy,
            percent(row["em"]).rstrip("%"),
            interval(row["em_interval"]),
            percent(row["retrieval_rate"]),
            number(row["encoder_tokens"]),
            number(row["padded_encoder_tokens"]),
            number(row["questions_per_second"]),
            number(row["p50_ms"], 1),
            number(row["p95_ms"], 1),
            style="bold" if policy == "gate" else None,
        )
    return table


def _strata(edition: Mapping[str, Any]) -> Table:
    strata = list(edition["questions_by_stratum"])
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("EM %", no_wrap=True)
    for name in strata:
        table.add_column(stratum(name), justify="right", no_wrap=True)
    weighted = all("em_zipf" in row for row in edition["policies"].values())
    if weighted:
        table.add_column("Zipf-weighted", justify="right", no_wrap=True)
    for policy, row in edition["policies"].items():
        cells = [percent(row["em_by_stratum"][name]).rstrip("%") for name in strata]
        cells += [percent(row["em_zipf"]).rstrip("%")] if weighted else []
        table.add_row(policy, *cells, style="bold" if policy == "gate" else None)
    return table


def _gate_line(edition: Mapping[str, Any]) -> str:
    quality = edition["gate_quality"]
    parts = [
        f"need {percent(edition['need'])}",
        f"AUROC {fraction(quality['auroc'])}",
        f"static {fraction(quality['auroc_static_relations'])}",
        f"AP {fraction(quality['average_precision'])}",
        f"ECE {fraction(quality['ece'])}",
        f"area {fraction(quality['normalised_area'])}",
    ]
    if speed := edition.get("speed_up"):
        parts.append(
            f"avoidable share f {percent(speed['avoidable_share'])}, bound {speed['bound']:.2f}x,"
            f" measured {speed['speed_up']:.2f}x ({percent(speed['fraction_of_bound'])} of it;"
            f" rounds from {speed['rounds'][0]:.2f}x to {speed['rounds'][1]:.2f}x)"
        )
    return ", ".join(parts)


def _checks(checks: list[Mapping[str, Any]]) -> Table:
    table = Table(title="Promises", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("promise", overflow="fold")
    for column in ("measured", "bar", ""):
        table.add_column(column, justify="right", no_wrap=True)
    words = {True: "[green]kept[/]", False: "[bold red]missed[/]", None: MISSING}
    for check in checks:
        bar = f"{check['relation']} {measured(check, check['bar'])}"
        slow = check["met"] is False and check["kind"] == SPEED
        word = "[yellow]slow[/]" if slow else words[check["met"]]
        table.add_row(check["name"], measured(check, check["measured"]), bar, word)
    return table
