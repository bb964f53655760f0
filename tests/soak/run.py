"""The run that ``soak.py`` kills: ``python run.py MODEL_DIR`` leaves its final state in ``logs/final.npz``.

Dense: the toy system of ``tests/training/toy.py``, two phases with dropout and micro-batches, on data=2 x fsdp=2.
``--experts``: the sparse system of ``tests/multi_process/switch.py``, jitter and dropped tokens, on data=2 x expert=2.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import jax

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "multi_process")]
import switch  # noqa: E402
import toy  # noqa: E402
import worker  # noqa: E402

from expertrag_jax import launch, partitioning, processes  # noqa: E402
from expertrag_jax.training import loop  # noqa: E402

SECONDS_PER_STEP = 0.02  # so that steps, not starts, take most of the time


def slowly(batches):
    """The batches, each after the time that a step shall take at least."""
    for batch in batches:
        time.sleep(SECONDS_PER_STEP)
        yield batch


def own(rows):
    """This process's slice of a global batch."""
    index, count = jax.process_index(), jax.process_count()
    return {name: value.reshape(count, -1, *value.shape[1:])[index] for name, value in rows.items()}


def dense():
    """(system, data sets, mesh, micro-batches)"""

    def data(start):
        return slowly(map(own, toy.data(start)))

    mesh = partitioning.MeshConfig(data=2, fsdp=2)
    return toy.Toy(width=64, steps=(150, 250)), {"body": data, "head": data}, mesh, 2


def sparse():
    """(system, data sets, mesh, micro-batches)"""

    def data(start):
        return slowly(map(switch.own_rows, itertools.count(start)))

    return switch.Switch(steps=400), {"all": data}, partitioning.MeshConfig(data=2, expert=2), 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--address")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--heartbeat", type=int, default=8)
    arguments = parser.parse_args()
    launch.log_to_stderr()
    if arguments.count > 1:
        processes.join(arguments.address, arguments.count, arguments.index, arguments.heartbeat, detect=False)
    system, datasets, mesh, microbatches = sparse() if arguments.experts else dense()
    state = loop.train(
        system, datasets, arguments.model_dir, mesh=partitioning.make_mesh(mesh), microbatches=microbatches,
        checkpoint_period=10, log_period=10,
    )  # fmt: skip
    worker.leave(arguments.model_dir, state)


if __name__ == "__main__":
    main()
