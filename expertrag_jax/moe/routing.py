"""Who goes where: token-choice routing, its losses and its statistics.

Shapes: G routing groups, S tokens per group, E experts, k selected experts, C expert capacity.
All arithmetic is float32 whatever the activations are. Padding (``valid`` False) takes no capacity and
enters no statistic. Sources: Switch Transformer (arXiv 2101.03961, section 2.2), ST-MoE (arXiv 2202.08906,
equation 5).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from expertrag_jax.errors import UserError


@struct.dataclass
class Routing:
    """The choice of experts per token.

    Attributes:
      probabilities: [G, S, E] float32, softmax of the router logits.
      expert_index: [G, S, k] int32, chosen experts, best first.
      weight: [G, S, k] float32, combination weights.
      valid: [G, S] bool, False on padding.
    """

    probabilities: jax.Array
    expert_index: jax.Array
    weight: jax.Array
    valid: jax.Array


@struct.dataclass
class Buckets:
    """Where every token sits in the experts' buffers.

    Attributes:
      slot: [G, S, k] int32, ``expert * C + position`` of each choice, or ``E * C`` when dropped.
      token: [G, E * C] int32, the flat choice ``token * k + choice`` that fills each slot, or ``S * k`` when
        the slot is empty.
    """

    slot: jax.Array
    token: jax.Array


@struct.dataclass
class RouterStatistics:
    """Per-group figures of one MoE layer; every leaf has the leading axis G.

    Attributes:
      tokens: [G] valid tokens; groups without any carry no weight in averages.
      balance_loss: [G] Switch load-balancing loss, 1 when the load is uniform.
      z_loss: [G] mean squared log-partition of the router.
      load: [G, E] fraction of choices that each expert received (before capacity).
      dropped: [G] fraction of choices over capacity.
      entropy: [G] mean router entropy in nats.
      confidence: [G] mean probability of the first choice.
    """

    tokens: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    load: jax.Array
    dropped: jax.Array
    entropy: jax.Array
    confidence: jax.Array


def group_size_for(num_tokens: int, group_size: int, batch_shards: int = 1) -> int:
    """Tokens per routing group, independent of the mesh.

    It is the largest divisor of ``num_tokens`` that is at most ``group_size``.

    Raises:
      UserError: when the number of groups is not a multiple of ``batch_shards``; names the nearest group
        sizes.
    """
    divisors = [d for d in range(1, math.isqrt(num_tokens) + 1) if num_tokens % d == 0]
    divisors = sorted({*divisors, *(num_tokens // d for d in divisors)})
    size = max(d for d in divisors if d <= max(group_size, 1))
    if (num_tokens // size) % batch_shards:
        fitting = [d for d in divisors if (num_tokens // d) % batch_shards == 0]
        nearest = sorted(fitting, key=lambda d: abs(d - group_size))[:3]
        hint = (
            f"nearest group sizes that do: {sorted(nearest)}"
            if nearest
            else "no group size does: change the batch size"
        )
        raise UserError(
            f"{num_tokens} tokens in routing groups of {size} make {num_tokens // size} groups, which do not "
            f"divide over {batch_shards} batch shards; {hint}."
        )
    return size


def expert_capacity(group_size: int, num_experts: int, k: int, capacity_factor: float) -> int:
    """Slots per expert and group, C = ceil(capacity_factor * S * k / E), at most S and at least 1."""
    return max(1, min(group_size, math.ceil(capacity_factor * group_size * k / num_experts)))


def route(logits: jax.Array, valid: jax.Array, k: int, renormalise: bool | None = None) -> Routing:
    """Top-k token choice.

    Args:
      logits: [G, S, E] float32 router logits.
      valid: [G, S] bool.
      k: experts per token.
      renormalise: whether the weights of a token's experts sum to 1; None: for k > 1 (Mixtral), while k = 1
        weighs the expert by its probability (Switch).
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    if k == 1:
        index = jnp.argmax(probabilities, axis=-1, keepdims=True)
    else:
        index = jax.lax.top_k(jax.lax.stop_gradient(probabilities), k)[1]
    # A product with one-hot rows, not a gather: its gradient is a product again and not a scatter.
    weight = (probabilities[:, :, None] * jax.nn.one_hot(index, logits.shape[-1])).sum(-1)
    if renormalise or (renormalise is None and k > 1):
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    weight = jnp.where(valid[..., None], weight, 0.0)
    return Routing(probabilities, index.astype(jnp.int32), weight, valid)


def fill_buckets(routing: Routing, num_experts: int, capacity: int) -> Buckets:
    """Assigns choices to slots in Switch's order: all first choices in token order, then all second choices.

    A choice whose expert is full is dropped: exactly the choices that Switch's cumulative-sum rule drops.
    """
    groups, size, k = routing.expert_index.shape
    flat = routing.expert_index.transpose(0, 2, 1).reshape(groups, k * size)  # first choices first
    valid = jnp.tile(routing.valid, (1, k))
    chosen = (flat[..., None] == jnp.arange(num_experts)) & valid[..., None]  # [G, kS, E]
    position = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
    position = jnp.take_along_axis(position, flat[..., None], axis=-1)[..., 0]
    kept = valid & (position < capacity)
    slot = jnp.where(kept, flat * capacity + position, num_experts * capacity)
    order = (jnp.arange(size) * k)[None, :] + jnp.arange(k)[:, None]  # choice-major to the flat choice id
    order = jnp.broadcast_to(order.reshape(1, -1), slot.shape)
    token = jnp.full((groups, num_experts * capacity + 1), size * k, jnp.int32)
    token = jax.vmap(lambda t, s, o: t.at[s].set(o))(token, slot, order)[:, :-1]
    return Buckets(slot.reshape(groups, k, size).transpose(0, 2, 1), token)


def statistics(logits: jax.Array, routing: Routing, buckets: Buckets | None) -> RouterStatistics:
    """Losses and figures per group; ``logits`` [G, S, E] float32.

    Balance loss (Switch, equation 4): E * sum_e f_e P_e with f_e the fraction of first choices and P_e the
    mean probability. Router z-loss (ST-MoE, equation 5): mean of logsumexp(logits)^2. Both over valid tokens
    only.
    """
    num_experts = logits.shape[-1]
    valid = routing.valid.astype(jnp.float32)
    tokens = valid.sum(-1)
    count = jnp.maximum(tokens, 1.0)

    def mean(values):  # [G, S, ...] -> [G, ...]
        mask = valid.reshape(valid.shape + (1,) * (values.ndim - 2))
        return (values * mask).sum(1) / count.reshape((-1,) + (1,) * (values.ndim - 2))

    choices = jax.nn.one_hot(routing.expert_index, num_experts)  # [G, S, k, E]
    first, load = mean(choices[:, :, 0]), mean(choices.mean(2))
    probability = mean(routing.probabilities)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    if buckets is None:
        dropped = jnp.zeros_like(tokens)
    else:
        over = (buckets.slot >= buckets.token.shape[-1]).astype(jnp.float32).mean(-1)
        dropped = mean(over)
    return RouterStatistics(
        tokens=tokens,
        balance_loss=num_experts * (jax.lax.stop_gradient(first) * probability).sum(-1),
        z_loss=mean(jax.nn.logsumexp(logits, axis=-1) ** 2),
        load=jax.lax.stop_gradient(load),
        dropped=jax.lax.stop_gradient(dropped),
        entropy=jax.lax.stop_gradient(mean(-(routing.probabilities * log_probabilities).sum(-1))),
        confidence=jax.lax.stop_gradient(mean(routing.probabilities.max(-1))),
    )
