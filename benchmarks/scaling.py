"""How time and memory of a training step grow with experts, layers, passages and length.

    python benchmarks/scaling.py --json scaling.json
    python benchmarks/scaling.py --shape base --batch 64 --layers 2 6 12 24 --length 128 256 512 1024   # on a GPU

From one base (``--shape``, ``--batch``, dense, no passages) one size at a time is changed: ExpertRAG's generator phase,
with the trainer's own compiled step. Layers are those of the encoder and as many of the decoder; experts are in every
other layer, one per token, so that the work stays the same and the parameters grow; each of K passages is as long as
the question and encoded with it; length is the question's. ``state`` is what stays between steps (parameters and
Adafactor's state), ``temp`` what the compiler reserves for a step, both per device. Times are medians over rounds in
which the sizes of a series take turns; ratios are to the first of a series. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np
from compiled_step import CompiledStep, medians
from train_step import SHAPES, Shape, make_batch

from expertrag_jax.batch import Batch
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.training import optimizer

SERIES = ("experts", "layers", "passages", "length")


def sized(base: Shape, series: str, value: int) -> tuple[Shape, int]:
    """The base with one size changed, and its number of passages."""
    config, passages = base.config, 0
    if series == "experts":
        config = dataclasses.replace(config, num_experts=value)
    elif series == "layers":
        config = dataclasses.replace(config, num_encoder_layers=value, num_decoder_layers=value)
    elif series == "passages":
        passages = value
    return dataclasses.replace(base, config=config, inputs=value if series == "length" else base.inputs), passages


def with_passages(batch: Batch, passages: int, vocab_size: int) -> Batch:
    """The batch with K passages of the question's length per question; as it is for K = 0."""
    if not passages:
        return batch
    size, length = batch.encoder_input_tokens.shape
    tokens = np.random.default_rng(1).integers(3, vocab_size, (size, passages, length)).astype(np.int32)
    return batch.replace(passage_tokens=tokens)


def compiled_step(shape: Shape, passages: int) -> CompiledStep:
    """The step of ExpertRAG's generator phase at one size."""
    system = ExpertRAG(shape.config, generator_optimizer=lambda: optimizer.adafactor(1e-3))
    return CompiledStep(system, with_passages(make_batch(shape), passages, shape.config.vocab_size))


def measure(base: Shape, unchanged: CompiledStep, series: str, values: list[int], rounds: int, steps: int) -> list:
    """A row per size; ``unchanged`` is the base's step, which the series share."""
    compiled, tokens = {}, {}
    for value in values:
        shape, passages = sized(base, series, value)
        compiled[value] = unchanged if (shape, passages) == (base, 0) else compiled_step(shape, passages)
        tokens[value] = shape.batch * (shape.inputs * max(1, passages) + shape.targets)
    times = medians(compiled, rounds, steps)
    first = values[0]
    rows = []
    for value, step in compiled.items():
        wall, cpu = times[value]
        rows.append(
            {
                "series": series, "value": value, "batch": base.batch, "inputs": base.inputs, "targets": base.targets,
                "device": jax.devices()[0].device_kind, "jax": jax.__version__, "parameters": step.parameters,
                "state_bytes": step.state_bytes, "temp_bytes": step.temp_bytes,
                "ms_per_step": 1000 * wall, "cpu_ms_per_step": 1000 * cpu, "tokens_per_second": tokens[value] / wall,
                "wall_ratio": wall / times[first][0], "cpu_ratio": cpu / times[first][1],
                "temp_ratio": step.temp_bytes / compiled[first].temp_bytes,
            }
        )  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """The rows of a series as a table."""
    print(
        f"{rows[0]['series']:>9} {'params':>12} {'state MB':>9} {'temp MB':>9} {'ratio':>6} "
        f"{'ms/step':>9} {'ratio':>6} {'cpu ms':>9} {'ratio':>6} {'tokens/s':>10}"
    )
    for row in rows:
        print(
            f"{row['value']:9} {row['parameters']:12,} {row['state_bytes'] / 1e6:9.1f} {row['temp_bytes'] / 1e6:9.1f} "
            f"{row['temp_ratio']:6.2f} {row['ms_per_step']:9.1f} {row['wall_ratio']:6.2f} "
            f"{row['cpu_ms_per_step']:9.1f} {row['cpu_ratio']:6.2f} {row['tokens_per_second']:10,.0f}",
            flush=True,
        )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--inputs", type=int, default=64, help="length of the question, where it is not varied")
    parser.add_argument("--targets", type=int, default=16, help="length of the answer")
    parser.add_argument("--experts", type=int, nargs="*", default=[0, 4, 16], help="0 is the dense model")
    parser.add_argument("--layers", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--passages", type=int, nargs="*", default=[0, 2, 8])
    parser.add_argument("--length", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="per round")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    base = dataclasses.replace(
        SHAPES[options.shape], batch=options.batch, inputs=options.inputs, targets=options.targets
    )
    unchanged, rows = compiled_step(base, 0), []
    for series in SERIES:
        values = getattr(options, series)
        if values:
            found = measure(base, unchanged, series, values, options.rounds, options.steps)
            show(found)
            rows += found
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
