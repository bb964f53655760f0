"""One of several processes that train the toy system: ``python worker.py MODEL_DIR --count 2 --index 0 --address ...``.

The mesh is data=4 x fsdp=2 whichever way the eight devices lie. Process 0 leaves ``logs/final.npz``: every leaf of the
final state, whole. ``--experts RUN`` trains the sparse system of ``switch.py`` too, beside MODEL_DIR: that costs less
than processes of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import switch
from jax.experimental import multihost_utils

from expertrag_jax import launch, partitioning, processes
from expertrag_jax.training import loop

TOY = Path(__file__).parents[1] / "training" / "toy.py"


def load_toy():
    """The module ``toy.py``."""
    spec = importlib.util.spec_from_file_location("training_toy", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(model_dir: str | Path, mesh=None, at: int | None = None, then=None, asynchronous: bool = True):
    """Trains 12 + 18 steps with a checkpoint every 5; ``then`` is called when position ``at`` of phase 2 is read."""
    toy = load_toy()
    index, count = jax.process_index(), jax.process_count()

    def data(start, at=None):
        for position in itertools.count(start):
            if position == at:
                then()
            size = 16 // count
            yield {name: value[index * size : (index + 1) * size] for name, value in toy.rows(position, 16).items()}

    return loop.train(
        toy.Toy(width=256, steps=(12, 18)),  # wide enough for arrays in files of their process
        {"body": data, "head": lambda start: data(start, at)},
        model_dir,
        mesh=mesh or partitioning.make_mesh(partitioning.MeshConfig(data=4, fsdp=2)),
        microbatches=1,
        checkpoint_period=5,
        keep_checkpoints=2,
        asynchronous_checkpoints=asynchronous,
        log_period=3,
    )


def whole(state) -> dict[str, np.ndarray]:
    """{name: the whole leaf, on this host}."""
    gathered = multihost_utils.process_allgather(state, tiled=True) if jax.process_count() > 1 else state
    leaves = jax.tree_util.tree_leaves_with_path(gathered)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def leave(model_dir: Path, state) -> None:
    """Writes the whole state to ``logs/final.npz``."""
    leaves = whole(state)
    if jax.process_index() == 0:
        np.savez(model_dir / "logs" / "final.npz", **leaves)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--experts", action="append", default=[], choices=switch.RUNS)
    parser.add_argument("--measured", action="store_true", help="the sparse system is also evaluated on expert8")
    parser.add_argument("--address")
    parser.add_argument("--count", type=int)
    parser.add_argument("--index", type=int)
    parser.add_argument("--heartbeat", type=int, default=60)
    parser.add_argument("--signal_at", type=int, help="position in phase 2 at which a signal comes")
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--signal_process", type=int, default=1)
    arguments = parser.parse_args()
    launch.log_to_stderr()
    processes.join(arguments.address, arguments.count, arguments.index, arguments.heartbeat, detect=False)
    chosen = arguments.index == arguments.signal_process

    def send():
        os.kill(os.getpid(), getattr(signal, arguments.signal))
        time.sleep(3)  # the runtime looks for a SIGTERM once a second, and the steps left take less

    leave(arguments.model_dir, run(arguments.model_dir, at=arguments.signal_at if chosen else None, then=send))
    for name in arguments.experts:
        folder = arguments.model_dir.with_name(name)
        leave(folder, switch.run(folder, name, arguments.measured and name == "expert8"))


if __name__ == "__main__":
    main()
