"""Time of a whole training step: forward, backward, Adafactor, through the trainer's own compiled step.

    python benchmarks/train_step.py --shape tiny --json train_step.json

Prints a row per model: milliseconds per step (median over runs that take turns), tokens per second, model FLOPs per
step and, where the device's peak is known, model FLOPs utilisation. Needs no TensorFlow.

Model FLOPs count 6 per weight of a matrix and token that passes it (forward 2, backward 4), an expert layer as one
dense layer per selected expert, plus attention scores; padding of expert buffers and recomputation do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np

from expertrag_jax import partitioning
from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.systems.closed_book import ClosedBook
from expertrag_jax.training import optimizer, phases
from expertrag_jax.training.state import Layout
from expertrag_jax.training.step import make_train_step

# dense bfloat16
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    config: TransformerConfig
    batch: int
    inputs: int
    targets: int


SHAPES = {
    "tiny": Shape(TransformerConfig(vocab_size=1024, mlp_dim=512), 32, 64, 64),
    "base": Shape(
        TransformerConfig(
            vocab_size=32128, embed_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, num_encoder_layers=12,
            num_decoder_layers=12, dtype="bfloat16", scan_layers=True,
        ),
        128, 512, 128,
    ),
}


def model_flops(shape: Shape) -> float:
    """Model FLOPs of one training step; see the module's docstring."""
    c, width = shape.config, shape.config.embed_dim
    joined = c.num_heads * c.head_dim
    selected = c.num_selected_experts if c.num_experts else 1
    matrices = len(c.mlp_activations) + 1

    def feed_forward(layers):
        sparse = sum(c.is_sparse(i) for i in range(layers))
        return matrices * width * c.mlp_dim * (layers - sparse + selected * sparse)

    attention = 4 * width * joined
    encoder = c.num_encoder_layers * attention + feed_forward(c.num_encoder_layers)
    decoder = c.num_decoder_layers * (attention + 2 * width * joined) + feed_forward(c.num_decoder_layers)
    decoder += width * c.vocab_size
    cross = c.num_decoder_layers * 2 * width * joined  # keys and values of the encoder's states
    source, target = shape.batch * shape.inputs, shape.batch * shape.targets
    scores = c.num_encoder_layers * source * shape.inputs
    scores += c.num_decoder_layers * target * (shape.targets + shape.inputs)
    return 6.0 * (source * (encoder + cross) + target * decoder + 2 * joined * scores)


def make_batch(shape: Shape, seed: int = 0) -> Batch:
    """Random tokens without padding."""
    rng = np.random.default_rng(seed)

    def draw(length):
        return rng.integers(3, shape.config.vocab_size, (shape.batch, length)).astype(np.int32)

    targets = draw(shape.targets)
    return Batch(
        encoder_input_tokens=draw(shape.inputs),
        decoder_input_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        decoder_target_tokens=targets,
        decoder_loss_weights=np.ones_like(targets, np.float32),
    )


class Runner:
    """A compiled step and its state; ``run(n)`` takes n steps and returns seconds of wall and of process CPU."""

    def __init__(
        self, config: TransformerConfig, shape: Shape, mesh: partitioning.MeshConfig | None = None
    ):
        system = ClosedBook(config, optimizer=lambda: optimizer.adafactor(1e-3))
        phase, self.mesh = system.phases[0], partitioning.make_mesh(mesh or partitioning.MeshConfig())
        with jax.set_mesh(self.mesh):
            layout = Layout(system, self.mesh)
            self.state = phases.enter(layout.initial_params(system, 0), 0, 0, phase, layout)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, layout.abstract_state(phase))
            self.step = make_train_step(phase.loss, phase.make_optimizer(), phase.trainable, state_shardings=shardings)
            self.batch = partitioning.global_batch(make_batch(shape), self.mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def run(self, steps: int) -> tuple[float, float]:
        with jax.set_mesh(self.mesh):
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.batch)
            jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--experts", type=int, nargs="*", default=[0, 8], help="0 is the dense model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="per round")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    shapes = {
        f"{n} experts" if n else "dense": dataclasses.replace(
            shape, config=dataclasses.replace(shape.config, num_experts=n)
        )
        for n in options.experts
    }
    runners = {name: Runner(each.config, each) for name, each in shapes.items()}
    for runner in runners.values():
        runner.run(2)  # compiles
    times: dict[str, list] = {name: [] for name in runners}
    for _ in range(options.rounds):
        for name, runner in runners.items():
            times[name].append(runner.run(options.steps))
    device = jax.devices()[0].device_kind
    peak = PEAK_FLOPS.get(device) if shape.config.dtype == "bfloat16" else None
    rows = []
    for name, taken in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken))
        flops = model_flops(shapes[name])
        rows.append(
            {
                "variant": name, "shape": options.shape, "device": device, "jax": jax.__version__,
                "parameters": runners[name].parameters, "ms_per_step": 1000 * wall, "cpu_ms_per_step": 1000 * cpu,
                "tokens_per_second": shape.batch * (shape.inputs + shape.targets) / wall,
                "model_flops_per_step": flops, "model_flops_utilisation": flops / wall / peak if peak else None,
            }
        )
    print(f"{'variant':12} {'params':>12} {'ms/step':>9} {'cpu ms':>9} {'tokens/s':>10} {'TFLOP/step':>10} {'MFU':>6}")
    for row in rows:
        mfu = row["model_flops_utilisation"]
        print(
            f"{row['variant']:12} {row['parameters']:12,} {row['ms_per_step']:9.1f} {row['cpu_ms_per_step']:9.1f} "
            f"{row['tokens_per_second']:10,.0f} {row['model_flops_per_step'] / 1e12:10.3f} "
            f"{'-' if mfu is None else f'{mfu:.1%}':>6}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
