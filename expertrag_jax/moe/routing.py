"""Who goes where: the choice of experts, and the slots that the choices get.

Shapes: G routing groups, S tokens per group, E experts, k selected experts, C expert capacity.
All arithmetic is float32 whatever the activations are. Padding (``valid`` False) takes no capacity. Source of
the rules: Switch Transformer (arXiv 2101.03961, section 2.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
      slot: [G, S, k] int32, the slot of each choice (``expert * C + position``), or ``M`` when dropped.
      token: [G, M] int32, the flat choice ``token * k + choice`` that fills each slot, or ``S * k`` when the slot
        is empty; M = E * C.
    """

    slot: jax.Array
    token: jax.Array


@struct.dataclass
class TokenChoice:
    """Expert choice's result: which tokens each expert reads.

    Attributes:
      token: [G, E * C] int32, or S where the slot is empty.
      weight: [G, E * C] float32, the expert's probability at that token; 0 where empty.
      load: [G, E] fraction of the filled slots: uniform. unread: [G] fraction of valid tokens that no expert reads.
    """

    token: jax.Array
    weight: jax.Array
    load: jax.Array
    unread: jax.Array


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


def route(logits: jax.Array, valid: jax.Array, k: int, bias: jax.Array | None = None) -> Routing:
    """Top-k token choice.

    The weights of a token's experts sum to 1 for k > 1 (Mixtral, arXiv 2401.04088); k = 1 weighs the expert by its
    probability (Switch).

    Args:
      logits: [G, S, E] float32 router logits.
      valid: [G, S] bool.
      k: experts per token.
      bias: [E], added to the probabilities for the choice only (see ``balance``); None: nothing.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    scores = jax.lax.stop_gradient(probabilities if bias is None else probabilities + bias)
    index = jnp.argmax(scores, axis=-1, keepdims=True) if k == 1 else jax.lax.top_k(scores, k)[1]
    # A product with one-hot rows, not a gather: its gradient is a product again and not a scatter.
    weight = (probabilities[:, :, None] * jax.nn.one_hot(index, logits.shape[-1])).sum(-1)
    if k > 1:
        weight = weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)
    weight = jnp.where(valid[..., None], weight, 0.0)
    return Routing(probabilities, index.astype(jnp.int32), weight, valid)


def choose_tokens(logits: jax.Array, valid: jax.Array, k: int, capacity_factor: float) -> TokenChoice:
    """Expert choice (arXiv 2202.09368, section 3.2): every expert takes its likeliest tokens of the group.

    An expert reads ceil(capacity_factor * k * valid tokens / E) tokens, so what a text gives does not depend on the
    padding behind it.

    Args:
      logits: [G, S, E] float32. valid: [G, S] bool. k: experts per token, on average.
    """
    groups, size, num_experts = logits.shape
    capacity = expert_capacity(size, num_experts, k, capacity_factor)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    scores = jnp.where(valid[..., None], probabilities, -1.0).swapaxes(1, 2)  # [G, E, S]
    weight, token = jax.lax.top_k(scores, capacity)
    tokens = valid.sum(-1, keepdims=True)
    room = jnp.ceil(capacity_factor * k * tokens / num_experts).astype(jnp.int32)
    filled = jnp.arange(capacity) < jnp.minimum(jnp.maximum(room, 1), tokens)  # [G, C]
    filled = jnp.broadcast_to(filled[:, None], weight.shape)
    token = jnp.where(filled, token, size).reshape(groups, -1)
    weight = jnp.where(filled, weight, 0.0).reshape(groups, -1)
    load = filled.sum(-1) / jnp.maximum(filled.sum((1, 2)), 1)[:, None]
    read = jax.vmap(lambda token: jnp.zeros(size, bool).at[token].set(True, mode="drop"))(token)
    unread = 1 - (read & valid).sum(-1) / jnp.maximum(tokens[:, 0], 1)
    return TokenChoice(token, weight, load, jnp.where(tokens[:, 0] > 0, unread, 0.0))


def fill_buckets(routing: Routing, num_experts: int, capacity: int, prioritised: bool = False) -> Buckets:
    """Assigns choices to slots in Switch's order: all first choices in token order, then all second choices.

    A choice whose expert is full is dropped: exactly the choices that Switch's cumulative-sum rule drops.

    Args:
      prioritised: tokens come in the order of their largest probability and not of the text, so that the least sure
        ones are dropped (V-MoE, arXiv 2106.05974, section 4.1).
    """
    groups, size, k = routing.expert_index.shape
    index, valid = routing.expert_index, routing.valid
    order = jnp.broadcast_to(jnp.arange(size), valid.shape)
    if prioritised:
        order = jnp.argsort(-routing.probabilities.max(-1), axis=1, stable=True)
        index = jnp.take_along_axis(index, order[..., None], axis=1)
        valid = jnp.take_along_axis(valid, order, axis=1)
    flat = index.transpose(0, 2, 1).reshape(groups, k * size)  # first choices first
    valid = jnp.tile(valid, (1, k))
    chosen = (flat[..., None] == jnp.arange(num_experts)) & valid[..., None]  # [G, kS, E]
    position = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
    position = jnp.take_along_axis(position, flat[..., None], axis=-1)[..., 0]
    slot = jnp.where(valid & (position < capacity), flat * capacity + position, num_experts * capacity)
    choice = jnp.concatenate([order * k + j for j in range(k)], axis=1)  # the flat choice ids, in this order
    token = _inverse(slot, choice, num_experts * capacity, size * k)
    slot = slot.reshape(groups, k, size).transpose(0, 2, 1)
    if prioritised:  # back to the order of the text
        slot = jnp.take_along_axis(slot, jnp.argsort(order, axis=1)[..., None], axis=1)
    return Buckets(slot, token)


def _inverse(slot, choice, slots, nothing):
    """slot, choice [G, N] -> [G, slots]: which choice fills each slot, or ``nothing``; a slot of ``slots`` is none."""
    empty = jnp.full(slots, nothing, jnp.int32)
    return jax.vmap(lambda slot, choice: empty.at[slot].set(choice, mode="drop", unique_indices=False))(slot, choice)


def sort_by_expert(expert: jax.Array, num_experts: int, spare: int) -> tuple[Buckets, jax.Array]:
    """Slots without capacity: expert 0's choices first, then expert 1's, in their order.

    Args:
      expert: [T, k] int32, the chosen experts; ``num_experts`` where there is no token.
      spare: empty slots behind the last choice.
    Returns:
      (Buckets with G = 1 and T * k + spare slots, choices of each expert [E] int32)
    """
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    sizes = (flat[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
    slots = flat.size + spare
    slot = jnp.where(flat < num_experts, place, slots).reshape(1, *expert.shape)
    token = jnp.where(jnp.arange(flat.size) < sizes.sum(), order, flat.size)
    return Buckets(slot, jnp.pad(token, (0, spare), constant_values=flat.size)[None]), sizes


class Owners(NamedTuple):
    """Slots by owning device: Buckets with T * k slots per owner, and choices of each expert [owners, E_local]."""

    slots: Buckets
    counts: jax.Array


def sort_by_owner(expert: jax.Array, num_experts: int, owners: int) -> Owners:
    """Room for all choices on every owner, sorted by expert; ``expert`` [T, k] as in ``sort_by_expert``."""
    room = expert.size
    sorted_slots, sizes = sort_by_expert(expert, num_experts, 0)
    counts = sizes.reshape(owners, -1)
    owner = jnp.minimum(expert // (num_experts // owners), owners - 1)
    before = jnp.cumsum(counts.sum(-1)) - counts.sum(-1)  # choices of earlier owners
    slot = jnp.where(expert < num_experts, sorted_slots.slot[0] - before[owner] + owner * room, owners * room)
    choice = jnp.arange(room, dtype=jnp.int32)[None]
    token = _inverse(slot.reshape(1, -1), choice, owners * room, room)
    return Owners(Buckets(slot[None], token), counts)
