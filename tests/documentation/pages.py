"""Finds the commands on a Markdown page.

A command is something that a reader is meant to type:

- a statement of a fenced block that is labelled ``bash``, or a whole fenced block that is labelled ``python``;
- in a block without a label, fenced or indented by four spaces, a line that starts one of PROGRAMS. A block with
  another label (``gin``, ``text``) holds no commands;
- inline code that begins with one of PROGRAMS and is complete: it has an argument besides the name of a subcommand, and
  neither ``...`` nor a placeholder in capitals (``--model_dir=MODEL_DIR``). The same words again on one page are the
  same command.

A comment directly before a block, a paragraph or a table says why its commands are not run::

    <!-- not run: needs a cluster with Slurm -->

The reason begins with ``needs`` (hardware, software or data) or ``takes`` (time).
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = r"(?:[\w./]*/)?(?:expertrag|make|python3?|pip)\s+\S"
SHELLS = ("bash", "sh", "shell", "console")
FENCE = re.compile(r" {0,3}(```+|~~~+) *(\w*)")
MARK = re.compile(r"<!--\s*not run:\s*(.*?)\s*-->", re.DOTALL)
REASON = re.compile(r"(needs|takes) \S+")
MEND = "add an entry to tests/documentation/small.py, or write <!-- not run: needs ... --> before it."
INCOMPLETE = re.compile(r"\.\.\.|(?:^|[\s=])[A-Z][A-Z_]+(?=\s|$)")


class PageError(Exception):
    """A page that cannot be read by these rules; the message names page and line."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
      page: path below the root of the checkout.
      line: where it begins, from 1.
      text: a statement of bash without comments, or a Python program.
      language: ``bash`` or ``python``.
      not_run: the reason of its mark; None without a mark.
    """

    page: str
    line: int
    text: str
    language: str = "bash"
    not_run: str | None = None

    @property
    def words(self) -> str:
        """The text on one line, with single spaces."""
        return " ".join(self.text.split())

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.words[:120]}"


def documentation(root: Path) -> dict[str, str]:
    """Returns the text of README.md, CONTRIBUTING.md and docs/**/*.md by page, without docs/results/."""
    paths = [path for name in ("README.md", "CONTRIBUTING.md") if (path := root / name).exists()]
    paths += sorted(path for path in (root / "docs").rglob("*.md") if root / "docs" / "results" not in path.parents)
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def commands(page: str, text: str) -> list[Command]:
    """Returns the commands of a page, in its order.

    Args:
      page: its name.
      text: its Markdown.

    Raises:
      PageError: a block is not closed or is not valid bash, or a mark does not say what is needed.
    """
    found: list[Command] = []
    for block in _blocks(page, text):
        if block.language is None:
            pieces = [piece for piece in _inline(block) if piece[1] not in {command.words for command in found}]
        elif block.language == "python":
            pieces = [(block.line, "\n".join(block.lines))]
        elif block.language in (*SHELLS, ""):
            pieces = list(_statements(page, block))
        else:
            pieces = []
        language = "python" if block.language == "python" else "bash"
        found += [Command(page, line, text, language, block.not_run) for line, text in dict.fromkeys(pieces)]
    return found


def covered(found: Sequence[Command], entries: Mapping[str, Any]) -> tuple[list[tuple[Command, Any]], list[str]]:
    """Gives every command without a mark the entry that says how it is run.

    Args:
      found: the commands of a page.
      entries: what to do with each, by its beginning; of two that fit, the first in their order that is not taken yet.

    Returns:
      The commands that have an entry, each with it; and a sentence for every command and every entry that is left over.
    """
    pairs, problems, left = [], [], dict(entries)
    for command in found:
        if command.not_run is not None:
            continue
        beginning = next((name for name in left if command.words.startswith(name)), None)
        if beginning is not None:
            pairs.append((command, left.pop(beginning)))
        else:
            problems.append(f"{command}: this command is neither run by a test nor marked; {MEND}")
    return pairs, problems + [f"No command of the page begins with {name!r}, as its entry does." for name in left]


@dataclasses.dataclass
class _Block:
    """Lines from ``line`` on; language: of a block of code, "" if it is not labelled; None: a paragraph or table."""

    line: int
    lines: list[str]
    language: str | None
    not_run: str | None = None


def _blocks(page: str, text: str) -> Iterator[_Block]:
    """The blocks of a page, each with the mark before it."""
    lines = MARK.sub(lambda mark: f"\0{' '.join(mark[1].split())}\0" + "\n" * mark[0].count("\n"), text).split("\n")
    place, not_run = 0, None
    while place < len(lines):
        start, line = place, lines[place]
        if not line.strip():
            place += 1
            continue
        if line.startswith("\0"):
            not_run = line.strip("\0 ")
            if not REASON.match(not_run):
                raise PageError(f"{page}:{start + 1}: 'not run: {not_run}' must begin with 'needs' or 'takes'.")
            place += 1
            continue
        if fence := FENCE.match(line):
            place += 1
            while place < len(lines) and not lines[place].strip().startswith(fence[1]):
                place += 1
            if place == len(lines):
                raise PageError(f"{page}:{start + 1}: this block is not closed.")
            block = _Block(start + 2, lines[start + 1 : place], fence[2])
            place += 1
        elif line.startswith(("    ", "\t")):
            while place < len(lines) and (lines[place].startswith(("    ", "\t")) or not lines[place].strip()):
                place += 1
            block = _Block(start + 1, [line[4:] for line in lines[start:place]], "")
        else:
            while place < len(lines) and lines[place].strip() and not re.match(rf"\0|{FENCE.pattern}", lines[place]):
                place += 1
            block = _Block(start + 1, lines[start:place], None)
        block.not_run, not_run = not_run, None
        yield block


def _inline(block: _Block) -> Iterator[tuple[int, str]]:
    """Complete commands in inline code, each with its line."""
    text = "\n".join(block.lines)
    for code in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", text, re.DOTALL):
        words = " ".join(code[2].split())
        least = 3 if words.startswith("expertrag") else 2
        if re.match(PROGRAMS, words) and len(words.split()) >= least and not INCOMPLETE.search(words):
            yield block.line + text.count("\n", 0, code.start()), words


def _statements(page: str, block: _Block) -> Iterator[tuple[int, str]]:
    """Statements of a block of code, each with its line; of a block without a label, those that start a program."""
    lines = iter(enumerate(block.lines, start=block.line))
    for start, line in lines:
        statement = _without_comment(line)
        if not statement.strip() or not block.language and not re.search(rf"(?:^|\s){PROGRAMS}", statement):
            continue
        while not _complete(statement):
            _, line = next(lines, (None, None))
            if line is None:
                raise PageError(f"{page}:{start}: this is not a statement of bash: {statement}")
            statement = _joined(statement, _without_comment(line))
        yield start, statement.strip().removeprefix("$ ").strip()


def _joined(statement: str, line: str) -> str:
    if statement.endswith("\\"):
        return f"{statement[:-1].rstrip()} {line.strip()}"
    return f"{statement}\n{line}"


def _without_comment(line: str) -> str:
    """The line up to a ``#`` that begins a word outside quotes."""
    word = r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s\\'"]|\\$|['"])+"""
    for token in re.finditer(word, line):
        if token[0].startswith("#"):
            return line[: token.start()].rstrip()
    return line.rstrip()


def _complete(statement: str) -> bool:
    """Whether bash takes the text as it is for one or more statements."""
    if statement.endswith("\\"):
        return False
    return subprocess.run(["bash", "-n", "-c", statement], capture_output=True).returncode == 0
