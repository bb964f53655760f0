"""A disk that is full stops the run with one sentence, and earlier checkpoints stay whole. In processes of their own:
a limit on the size of files (EFBIG) goes everywhere, a small file system of its own (ENOSPC) where namespaces do."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

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


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    path = tmp_path_factory.mktemp("job") / "full_disk_job.py"
    path.write_text(JOB)
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


def test_a_small_file_system(job, tmp_path):
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        possible = subprocess.run([*mount, f"mount -t tmpfs -o size=3m x {tmp_path}"], capture_output=True, timeout=20)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if possible.returncode:
        pytest.skip(f"no file system of one's own here: {possible.stderr.decode()}")
    directory, copy = tmp_path / "checkpoints", tmp_path.with_name(tmp_path.name + "_copy")
    command = f"mount -t tmpfs -o size=3m x {tmp_path} && {sys.executable} {job} --directory={directory} --how=small"
    keep = f"; code=$?; cp -r {directory} {copy}; exit $code"  # the file system ends with the shell
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([*mount, command + keep], env=environment, capture_output=True, text=True, timeout=120)
    check(result, directory)
    assert restored(copy).std() > 0.9
