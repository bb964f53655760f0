"""Time and memory of the sparse layer against a dense feed-forward with the same active FLOPs.

    python benchmarks/moe.py --json moe.json
    python benchmarks/moe.py --tokens 65536 --width 2048 --hidden 8192 --dtype bfloat16     # fills a GPU

One run is forward and backward, with gradients to the inputs and all weights; router, balance loss and z-loss are
included. Variants, which take turns:

* ``dense``: one feed-forward of width k * hidden: what k experts compute.
* ``buckets``: `MixtureOfExperts` as the models use it, capacity factor 1.25.
* ``dropless``: the same layer with ``dispatch="dropless"``.
* ``einsum_512``, ``einsum_4096``: one-hot dispatch and combine products in groups of that many tokens (GShard,
  arXiv 2006.16668, algorithm 1; Switch Transformer, arXiv 2101.03961, appendix F), the same capacity and losses.

Gradients are written over those of the run before, as into an accumulator: for 64 experts new memory for them would be
512 MiB in pages of 4 KiB, whose first touch takes a third of the time (--fresh_gradients measures that too).

A row holds medians of process CPU time and of wall time, the ratios to ``dense``, bytes of temporaries that the
compiler plans (arguments and results, so weights and their gradients, do not count) and the fraction of choices
dropped. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.layers import FeedForward
from expertrag_jax.moe import routing
from expertrag_jax.moe.experts import expert_feed_forward
from expertrag_jax.moe.layer import MixtureOfExperts
from expertrag_jax.moe.statistics import choice_statistics

CAPACITY_FACTOR = 1.25
VARIANTS = ("dense", "buckets", "dropless", "einsum_512", "einsum_4096")


def draw(shapes, seed: int = 0):
    """Parameters of a variant: normal, scaled so that activations keep their size."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        scale = 0.02 if "router" in jax.tree_util.keystr(path) else leaf.shape[-2] ** -0.5
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale)

    return jax.tree_util.tree_map_with_path(one, shapes)


def einsum_mixture(params, x, valid, *, k: int, group: int):
    """A sparse layer by one-hot products; x [G, S, D] in groups of S = ``group`` tokens."""
    num_experts = params["router"]["router_weights"]["w"]["kernel"].shape[-1]
    capacity = routing.expert_capacity(group, num_experts, k, CAPACITY_FACTOR)
    logits = jnp.einsum("gsd,de->gse", x.astype(jnp.float32), params["router"]["router_weights"]["w"]["kernel"])
    choice = routing.route(logits, valid, k)
    chosen = jax.nn.one_hot(choice.expert_index, num_experts)  # [G, S, k, E]
    first = chosen.swapaxes(1, 2).reshape(chosen.shape[0], -1, num_experts)  # all first choices, then all second
    position = (jnp.cumsum(first, axis=1) - 1).reshape(-1, k, group, num_experts).swapaxes(1, 2)
    position = (position * chosen).sum(-1)  # [G, S, k]
    place = jax.nn.one_hot(position, capacity)  # a position beyond the capacity is a row of zeros
    combine = jnp.einsum("gske,gskc,gsk->gsec", chosen, place, choice.weight)
    dispatch = jax.lax.stop_gradient((combine > 0).astype(x.dtype))
    buffers = jnp.einsum("gsec,gsd->egcd", dispatch, x)
    kernels = {name: leaf["kernel"] for name, leaf in params["expert"].items()}
    outputs = expert_feed_forward(kernels, buffers.reshape(num_experts, -1, x.shape[-1]), ("relu",))
    y = jnp.einsum("gsec,egcd->gsd", combine.astype(x.dtype), outputs.reshape(buffers.shape))
    figures = choice_statistics(logits, choice, None)
    return y, figures.replace(dropped=1 - place.sum(-1).mean((1, 2)))


class Variant:
    """A compiled forward and backward pass with its arguments; ``run()`` gives seconds of CPU and of wall."""

    def __init__(self, name: str, experts: int, k: int, options: argparse.Namespace):
        self.name = name
        length = min(options.tokens, 64)
        valid = jnp.ones((options.tokens // length, length), bool)
        x = np.random.default_rng(1).standard_normal((*valid.shape, options.width), np.float32)
        x = jnp.asarray(x, options.dtype)
        if name == "dense":
            model = FeedForward(
                TransformerConfig(embed_dim=options.width, mlp_dim=k * options.hidden, mlp_activations=("relu",))
            )
        else:
            model = MixtureOfExperts(
                experts, options.hidden, ("relu",), k, CAPACITY_FACTOR, group_size=options.group_size,
                dispatch="dropless" if name == "dropless" else "buckets",
            )
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, valid, True))["params"]
        params = draw(nn.unbox(shapes))
        gradient = jax.value_and_grad(functools.partial(self._objective, model, k), (0, 1), has_aux=True)

        def run(params, x, valid, old):  # the compiler puts the gradients where the old ones lie
            return gradient(params, x, valid)

        self.keep = not options.fresh_gradients
        self.gradients = jax.tree.map(jnp.zeros_like, (params, x))
        self.program = jax.jit(run, donate_argnums=(3,) if self.keep else (), keep_unused=True)
        self.program = self.program.lower(params, x, valid, self.gradients).compile()
        self.arguments = (params, x, valid)
        self.temp_bytes = self.program.memory_analysis().temp_size_in_bytes

    def _objective(self, model, k, params, x, valid):
        if self.name.startswith("einsum"):
            group = min(int(self.name.split("_")[1]), x.size // x.shape[-1])
            rows = x.reshape(-1, group, x.shape[-1])
            y, figures = einsum_mixture(params, rows, valid.reshape(-1, group), k=k, group=group)
        else:
            y, state = model.apply({"params": params}, x, valid, False, mutable=["router"])
            figures = state["router"]["statistics"][0] if "router" in state else None
        objective = jnp.square(y.astype(jnp.float32)).mean()
        if figures is None:
            return objective, jnp.zeros(())
        objective = objective + 1e-2 * figures.balance_loss.mean() + 1e-3 * figures.z_loss.mean()
        return objective, figures.dropped.mean()

    def run(self) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        (_, self.dropped), gradients = jax.block_until_ready(self.program(*self.arguments, self.gradients))
        taken = time.process_time() - cpu, time.perf_counter() - wall
        if self.keep:
            self.gradients = gradients
        return taken


def measure(experts: int, k: int, options: argparse.Namespace) -> list[dict]:
    """The rows of all variants for one number of experts and of experts per token."""
    variants = [Variant(name, experts, k, options) for name in options.variants]
    for variant in variants:
        variant.run()
    taken: dict[str, list] = {variant.name: [] for variant in variants}
    for _ in range(options.rounds):
        for variant in variants:
            taken[variant.name].append(variant.run())
    rows = []
    for variant in variants:
        cpu, wall = (statistics.median(column) for column in zip(*taken[variant.name]))
        rows.append({
            "variant": variant.name, "experts": experts, "k": k, "cpu_ms": 1e3 * cpu, "wall_ms": 1e3 * wall,
            "temp_bytes": variant.temp_bytes, "dropped": float(variant.dropped),
        })  # fmt: skip
    base = rows[0]
    for row in rows:
        for name in ("cpu", "wall"):
            row[f"{name}_ratio_to_dense"] = row[f"{name}_ms"] / base[f"{name}_ms"]
        row["temp_bytes_ratio"] = row["temp_bytes"] / max(1, base["temp_bytes"])
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048, help="of one expert")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--group_size", type=int, default=4096, help="tokens per routing group of the layer")
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64])
    parser.add_argument("--k", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="the first is 1.00")
    parser.add_argument("--fresh_gradients", action="store_true", help="new memory for the gradients of every run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    sizes = ("tokens", "width", "hidden", "dtype", "group_size", "fresh_gradients")
    sizes = {name: getattr(options, name) for name in sizes}
    print(f"{'experts':>7} {'k':>2} {'variant':12} {'cpu ms':>8} {'wall ms':>8} {'cpu/dense':>9} {'wall/dense':>10} "
          f"{'temp MiB':>8} {'temp/dense':>10} {'dropped':>7}")  # fmt: skip
    rows = []
    for experts in options.experts:
        for k in options.k:
            for row in measure(experts, k, options):
                rows.append(row | device | sizes)
                print(
                    f"{experts:7} {k:2} {row['variant']:12} {row['cpu_ms']:8.1f} {row['wall_ms']:8.1f} "
                    f"{row['cpu_ratio_to_dense']:9.2f} {row['wall_ratio_to_dense']:10.2f} "
                    f"{row['temp_bytes'] / 2**20:8.1f} {row['temp_bytes_ratio']:10.2f} {row['dropped']:7.3f}",
                    flush=True,
                )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
