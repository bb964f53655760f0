"""The mixture-of-experts feed-forward layer: routing and dispatch joined, expert-parallel under a mesh.

Inside ``jax.shard_map`` every device routes its own groups, sends buffers to the experts' owners with one
``all_to_all`` over the mesh axis ``expert``, runs its experts, and gets the results back with a second one.
The axis ``tensor`` splits the experts' hidden width; its partial sums are added by one ``psum``.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.moe import dispatch, routing
from expertrag_jax.moe.experts import Kernels, expert_feed_forward, expert_kernels, router_kernel

EXACT_CAPACITY_FACTOR = 2.0
"""Slots of the fast path where nothing may be dropped; a fuller expert sends the batch down the slow path."""


def mixture(
    x: jax.Array,
    router_input: jax.Array,
    valid: jax.Array,
    router_weights: jax.Array,
    kernels: dict,
    *,
    k: int,
    capacity: int,
    exact: bool,
    activations: tuple[str, ...],
    expert_axis: int = 1,
    reduce_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, routing.RouterStatistics]:
    """Routes and runs one device's groups.

    Args:
      x: [G, S, D] tokens. router_input: [G, S, D], what the router sees (x, or x with jitter).
      valid: [G, S] bool.
      router_weights: [D, E]; kernels: dict of [E_local, D, F] / [E_local, F, D].
      k: experts per token. capacity: slots per expert and group.
      exact: repeat with room for every token if any was dropped.
      activations: as in the dense layer.
      expert_axis: size of the mesh axis ``expert`` (1: no exchange).
      reduce_axes: the mesh axes larger than 1.
    Returns:
      ([G, S, D], RouterStatistics)
    """
    num_experts, size = router_weights.shape[-1], x.shape[1]
    logits = jnp.einsum(
        "gsd,de->gse", router_input.astype(jnp.float32), router_weights, precision=jax.lax.Precision.HIGHEST
    )
    choice = routing.route(logits, valid, k)
    buckets = routing.fill_buckets(choice, num_experts, capacity)
    figures = routing.statistics(logits, choice, buckets)

    def run(buckets, capacity):
        groups, width = x.shape[0], x.shape[-1]
        buffers = dispatch.gather_tokens(x, buckets).reshape(groups, num_experts, capacity, width)
        buffers = buffers.transpose(1, 0, 2, 3)  # [E, G, C, D]
        if expert_axis > 1:  # experts to their owners: [E_local, G * expert_axis, C, D]
            buffers = jax.lax.all_to_all(buffers, "expert", split_axis=0, concat_axis=1, tiled=True)
        local = expert_feed_forward(kernels, buffers.reshape(buffers.shape[0], -1, width), activations)
        if "tensor" in reduce_axes:
            local = jax.lax.psum(local, "tensor")
        local = local.reshape(buffers.shape)
        if expert_axis > 1:
            local = jax.lax.all_to_all(local, "expert", split_axis=1, concat_axis=0, tiled=True)
        outputs = local.transpose(1, 0, 2, 3).reshape(groups, num_experts * capacity, width)
        return dispatch.combine(outputs, choice.weight, buckets)

    if not exact or capacity >= size:
        return run(buckets, capacity), figures
    overflow = (figures.dropped * figures.tokens).sum()
    if reduce_axes:  # all devices take the same path: the exchange needs every one of them
        overflow = jax.lax.psum(overflow, reduce_axes)
    y = jax.lax.cond(
        overflow > 0,
        lambda: run(routing.fill_buckets(choice, num_experts, size), size),
        lambda: run(buckets, capacity),
    )
    return y, figures.replace(dropped=jnp.zeros_like(figures.dropped))


class MixtureOfExperts(nn.Module):
    """A sparse feed-forward layer with the parameter tree of T5X's Switch models.

    Attributes:
      num_experts: E. hidden: width F of one expert. activations: as in the dense layer.
      k: experts per token.
      train_capacity_factor, eval_capacity_factor: slots per expert over a uniform load; None for evaluation
        means that nothing is ever dropped.
      group_size: upper bound of tokens per routing group. jitter: multiplicative noise on the router's input.
    Sows ``RouterStatistics`` into the collection ``router``.
    Raises:
      UserError: in training under a mesh, when the routing groups do not divide over the batch shards, or the
        experts over the mesh axis ``expert``.
    """

    num_experts: int
    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    k: int = 1
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None
    group_size: int = 4096
    jitter: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, L, D], valid [B, L] bool -> [B, L, D]."""
        width = x.shape[-1]
        router = Kernels(router_kernel(self.num_experts, width), name="router")()
        wanted = expert_kernels(self.num_experts, width, self.hidden, self.activations)
        kernels = Kernels(wanted, name="expert")()
        exact = deterministic and self.eval_capacity_factor is None
        sizes = partitioning.mesh_axis_sizes()
        size, sharded = self._grouping(x.shape[0] * x.shape[1], sizes, deterministic, exact)
        factor = self.train_capacity_factor if not deterministic else self.eval_capacity_factor
        run = functools.partial(
            mixture,
            k=self.k,
            activations=self.activations,
            exact=exact,
            capacity=routing.expert_capacity(
                size, self.num_experts, self.k, EXACT_CAPACITY_FACTOR if exact else factor
            ),
        )
        if sharded:
            run = _shard(run, kernels, sizes, self.num_experts)
        weights = router["router_weights"]["w"]
        groups = x.reshape(-1, size, width)
        router_input = groups
        if self.jitter and not deterministic:
            noise = jax.random.uniform(
                self.make_rng("jitter"), groups.shape, jnp.float32, 1 - self.jitter, 1 + self.jitter
            )
            router_input = groups.astype(jnp.float32) * noise
        y, figures = run(groups, router_input, valid.reshape(-1, size), weights, kernels)
        self.sow("router", "statistics", figures)
        return y.reshape(x.shape)

    def _grouping(self, tokens: int, sizes: dict, deterministic: bool, exact: bool) -> tuple[int, bool]:
        """Tokens per routing group, and whether the groups are spread over the mesh.

        In training the groups must divide over the batch shards. In evaluation they need not (the last batch
        may be small): the layer then runs on whole arrays and the compiler shards it.
        """
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        size = routing.group_size_for(tokens, self.group_size, 1 if deterministic else shards)
        if max(sizes.values()) == 1:
            return size, False
        if exact and (tokens // size) % shards and tokens % shards == 0:
            size = tokens // shards  # nothing is dropped, so groups mean nothing
        return size, (tokens // size) % shards == 0


def _shard(run, kernels: dict, sizes: dict, num_experts: int):
    """Wraps ``mixture`` in a shard_map over the context mesh."""
    if num_experts % sizes["expert"]:
        raise UserError(
            f"{num_experts} experts do not divide over the mesh axis expert={sizes['expert']}: make "
            "NUM_EXPERTS a multiple of it."
        )
    batch = PartitionSpec(partitioning.BATCH_AXES)
    into, back = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor", None)
    kernel_specs = {name: back if name == "wo" else into for name in kernels}
    used = tuple(axis for axis in partitioning.MESH_AXES if sizes[axis] > 1)
    run = functools.partial(run, expert_axis=sizes["expert"], reduce_axes=used)
    return jax.shard_map(
        run,
        in_specs=(batch, batch, batch, PartitionSpec(), kernel_specs),
        out_specs=(batch, batch),
        check_vma=False,
    )
