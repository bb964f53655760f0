"""Maximum inner product search: exact, approximate, and over a mesh. Pure functions.

    rows(q) = argtop_k over n of <q, v_n>

All return the k best rows in falling order of score, the lower row first among equals. Where fewer than k
vectors exist, the rest is ``ABSENT_ROW`` with ``ABSENT_SCORE``, so shapes depend on k alone.

Vectors are scanned in blocks, so the largest temporary is [B, block_size] and not [B, N].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

ABSENT_ROW = -1
# Finite, unlike -inf: a softmax over passages of which some, or all, are absent stays free of NaN.
ABSENT_SCORE = -1e30
DEFAULT_BLOCK_SIZE = 16384

Array = Any


def _scores(queries: Array, vectors: Array) -> Array:
    """[B, D] x [N, D] -> [B, N] float32; full precision, or a TPU would rank by bfloat16 products."""
    return lax.dot_general(
        queries,
        vectors,
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _pad_to_k(rows: Array, scores: Array, k: int) -> tuple[Array, Array]:
    missing = k - rows.shape[1]
    if missing <= 0:
        return rows, scores
    width = ((0, 0), (0, missing))
    return (
        jnp.pad(rows, width, constant_values=ABSENT_ROW),
        jnp.pad(scores, width, constant_values=ABSENT_SCORE),
    )


def _mark_absent(rows: Array, scores: Array) -> tuple[Array, Array]:
    absent = scores <= ABSENT_SCORE
    return jnp.where(absent, ABSENT_ROW, rows), jnp.where(absent, ABSENT_SCORE, scores)


def merge_topk(rows: Array, scores: Array, k: int) -> tuple[Array, Array]:
    """The k best of candidate lists laid side by side: [B, M] int32, [B, M] float32 -> [B, k] each.

    Among equal scores the earlier column wins, so lists that are in order of rows keep the lower row first.
    """
    scores, places = lax.top_k(scores, min(k, scores.shape[1]))
    return _pad_to_k(*_mark_absent(jnp.take_along_axis(rows, places, axis=1), scores), k)


def _block_topk(queries, block, first_row, count, k, recall_target):
    """Top k of one block whose first row is `first_row`; rows >= count are padding. k' <= k columns."""
    size = block.shape[0]
    scores = _scores(queries, block)
    rows = first_row + jnp.arange(size, dtype=jnp.int32)
    scores = jnp.where(rows < count, scores, ABSENT_SCORE)
    if recall_target is None:
        scores, places = lax.top_k(scores, min(k, size))
    else:
        scores, places = lax.approx_max_k(scores, min(k, size), recall_target=recall_target)
    return first_row + places.astype(jnp.int32), scores


def _blocked_topk(queries, vectors, first_row, count, k, block_size, recall_target):
    total = vectors.shape[0]
    blocks, remainder = divmod(total, block_size)
    best_rows = jnp.full((queries.shape[0], k), ABSENT_ROW, jnp.int32)
    best_scores = jnp.full((queries.shape[0], k), ABSENT_SCORE, jnp.float32)

    def merge(best, start, block):
        rows, scores = _block_topk(queries, block, first_row + start, count, k, recall_target)
        return merge_topk(
            jnp.concatenate([best[0], rows], axis=1), jnp.concatenate([best[1], scores], axis=1), k
        )

    def step(best, number):
        start = number * block_size
        return merge(best, start, lax.dynamic_slice_in_dim(vectors, start, block_size)), None

    best = (best_rows, best_scores)
    if blocks:
        best, _ = lax.scan(step, best, jnp.arange(blocks, dtype=jnp.int32))
    if remainder or not blocks:
        best = merge(best, blocks * block_size, vectors[blocks * block_size :])
    return best


def exact_topk(
    queries: Array,
    vectors: Array,
    k: int,
    *,
    count: int | Array | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[Array, Array]:
    """Exact search on one device.

    Args:
      queries: [B, D] float.
      vectors: [N, D] float (any float dtype; products accumulate in float32).
      k: how many rows per query, static; may exceed N.
      count: rows at and after it are padding and never returned; N by default.
      block_size: rows scored at a time; bounds memory to B * block_size floats.

    Returns:
      rows [B, k] int32 and scores [B, k] float32, falling.
    """
    count = vectors.shape[0] if count is None else count
    return _blocked_topk(queries, vectors, jnp.int32(0), count, k, block_size, None)


def approximate_topk(
    queries: Array,
    vectors: Array,
    k: int,
    *,
    recall_target: float = 0.95,
    count: int | Array | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> tuple[Array, Array]:
    """As `exact_topk`, each block's candidates by ``lax.approx_max_k`` (Chern et al. 2022, arXiv 2206.14286).

    Scores are exact; a true neighbour is missed with probability at most 1 - recall_target per block. It is
    the fast path on TPUs; on CPU and GPU XLA computes it exactly.
    """
    count = vectors.shape[0] if count is None else count
    return _blocked_topk(queries, vectors, jnp.int32(0), count, k, block_size, recall_target)


def sharded_topk(
    queries: Array,
    vectors: Array,
    k: int,
    *,
    mesh: Mesh,
    axis: str | tuple[str, ...],
    count: int | Array | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    recall_target: float | None = None,
) -> tuple[Array, Array]:
    """Search over vectors that are split along `axis` of `mesh`: each shard's top k, gathered, merged.

    Communication is B * k rows and scores per shard, whatever N is.

    Args:
      queries: [B, D], replicated.
      vectors: [N, D], split in rows over `axis`; N is a multiple of the number of shards (pad, and set
        `count`).
      k, count, block_size: as in `exact_topk`.
      recall_target: None for exact search, else as in `approximate_topk`.

    Returns:
      rows [B, k] int32 (of the whole array) and scores [B, k] float32, replicated.

    Raises:
      ValueError: if N does not divide by the number of shards.
    """
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    shards = 1
    for name in axes:
        shards *= mesh.shape[name]
    total = vectors.shape[0]
    if total % shards:
        raise ValueError(
            f"{total} vectors do not divide over {shards} shards of mesh axis {axis!r}; pad them"
        )
    count = jnp.int32(total if count is None else count)

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec()),
        check_vma=False,  # the merged lists are equal on all shards, which the checker cannot see
    )
    def search(queries, local, count):
        first_row = lax.axis_index(axes).astype(jnp.int32) * local.shape[0]
        rows, scores = _blocked_topk(queries, local, first_row, count, k, block_size, recall_target)
        rows = lax.all_gather(rows, axes, axis=1, tiled=True)
        scores = lax.all_gather(scores, axes, axis=1, tiled=True)
        return merge_topk(rows, scores, k)

    return search(queries, vectors, count)
