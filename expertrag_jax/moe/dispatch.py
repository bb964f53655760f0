"""Moving tokens to their experts and back, without a scatter in either direction under token choice.

``gather_tokens`` and ``combine`` are each other's transpose. Both have a custom derivative that is again a gather,
because ``Buckets`` holds the index map in both directions. Shapes as in ``routing``; D is the width, M the number of
slots (E * C in buckets).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from expertrag_jax.moe.experts import expert_feed_forward
from expertrag_jax.moe.routing import Buckets


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows [G, N, D], index [G, M] -> [G, M, D]; an index of N (nothing there) gives zeros."""
    padded = jnp.pad(rows, ((0, 0), (0, 1), (0, 0)))
    return jnp.take_along_axis(padded, index[..., None], axis=1, mode="clip")


@jax.custom_vjp
def gather_tokens(x: jax.Array, buckets: Buckets) -> jax.Array:
    """Tokens to expert buffers: x [G, S, D] -> [G, M, D]; an empty slot is zero."""
    k = buckets.slot.shape[-1]
    return _take(x, buckets.token // k)


def _gather_forward(x, buckets):
    return gather_tokens(x, buckets), buckets


def _gather_backward(buckets, gradient):
    groups, size, k = buckets.slot.shape
    back = _take(gradient, buckets.slot.reshape(groups, size * k))
    return back.reshape(groups, size, k, -1).sum(2), None


gather_tokens.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def combine(buffers: jax.Array, weight: jax.Array, buckets: Buckets) -> jax.Array:
    """Expert buffers back to tokens: buffers [G, M, D], weight [G, S, k] -> [G, S, D].

    y[s] = sum_j weight[s, j] * buffers[slot[s, j]]; a dropped choice contributes 0.
    """
    groups, size, k = buckets.slot.shape
    chosen = _take(buffers, buckets.slot.reshape(groups, size * k)).reshape(groups, size, k, -1)
    return jnp.einsum("gskd,gsk->gsd", chosen, weight.astype(buffers.dtype))


def _combine_forward(buffers, weight, buckets):
    return combine(buffers, weight, buckets), (buffers, weight, buckets)


def _combine_backward(residuals, gradient):
    buffers, weight, buckets = residuals
    groups, size, k = buckets.slot.shape
    flat_weight = jnp.pad(weight.reshape(groups, size * k), ((0, 0), (0, 1)))
    slot_weight = jnp.take_along_axis(flat_weight, buckets.token, axis=1)
    to_buffers = _take(gradient, buckets.token // k) * slot_weight[..., None].astype(gradient.dtype)
    chosen = _take(buffers, buckets.slot.reshape(groups, size * k)).reshape(groups, size, k, -1)
    to_weight = jnp.einsum("gskd,gsd->gsk", chosen, gradient).astype(weight.dtype)
    return to_buffers, to_weight, None


combine.defvjp(_combine_forward, _combine_backward)


def take_rows(x: jax.Array, token: jax.Array) -> jax.Array:
    """Expert choice: x [G, S, D], token [G, M] -> [G, M, D]; a token of S (an empty slot) is zero."""
    return _take(x, token)


def add_rows(outputs: jax.Array, weight: jax.Array, token: jax.Array, size: int) -> jax.Array:
    """Expert choice: y[token[m]] += weight[m] * outputs[m]; outputs [G, M, D], weight, token [G, M] -> [G, S, D].

    A token has any number of slots, so this adds by a scatter, and so does the derivative of ``take_rows``.
    """
    rows = outputs * weight[..., None].astype(outputs.dtype)
    empty = jnp.zeros((size, outputs.shape[-1]), outputs.dtype)
    return jax.vmap(lambda rows, token: empty.at[token].add(rows, mode="drop"))(rows, token)


def dense_oracle(x, expert_index, weight, kernels, activations) -> jax.Array:
    """Reference for tests: every expert reads every token, nothing is dropped.

    Args:
      x: [G, S, D]; expert_index, weight: [G, S, k].
      kernels, activations: see ``experts.expert_feed_forward``.
    """
    groups, size, width = x.shape
    outputs = expert_feed_forward(kernels, x.reshape(1, -1, width), activations, jnp.matmul)  # broadcasts over E
    outputs = outputs.reshape(-1, groups, size, width)
    mixing = (jax.nn.one_hot(expert_index, outputs.shape[0]) * weight[..., None]).sum(2)  # [G, S, E]
    return jnp.einsum("egsd,gse->gsd", outputs, mixing.astype(x.dtype))
