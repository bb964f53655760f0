"""The report as one HTML file that needs nothing else: tables, figures inlined, legible on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from expertrag_jax.evaluation import plots
from expertrag_jax.evaluation.checks import SPEED
from expertrag_jax.evaluation.words import (
    duration,
    fraction,
    interval,
    measured,
    number,
    percent,
    points,
    stratum,
    summary,
)

_STYLE = """
:root { --ink:#1f2933; --soft:#616e7c; --line:#e4e7eb; --gate:#0b7a75; --wash:#f5f7fa; --miss:#ab2f2f; }
* { box-sizing:border-box; }
body { margin:0; color:var(--ink); background:#fff; font:16px/1.5 system-ui,Roboto,Arial,sans-serif; }
main { max-width:66rem; margin:0 auto; padding:1.5rem 1rem 4rem; }
h1 { font-size:1.8rem; line-height:1.2; margin:.2rem 0 .6rem; letter-spacing:-.01em; }
h2 { font-size:1.3rem; margin:2.6rem 0 .5rem; padding-top:1.1rem; border-top:1px solid var(--line); }
h3 { font-size:1rem; margin:1.6rem 0 .4rem; }
p, li { max-width:46rem; }
.lead { font-size:1.1rem; margin:.2rem 0 1.2rem; }
.soft { color:var(--soft); font-size:.9rem; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(9.2rem,1fr)); gap:.7rem; margin:1rem 0; }
.tile { background:var(--wash); border-radius:.6rem; padding:.7rem .9rem; }
.tile b { display:block; font-size:1.55rem; line-height:1.25; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:.85rem; }
.scroll { overflow-x:auto; -webkit-overflow-scrolling:touch; margin:.6rem 0 1rem; }
table { border-collapse:collapse; font-size:.92rem; font-variant-numeric:tabular-nums; min-width:100%; }
th, td { padding:.38rem .65rem; text-align:right; white-space:nowrap; border-bottom:1px solid var(--line); }
th { font-weight:600; color:var(--soft); font-size:.82rem; vertical-align:bottom; }
th:first-child, td:first-child { text-align:left; position:sticky; left:0; background:#fff; }
td small { color:var(--soft); margin-left:.35em; }
tr.gate td { background:#eaf5f4; font-weight:600; }
tr.gate td small { font-weight:400; }
.wrap td:first-child { white-space:normal; min-width:11rem; }
.narrow { min-width:0; width:100%; max-width:28rem; }
.yes { color:var(--gate); font-weight:600; } .no { color:var(--miss); font-weight:700; }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr)); gap:1.2rem; }
figure { margin:.4rem 0; } figure img { width:100%; height:auto; display:block; }
figcaption { color:var(--soft); font-size:.88rem; margin-top:.3rem; }
.bar { background:var(--gate); height:.7rem; border-radius:.2rem; min-width:2px; }
.stages td:last-child { width:55%; min-width:8rem; }
@media (max-width:30rem) { th, td { padding:.35rem .4rem; } .wrap td:first-child { min-width:7.5rem; } }
@media print { .scroll { overflow:visible; } h2, figure { break-inside:avoid; } }
"""


def render(report: Mapping[str, Any]) -> str:
    """The page of a report, as ``report.build_report`` makes it or as it was read from ``report.json``."""
    limits = plots.accuracy_limits(report["editions"])
    body = [_opening(report), _checks(report["checks"])]
    body += [_edition(name, edition, limits) for name, edition in report["editions"].items()]
    body += [_training(report), _method(report)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(report['title'])}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _opening(report: Mapping[str, Any]) -> str:
    first = next(iter(report["editions"].values()))
    gate, always, quality = first["policies"]["gate"], first["policies"]["always"], first["gate_quality"]
    low, high = gate["em_minus_always_interval"]
    tiles = [
        (percent(gate["em"]), "exact match with the gate"),
        (points(gate["em_minus_always"]), f"points against always ({points(low)} to {points(high)})"),
        (percent(gate["retrieval_rate"]), "of the questions retrieve"),
    ]
    if speed := first.get("speed_up"):
        tiles.append((f"{speed['speed_up']:.2f}×", f"faster than always; {speed['bound']:.2f}× is possible"))
    tiles.append((fraction(quality["auroc"]), "AUROC against need"))
    saved = 1 - gate["encoder_tokens"] / always["encoder_tokens"] if always["encoder_tokens"] else None
    tiles.append((percent(saved), "fewer encoder tokens than always"))
    cells = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for value, label in tiles
    )
    seed = "" if report["seed"] is None else f" Seed {report['seed']}."
    return (
        f'<h1>{_text(report["title"])}</h1><p class="lead">{_text(summary(first))}</p>'
        f'<div class="tiles">{cells}</div>'
        f'<p class="soft">The whole run took {duration(report["wall_seconds"])}.{seed} Ranges in small print'
        " and bars are 95% bootstrap intervals that resample facts.</p>"
    )


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    if not checks:
        return ""
    words = {
        True: '<span class="yes">✓</span>',
        False: '<span class="no">✗ missed:</span>',
        None: '<span class="no">not measured:</span>',
    }
    slow = words | {False: '<span class="no">✗ slow:</span>'}
    rows = [
        [
            f"{(slow if check['kind'] == SPEED else words)[check['met']]} {_text(check['name'])}",
            measured(check, check["measured"]),
            f"{'≥' if check['relation'] == '>=' else '≤'} {measured(check, check['bar'])}",
        ]
        for check in checks
    ]
    kept = sum(check["met"] is True for check in checks)
    table = _table(["promise", "measured", "bar"], rows, kind="wrap")
    return f"<h2>Promises: {kept} of {len(checks)} kept</h2>{table}"


def _edition(name: str, edition: Mapping[str, Any], limits: tuple[float, float]) -> str:
    quality = edition["gate_quality"]
    facts = (
        f"{number(edition['questions'])} questions about {number(edition['facts'])} facts. Retrieval is"
        f" needed (wrong without, right with) for {percent(edition['need'])} and harms"
        f" {percent(edition['harm'])}."
    )
    if edition["retriever_recall"] is not None:
        facts += f" A gold passage is among the {edition['num_passages'] or 'K'} retrieved for"
        facts += f" {percent(edition['retriever_recall'])}."
    merit = [
        [
            "AUROC against need",
            f"{fraction(quality['auroc'])}<small>{_unit_interval(quality['auroc_interval'])}</small>",
        ],
        ["AUROC within static relations", fraction(quality["auroc_static_relations"])],
        ["average precision", fraction(quality["average_precision"])],
        ["expected calibration error", fraction(quality["ece"])],
        ["normalised area", fraction(quality["normalised_area"])],
        ["threshold on p_ret", fraction(edition["threshold"])],
    ]
    curve = _figure(
        plots.accuracy_over_rate(edition, limits),
        "Exact match against retrieval rate. Solid: the gate's ranking of the questions; dashed: the oracle,"
        " need first and harm last; dotted: choosing blindly. The vertical axis does not start at zero.",
    )
    bins = _figure(
        plots.reliability(edition),
        "Reliability: of the questions to which the gate gave p_ret, how many needed retrieval. On the"
        " diagonal the probability can be believed.",
    )
    return (
        f"<h2>Edition {_text(name)}</h2><p>{_text(edition['description'])} {facts}</p>"
        f"{_policy_table(edition)}{_speed(edition)}<h3>Exact match by stratum</h3>{_stratum_table(edition)}"
        f'<div class="figures">{curve}{bins}</div><h3>The gate</h3>{_table(["", ""], merit, kind="narrow")}'
    )


def _policy_table(edition: Mapping[str, Any]) -> str:
    policies = edition["policies"]
    zipf = all("em_zipf" in policy for policy in policies.values())
    head = [
        "policy",
        "exact match",
        "retrieves",
        "encoder tokens",
        "padded",
        "questions/s",
        "p50 ms",
        "p95 ms",
    ]
    if zipf:
        head.insert(2, "Zipf-weighted")
    rows = []
    for name, policy in policies.items():
        row = [
            _text(name),
            f"{percent(policy['em'])}<small>{interval(policy['em_interval'])}</small>",
            percent(policy["retrieval_rate"]),
            number(policy["encoder_tokens"]),
            number(policy["padded_encoder_tokens"]),
            number(policy["questions_per_second"]),
            number(policy["p50_ms"], 1),
            number(policy["p95_ms"], 1),
        ]
        if zipf:
            row.insert(
                2, f"{percent(policy['em_zipf'])}<small>{interval(policy['em_zipf_interval'])}</small>"
            )
        rows.append(row)
    return _table(head, rows, marked="gate")


def _stratum_table(edition: Mapping[str, Any]) -> str:
    strata = edition["questions_by_stratum"]
    head = ["policy"] + [f"{_text(stratum(name))}<br>{number(count)}" for name, count in strata.items()]
    rows = [
        [_text(name)] + [percent(policy["em_by_stratum"][s]) for s in strata]
        for name, policy in edition["policies"].items()
    ]
    rows.append(
        ["the gate retrieves"]
        + [percent(edition["policies"]["gate"]["retrieval_rate_by_stratum"][s]) for s in strata]
    )
    rows.append(["retrieval is needed"] + [percent(edition["need_by_stratum"][s]) for s in strata])
    return _table(head, rows, marked="gate", raw_head=True)


def _speed(edition: Mapping[str, Any]) -> str:
    speed = edition.get("speed_up")
    if not speed:
        return ""
    rate = edition["policies"]["gate"]["retrieval_rate"]
    runs = len(speed["seconds"]["gate"])
    return (
        f"<p>Skipping retrieval saves at most f = {percent(speed['avoidable_share'])} of a question's cost,"
        f" so at a retrieval rate of {percent(rate)} at most a factor 1/(1−(1−r)f) = {speed['bound']:.2f};"
        f" {speed['speed_up']:.2f} was measured, {percent(speed['fraction_of_bound'])} of it"
        f" (medians of {runs} runs, policies in turn; single rounds gave {speed['rounds'][0]:.2f} to"
        f" {speed['rounds'][1]:.2f}).</p>"
    )


def _training(report: Mapping[str, Any]) -> str:
    figures = [
        _figure(plots.loss_curve(curve), f"Training loss, {name}. Thin: as logged; thick: running mean.")
        for name, curve in report["losses"].items()
        if curve
    ]
    if report["expert_load"]:
        figures.append(
            _figure(
                plots.expert_load(report["expert_load"]),
                "Expert load: how each sparse layer spreads its tokens.",
            )
        )
    return f'<h2>Training</h2><div class="figures">{"".join(figures)}</div>' if figures else ""


def _method(report: Mapping[str, Any]) -> str:
    parts = ["<h2>How this was measured</h2>"]
    if report["notes"]:
        parts.append("<ul>" + "".join(f"<li>{_text(note)}</li>" for note in report["notes"]) + "</ul>")
    if report["stages"]:
        longest = max(report["stages"].values()) or 1
        rows = [
            [
                _text(name),
                duration(seconds),
                f'<div class="bar" style="width:{100 * seconds / longest:.1f}%"></div>',
            ]
            for name, seconds in report["stages"].items()
        ]
        parts.append("<h3>Wall time by stage</h3>" + _table(["stage", "", ""], rows, kind="stages"))
    settings = {"seed": report["seed"], "bootstrap samples": report["replicates"], **report["settings"]}
    for title, values in (("Settings", settings), ("Versions", report["versions"])):
        rows = [[_text(key), _text(value)] for key, value in values.items() if value is not None]
        parts.append(f"<h3>{title}</h3>" + _table(["", ""], rows, kind="narrow"))
    return "".join(parts)


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    kind: str = "",
    marked: str = "",
    raw_head: bool = False,
) -> str:
    """Rows of HTML cells; the row whose first cell is ``marked`` stands out. Empty heads give no head."""
    top = "".join(f"<th>{cell if raw_head else _text(cell)}</th>" for cell in head) if any(head) else ""
    lines = []
    for row in rows:
        mark = ' class="gate"' if marked and row[0] == marked else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    table = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = _text(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _unit_interval(bounds: Sequence[float | None]) -> str:
    return "" if None in bounds else f"{bounds[0]:.3f}–{bounds[1]:.3f}"


def _text(value: Any) -> str:
    return html.escape(str(value))
