"""Matrix products of many experts, each as its platform computes it best; their derivatives are spelled out.

``batched_matmul`` has a buffer of equal size per expert; ``grouped_matmul`` has rows sorted by expert, any number per
expert. What a platform runs is chosen when the program is lowered, so one program can be exported for several.

Shapes: E experts, C slots, N rows, D and F widths. The result has the rows' dtype.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp

TUNED_GPU_LIBRARY = "tokamax"
"""Package whose ``ragged_dot`` runs on GPUs where it is installed; XLA's own materialises a masked dense product."""


@jax.custom_vjp
def batched_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [E, C, D], w [E, D, F] -> [E, C, F].

    On a CPU the experts come one after the other: XLA's batched product of many small matrices takes up to 2.7 times
    as long as that (64 experts of 80 slots, 2048 to 512: 178 against 65 ms).
    """
    return _each_expert(lambda x, w: x @ w, x, w)


def _batched_forward(x, w):
    return batched_matmul(x, w), (x, w)


def _batched_backward(saved, g):
    x, w = saved
    return _each_expert(lambda g, w: g @ w.T, g, w), jnp.einsum("ecd,ecf->edf", x, g)


batched_matmul.defvjp(_batched_forward, _batched_backward)


def _each_expert(product, a, b):
    return jax.lax.platform_dependent(a, b, cpu=_one_by_one(product), default=jax.vmap(product))


def _one_by_one(product):
    """``vmap(product)`` as a loop over the leading axis."""

    def run(a, b):
        result = jax.eval_shape(product, a[0], b[0])

        def step(e, out):
            return jax.lax.dynamic_update_index_in_dim(out, product(a[e], b[e]), e, 0)

        return jax.lax.fori_loop(0, len(a), step, _zeros((len(a), *result.shape), a))

    return run


def _zeros(shape, like):
    """Zeros that depend on an input: a constant would be one buffer for all loops, alive from the first to the last."""
    return jnp.broadcast_to(like.ravel()[0] * 0, shape)


def block_rows(rows: int, num_experts: int) -> int:
    """Rows per block of ``grouped_matmul``: a block holds an expert's rows where they are few, else 128."""
    few = -(-5 * rows // (4 * num_experts) // 16) * 16  # 1.25 times a uniform load, in steps of 16
    return max(16, few) if few <= 256 else 128


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
    """Rows of each expert times its kernel, for any numbers of rows; nothing is padded or dropped.

    On TPUs ``jax.lax.ragged_dot``, on GPUs that of ``TUNED_GPU_LIBRARY`` where it is installed. Elsewhere a loop over
    the experts, and in it over as many blocks as the expert's rows fill: the last block of an expert runs on into the
    next one's rows, which that one then overwrites.

    Args:
      x: [N, D], expert 0's rows first; the last ``block`` rows belong to no expert.
      w: [E, D, F]. sizes: [E] int32, rows of each expert; they add to at most N - block.
      block: rows per block, from ``block_rows``.
    Returns:
      [N, F]; what stands in rows that belong to no expert is undefined, and their gradient must be 0.
    """
    return _grouped(block, x, w, sizes)


def _libraries() -> dict:
    """Platform -> a ragged product that is fast on it."""
    found = {"tpu": jax.lax.ragged_dot}
    if importlib.util.find_spec(TUNED_GPU_LIBRARY):
        found["cuda"] = importlib.import_module(TUNED_GPU_LIBRARY).ragged_dot
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped(block, x, w, sizes):
    return jax.lax.platform_dependent(
        x, w, sizes, **_libraries(), default=lambda x, w, sizes: _rows(x, w, sizes, block, jnp.matmul)
    )


def _grouped_forward(block, x, w, sizes):
    return _grouped(block, x, w, sizes), (x, w, sizes)


def _grouped_backward(block, saved, g):
    def by_library(dot):  # the forward product inside is unused and removed
        return lambda x, w, sizes, g: jax.vjp(lambda x, w: dot(x, w, sizes), x, w)[1](g)

    def by_blocks(x, w, sizes, g):
        return _rows(g, w, sizes, block, lambda g, w: g @ w.T), _outer(x, g, w.dtype, sizes, block)

    platforms = {name: by_library(dot) for name, dot in _libraries().items()}
    return *jax.lax.platform_dependent(*saved, g, **platforms, default=by_blocks), None


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _rows(x, w, sizes, block, product):
    """``product(rows, kernel)`` block by block: [N, D], [E, D, F] -> [N, F]."""
    result = jax.eval_shape(product, x[:block], w[0])
    starts = jnp.cumsum(sizes) - sizes

    def expert(e, out):
        kernel = w[e]

        def step(i, out):
            at = starts[e] + i * block
            rows = jax.lax.dynamic_slice_in_dim(x, at, block)
            return jax.lax.dynamic_update_slice_in_dim(out, product(rows, kernel), at, 0)

        return jax.lax.fori_loop(0, (sizes[e] + block - 1) // block, step, out)

    return jax.lax.fori_loop(0, len(w), expert, _zeros((len(x), *result.shape[1:]), x))


def _outer(x, g, dtype, sizes, block):
    """x^T g over the rows of each expert: [N, D], [N, F] -> [E, D, F], added up in float32."""
    ends = jnp.cumsum(sizes)

    def expert(e, out):
        def step(i, total):
            at = ends[e] - sizes[e] + i * block
            mine = (at + jnp.arange(block) < ends[e])[:, None]
            rows = jnp.where(mine, jax.lax.dynamic_slice_in_dim(x, at, block), 0)
            gradients = jnp.where(mine, jax.lax.dynamic_slice_in_dim(g, at, block), 0)
            return total + jnp.matmul(rows.T, gradients, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
        total = jax.lax.fori_loop(0, (sizes[e] + block - 1) // block, step, zeros)
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), e, 0)

    return jax.lax.fori_loop(0, len(sizes), expert, _zeros((len(sizes), x.shape[1], g.shape[1]), g).astype(dtype))
