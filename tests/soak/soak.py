"""Kills a training run at random moments, starts it again each time, and compares its end with an uninterrupted run.

    python tests/soak/soak.py [--kills 30] [--seed 0] [--experts] [--processes 1] [--folder DIR]

The run (``run.py``) has two phases, dropout, micro-batches, batches of two shapes, and an asynchronous checkpoint every
10 steps, on a mesh of data=2 x fsdp=2 devices; ``--experts``: one phase of a sparse layer on data=2 x expert=2. A
moment is a time after a start, drawn so that kills fall into start-up, compilation, steps and writes. Of several
processes one is killed, drawn too, and the others must end by themselves. A run that comes to its end before all kills
are spent is compared and begun anew. Prints a line per kill and a verdict; exit code 1 where a bit of a final state
differs, or where a process that has saved since its start outlives a killed one for longer than the heartbeat allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
RUN = Path(__file__).with_name("run.py")
HEARTBEAT = 8  # seconds


@dataclasses.dataclass(frozen=True)
class Job:
    """The run that is killed: its programs' cache, its log, its processes and their flags."""

    cache: Path
    log: Path
    processes: int
    flags: tuple[str, ...]

    def start(self, model_dir: Path) -> list[subprocess.Popen]:
        """The run, in processes of its own, from its newest checkpoint or from nothing."""
        devices = f"--xla_force_host_platform_device_count={4 // self.processes}"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=false {devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        command = [sys.executable, str(RUN), str(model_dir), *self.flags, f"--heartbeat={HEARTBEAT}"]
        command += [f"--address={free_address()}", f"--count={self.processes}"]
        with self.log.open("a") as told:
            return [
                subprocess.Popen([*command, f"--index={index}"], env=environment, stdout=told, stderr=told)
                for index in range(self.processes)
            ]

    def finish(self, started: list[subprocess.Popen], seconds: float) -> None:
        """Waits for the end of a run; SystemExit with its log where it fails or hangs."""
        ends = time.monotonic() + seconds
        try:
            codes = [process.wait(max(0.0, ends - time.monotonic())) for process in started]
        except subprocess.TimeoutExpired:
            stop(started)
            raise SystemExit(f"the run did not end within {seconds:.0f} s:\n{self.log.read_text()[-4000:]}") from None
        if any(codes):
            raise SystemExit(f"the run ended with exit codes {codes}:\n{self.log.read_text()[-4000:]}")


def free_address() -> str:
    """Of this machine, with a port that nobody listens on."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{port.getsockname()[1]}"


def stop(started: list[subprocess.Popen]) -> None:
    """Kills what is left."""
    for process in started:
        process.kill()
        process.wait()


def outlived(started: list[subprocess.Popen], joined: bool) -> float | None:
    """Seconds until all others had ended after one of them was killed; None where they had to be stopped.

    Processes that were still looking for one another wait for a lost one as long as a start may take, so only
    ``joined`` ones must end.
    """
    begin = time.monotonic()
    while any(process.poll() is None for process in started):
        if time.monotonic() - begin > HEARTBEAT + 2 + (0 if joined else 10):
            stop(started)
            return None
        time.sleep(0.05)
    return time.monotonic() - begin


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
    parser.add_argument("--experts", action="store_true", help="a sparse layer on data=2 x expert=2")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2, 4), help="that share the four devices")
    parser.add_argument("--folder", type=Path, help="of the runs; default: one that is deleted at the end")
    arguments = parser.parse_args()
    flags = ("--experts",) if arguments.experts else ()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        job = Job(folder / "compiled", folder / "log.txt", arguments.processes, flags)
        return soak(job, folder, arguments.kills, random.Random(arguments.seed))


def soak(job: Job, folder: Path, kills: int, rng: random.Random) -> int:
    """Exit code."""
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    for model_dir in (undisturbed, killed):
        shutil.rmtree(model_dir, ignore_errors=True)
    begin = time.monotonic()
    job.finish(job.start(killed), 600)  # compiles for all that follow
    warm = time.monotonic()
    job.finish(job.start(undisturbed), 600)
    whole = time.monotonic() - warm
    if not same(killed, undisturbed):
        return 1
    shutil.rmtree(killed)
    print(f"undisturbed run: {steps(undisturbed)[-1]} steps in {whole:.1f} s", flush=True)
    done, starts, asserted = 0, 0, 0
    while done < kills:
        started, newest = job.start(killed), (steps(killed) or [0])[-1]
        starts += 1
        wait = rng.uniform(0.1, 0.6) * whole
        victim = rng.choice(started)
        try:
            victim.wait(wait)
        except subprocess.TimeoutExpired:
            victim.kill()
            done += 1
            found = steps(killed)
            seconds = outlived(started, joined=bool(found) and found[-1] > newest)
            print(f"kill {done:2} after {wait:5.1f} s: {left_behind(killed, seconds, job.processes)}", flush=True)
            if found and found[-1] > newest:
                asserted += 1
                if seconds is None:
                    return 1
            continue
        job.finish(started, HEARTBEAT)
        print(f"start {starts} came to the end in less than {wait:.1f} s: once more from the beginning", flush=True)
        if not same(killed, undisturbed):
            return 1
        shutil.rmtree(killed)
    job.finish(job.start(killed), 600)
    equal = same(killed, undisturbed)
    print(f"{done} kills in {time.monotonic() - begin:.0f} s, {asserted} of them behind a new checkpoint", flush=True)
    return 0 if equal and asserted else 1


def left_behind(model_dir: Path, seconds: float | None, processes: int) -> str:
    """What a kill left behind."""
    found = steps(model_dir)
    words = [f"newest checkpoint {found[-1]}" if found else "no checkpoint yet"]
    words += ["one half written"] * bool(half_written(model_dir))
    if processes > 1:
        words.append("the others were stopped" if seconds is None else f"the others ended after {seconds:.1f} s")
    return ", ".join(words)


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
