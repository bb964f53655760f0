"""Loss-free balancing (DeepSeek-V3; arXiv 2408.15664, algorithm 1): a bias per expert that only the choice sees.

The algorithm lowers the bias of an expert with more than the mean load by a fixed step, and raises it of one with less.
Here the bias is a parameter of the layer, and this file gives it the gradient RATE * sign(load - mean), whatever the
loss is. So the state lies where all parameters lie, is sharded, saved and restored with them, and any optimizer moves
it. The parameter starts at 1: a constant on all experts changes no choice, and Adafactor, whose step is relative to
the parameter's root mean square, then has one to scale with. Under Adam and Adafactor, which divide by the gradient's
size, a step is about the learning rate; under SGD it is the learning rate times RATE. RATE is small so that the
gradient's global norm is still that of the loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from expertrag_jax.moe.statistics import RouterStatistics

RATE = 1e-3
"""The algorithm's u; the paper found 1e-3 best."""


def load_error(figures: RouterStatistics) -> jax.Array:
    """[E]: the load of each expert over all groups, minus the mean load."""
    load = (figures.load * figures.tokens[:, None]).sum(0) / jnp.maximum(figures.tokens.sum(), 1.0)
    return load - load.mean()


@jax.custom_vjp
def steer(y: jax.Array, bias: jax.Array, error: jax.Array) -> jax.Array:
    """Returns y; the gradient of ``bias`` [E] is RATE * sign(error), and y's passes through."""
    return y


def _steer_forward(y, bias, error):
    return y, error


def _steer_backward(error, gradient):
    return gradient, RATE * jnp.sign(error), None


steer.defvjp(_steer_forward, _steer_backward)
