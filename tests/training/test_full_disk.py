"""A disk that is full stops the run with one sentence, and earlier checkpoints stay whole. In processes of their own:
a limit on the size of files (EFBIG) goes everywhere, a small file system of its own (ENOSPC) where namespaces do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.training import loop
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[2]

JOB = '''
"""Saves a checkpoint, fills the disk, and saves more."""
import resource
import jax
from expertrag_jax import launch, partitioning
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import TrainState

FLAGS = {"--directory": ("directory", "of checkpoints"), "--how": ("how", ""), "--at_the_end": ("at_the_end", "")}

def state(value):
    params = {"kernel": jax.numpy.full((512, 1024), value) * jax.random.normal(jax.random.key(0), (512, 1024))}
    return TrainState(*(jax.numpy.int32(value) for _ in range(3)), params=params, optimizer_state=())

def full_disk_job(directory: str, how: str = "limit", at_the_end: bool = False):
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(1, state(1), {})
        checkpoints.wait()
        print("saved 1", flush=True)
        if how == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
        checkpoints.save(2, state(2), {})
        if not at_the_end:
            checkpoints.save(3, state(3), {})
            print("saved 3", flush=True)
    print("the end", flush=True)

if __name__ == "__main__":
    launch.run("full_disk_job")
'''


RUN = '''
"""Trains the toy for 60 steps with a checkpoint every 20; at step 25 the disk is full."""
import resource
import time
from pathlib import Path
import jax
import toy
from expertrag_jax import launch, partitioning
from expertrag_jax.training import loop

FLAGS = {"--model_dir": ("model_dir", ""), "--how": ("how", "")}

def full_disk_run(model_dir: str, how: str = "limit"):
    def fill():
        while not (Path(model_dir) / "checkpoints" / "20").exists():  # it is written while training goes on
            time.sleep(0.01)
        if how == "limit":
            size = (Path(model_dir) / "logs" / "metrics.jsonl").stat().st_size
            return resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
        try:
            with open(Path(model_dir).parent / "others", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            print("full", flush=True)

    data = {"body": lambda start: toy.data(start, 24, fill), "head": toy.data}
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    loop.train(toy.Toy(steps=(60, 0)), data, model_dir, mesh=mesh, checkpoint_period=20, log_period=1)

if __name__ == "__main__":
    launch.run("full_disk_run")
'''


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "full_disk_job.py"
    path.write_text(JOB)
    (path.parent / "full_disk_run.py").write_text(RUN)
    shutil.copy(Path(__file__).with_name("toy.py"), path.parent)
    return path


def check(result, directory):
    assert result.returncode == 2, result.stderr
    assert result.stdout == "saved 1\n"
    assert result.stderr == (
        f"error: The disk is full: a checkpoint could not be written to {directory}; earlier ones are whole. Make room "
        "and run the same command again, which goes on from step 1.\n"
    )


def restored(directory):
    """What the newest checkpoint holds; opening it again removes the half-written one."""
    with Checkpoints(directory) as checkpoints:
        assert checkpoints.latest == 1
        scalar, kernel = jax.ShapeDtypeStruct((), "int32"), jax.ShapeDtypeStruct((512, 1024), "float32")
        like = TrainState(scalar, scalar, scalar, params={"kernel": kernel}, optimizer_state=())
        found = checkpoints.restore(1, like)  # compares fingerprints
    assert [path.name for path in directory.iterdir()] == ["1"]
    return found.params["kernel"]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_limit_on_files(job, run_python, tmp_path, at_the_end):
    directory = tmp_path / "checkpoints"
    check(run_python(job, f"--directory={directory}", f"--at_the_end={at_the_end}"), directory)
    assert restored(directory).std() > 0.9


@pytest.fixture
def on_a_small_file_system(tmp_path):
    """``run(directory, script, *arguments)`` on 3 MiB at ``tmp_path``; (how it ended, a copy of ``directory``)."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        possible = subprocess.run([*mount, f"mount -t tmpfs -o size=3m x {tmp_path}"], capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if possible.returncode:
        pytest.skip(f"no file system of one's own here: {possible.stderr.decode()}")

    def run(directory, script, *arguments):
        copy = tmp_path.with_name(tmp_path.name + "_copy")
        command = f"mount -t tmpfs -o size=3m x {tmp_path} && {sys.executable} {script} {' '.join(arguments)}"
        keep = f"; code=$?; cp -r {directory} {copy}; exit $code"  # the file system ends with the shell
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([*mount, command + keep], env=environment, capture_output=True, text=True, timeout=120)
        return done, copy

    return run


def test_a_small_file_system(job, on_a_small_file_system, tmp_path):
    directory = tmp_path / "checkpoints"
    result, copy = on_a_small_file_system(directory, job, f"--directory={directory}", "--how=small")
    check(result, directory)
    assert restored(copy).std() > 0.9


def check_run(result, model_dir, left, toy, told):
    """It ended before step 40, and what it left in ``left`` goes on from step 20, without a damaged checkpoint."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"error: The disk is full: the log could not be written to {model_dir / 'logs'}; checkpoints are whole. Make "
        "room and run the same command again, which goes on from the newest of them."
    )
    assert [path.name for path in (left / "checkpoints").iterdir()] == ["20"]
    positions, mesh = [], partitioning.make_mesh(devices=jax.devices()[:1])

    def data(start):
        positions.append(start)
        return toy.data(start)

    state = loop.train(toy.Toy(steps=(60, 0)), {"body": data, "head": data}, left, mesh=mesh, log_period=1)
    assert (int(state.step), positions) == (60, [20]) and not any("damaged" in message for message in told())
    records = [json.loads(line) for line in (left / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 61))


def test_a_run_that_meets_a_limit_on_files(job, run_python, toy, tmp_path, told):
    result = run_python(job.with_name("full_disk_run.py"), f"--model_dir={tmp_path / 'm'}")
    check_run(result, tmp_path / "m", tmp_path / "m", toy, told)


def test_a_run_that_fills_a_small_file_system(job, on_a_small_file_system, toy, tmp_path, told):
    script, model_dir = job.with_name("full_disk_run.py"), tmp_path / "m"
    result, copy = on_a_small_file_system(model_dir, script, f"--model_dir={model_dir}", "--how=small")
    assert result.stdout == "full\n"
    check_run(result, model_dir, copy, toy, told)
