"""One training step of T5X beside ours: same shape, batch, optimizer and device, in turns in one process.

    python benchmarks/beside_t5x.py --json beside_t5x.json
    python benchmarks/beside_t5x.py --experts 8 --json beside_t5x_moe.json

Needs T5X on the Python path (the extra ``t5x``; it is on no package index), and with ``--experts`` flaxformer, whose
Switch layer T5X trains; then eight virtual CPU devices hold an expert each. ``--stub NAME`` replaces a module that they
import and this benchmark never calls: ``--stub airio.core --stub jestimator.amos --stub aqt.jax_legacy.jax``.

T5 1.1: 2 + 2 layers, width 128, 4 heads of 32, feed-forward 512 gated, vocabulary 1024, batch 32, lengths 64 and 64,
float32, no dropout, Adafactor. With experts: every other layer sparse, 8 experts, top-1, capacity 1.25, groups of 256.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from typing import Any
from unittest import mock

GROUP_SIZE = 256
FLAXFORMER = """
from __gin__ import dynamic_registration
from flaxformer.architectures.moe import routing
from flax import linen
include 'flaxformer/t5x/configs/moe/architectures/moe.gin'
NUM_MODEL_PARTITIONS = 1
NUM_ENCODER_LAYERS = 2
NUM_DECODER_LAYERS = 2
NUM_HEADS = 4
HEAD_DIM = 32
EMBED_DIM = 128
MLP_DIM = 512
NUM_EMBEDDINGS = 1024
NUM_EXPERTS = 8
NUM_ENCODER_SPARSE_LAYERS = 1
NUM_DECODER_SPARSE_LAYERS = 1
TRAIN_EXPERT_CAPACITY_FACTOR = 1.25
GROUP_SIZE = 256
ACTIVATION_DTYPE = 'float32'
MOE_TRUNCATED_DTYPE = 'float32'
sparse_encoder/routing.TokensChooseMaskedRouter.batch_prioritized_routing = False
"""


class T5XRunner:
    """T5X's own compiled step; ``run(n)`` takes n steps and returns seconds of wall and of process CPU per step."""

    def __init__(self, batch: Any, experts: int):
        import jax
        import t5x.trainer
        import t5x.utils

        model, partitioner = self._sparse() if experts else self._dense()
        self.batch = {
            name: getattr(batch, name)
            for name in (
                "encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights"
            )
        }  # fmt: skip
        start = t5x.utils.TrainStateInitializer(
            optimizer_def=model.optimizer_def, init_fn=model.get_initial_variables, partitioner=partitioner,
            input_shapes={name: rows.shape for name, rows in self.batch.items()},
            input_types={name: rows.dtype for name, rows in self.batch.items()},
        )  # fmt: skip
        settings = dict(
            model=model, train_state=start.from_scratch(jax.random.PRNGKey(0)), partitioner=partitioner, eval_names=[],
            summary_dir=None, train_state_axes=start.train_state_axes, rng=jax.random.PRNGKey(1),
            learning_rate_fn=lambda step: 1e-3, num_microbatches=None,
        )
        if experts:
            from t5x.contrib.moe import trainer

            made = trainer.MoeTrainer(num_expert_partitions=experts, **settings)
        else:
            made = t5x.trainer.Trainer(**settings)
        self.step, self.state = made._partitioned_train_step, made.train_state

    @staticmethod
    def _dense() -> tuple[Any, Any]:
        import seqio
        from t5x import adafactor, models, partitioning
        from t5x.examples.t5 import network

        config = network.T5Config(
            vocab_size=1024, dtype="float32", emb_dim=128, num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
            head_dim=32, mlp_dim=512, mlp_activations=("gelu", "linear"), dropout_rate=0.0, logits_via_embedding=False,
        )
        vocabulary = seqio.PassThroughVocabulary(1024)
        rules = adafactor.standard_logical_factor_rules()
        model = models.EncoderDecoderModel(
            network.Transformer(config), vocabulary, vocabulary, adafactor.Adafactor(1e-3, logical_factor_rules=rules)
        )
        return model, partitioning.PjitPartitioner(num_partitions=1)

    @staticmethod
    def _sparse() -> tuple[Any, Any]:
        import flaxformer
        import gin
        import jax
        import numpy as np
        import seqio
        from t5x import adafactor
        from t5x.contrib.moe import adafactor_utils, models, partitioning

        gin.add_config_file_search_path(os.path.dirname(next(iter(flaxformer.__path__))))
        gin.parse_config(FLAXFORMER)
        vocabulary = seqio.PassThroughVocabulary(1024)
        optimizer = adafactor.Adafactor(1e-3, logical_factor_rules=adafactor_utils.logical_factor_rules())
        module = gin.query_parameter("%ARCHITECTURE").scoped_configurable_fn()
        model = models.MoeEncoderDecoderModel(module, vocabulary, vocabulary, optimizer, aux_loss_factor=0.01)
        # T5X's own mesh for CPUs puts all devices on the model axis.
        devices = np.array(jax.devices()).reshape(1, -1, 1)
        partitioning.default_moe_mesh = lambda *_, **__: jax.sharding.Mesh(devices, ["data", "expert", "model"])
        return model, partitioning.MoePjitPartitioner(num_expert_partitions=devices.size, num_partitions=1)

    def run(self, steps: int) -> tuple[float, float]:
        import jax

        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, choices=[0, 8], default=0, help="0: the dense model on one device")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="per round")
    parser.add_argument("--stub", action="append", default=[], metavar="MODULE", help="to be replaced; repeatable")
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    for name in options.stub:
        parts = name.split(".")
        for i in range(len(parts)):
            sys.modules[".".join(parts[: i + 1])] = mock.MagicMock()
    if options.experts:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import train_step

    from expertrag_jax.partitioning import MeshConfig

    shape = train_step.SHAPES["tiny"]
    mesh = MeshConfig()
    if options.experts:
        config = dataclasses.replace(shape.config, num_experts=options.experts, expert_group_size=GROUP_SIZE)
        shape, mesh = dataclasses.replace(shape, config=config), MeshConfig(data=1, expert=options.experts)
    try:
        runners = {"t5x": T5XRunner(train_step.make_batch(shape), options.experts)}
    except ImportError as error:
        parser.exit(2, f"error: {error}: install T5X (and flaxformer for --experts), or --stub what is not used.\n")
    runners["expertrag_jax"] = train_step.Runner(shape.config, shape, mesh)
    times: dict[str, list] = {name: [] for name in runners}
    for runner in runners.values():
        runner.run(2)  # compiles
    for _ in range(options.rounds):
        for name, runner in runners.items():
            times[name].append(runner.run(options.steps))
    medians = {name: [statistics.median(column) for column in zip(*taken)] for name, taken in times.items()}
    rows = [
        {
            "variant": name, "experts": options.experts, "ms_per_step": 1000 * wall, "cpu_ms_per_step": 1000 * cpu,
            "wall_ratio_to_t5x": wall / medians["t5x"][0], "cpu_ratio_to_t5x": cpu / medians["t5x"][1],
        }
        for name, (wall, cpu) in medians.items()
    ]
    for row in rows:
        print(
            f"{row['variant']:14} {row['ms_per_step']:8.1f} ms  cpu {row['cpu_ms_per_step']:8.1f} ms  "
            f"{row['wall_ratio_to_t5x']:.2f} of T5X's time, cpu {row['cpu_ratio_to_t5x']:.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
