"""Gradient accumulation: how the memory and the time of a training step change with the number of micro-batches.

    python benchmarks/accumulation.py --json accumulation.json

Compiles the trainer's own step, donated state and all, at several numbers n of micro-batches of one batch. ``temp`` is
what the compiler reserves beside the arguments (``compiled.memory_analysis()``): activations of the one micro-batch
that is worked on, and what is as large as the parameters whatever n is. Least squares on temp = fixed + shrinking / n
separates the two; ``shrunk`` is the measured fall of the shrinking part, n where the fall is in proportion. Wall and
process-CPU time are medians over rounds in which the variants take turns. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np
from compiled_step import CompiledStep, medians
from train_step import SHAPES, make_batch

from expertrag_jax.systems.closed_book import ClosedBook
from expertrag_jax.training import optimizer


def fixed_and_shrinking(temp_bytes: dict[int, int]) -> tuple[float, float]:
    """Least squares of temp = fixed + shrinking / n over the numbers n of micro-batches above 1.

    One alone has no accumulators and is left out; with two numbers or fewer, all are used.
    """
    counts = [n for n in temp_bytes if n > 1]
    counts = counts if len(counts) > 1 else list(temp_bytes)
    slope, fixed = np.polyfit([1 / n for n in counts], [temp_bytes[n] for n in counts], 1)
    return float(fixed), float(slope)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--experts", type=int, default=0, help="0 is the dense model")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--microbatches", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="per round")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    config = dataclasses.replace(shape.config, num_experts=options.experts)
    shape = dataclasses.replace(shape, config=config, batch=options.batch)
    system = ClosedBook(config, optimizer=lambda: optimizer.adafactor(1e-3))
    compiled = {n: CompiledStep(system, make_batch(shape), n) for n in options.microbatches}
    times = medians(compiled, options.rounds, options.steps)
    fixed, shrinking = fixed_and_shrinking({n: step.temp_bytes for n, step in compiled.items()})
    rows = []
    for n, step in compiled.items():
        wall, cpu = times[n]
        rows.append(
            {
                "microbatches": n, "shape": options.shape, "experts": options.experts, "batch": options.batch,
                "device": jax.devices()[0].device_kind, "jax": jax.__version__,
                "parameter_bytes": step.parameter_bytes, "temp_bytes": step.temp_bytes,
                "temp_bytes_ratio": step.temp_bytes / compiled[options.microbatches[0]].temp_bytes,
                "fixed_bytes": fixed, "shrunk": shrinking / max(1.0, step.temp_bytes - fixed),
                "ms_per_step": 1000 * wall, "cpu_ms_per_step": 1000 * cpu,
            }
        )  # fmt: skip
    print(f"{'microbatches':>12} {'temp MB':>9} {'ratio':>6} {'shrunk':>7} {'ms/step':>9} {'cpu ms':>9}")
    for row in rows:
        print(
            f"{row['microbatches']:12} {row['temp_bytes'] / 1e6:9.1f} {row['temp_bytes_ratio']:6.3f} "
            f"{row['shrunk']:6.1f}x {row['ms_per_step']:9.1f} {row['cpu_ms_per_step']:9.1f}"
        )
    print(f"fixed {fixed / 1e6:.1f} MB; parameters {rows[0]['parameter_bytes'] / 1e6:.1f} MB")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
