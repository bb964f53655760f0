"""Kills a training run at random moments, starts it again each time, and compares its end with an uninterrupted run.

    python tests/soak/soak.py [--kills 30] [--seed 0] [--folder DIR]

The run (``run.py``) has two phases, dropout, microbatches, batches of two shapes, and an asynchronous checkpoint every
10 steps, on a mesh of data=2 x fsdp=2 devices. A moment is a time after a start, drawn so that kills fall into
start-up, compilation, steps and writes. A run that comes to its end before all kills are spent is compared and begun
anew. Prints a line per kill and a verdict; exit code 1 where a bit of a final state differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RUN = Path(__file__).with_name("run.py")


def start(model_dir: Path, cache: Path, log: Path) -> subprocess.Popen:
    """The run, in a process of its own, from its newest checkpoint or from nothing."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=4",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("a") as told:
        return subprocess.Popen([sys.executable, str(RUN), str(model_dir)], env=environment, stdout=told, stderr=told)


def finish(process: subprocess.Popen, log: Path, seconds: float) -> None:
    """Waits for the end of a run; SystemExit with its log where it fails or hangs."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise SystemExit(f"the run did not end within {seconds:.0f} s:\n{log.read_text()[-4000:]}") from None
    if code:
        raise SystemExit(f"the run ended with exit code {code}:\n{log.read_text()[-4000:]}")


def steps(model_dir: Path) -> list[int]:
    """Of the checkpoints."""
    folder = model_dir / "checkpoints"
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def half_written(model_dir: Path) -> int:
    """Checkpoints that a kill cut off."""
    folder = model_dir / "checkpoints"
    return sum("tmp" in entry.name for entry in folder.iterdir()) if folder.is_dir() else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the runs; default: one that is deleted at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return soak(arguments.folder or Path(temporary), arguments.kills, random.Random(arguments.seed))


def soak(folder: Path, kills: int, rng: random.Random) -> int:
    """Exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    undisturbed, killed, cache, log = (folder / name for name in ("undisturbed", "killed", "compiled", "log.txt"))
    for model_dir in (undisturbed, killed):
        shutil.rmtree(model_dir, ignore_errors=True)
    begin = time.monotonic()
    finish(start(killed, cache, log), log, 600)  # compiles for all that follow
    warm = time.monotonic()
    finish(start(undisturbed, cache, log), log, 600)
    whole = time.monotonic() - warm
    if not same(killed, undisturbed):
        return 1
    shutil.rmtree(killed)
    print(f"undisturbed run: {steps(undisturbed)[-1]} steps in {whole:.1f} s", flush=True)
    done, starts = 0, 0
    while done < kills:
        process = start(killed, cache, log)
        starts += 1
        wait = rng.uniform(0.1, 0.6) * whole
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            found, cut = steps(killed), half_written(killed)
            place = f"newest checkpoint {found[-1]}" if found else "no checkpoint yet"
            print(f"kill {done:2} after {wait:5.1f} s: {place}{', one half written' if cut else ''}", flush=True)
            continue
        finish(process, log, 1)
        print(f"start {starts} came to the end in less than {wait:.1f} s: once more from the beginning", flush=True)
        if not same(killed, undisturbed):
            return 1
        shutil.rmtree(killed)
    finish(start(killed, cache, log), log, 600)
    equal = same(killed, undisturbed)
    print(f"{done} kills in {time.monotonic() - begin:.0f} s", flush=True)
    return 0 if equal else 1


def same(found: Path, expected: Path) -> bool:
    """Whether two runs left the same bits; prints the verdict."""
    one, other = (dict(np.load(model_dir / "logs" / "final.npz")) for model_dir in (expected, found))
    differ = [name for name in one if name not in other or one[name].tobytes() != other[name].tobytes()]
    if differ or one.keys() != other.keys():
        print(f"DIFFERENT: {', '.join(differ) or 'other names'}", flush=True)
        return False
    print(f"equal: {len(one)} arrays, {sum(array.nbytes for array in one.values()):,} bytes, every bit", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
