"""A tiny system with two phases, and a command that trains it: ``python toy.py MODEL_DIR [--kill_at N] ...``.

Phase "body" (80 steps) trains everything with Adafactor, phase "head" (120 steps) the head alone with AdamW.
The
loss draws dropout, and batches alternate between two shapes: what makes a bit-exact restart hard.
"""

from __future__ import annotations

import argparse
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from expertrag_jax import partitioning
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import loop, optimizer

WIDTH = 8


class Toy:
    """Regression with one hidden layer; ``width`` is the hidden layer's."""

    def __init__(self, width: int = WIDTH, steps: tuple[int, int] = (80, 120)):
        self.width = width
        self.phases = (
            Phase("body", steps[0], loss, lambda: optimizer.adafactor(0.02, min_dim_size_to_factor=4)),
            Phase("head", steps[1], loss, optimizer.adamw(1e-2, weight_decay=0.1), ("head/.*",)),
        )

    def init(self, rng):
        body, head = jax.random.split(rng)
        return {
            "body": {
                "kernel": jax.random.normal(body, (4, self.width)) * 0.5,
                "bias": jnp.zeros((self.width,)),
            },
            "head": {"kernel": jax.random.normal(head, (self.width, 8)) * 0.5},
        }

    def logical_axes(self):
        return {"body": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}, "head": {"kernel": ("mlp", "embed")}}


def loss(params, batch, rng):
    """Mean squared error over units with weight; zero weight rows are padding."""
    hidden = jnp.tanh(batch["x"] @ params["body"]["kernel"] + params["body"]["bias"])
    hidden = partitioning.constrain(hidden, "batch", "mlp")
    if rng is not None:
        hidden = hidden * jax.random.bernoulli(rng, 0.9, hidden.shape)
    error = ((hidden @ params["head"]["kernel"] - batch["y"]) ** 2).mean(-1) * batch["weight"]
    count = batch["weight"].sum()
    load = (hidden**2).sum(0)
    return error.sum() / count, {"loss": (error.sum(), count), "load": (load, jnp.ones(()))}


def rows(position: int, size: int) -> dict[str, np.ndarray]:
    """The batch at a position; the weight is 0 on about a third of the rows."""
    rng = np.random.default_rng(position)
    x = rng.normal(size=(size, 4)).astype(np.float32)
    weight = (rng.random(size) < 0.7).astype(np.float32)
    weight[0] = 1
    tokens = np.array([[5, 6, 0]] * size, np.int32)
    return {"x": x, "y": np.tanh(x @ np.ones((4, 8), np.float32)), "weight": weight, "tokens": tokens}


def data(start: int, at=None, then=None):
    """Batches of 16 and 8 rows in turn; calls ``then`` when position ``at`` is asked for."""
    position = start
    while True:
        if position == at:
            then()
        yield rows(position, 8 if position % 2 else 16)
        position += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("--signal_at", type=int, help="position in phase 'head' at which a signal comes")
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--mesh", default="{}")
    arguments = parser.parse_args()
    mesh = partitioning.make_mesh(partitioning.MeshConfig(**json.loads(arguments.mesh)))

    def send():
        os.kill(os.getpid(), getattr(signal, arguments.signal))

    state = loop.train(
        Toy(),
        {"body": data, "head": lambda start: data(start, arguments.signal_at, send)},
        arguments.model_dir,
        mesh=mesh,
        microbatches=2,
        checkpoint_period=50,
        log_period=20,
        metadata={"digests": {"vocabulary": "abc"}},
    )
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(state))[0]
    path = os.path.join(arguments.model_dir, "logs", "final.npz")
    np.savez(path, **{jax.tree_util.keystr(key): value for key, value in flat})


if __name__ == "__main__":
    main()
