"""Loss-free balancing (DeepSeek-V3; arXiv 2408.15664, algorithm 1): a bias per expert that only the choice sees.

The algorithm lowers the bias of an expert with more than the mean load by a fixed step u, and raises it of one with
less. Here the bias is a parameter of the layer, and its gradient is u * sign(load - mean), whatever the loss is; so the
state lies where all parameters lie, is sharded, saved and restored with them. The training step goes exactly so far
against the sign (``with_bias_steps``): no optimizer's learning rate, moments or weight decay touch it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from expertrag_jax.moe.statistics import RouterStatistics

RATE = 1e-3
"""The algorithm's u; the paper found 1e-3 best."""


def load_error(figures: RouterStatistics) -> jax.Array:
    """[E]: the load of each expert over all groups, minus the mean load."""
    load = (figures.load * figures.tokens[:, None]).sum(0) / jnp.maximum(figures.tokens.sum(), 1.0)
    return load - load.mean()


def with_bias_steps(updates: Mapping[str, jax.Array], gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """An optimizer's updates by path, those of every ``selection_bias`` replaced by -u * sign(gradient)."""

    def step(name, update):
        ours = name.rpartition("/")[2] == "selection_bias"
        return -RATE * jnp.sign(gradients[name]).astype(update.dtype) if ours else update

    return {name: step(name, update) for name, update in updates.items()}


@jax.custom_vjp
def steer(y: jax.Array, bias: jax.Array, error: jax.Array) -> jax.Array:
    """Returns y; the gradient of ``bias`` [E] is RATE * sign(error), and y's passes through."""
    return y


def _steer_forward(y, bias, error):
    return y, error


def _steer_backward(error, gradient):
    return gradient, RATE * jnp.sign(error), None


steer.defvjp(_steer_forward, _steer_backward)
