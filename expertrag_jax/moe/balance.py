"""Loss-free balancing (DeepSeek-V3; arXiv 2408.15664, algorithm 1): a bias per expert that only the choice sees.

The algorithm lowers the bias of an expert with more than the mean load by a fixed step u, and raises it of one with
less. Here the bias is a parameter of the layer, and its gradient is load - mean, whatever the loss is; so the state
lies where all parameters lie, is sharded, saved and restored with them, and the load of a batch is the mean of its
micro-batches'. The training step takes these gradients out (``take_errors``) before it measures, clips and applies the
others, and moves each bias by u against the sign of its own (``with_bias_steps``): no optimizer's learning rate,
moments or weight decay touch it.
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


def take_errors(gradients: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Gradients by path -> (the same with zeros for every ``selection_bias``, the load errors that stood there)."""
    errors = {name: g for name, g in gradients.items() if name.rpartition("/")[2] == "selection_bias"}
    return dict(gradients) | jax.tree.map(jnp.zeros_like, errors), errors


def with_bias_steps(updates: Mapping[str, jax.Array], errors: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """An optimizer's updates by path, those of the biases that ``errors`` names replaced by -u * sign(error)."""
    return dict(updates) | {name: -RATE * jnp.sign(e).astype(updates[name].dtype) for name, e in errors.items()}


@jax.custom_vjp
def steer(y: jax.Array, bias: jax.Array, error: jax.Array) -> jax.Array:
    """Returns y; the gradient of ``bias`` [E] is ``error``, and y's passes through."""
    return y


def _steer_forward(y, bias, error):
    return y, error


def _steer_backward(error, gradient):
    return gradient, error, None


steer.defvjp(_steer_forward, _steer_backward)
