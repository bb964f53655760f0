"""What a sparse layer tells about its routing: losses, load, and how sure the router is.

Shapes: G routing groups, S tokens per group, E experts. Padding enters no figure.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from expertrag_jax.moe.routing import Buckets, Routing


@struct.dataclass
class RouterStatistics:
    """Per-group figures of one MoE layer; every leaf has the leading axis G.

    Attributes:
      tokens: [G] valid tokens; groups without any carry no weight in averages.
      balance_loss: [G] Switch load-balancing loss, 1 when the load is uniform.
      z_loss: [G] mean squared log-partition of the router.
      load: [G, E] fraction of choices that each expert received (before capacity).
      dropped: [G] fraction of choices over capacity; under expert choice, of tokens that no expert reads.
      entropy: [G] mean router entropy in nats.
      confidence: [G] mean probability of the likeliest expert.
    """

    tokens: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    load: jax.Array
    dropped: jax.Array
    entropy: jax.Array
    confidence: jax.Array


def statistics(logits, valid, first, load, dropped) -> RouterStatistics:
    """Losses and figures per group.

    Balance loss (Switch, arXiv 2101.03961, equation 4): E * sum_e f_e P_e with f_e the fraction of first choices and
    P_e the mean probability. Router z-loss (ST-MoE, arXiv 2202.08906, equation 5): mean of logsumexp(logits)^2.

    Args:
      logits: [G, S, E] float32. valid: [G, S] bool.
      first: [G, E] fraction of first choices. load: [G, E] fraction of all choices. dropped: [G].
    """
    probabilities, log_z = jax.nn.softmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    stop = jax.lax.stop_gradient
    entropy = log_z - (probabilities * logits).sum(-1)
    return RouterStatistics(
        tokens=valid.sum(-1).astype(jnp.float32),
        balance_loss=logits.shape[-1] * (stop(first) * mean(probabilities, valid)).sum(-1),
        z_loss=mean(log_z**2, valid),
        load=stop(load),
        dropped=stop(dropped),
        entropy=stop(mean(entropy, valid)),
        confidence=stop(mean(probabilities.max(-1), valid)),
    )


def choice_statistics(logits: jax.Array, choice: Routing, slots: Buckets | None) -> RouterStatistics:
    """``statistics`` of token choice; without ``slots`` nothing was dropped."""
    chosen = jax.nn.one_hot(choice.expert_index, logits.shape[-1])  # [G, S, k, E]
    over = jnp.zeros(choice.valid.shape)
    if slots is not None:
        over = (slots.slot >= slots.token.shape[-1]).astype(jnp.float32).mean(-1)
    means = (mean(values, choice.valid) for values in (chosen[:, :, 0], chosen.mean(2), over))
    return statistics(logits, choice.valid, *means)


def mean(values: jax.Array, valid: jax.Array) -> jax.Array:
    """Means over valid tokens: values [G, S, ...], valid [G, S] -> [G, ...]; 0 in a group without any.

    A product: XLA on CPU is slow at sums over a middle axis.
    """
    mask = valid.astype(jnp.float32)
    total = jnp.einsum("gs...,gs->g...", values, mask, precision=jax.lax.Precision.HIGHEST)
    return total / jnp.maximum(mask.sum(-1), 1.0).reshape((-1,) + (1,) * (values.ndim - 2))
