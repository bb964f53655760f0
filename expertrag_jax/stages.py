"""Progress of a job in stages: a bar while a stage runs, one line with its seconds when it is done."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Stages:
    """Runs stages one after the other and keeps their wall seconds.

    Attributes:
      seconds: stage -> wall seconds, in the order in which they ran.
    """

    def __init__(self, count: int, console: Console | None = None):
        self.seconds: dict[str, float] = {}
        self._count = count
        self._console = console or Console(file=sys.stdout)  # fixed, so that ``quiet`` does not silence it
        self._start = time.monotonic()

    @property
    def wall_seconds(self) -> float:
        """Since the first stage could have begun."""
        return time.monotonic() - self._start

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """A stage; the block gets ``advance(steps=1, note="")``.

        The note of the last call stands in the stage's line.
        """
        place = f"[{len(self.seconds) + 1}/{self._count}]"
        start, told = time.monotonic(), {"note": ""}
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(f"{place} {name}", total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                told["note"] = note or told["note"]
                progress.update(task, advance=steps, note=told["note"])

            yield advance
        self.seconds[name] = time.monotonic() - start
        line = f"{place} {name}: {self.seconds[name]:.1f} s"
        self._console.print(line + (f"  {told['note']}" if told["note"] else ""), markup=False, highlight=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what an inner job prints, its progress bars too; its errors are raised as always."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
