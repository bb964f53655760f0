"""A tiny sparse system whose experts lie on the devices of several processes, and drop tokens."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import optax

from expertrag_jax import partitioning
from expertrag_jax.moe.layer import MixtureOfExperts
from expertrag_jax.systems import generator
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import loop

ROWS, LENGTH, WIDTH = 16, 8, 16
LAYER = MixtureOfExperts(
    num_experts=8, hidden=64, activations=("relu",), train_capacity_factor=1.0, group_size=LENGTH, jitter=0.1
)
MESHES = {
    "expert8": partitioning.MeshConfig(data=1, expert=8),
    "data2_expert4": partitioning.MeshConfig(data=2, expert=4),
}
OTHERS = {  # ways to the experts, on the second mesh
    "dropless": LAYER.clone(dispatch="dropless"),
    "expert_choice": LAYER.clone(routing="expert_choice"),
}
RUNS = {name: (LAYER, mesh) for name, mesh in MESHES.items()}
RUNS |= {name: (layer, MESHES["data2_expert4"]) for name, layer in OTHERS.items()}


class Switch:
    """Regression with one residual layer of experts; a routing group is a row, so an expert has one slot in it."""

    def __init__(self, steps: int = 4, layer: MixtureOfExperts = LAYER):
        self.phases = (Phase("all", steps, functools.partial(loss, layer), lambda: optax.adam(0.02)),)

    def init(self, rng):
        return generator.plain(boxed(rng))

    def logical_axes(self):
        return generator.axes_of(jax.eval_shape(boxed, jax.random.key(0)))


def boxed(rng):
    """Fresh parameters with their logical axes."""
    batch = rows(0)
    return LAYER.init(rng, batch["x"][:1], batch["valid"][:1], True)["params"]


def loss(layer, params, batch, rng):
    """Mean squared error over valid tokens, and the router's losses; ``rng`` None: evaluation, which drops nothing."""
    rngs = None if rng is None else {"jitter": rng}
    x, valid = batch["x"], batch["valid"]
    y, state = layer.apply({"params": params}, x, valid, rng is None, rngs=rngs, mutable=["router"])
    error, count = (((x + y - batch["y"]) ** 2).mean(-1) * valid).sum(), valid.sum()
    router, metrics = generator.router_losses(state["router"], 0.01, 1e-3)
    figures = state["router"]["statistics"][0]
    fullest = (figures.load * figures.tokens[:, None]).max()  # tokens of a group that want the same expert
    return error / count + router, {"loss": (error, count), "fullest": (fullest, 1.0)} | metrics


def rows(position: int) -> dict[str, np.ndarray]:
    """The global batch at a position; about a tenth of the tokens is padding."""
    rng = np.random.default_rng(position)
    x = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    return {"x": x, "y": np.tanh(2 * x[..., ::-1]), "valid": rng.random((ROWS, LENGTH)) < 0.9}


def own_rows(position: int) -> dict[str, np.ndarray]:
    """This process's slice of ``rows``."""
    size = ROWS // jax.process_count()
    start = jax.process_index() * size
    return {name: value[start : start + size] for name, value in rows(position).items()}


def run(model_dir: Path, name: str, measured: bool = False):
    """Trains 4 steps of one of ``RUNS``, or reads the state after them; ``measured``: logs ``eval/loss`` of it."""
    layer, mesh = RUNS[name]
    mesh = partitioning.make_mesh(mesh)
    evaluate = jax.jit(lambda params, batch: loss(layer, params, batch, None)[1])

    def measure(params, step):
        metrics = evaluate(params, partitioning.global_batch(own_rows(1000), mesh))
        return {name: metrics[name][0] / metrics[name][1] for name in ("loss", "fullest", "router/dropped")}

    return loop.train(
        Switch(layer=layer),
        {"all": lambda start: map(own_rows, itertools.count(start))},
        model_dir,
        mesh=mesh,
        log_period=1,
        hooks=[loop.Hook("eval", 2, measure)] if measured else (),
    )
