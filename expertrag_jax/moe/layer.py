"""The mixture-of-experts feed-forward layer: its parameters, its routing groups, and its place on the mesh."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.moe import balance, mixture, routing
from expertrag_jax.moe.experts import Kernels, expert_kernels, router_kernel

EXACT_CAPACITY_FACTOR = 2.0
"""Slots of the fast path where nothing may be dropped; a fuller expert sends the batch down the slow path."""

DISPATCHES = ("buckets", "dropless")
ROUTINGS = ("token_choice", "expert_choice")


class MixtureOfExperts(nn.Module):
    """A sparse feed-forward layer with the parameter tree of T5X's Switch models.

    Attributes:
      num_experts: E. hidden: width F of one expert. activations: as in the dense layer.
      k: experts per token.
      train_capacity_factor, eval_capacity_factor: slots per expert over a uniform load; None for evaluation means that
        nothing is ever dropped.
      group_size: upper bound of tokens per routing group. jitter: multiplicative noise on the router's input.
      dispatch: ``buckets`` (capacity; fast everywhere) or ``dropless`` (no capacity, nothing dropped; on a mesh axis
        ``expert`` of n it moves n times as much).
      routing: ``token_choice``, or ``expert_choice``, where every expert takes its best tokens of a row of the batch:
        a perfectly even load, for encoders only, because the choice depends on all tokens of the row. The three
        fields around this one have no say then; ``train_capacity_factor`` holds in evaluation too where the other is
        None.
      prioritised: full experts drop the least sure tokens, not the last ones (V-MoE).
      loss_free_balancing: a bias on the choice keeps the load even instead of the balance loss (see ``balance``); it is
        the parameter ``selection_bias``.
    Sows ``RouterStatistics`` into the collection ``router``.
    Raises:
      UserError: in training under a mesh, when the routing groups do not divide over the batch shards, or the experts
        over the mesh axis ``expert``.
    """

    num_experts: int
    hidden: int
    activations: tuple[str, ...] = ("gelu", "linear")
    k: int = 1
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None
    group_size: int = 4096
    jitter: float = 0.0
    dispatch: str = "buckets"
    routing: str = "token_choice"
    prioritised: bool = False
    loss_free_balancing: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, L, D], valid [B, L] bool -> [B, L, D]."""
        width, bias = x.shape[-1], None
        weights = Kernels(router_kernel(self.num_experts, width), name="router")()["router_weights"]["w"]
        wanted = expert_kernels(self.num_experts, width, self.hidden, self.activations)
        kernels = Kernels(wanted, name="expert")()
        if self.loss_free_balancing and self.routing == "token_choice":
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("unmodeled",))
            bias = self.param("selection_bias", zeros, (self.num_experts,), jnp.float32)
        sizes = partitioning.mesh_axis_sizes()
        size, sharded = self._grouping(x.shape, sizes, deterministic)
        run = self._mixture(size, deterministic)
        if sharded:
            run = _shard(run, kernels, sizes, self.num_experts)
        groups = x.reshape(-1, size, width)
        router = mixture.Router(weights, None if bias is None else jax.lax.stop_gradient(bias))
        y, figures = run(groups, self._router_input(groups, deterministic), valid.reshape(-1, size), router, kernels)
        if bias is not None:
            y = balance.steer(y, bias, balance.load_error(figures))
        self.sow("router", "statistics", figures)
        return y.reshape(x.shape)

    def _drops_nothing(self, deterministic: bool) -> bool:
        return deterministic and self.eval_capacity_factor is None

    def _mixture(self, size: int, deterministic: bool):
        """The way through the experts of groups of ``size`` tokens: a function of ``mixture``."""
        common = {"k": self.k, "activations": self.activations}
        factor = self.train_capacity_factor
        if deterministic and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        if self.routing == "expert_choice":
            return functools.partial(mixture.expert_choice, capacity_factor=factor, **common)
        if self.dispatch == "dropless":
            return functools.partial(mixture.dropless, **common)
        exact = self._drops_nothing(deterministic)
        capacity = routing.expert_capacity(size, self.num_experts, self.k, EXACT_CAPACITY_FACTOR if exact else factor)
        return functools.partial(
            mixture.buckets, capacity=capacity, exact=exact, prioritised=self.prioritised, **common
        )

    def _router_input(self, groups: jax.Array, deterministic: bool) -> jax.Array:
        if deterministic or not self.jitter:
            return groups
        low, high = 1 - self.jitter, 1 + self.jitter
        noise = jax.random.uniform(self.make_rng("jitter"), groups.shape, jnp.float32, low, high)
        return groups.astype(jnp.float32) * noise

    def _grouping(self, shape: tuple[int, ...], sizes: dict, deterministic: bool) -> tuple[int, bool]:
        """Tokens per routing group, and whether the groups are spread over the mesh.

        In training the groups must divide over the batch shards. In evaluation they need not (the last batch may be
        small): the layer then runs on whole arrays and the compiler shards it. Experts that choose do so in one row of
        the batch, so that a row does not depend on its batch-mates.
        """
        tokens, shards = shape[0] * shape[1], sizes["data"] * sizes["fsdp"] * sizes["expert"]
        by_row = self.routing == "expert_choice"
        limit = shape[1] if by_row else self.group_size
        size = routing.group_size_for(tokens, limit, 1 if deterministic else shards)
        if max(sizes.values()) == 1:
            return size, False
        exact = self._drops_nothing(deterministic) and not by_row
        if exact and (tokens // size) % shards and tokens % shards == 0:
            size = tokens // shards  # nothing is dropped, so groups mean nothing
        return size, (tokens // size) % shards == 0


def _shard(run, kernels: dict, sizes: dict, num_experts: int):
    """Wraps a function of ``mixture`` in a shard_map over the context mesh."""
    if num_experts % sizes["expert"]:
        raise UserError(
            f"{num_experts} experts do not divide over the mesh axis expert={sizes['expert']}: make "
            "NUM_EXPERTS a multiple of it."
        )
    batch = PartitionSpec(partitioning.BATCH_AXES)
    into, back = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor", None)
    kernel_specs = {name: back if name == "wo" else into for name in kernels}
    used = tuple(axis for axis in partitioning.MESH_AXES if sizes[axis] > 1)
    run = functools.partial(run, axes=mixture.Axes(sizes["expert"], used))
    return jax.shard_map(
        run,
        in_specs=(batch, batch, batch, PartitionSpec(), kernel_specs),
        out_specs=(batch, batch),
        check_vma=False,
    )
