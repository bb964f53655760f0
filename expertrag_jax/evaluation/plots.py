"""The report's figures, drawn from its JSON: PNG bytes, one column of a phone wide and sharp on a screen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = {
    "never": "#8a8f98",
    "always": "#1f2933",
    "random": "#b08b4f",
    "gate": "#0b7a75",
    "oracle": "#7b5ea7",
}
MARKERS = {"never": "v", "always": "s", "random": "D", "gate": "o", "oracle": "*"}
_INK, _GRID = "#1f2933", "#e4e7eb"
_SIZE = (5.2, 3.9)  # inches; with 11-point text legible at 340 pixels' width
_DPI = 170


def accuracy_over_rate(edition: dict[str, Any], limits: tuple[float, float] | None = None) -> bytes:
    """Exact match against retrieval rate: the gate's, the oracle's and the random curve, and every policy's
    point.

    Args:
      edition: one edition of the report.
      limits: of the vertical axis, so that editions can be compared; None fits this one.
    """
    figure, axes = _axes("retrieval rate", "exact match")
    plots, policies = edition["plots"], edition["policies"]
    never, always = policies["never"]["em"], policies["always"]["em"]
    axes.plot(plots["rate"], plots["oracle_accuracy"], color=COLOURS["oracle"], lw=1.5, ls=(0, (4, 2)))
    axes.plot([0, 1], [never, always], color=COLOURS["random"], lw=1.5, ls=(0, (1, 1.5)))
    axes.plot(plots["rate"], plots["gate_accuracy"], color=COLOURS["gate"], lw=2.2)
    for name, policy in policies.items():
        low, high = policy["em_interval"]
        error = [[max(0.0, policy["em"] - low)], [max(0.0, high - policy["em"])]]
        axes.errorbar(
            [policy["retrieval_rate"]],
            [policy["em"]],
            yerr=error,
            color=COLOURS.get(name, "#555555"),
            marker=MARKERS.get(name, "P"),
            markersize=12 if name == "oracle" else 8,
            markeredgecolor="white",
            elinewidth=1.2,
            capsize=3,
            ls="none",
            label=name,
            zorder=5,
        )
    axes.set_xlim(-0.04, 1.04)
    if limits:
        axes.set_ylim(*limits)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor=_GRID, fontsize=10)
    return _png(figure)


def accuracy_limits(editions: dict[str, Any]) -> tuple[float, float]:
    """One vertical range that holds every edition's curves and intervals."""
    values: list[float] = []
    for edition in editions.values():
        values += edition["plots"]["gate_accuracy"] + edition["plots"]["oracle_accuracy"]
        values += [bound for policy in edition["policies"].values() for bound in policy["em_interval"]]
    margin = 0.05 * (max(values) - min(values)) + 0.005
    return min(values) - margin, min(1.005, max(values) + margin)


def reliability(edition: dict[str, Any]) -> bytes:
    """How often retrieval was needed, against the gate's probability; below, how many questions."""
    bins, error = edition["plots"]["reliability"], edition["gate_quality"]["ece"]
    figure = Figure(figsize=_SIZE, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    _style(top, "", "frequency of need")
    _style(bottom, "p_ret, the gate's probability", "questions")
    top.plot([0, 1], [0, 1], color=COLOURS["never"], lw=1.2, ls=(0, (4, 2)))
    top.plot(bins["probability"], bins["frequency"], color=COLOURS["gate"], lw=1.6, marker="o", markersize=6)
    top.text(0.03, 0.94, f"ECE {error:.3f}", transform=top.transAxes, va="top", fontsize=12, color=_INK)
    top.set_ylim(-0.03, 1.03)
    bottom.bar(bins["probability"], bins["count"], width=0.045, color=COLOURS["gate"], alpha=0.75)
    bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    bottom.set_xlim(-0.03, 1.03)
    return _png(figure)


def expert_load(load: dict[str, list[float]]) -> bytes:
    """Share of each sparse layer's tokens that its experts got; rows are layers.

    White is the even share; the colours end at nothing and at twice the even share, the same for every run.
    """
    names = list(load)
    table = np.array([load[name] for name in names])
    even = 1 / table.shape[1]
    height = 1.3 + 0.42 * len(names)
    figure = Figure(figsize=(_SIZE[0], max(2.2, height)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(table, cmap="BrBG", vmin=0, vmax=2 * even, aspect="auto")
    for row, column in np.ndindex(*table.shape):
        dark = abs(table[row, column] - even) > 0.6 * even
        text = f"{100 * table[row, column]:.0f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9.5, color="white" if dark else _INK)
    axes.set_xticks(range(table.shape[1]), [str(expert) for expert in range(table.shape[1])], fontsize=10)
    axes.set_yticks(range(len(names)), names, fontsize=10)
    axes.set_xlabel(f"expert (% of the layer's tokens; even is {100 * even:.3g})", fontsize=10.5, color=_INK)
    axes.tick_params(length=0, colors=_INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _png(figure)


def loss_curve(points: Sequence[Sequence[float]]) -> bytes:
    """Training loss against step: every logged value, and a running mean over a twentieth of the run."""
    steps, losses = np.array(points, np.float64).reshape(-1, 2).T
    figure, axes = _axes("step", "loss")
    axes.plot(steps, losses, color=COLOURS["gate"], lw=0.9, alpha=0.35)
    half = len(losses) // 40
    if half:
        total, at = np.concatenate([[0.0], np.cumsum(losses)]), np.arange(len(losses))
        low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(losses))
        axes.plot(steps, (total[high] - total[low]) / (high - low), color=COLOURS["gate"], lw=2)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return _png(figure)


def _axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    _style(axes, xlabel, ylabel)
    return figure, axes


def _style(axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=11.5, color=_INK)
    axes.set_ylabel(ylabel, fontsize=11.5, color=_INK)
    axes.tick_params(labelsize=10.5, colors=_INK, length=0)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#9aa5b1")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    # No software version or date inside: the same numbers give the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
