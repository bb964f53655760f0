"""Which processes belong together, by flags and by what launchers leave in the environment."""

import logging
import subprocess
import sys
import time

import pytest

from expertrag_jax import launch, processes
from expertrag_jax.errors import UserError
from expertrag_jax.processes import Launcher

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "JAX_COORDINATOR")


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (SLURM, Launcher("Slurm", 4, 3)),
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), Launcher("Slurm", 4, 3)),
        (without(SLURM, "SLURM_STEP_NODELIST"), None),  # the script of sbatch
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),  # srun --pty in a larger allocation
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI | ORTE, Launcher("Open MPI", 2, 1)),
        (OPEN_MPI | ORTE | SLURM, Launcher("Open MPI", 2, 1)),  # mpirun in a Slurm job
        (OPEN_MPI, Launcher("Open MPI", 2, 1, finds_coordinator=False)),  # Open MPI 5
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"PMI_SIZE": "8", "PMI_RANK": "0"}, Launcher("MPI", 8, 0, finds_coordinator=False)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no job
    ],
)
def test_launchers(environment, found):
    assert processes.find_launcher(environment) == found


def test_an_indexed_kubernetes_job_needs_its_package(monkeypatch, caplog):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert processes.find_launcher(pod) is None
    assert "without the package kubernetes it runs alone" in caplog.text
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: object())
    assert processes.find_launcher(pod) == Launcher("Kubernetes")


def test_a_tpu(monkeypatch):
    import jax

    monkeypatch.setattr(type(jax.config), "jax_platforms", "tpu,cpu", raising=False)
    assert processes.find_launcher({}) == Launcher("a TPU")


@pytest.fixture
def joined(monkeypatch):
    """``joined(environment, *flags, detect=True)`` -> what JAX is asked for, or None."""
    import os

    import jax

    def run(environment, address=None, count=None, index=None, detect=True, error=None):
        for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked = []

        def initialize(**arguments):
            asked.append(arguments)
            if error:
                raise error

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        processes.join(address, count, index, 30, detect)
        if not asked:
            return None
        assert asked[0]["heartbeat_timeout_seconds"] == 28  # the others end up to 1.5 s later
        assert asked[0]["shutdown_timeout_seconds"] == 30
        return tuple(asked[0][name] for name in ("coordinator_address", "num_processes", "process_id"))

    return run


def test_flags_and_environment_together(joined):
    assert joined({}) is None
    assert joined(SLURM) == (None, 4, 3)
    assert joined(SLURM, detect=False) is None
    assert joined(SLURM, count=1) is None  # the way to run alone inside
    assert joined(SLURM, "auto", detect=False) == (None, 4, 3)
    assert joined({}, "host0:1234", 2, 0) == ("host0:1234", 2, 0)
    assert joined(OPEN_MPI, "host0:1234") == ("host0:1234", 2, 1)
    assert joined({}, "host0:1234", 1, 0) == ("host0:1234", 1, 0)


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({}, {"count": 2}, "belong together"),
        ({}, {"address": "host0:1234"}, "belong together"),
        ({}, {"address": "auto"}, "finds no Slurm step"),
        ({}, {"address": "a:1", "count": 2, "index": 2}, "are 0 to 1"),
        (OPEN_MPI, {}, "Open MPI started 2 processes and does not say where process 0 is"),
    ],
)
def test_what_does_not_fit_together_is_refused(joined, environment, flags, words):
    with pytest.raises(UserError, match=words):
        joined(environment, **flags)


def test_a_tpu_without_other_hosts_runs_alone(joined, monkeypatch, caplog):
    monkeypatch.setattr(processes, "_on_tpu", lambda: True)
    assert joined({}) == (None, None, None)
    with caplog.at_level(logging.WARNING):
        assert joined({}, error=ValueError("coordinator_address should be defined.")) == (None, None, None)
    assert "runs alone" in caplog.text
    with pytest.raises(ValueError, match="address"):  # what was asked for by flags is not given up
        joined({}, "host0:1234", 2, 0, error=ValueError("address"))


def test_only_jobs_for_several_processes_look_for_others():
    assert launch.load("expertrag_jax.train")[0].SEVERAL_PROCESSES
    assert not hasattr(launch.load("expertrag_jax.answer")[0], "SEVERAL_PROCESSES")


def test_a_process_knows_when_it_was_started():
    program = "import time; time.sleep(0.5); from expertrag_jax import processes; "
    program += "print(time.monotonic() - processes.start_time())"
    before = time.monotonic()
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert 0.5 <= float(told.stdout) <= time.monotonic() - before + 0.1
