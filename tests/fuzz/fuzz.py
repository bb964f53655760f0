"""Damages what the commands read, one thing at a time, and checks how they respond.

    python tests/fuzz/fuzz.py [--cases 1000] [--seed N] [--jobs 2] [--bench DIR] [--only TEXT] [--case N] [--json FILE]

A case copies valid files into a new folder, damages one of them (or one argument, or one gin value), and runs one
command there in a process of its own. Every outcome is one of

    refused    exit code 2 and one sentence
    unchanged  exit code 0 and the results of the undamaged files
    warned     exit code 0, other results, and a warning
    accepted   exit code 0, other results, no warning, if ``kinds.py`` says that such a file may be intended
    FAULT      a traceback, a hang, death by a signal, a sentence that does not name the file, a file changed by a
               command that refused, or a damaged file accepted without a warning

The seed comes from the clock and is printed, with the number of each fault's case: ``--seed`` and ``--case`` repeat it.
Exit code 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import bench  # noqa: E402
import kinds  # noqa: E402
import mutations  # noqa: E402
from command import Ended, run_command  # noqa: E402
from judge import judge  # noqa: E402

from expertrag_jax.main import COMMANDS  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Case:
    """One damage and one command.

    Attributes:
      number: from 0; with the seed it decides the rest.
      kind: name of the kind of file, or "arguments" or "gin values".
      command: name in ``kinds.COMMANDS``.
      arguments: of the command.
      path: of the damaged file in the case's folder; None if an argument is damaged.
      change: what is done, in a word.
      seed: of the damage itself.
      free: see ``kinds.Kind``.
    """

    number: int
    kind: str
    command: str
    arguments: list[str]
    path: Path | None
    change: str
    seed: str
    free: bool


def draw(number: int, seed: int, bench_dir: Path) -> Case:
    """The case of a number: kinds take turns, so that each has its share, and commands within a kind."""
    rng = random.Random(f"{seed}/{number}")
    turn = number % (len(kinds.KINDS) + 12)
    if turn >= len(kinds.KINDS):
        return _argument(number, rng, turn % 2 == 0)
    kind = kinds.KINDS[turn]
    command = rng.choice(kind.commands)
    path = rng.choice(kind.paths(bench_dir))
    change = rng.choice(mutations.PLACE if rng.random() < 0.15 else kind.mutations)
    return Case(
        number, kind.name, command, kinds.COMMANDS[command], path, change.__name__, f"{seed}/{number}/damage", kind.free
    )


def _argument(number: int, rng: random.Random, macro: bool) -> Case:
    command = rng.choice([name for name in kinds.COMMANDS if " --verify" not in name])
    arguments, word = list(kinds.COMMANDS[command]), rng.choice(kinds.WORDS)
    if macro:
        arguments.append(f"--gin.{rng.choice(kinds.MACROS)}={word}")
    else:
        flag = rng.choice([name for name in flags_of(arguments[0]) if name != "--overwrite"])
        arguments = [argument for argument in arguments if argument.partition("=")[0] != flag]
        arguments.insert(1, rng.choice([f"{flag}={word}", f"{flag}={word}", f"{flag[:-1]}={word}", flag, word]))
    if command == "demo" or macro:
        arguments.append("--dry_run")  # a right value would train for minutes
    changed = arguments[-2] if macro else arguments[1]
    return Case(number, "gin values" if macro else "arguments", command, arguments, None, changed[:60], "", True)


def flags_of(command: str) -> list[str]:
    """The flags of a command's own."""
    module = importlib.import_module(COMMANDS[command][0].partition(":")[0])
    return list(module.FLAGS)


def damage(case: Case, folder: Path) -> None:
    """Changes the case's file."""
    if case.path is None:
        return
    rng, path = random.Random(case.seed), folder / case.path
    change = getattr(mutations, case.change)
    if change in mutations.PLACE:
        change(rng, path)
    else:
        data = path.read_bytes()
        path.write_bytes(change(rng, data) if data else rng.randbytes(9))


def prepare(bench_dir: Path, folder: Path) -> None:
    """The case's folder: a copy of the bench, with the places that ``kinds.WORDS`` names."""
    shutil.copytree(bench_dir, folder, symlinks=True)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")


def run_case(case: Case, bench_dir: Path, expected: Ended, work: Path, seconds: float) -> tuple[Case, Ended, str, str]:
    """(the case, how it ended, the verdict, why)"""
    folder = work / f"case{case.number}"
    prepare(bench_dir, folder)
    damage(case, folder)
    ended = run_command(case.arguments, folder, seconds)
    verdict, why = judge(case.command, ended, expected, case.path, case.free)
    shutil.rmtree(folder, ignore_errors=True)
    return case, ended, verdict, why


def expectations(names: set[str], bench_dir: Path, work: Path, seconds: float) -> dict[str, Ended]:
    """How each command ends on the undamaged files; SystemExit if one fails."""
    expected = {}
    for name in sorted(names):
        folder = work / "right"
        prepare(bench_dir, folder)
        expected[name] = ended = run_command(kinds.COMMANDS[name], folder, seconds)
        shutil.rmtree(folder)
        if ended.code != (2 if name == "demo" else 0):
            raise SystemExit(f"{name} fails on undamaged files ({ended.code}):\n{ended.printed[-3000:]}")
        print(f"{name}: {ended.seconds:.1f} s", flush=True)
    return expected


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=180, help="after which a command hangs")
    parser.add_argument("--bench", type=Path, help="folder of the right files; made if it is not there")
    parser.add_argument("--only", default="", help="cases whose kind or command holds this text")
    parser.add_argument("--case", type=int, help="this case alone, with what it printed")
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{work}/programs")
        return _run(options, Path(work))


def _run(options: argparse.Namespace, work: Path) -> int:
    bench_dir = options.bench or work / "bench"
    if not bench_dir.exists():
        bench.make(bench_dir)
    numbers = range(options.cases) if options.case is None else [options.case]
    cases = [draw(number, options.seed, bench_dir) for number in numbers]
    cases = [case for case in cases if options.only in f"{case.kind}/{case.command}"]
    expected = expectations({case.command for case in cases}, bench_dir, work, options.seconds)
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        started = [
            pool.submit(run_case, case, bench_dir, expected[case.command], work, options.seconds) for case in cases
        ]
        for future in started:
            case, ended, verdict, why = future.result()
            outcomes.append((case, verdict))
            if len(outcomes) % 50 == 0:
                print(f"{len(outcomes)} of {len(cases)} cases", flush=True)
            if verdict == "FAULT" or options.case is not None:
                print(f"{verdict} {case.number} [{case.kind}] {case.command}: {case.change} {case.path or ''}: {why}")
                shown = ended.printed[-4000 if options.case is not None else -600 :]
                print("   " + "\n   ".join(shown.splitlines()), flush=True)
    report(outcomes, options.json, options.seed)
    return int(any(verdict == "FAULT" for _, verdict in outcomes))


def report(outcomes: list[tuple[Case, str]], path: Path | None, seed: int) -> None:
    """Prints the counts by kind and by command, and writes them."""
    tables = {}
    for title, name in (("kind", lambda case: case.kind), ("command", lambda case: case.command.split()[0])):
        table = collections.defaultdict(collections.Counter)
        for case, verdict in outcomes:
            table[name(case)][verdict] += 1
        tables[title] = {row: dict(counts) for row, counts in sorted(table.items())}
        columns = ("refused", "unchanged", "warned", "accepted", "FAULT")
        print(f"\n{title:<32}{'cases':>8}" + "".join(f"{column:>11}" for column in columns))
        for row, counts in [*sorted(table.items()), ("all", sum(table.values(), collections.Counter()))]:
            print(f"{row:<32}{counts.total():>8}" + "".join(f"{counts[column]:>11}" for column in columns))
    if path:
        path.write_text(json.dumps({"seed": seed, "cases": len(outcomes), **tables}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
