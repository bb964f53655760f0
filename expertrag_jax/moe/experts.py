"""What one expert computes: the feed-forward arithmetic, and the kernels that it needs.

Shapes: E experts, N tokens in an expert's buffer, D model width, F hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.moe.matmul import batched_matmul

ACTIVATIONS = {
    "linear": lambda x: x,
    "gelu": functools.partial(nn.gelu, approximate=True),  # T5 1.1 uses the tanh form
    "relu": nn.relu,
    "silu": nn.silu,
}
"""Activation functions by T5X's names."""


def input_names(activations: Sequence[str]) -> tuple[str, ...]:
    """T5X's names of the input kernels: ``wi``, or ``wi_0, wi_1`` when gated."""
    return ("wi",) if len(activations) == 1 else tuple(f"wi_{i}" for i in range(len(activations)))


def expert_feed_forward(
    kernels: Mapping[str, jax.Array],
    rows: jax.Array,
    activations: Sequence[str],
    product: Callable[[jax.Array, jax.Array], jax.Array] = batched_matmul,
) -> jax.Array:
    """Every expert on its own rows; gated when there are two activations.

    Args:
      kernels: ``wi`` (or ``wi_0``, ``wi_1``) [E, D, F] and ``wo`` [E, F, D]; cast to the rows' dtype.
      rows: what ``product(rows, kernel)`` takes: buffers [E, N, D], or sorted rows [N, D].
    Returns:
      The shape of ``rows``.
    """
    hidden = 1
    for label, name in zip(input_names(activations), activations):
        hidden = hidden * ACTIVATIONS[name](product(rows, kernels[label].astype(rows.dtype)))
    return product(hidden, kernels["wo"].astype(rows.dtype))


class Kernel(NamedTuple):
    """A kernel that is wanted: its shape, logical axes and initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: nn.initializers.Initializer


class Kernels(nn.Module):
    """Holds float32 kernels at T5X's paths: ``{"wo": Kernel(...)}`` is the parameter ``wo/kernel``.

    Returns the same nested dict with arrays in place of each Kernel.
    """

    wanted: Kernel | Mapping[str, Any]

    @nn.compact
    def __call__(self) -> Any:
        if isinstance(self.wanted, Kernel):
            shape, axes, init = self.wanted
            return self.param("kernel", nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        return {name: Kernels(branch, name=name)() for name, branch in self.wanted.items()}


def expert_kernels(num_experts: int, width: int, hidden: int, activations: Sequence[str]) -> dict:
    """The ``Kernel`` of every name that E experts of width D and hidden width F need, for ``Kernels``."""
    init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-2, out_axis=-1, batch_axis=(0,))
    into = Kernel((num_experts, width, hidden), ("expert", "embed", "expert_mlp"), init)
    back = Kernel((num_experts, hidden, width), ("expert", "expert_mlp", "embed"), init)
    return {name: into for name in input_names(activations)} | {"wo": back}


def router_kernel(num_experts: int, width: int) -> dict[str, Any]:
    """The router's kernel [D, E] at T5X's path ``router_weights/w/kernel``, for ``Kernels``."""
    init = nn.initializers.normal(2e-2)
    return {"router_weights": {"w": Kernel((width, num_experts), ("embed", "unmodeled"), init)}}
