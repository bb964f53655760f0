"""What a case's outcome is called, and whether it is a fault."""

from __future__ import annotations

import re
from pathlib import Path

from command import Ended

WRITTEN_BY = ("run/", "model/gate.json", "demo/", "cache.sqlite", "partial.jsonl")
"""Files that commands may write again."""

VOLATILE = re.compile(
    r"^(run\d?/(logs|checkpoints)/|report/report|demo/|cache.sqlite|exported/(manifest.json|parameters|programs))"
)
"""Results whose bytes differ between two right runs: times, and names of arrays."""
TIMED = re.compile(r"^(evaluate|export|infer|demo)")
"""Commands that print times, and whose results are files."""


def judge(command: str, ended: Ended, expected: Ended, damaged: Path | None, free: bool) -> tuple[str, str]:
    """(verdict, why); see ``fuzz.py``.

    Args:
      command: its name in ``kinds.COMMANDS``.
      ended: of the damaged case.
      expected: of the same command on the undamaged files.
      damaged: the changed file, relative to the case's folder; None if an argument was changed.
      free: whether what was changed may be right too.
    """
    if ended.code is None:
        return "FAULT", f"no end in {ended.seconds:.0f} s"
    if ended.code < 0:
        return "FAULT", f"ended by signal {-ended.code}"
    if "Traceback (most recent call last)" in ended.printed:
        return "FAULT", "a traceback"
    if ended.code == 2:
        return _refused(ended, damaged)
    if ended.code not in (0, 3):
        return "FAULT", f"exit code {ended.code}"
    equal = TIMED.match(command) or _told(ended) == _told(expected)
    if equal and _results(ended, expected) == _results(expected, expected):
        return "unchanged", ""
    if _warnings(ended) - _warnings(expected):
        return "warned", ""
    if free:
        return "accepted", ""
    return "FAULT", "a damaged file was accepted without a word"


def _refused(ended: Ended, damaged: Path | None) -> tuple[str, str]:
    lines = ended.printed.strip().splitlines()
    sentence = lines[-1] if lines else ""
    usage = re.match(r"expertrag \w+: error: ", sentence)  # argparse's own
    if not usage and not sentence.startswith("error: "):
        return "FAULT", "exit code 2 without a sentence at the end"
    if not usage and len(re.findall(r"^error: ", ended.printed, re.MULTILINE)) != 1:
        return "FAULT", "more than one error"
    if damaged is not None and not _names(sentence, damaged):
        return "FAULT", "the sentence names neither the file, its folder nor a record"
    changed = [
        name for name, digest in ended.before.items()
        if ended.after.get(name) != digest and not name.startswith(WRITTEN_BY)
    ]  # fmt: skip
    if changed:
        return "FAULT", f"refused, and changed {changed[0]}"
    return "refused", ""


def _names(sentence: str, damaged: Path) -> bool:
    places = (damaged.name, *(part.name for part in damaged.parents if part.name))
    record = re.search(r"(question|passage|document) '|another reader vocabulary", sentence)
    return record is not None or any(name in sentence for name in places)


def _results(ended: Ended, expected: Ended) -> dict[str, str]:
    """The digests of what the command made; a damaged file that it has mended is none of it."""
    return {
        name: digest
        for name, digest in ended.after.items()
        if digest not in (ended.before.get(name), expected.before.get(name)) and not VOLATILE.search(name)
    }


def _warnings(ended: Ended) -> set[str]:
    """The warnings in what it printed, without times and places."""
    lines = re.findall(r"^\d\d:\d\d:\d\d [WE] (.*)", ended.printed, re.MULTILINE)
    return {re.sub(r"/\S+", "", line) for line in lines}


def _told(ended: Ended) -> list[str]:
    """What it printed, without times, rates and places."""
    text = re.sub(r"/\S+|\d\d:\d\d:\d\d|[\d.]+ s\b|\d+ starts|examples_per_second \S+", "", ended.printed)
    lines = re.split(r"[\r\n]", text)
    return [line for line in lines if line.strip() and not re.search(r"\|| time |WARNING|/s", line)]
