"""The processes of one job: finding the others, joining them, and leaving so that the others notice.

A job of several processes is started once per host (or per accelerator), by hand with three flags or by a
launcher, whose environment variables say how many there are. Without a flag nothing is joined unless such
variables, or a TPU, are there, so a run on a laptop or in a shell of a cluster starts alone and at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expertrag_jax.errors import UserError

HEARTBEAT_SECONDS = 100
NOTICE_SECONDS = 2  # JAX's service looks once a second for who was silent too long; the others then have to end
AUTO = "auto"

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What a launcher's environment variables say.

    Attributes:
      name: for messages.
      count: processes of this job; None: JAX asks the cluster.
      index: this process, from 0; None: JAX asks the cluster.
      finds_coordinator: whether JAX can tell process 0's address from the environment.
    """

    name: str
    count: int | None = None
    index: int | None = None
    finds_coordinator: bool = True


def find_launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process as one of several, or as the only one of a TPU job; else None.

    MPI is looked for before Slurm, whose variables ``mpirun`` passes on. ``SLURM_STEP_NODELIST`` exists only
    inside ``srun``: the script of ``sbatch`` and a shell of ``salloc`` are no processes of a job. An indexed
    Kubernetes job is asked about its size by JAX, which needs the package ``kubernetes``.
    """
    mpi = _numbers(environment, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if mpi:
        return _of_several(Launcher("Open MPI", *mpi, "OMPI_MCA_orte_hnp_uri" in environment))
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    step = _numbers(environment, tasks, "SLURM_PROCID")
    if step and all(name in environment for name in slurm):
        return _of_several(Launcher("Slurm", *step))
    pmi = _numbers(environment, "PMI_SIZE", "PMI_RANK")
    if pmi:
        return _of_several(Launcher("MPI", *pmi, finds_coordinator=False))
    if _on_tpu():
        return Launcher("a TPU")
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is not None:
            return Launcher("Kubernetes")
        _LOG.warning(
            "this pod belongs to an indexed Kubernetes job, but without the package kubernetes it runs alone: install "
            "it, or give --coordinator_address, --process_count and --process_index"
        )
    return None


def join(address: str | None, count: int | None, index: int | None, heartbeat_seconds: int, detect: bool) -> None:
    """Joins the other processes of this job; must precede any use of a device.

    Args:
      address: ``host:port`` of process 0, ``"auto"``, or None.
      count, index: of processes, and this one; None: the launcher's. A count of 1 alone: join nobody.
      heartbeat_seconds: so long after a process has died the others have ended.
      detect: whether to look for a launcher where no flag is given.

    Raises:
      UserError: the three do not belong together, or something is missing that the environment does not say.
    """
    if (address, index) == (None, None) and (count == 1 or (count is None and not detect)):
        return
    if heartbeat_seconds < 2:
        raise UserError(f"--heartbeat_seconds={heartbeat_seconds} is too short to notice a death in: give at least 2.")
    launcher = None
    if None in (address, count, index) or address == AUTO:
        launcher = find_launcher(os.environ)
        if (launcher, address, count, index) == (None, None, None, None):
            return
        _check(launcher, address, count, index)
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"--process_index={index} is not one of the {count} processes, which are 0 to {count - 1}.")
    arguments = {
        "coordinator_address": None if address == AUTO else address,
        "num_processes": count if count is not None or launcher is None else launcher.count,
        "process_id": index if index is not None or launcher is None else launcher.index,
    }
    _initialize(arguments, heartbeat_seconds, launcher)


def leave(code: int) -> None:
    """Ends this process with an exit code other than 0; one of several ends at once.

    An orderly end would wait for the others, which wait for this one. Process 0 gives them two seconds to tell their
    own errors: it takes the service with it over which they would learn of a death.
    """
    if not several():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if index() == 0:
        time.sleep(2)
    os._exit(code)


def start_time() -> float:
    """When this process was started, in monotonic seconds; now, where there is no Linux to ask."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot: proc(5)
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - max(0.0, age)


def several() -> bool:
    """Whether this process is one of several; loads and starts nothing."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def index() -> int:
    """This process's number, from 0; asks JAX, which then starts its devices."""
    import jax

    return jax.process_index()


def prefix() -> str:
    """``"process 3: "`` where there are several, for what this process tells; else nothing."""
    return f"process {index()}: " if several() else ""


def _initialize(arguments: Mapping[str, Any], heartbeat_seconds: int, launcher: Launcher | None) -> None:
    import jax

    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=max(1, heartbeat_seconds - NOTICE_SECONDS),
            shutdown_timeout_seconds=heartbeat_seconds,  # at the end the others are waited for as long
        )
    except (ValueError, OSError, ImportError) as error:
        if launcher is None or launcher.count is not None or arguments["coordinator_address"] is not None:
            raise
        _LOG.warning("%s is here, but JAX finds no other process and runs alone: %s", launcher.name, error)


def _check(launcher: Launcher | None, address: str | None, count: int | None, index: int | None) -> None:
    """UserError where flags and environment together do not say all."""
    if launcher is None and address == AUTO and None in (count, index):
        raise UserError(
            "--coordinator_address=auto finds no Slurm step, Open MPI, TPU or indexed Kubernetes job of several "
            "processes here: give --coordinator_address, --process_count and --process_index."
        )
    if launcher is None:
        raise UserError(
            "--coordinator_address, --process_count and --process_index belong together: give all three, or start the "
            "processes with Slurm, Open MPI or on a TPU pod, which need none."
        )
    if address in (None, AUTO) and not launcher.finds_coordinator:
        raise UserError(
            f"{launcher.name} started {launcher.count} processes and does not say where process 0 is: give "
            "--coordinator_address=HOST:PORT with that host and a free port, the same for all."
        )


def _numbers(environment: Mapping[str, str], count: str, index: str) -> tuple[int, int] | None:
    values = environment.get(count, ""), environment.get(index, "")
    return (int(values[0]), int(values[1])) if all(value.isdigit() for value in values) else None


def _of_several(launcher: Launcher) -> Launcher | None:
    return launcher if launcher.count > 1 else None


def _on_tpu() -> bool:
    """Whether JAX will use TPUs; importing it sets its platforms to "tpu,cpu" where chips and libtpu are."""
    import jax

    return "tpu" in (jax.config.jax_platforms or "").split(",")
