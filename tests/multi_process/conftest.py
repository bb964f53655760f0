"""Jobs of several processes on this machine, which always end."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMEOUT = 120  # seconds for a whole job


@dataclasses.dataclass
class Ended:
    """How one process ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float  # since the start of the job


def free_address():
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{port.getsockname()[1]}"


def run_job(commands, environment, folder, timeout=TIMEOUT):
    """Runs a command per process; whatever happens, none is left. What they print goes through files: a pipe that
    nobody reads would stop them."""
    start = time.monotonic()
    started, seconds = [], {}
    try:
        for index, command in enumerate(commands):
            streams = [(folder / f"{name}.{index}").open("w") for name in ("stdout", "stderr")]
            started.append(subprocess.Popen(command, env=environment, stdout=streams[0], stderr=streams[1]))
            for stream in streams:
                stream.close()
        while len(seconds) < len(started) and time.monotonic() - start < timeout:
            for index, process in enumerate(started):
                if index not in seconds and process.poll() is not None:
                    seconds[index] = time.monotonic() - start
            time.sleep(0.02)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    told = [[(folder / f"{name}.{i}").read_text() for name in ("stdout", "stderr")] for i in range(len(commands))]
    assert len(seconds) == len(started), "\n".join(f"process {i}: {text}" for i, (_, text) in enumerate(told))
    return [Ended(process.returncode, *told[i], seconds[i]) for i, process in enumerate(started)]


@pytest.fixture(scope="session")
def environment(tmp_path_factory, xla_flags):
    """``environment(devices)`` of a process; programs are compiled once for all jobs of the same layout."""
    cache = tmp_path_factory.mktemp("compiled")

    def make(devices):
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    return make


@pytest.fixture(scope="session")
def run_together(environment, tmp_path_factory):
    """``run_together(command, count, devices)`` runs it ``count`` times at once, with the flags that join them."""

    def run(command, count, devices):
        flags = [f"--coordinator_address={free_address()}", f"--process_count={count}"]
        commands = [[*command, *flags, f"--process_index={index}"] for index in range(count)]
        return run_job(commands, environment(devices), tmp_path_factory.mktemp("told"))

    return run


@pytest.fixture(scope="session")
def train(environment, tmp_path_factory):
    """``train(model_dir, count, *arguments)`` runs ``worker.py`` as ``count`` processes with 8 devices in all."""

    def run(model_dir, count, *arguments):
        shared = [str(model_dir), f"--address={free_address()}", f"--count={count}", *map(str, arguments)]
        commands = [[sys.executable, str(HERE / "worker.py"), *shared, f"--index={index}"] for index in range(count)]
        return run_job(commands, environment(8 // count), tmp_path_factory.mktemp("told"))

    return run
