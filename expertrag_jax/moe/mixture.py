"""One device's tokens through the experts, in three ways; what ``layer.MixtureOfExperts`` puts under the mesh.

Inside ``jax.shard_map`` every device routes its own groups, sends rows to the experts' owners with an ``all_to_all``
over the mesh axis ``expert``, runs its experts, and gets the results back with a second one. The axis ``tensor`` splits
the experts' hidden width; its partial sums are added by one ``psum``.

All three take x [G, S, D] (tokens in routing groups), router_input [G, S, D] (x, or x with jitter), valid [G, S] bool,
``Router``, and kernels [E_local, D, F] / [E_local, F, D] by name; and give ([G, S, D], RouterStatistics). Keywords:
``k`` experts per token, ``activations`` as in the dense layer, ``axes`` of the mesh.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from expertrag_jax.moe import dispatch, routing
from expertrag_jax.moe.experts import expert_feed_forward
from expertrag_jax.moe.matmul import block_rows, grouped_matmul
from expertrag_jax.moe.statistics import RouterStatistics, choice_statistics, statistics


class Axes(NamedTuple):
    """Size of the mesh axis ``expert`` (1: no exchange), and the mesh axes larger than 1."""

    expert: int = 1
    used: tuple[str, ...] = ()


ONE_DEVICE = Axes()


class Router(NamedTuple):
    """Kernel [D, E] float32, and what is added to the probabilities for the choice alone: [E] or None."""

    kernel: jax.Array
    bias: jax.Array | None = None

    def logits(self, x: jax.Array) -> jax.Array:
        """x [G, S, D] -> [G, S, E], float32 throughout."""
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("gsd,de->gse", x.astype(jnp.float32), self.kernel, precision=highest)


def buckets(
    x, router_input, valid, router, kernels, *, k, capacity, exact, prioritised, activations, axes=ONE_DEVICE
) -> tuple[jax.Array, RouterStatistics]:
    """Token choice, ``capacity`` slots per expert and group; what does not fit is dropped.

    Args:
      exact: start again without capacity, as ``dropless`` does, if any was dropped.
      prioritised: slots go to the surest tokens first, not to the first in the text.
    """
    num_experts, size = router.kernel.shape[-1], x.shape[1]
    logits = router.logits(router_input)
    choice = routing.route(logits, valid, k, router.bias)

    def run(slots):
        buffers = dispatch.gather_tokens(x, slots)
        return dispatch.combine(_exchange(buffers, kernels, num_experts, activations, axes), choice.weight, slots)

    slots = routing.fill_buckets(choice, num_experts, capacity, prioritised)
    figures = choice_statistics(logits, choice, slots)
    if not exact or capacity >= size:
        return run(slots), figures
    overflow = (figures.dropped * figures.tokens).sum()
    if axes.used:  # all devices take the same path: the exchange needs every one of them
        overflow = jax.lax.psum(overflow, axes.used)
    y = jax.lax.cond(
        overflow > 0, lambda: _without_capacity(x, choice, kernels, num_experts, activations, axes), lambda: run(slots)
    )
    return y, figures.replace(dropped=jnp.zeros_like(figures.dropped))


def expert_choice(
    x, router_input, valid, router, kernels, *, k, capacity_factor, activations, axes=ONE_DEVICE
) -> tuple[jax.Array, RouterStatistics]:
    """Every expert takes its best tokens of a group (arXiv 2202.09368); a token is read by none to E experts."""
    num_experts = router.kernel.shape[-1]
    logits = router.logits(router_input)
    chosen = routing.choose_tokens(logits, valid, k, capacity_factor)
    buffers = dispatch.take_rows(x, chosen.token)
    outputs = _exchange(buffers, kernels, num_experts, activations, axes)
    figures = statistics(logits, valid, chosen.load, chosen.load, chosen.unread)
    return dispatch.add_rows(outputs, chosen.weight, chosen.token, x.shape[1]), figures


def dropless(
    x, router_input, valid, router, kernels, *, k, activations, axes=ONE_DEVICE
) -> tuple[jax.Array, RouterStatistics]:
    """Token choice without capacity: rows sorted by expert, each expert reads as many as chose it."""
    num_experts = router.kernel.shape[-1]
    logits = router.logits(router_input)
    choice = routing.route(logits, valid, k, router.bias)
    figures = choice_statistics(logits, choice, None)
    return _without_capacity(x, choice, kernels, num_experts, activations, axes), figures


def _without_capacity(x, choice, kernels, num_experts, activations, axes):
    """x [G, S, D] through the experts of ``choice``, all of it.

    With an expert axis of n, shapes are static only where any device can receive all choices of all n: buffers and
    traffic are n times those of a balanced load. The numbers of rows travel in a third, small ``all_to_all``.
    """
    k = choice.expert_index.shape[-1]
    rows = x.reshape(1, -1, x.shape[-1])
    weight = choice.weight.reshape(1, -1, k)
    expert = jnp.where(choice.valid[..., None], choice.expert_index, num_experts).reshape(-1, k)
    if axes.expert == 1:
        run = functools.partial(_run_sorted, kernels=kernels, activations=activations, axes=axes)
        return run(rows, expert, weight).reshape(x.shape)
    local, room = num_experts // axes.expert, expert.size
    owners = routing.sort_by_owner(expert, num_experts, axes.expert)
    sent = dispatch.gather_tokens(rows, owners.slots).reshape(axes.expert, room, -1)
    swap = functools.partial(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True)
    received, counts = swap(sent), swap(owners.counts)  # [from, room, D], [from, E_local]
    ends = jnp.cumsum(counts, axis=1)
    mine = (jnp.arange(room)[None, :, None] >= ends[:, None, :]).sum(-1)  # E_local where there is no row
    flat = received.reshape(1, -1, received.shape[-1])
    ones = jnp.where(mine < local, 1.0, 0.0).reshape(1, -1, 1)
    outputs = _run_sorted(flat, mine.reshape(-1, 1), ones, kernels=kernels, activations=activations, axes=axes)
    returned = swap(outputs.reshape(received.shape)).reshape(1, -1, received.shape[-1])
    return dispatch.combine(returned, weight, owners.slots).reshape(x.shape)


def _run_sorted(rows, expert, weight, *, kernels, activations, axes):
    """rows [1, T, D], expert [T, k] (E_local: none), weight [1, T, k] -> [1, T, D]."""
    num_experts = len(kernels["wo"])
    block = block_rows(expert.size, num_experts)
    slots, sizes = routing.sort_by_expert(expert, num_experts, block)
    inputs = dispatch.gather_tokens(rows, slots)[0]

    def product(rows, kernel):
        return grouped_matmul(rows, kernel, sizes, block)

    outputs = expert_feed_forward(kernels, inputs, activations, product)
    return dispatch.combine(_add_shards(outputs, axes)[None], weight, slots)


def _exchange(buffers, kernels, num_experts, activations, axes):
    """Buffers [G, E * C, D] through their experts, wherever these live; same shape."""
    groups, _, width = buffers.shape
    shape = (groups, num_experts, -1, width)
    buffers = buffers.reshape(shape).transpose(1, 0, 2, 3)  # [E, G, C, D]
    if axes.expert > 1:  # experts to their owners: [E_local, G * axes.expert, C, D]
        buffers = jax.lax.all_to_all(buffers, "expert", split_axis=0, concat_axis=1, tiled=True)
    local = expert_feed_forward(kernels, buffers.reshape(buffers.shape[0], -1, width), activations)
    local = _add_shards(local, axes).reshape(buffers.shape)
    if axes.expert > 1:
        local = jax.lax.all_to_all(local, "expert", split_axis=1, concat_axis=0, tiled=True)
    return local.transpose(1, 0, 2, 3).reshape(groups, -1, width)


def _add_shards(outputs, axes):
    return jax.lax.psum(outputs, "tensor") if "tensor" in axes.used else outputs
