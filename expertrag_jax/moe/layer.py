"""The mixture-of-experts feed-forward layer: routing and dispatch joined, expert-parallel under a mesh.

Inside ``jax.shard_map`` every device routes its own groups, sends buffers to the experts' owners with one
``all_to_all`` over the mesh axis ``expert``, runs its experts, and gets the results back with a second one.
The axis ``tensor`` splits the experts' hidden width; its partial sums are added by one ``psum``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from expertrag_jax import partitioning
from expertrag_jax.moe import dispatch, routing

KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,))


def expert_feed_forward(kernels: dict, buffers: jax.Array, activations: Sequence[str]) -> jax.Array:
    """Every expert on its own buffer: [E, N, D] -> [E, N, D]; gated when there are two activations."""
    hidden = 1
    for index, name in enumerate(activations):
        kernel = kernels["wi" if len(activations) == 1 else f"wi_{index}"].astype(buffers.dtype)
        hidden = hidden * activation(name)(jnp.matmul(buffers, kernel))
    return jnp.matmul(hidden, kernels["wo"].astype(buffers.dtype))


def activation(name: str):
    """A function by T5X's name: ``gelu`` (tanh form), ``relu``, ``silu`` or ``linear``."""
    return {"linear": lambda x: x, "gelu": functools.partial(nn.gelu, approximate=True), "relu": nn.relu, "silu": nn.silu}[name]


def mixture(x, router_input, valid, router_kernel, kernels, *, k, capacity, exact, activations, expert_axis=1, reduce_axes=()):
    """Routes and runs one device's groups.

    Args:
      x, router_input: [G, S, D] tokens, and what the router sees (x, or x with jitter).
      valid: [G, S] bool.
      router_kernel: [D, E]; kernels: dict of [E_local, D, F] / [E_local, F, D].
      capacity: slots per expert and group. exact: repeat with room for every token if any was dropped.
      expert_axis: size of the mesh axis ``expert`` (1: no exchange). reduce_axes: mesh axes in use.
    Returns:
      ([G, S, D], RouterStatistics)
    """
    num_experts = router_kernel.shape[-1]
    logits = jnp.einsum("gsd,de->gse", router_input.astype(jnp.float32), router_kernel.astype(jnp.float32))
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

    size = x.shape[1]
    if not exact or capacity >= size:
        return run(buckets, capacity), figures
    overflow = (figures.dropped * figures.tokens).sum()
    if reduce_axes:
        overflow = jax.lax.psum(overflow, reduce_axes)
    y = jax.lax.cond(
        overflow > 0,
        lambda: run(routing.fill_buckets(choice, num_experts, size), size),
        lambda: run(buckets, capacity),
    )
    return y, figures.replace(dropped=jnp.zeros_like(figures.dropped))


class _Router(nn.Module):
    """Holds the router's kernel at T5X's path ``router/router_weights/w/kernel``."""

    num_experts: int

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        return _Kernel((width, self.num_experts), ("embed", "unmodeled"), nn.initializers.normal(2e-2), name="w")()


class _Kernel(nn.Module):
    """One parameter called ``kernel``."""

    shape: tuple
    axes: tuple
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.with_logical_partitioning(self.init, self.axes), self.shape, jnp.float32)


class _RouterWeights(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, width: int) -> jax.Array:
        return _Router(self.num_experts, name="router_weights")(width)


class _Experts(nn.Module):
    num_experts: int
    hidden: int
    activations: tuple

    @nn.compact
    def __call__(self, width: int) -> dict:
        names = ["wi"] if len(self.activations) == 1 else [f"wi_{i}" for i in range(len(self.activations))]
        shape, axes = (self.num_experts, width, self.hidden), ("expert", "embed", "expert_mlp")
        kernels = {name: _Kernel(shape, axes, KERNEL_INIT, name=name)() for name in names}
        shape, axes = (self.num_experts, self.hidden, width), ("expert", "expert_mlp", "embed")
        return kernels | {"wo": _Kernel(shape, axes, KERNEL_INIT, name="wo")()}


class MixtureOfExperts(nn.Module):
    """A sparse feed-forward layer with the parameter tree of T5X's Switch models.

    Attributes:
      num_experts: E. hidden: width F of one expert. activations: as in the dense layer.
      k: experts per token. train_capacity_factor, eval_capacity_factor: slots per expert over a uniform load;
        None for evaluation means that nothing is ever dropped.
      group_size: upper bound of tokens per routing group. jitter: multiplicative noise on the router's input.
    Sows ``RouterStatistics`` into the collection ``router``.
    """

    num_experts: int
    hidden: int
    activations: tuple = ("gelu", "linear")
    k: int = 1
    train_capacity_factor: float = 1.25
    eval_capacity_factor: float | None = None
    group_size: int = 4096
    jitter: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, L, D], valid [B, L] bool -> [B, L, D]."""
        batch, length, width = x.shape
        router_kernel = _RouterWeights(self.num_experts, name="router")(width)
        kernels = _Experts(self.num_experts, self.hidden, self.activations, name="expert")(width)
        sizes = partitioning.mesh_axis_sizes()
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        tokens = batch * length
        size = routing.group_size_for(tokens, self.group_size, shards if not deterministic else 1)
        sharded = max(sizes.values()) > 1 and (tokens // size) % shards == 0
        if max(sizes.values()) > 1 and not sharded and tokens % shards == 0:  # evaluation drops nothing: regroup freely
            size, sharded = tokens // shards, True
        groups = x.reshape(-1, size, width)
        router_input = groups
        if self.jitter and not deterministic:
            noise = jax.random.uniform(self.make_rng("jitter"), groups.shape, groups.dtype, 1 - self.jitter, 1 + self.jitter)
            router_input = groups * noise
        factor = self.train_capacity_factor if not deterministic else (self.eval_capacity_factor or 2.0)
        run = functools.partial(
            mixture, k=self.k, activations=self.activations, exact=deterministic and self.eval_capacity_factor is None,
            capacity=routing.expert_capacity(size, self.num_experts, self.k, factor),
        )
        if sharded:
            run = _shard(run, kernels, sizes, self.num_experts)
        y, figures = run(groups, router_input, valid.reshape(-1, size), router_kernel, kernels)
        self.sow("router", "statistics", figures)
        return y.reshape(x.shape)


def _shard(run, kernels, sizes, num_experts):
    """Wraps ``mixture`` in a shard_map over the context mesh."""
    if num_experts % sizes["expert"]:
        from expertrag_jax.errors import UserError

        raise UserError(f"{num_experts} experts do not divide over the mesh axis expert={sizes['expert']}.")
    batch = PartitionSpec(("data", "fsdp", "expert"))
    kernel_specs = {
        name: PartitionSpec("expert", "tensor", None) if name == "wo" else PartitionSpec("expert", None, "tensor")
        for name in kernels
    }
    run = functools.partial(run, expert_axis=sizes["expert"], reduce_axes=("data", "fsdp", "expert", "tensor"))
    return jax.shard_map(
        run, in_specs=(batch, batch, batch, PartitionSpec(), kernel_specs), out_specs=(batch, batch), check_vma=False
    )
