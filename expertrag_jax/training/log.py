"""Reading back what a run logged (see ``telemetry``)."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from expertrag_jax.training.mastery import summary
from expertrag_jax.training.model_dir import LOGS

_LOG = logging.getLogger(__name__)


def read_records(model_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run in their order; none where nothing was logged."""
    return read_lines(Path(model_dir) / LOGS / "metrics.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; what is damaged, or was cut off by a kill, is left out with a warning."""
    if not path.is_file():
        return []
    found, damaged = [], []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            found.append(record)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged.append(number)
    if damaged and damaged != [len(lines)]:  # a last line that a kill cut off is no news
        _LOG.warning("%s: %d of %d lines are damaged and left out", path, len(damaged), len(lines))
    return found


def losses_by_phase(model_dir: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Phase -> (step, loss) of each record."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for record in read_records(model_dir):
        if "loss" in record:
            losses.setdefault(record["phase"], []).append((record["step"], record["loss"]))
    return losses


def expert_load(model_dir: str | Path, records: int = 10) -> dict[str, list[float]]:
    """Per sparse layer, the share of tokens of each expert, mean over the last ``records``; empty for a dense model."""
    loads = [record["router/load"] for record in read_records(model_dir) if "router/load" in record][-records:]
    return {f"sparse layer {i + 1}": row for i, row in enumerate(np.mean(loads, axis=0).tolist())} if loads else {}


def missed_marks(model_dir: str | Path) -> list[str]:
    """One sentence for each phase of a run that did not reach its mark."""
    found = []
    for record in read_records(model_dir):
        if record.get("mastery/reached") == 0.0:
            figures = {name.removeprefix("mastery/"): value for name, value in record.items()}
            found.append(summary({"value": None} | figures))
    return found
