"""T5's attention: relative position bias, masks, multi-head attention.

Shapes: B batch, L queries, M keys, D model width, H heads, A head width. Parameter names and logical axes as in
``layers``.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.layers import Dense

Array = jax.Array
RELEVANCE = "relevance"  # the collection for ``weighted_attention``, where the caller makes it mutable


def relative_bucket(distance: Array, bidirectional: bool, buckets: int, max_distance: int) -> Array:
    """T5's bucket of ``key position - query position``: exact when near, logarithmic up to max_distance."""
    result = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        result = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    far = exact + (
        jnp.log(jnp.maximum(distance, 1) / exact + 1e-6) / math.log(max_distance / exact) * (buckets - exact)
    ).astype(jnp.int32)
    return result + jnp.where(distance < exact, distance, jnp.minimum(far, buckets - 1))


class RelativePositionBias(nn.Module):
    """One learned bias per head and distance bucket, shared by all layers of a stack."""

    config: TransformerConfig
    bidirectional: bool

    @nn.compact
    def __call__(self, first_query: Array | int, queries: int, keys: int) -> Array:
        """Bias [1, H, queries, keys] float32 of queries at first_query, first_query + 1, ... over keys at 0, 1, ..."""
        config = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        init = nn.with_logical_partitioning(init, ("heads", "relpos_buckets"))
        table = self.param("rel_embedding", init, (config.num_heads, config.relative_buckets))
        # The bias of every distance once, from the last query's first key to the first query's last one; a product
        # with one-hot rows, as T5X has it: the gradient of a look-up would be a scatter.
        distance = jnp.arange(queries + keys - 1) - (first_query + queries - 1)
        bucket = relative_bucket(
            distance, self.bidirectional, config.relative_buckets, config.relative_max_distance
        )
        rows = jax.nn.one_hot(bucket, config.relative_buckets, axis=0)
        by_distance = jnp.matmul(table, rows, precision=jax.lax.Precision.HIGHEST)
        return diagonals(by_distance, queries, keys)[None]


def diagonals(by_distance: Array, queries: int, keys: int) -> Array:
    """Spreads [H, queries + keys - 1] to [H, queries, keys]: entry [h, q, k] is by_distance[h, k - q + queries - 1].

    The row, repeated and read in lines one shorter than itself, moves by one place per line: no gather, so the
    gradient is a sum and no scatter.
    """
    heads, width = by_distance.shape
    if queries == 1:
        return by_distance[:, None]
    repeated = jnp.broadcast_to(by_distance[:, None], (heads, queries, width)).reshape(heads, -1)
    lines = repeated[:, queries - 1 : queries - 1 + queries * (width - 1)]
    return lines.reshape(heads, queries, width - 1)[:, :, :keys]


def attention_mask(allowed: Array) -> Array:
    """Bool mask broadcastable to [B, H, Lq, Lk] -> additive float32 mask."""
    return jnp.where(allowed, 0.0, -1e9).astype(jnp.float32)


def softmax_mix(query: Array, keys: Array, values: Array, bias: Array) -> Array:
    """softmax(query keys^T + bias) values, divided by the sum of exponentials at the end and not before the product.

    The same function as in training, for inference: the CPU compiler fuses the textbook order into a kernel that takes
    up to eight times as long (jax 0.10, 2 cores); with gradients the textbook order is the faster one for short inputs.

    Args:
      query: [B, L, H, A]. keys, values: [B, M, H, A]. bias: broadcastable to [B, H, L, M].
    Returns:
      [B, L, H, A] in the dtype of the values.
    """
    query, keys, values = (x.transpose(0, 2, 1, 3) for x in (query, keys, values))
    scores = jnp.einsum("bhla,bhma->bhlm", query, keys, preferred_element_type=jnp.float32) + bias
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    mixed = jnp.einsum("bhlm,bhma->bhla", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(values.dtype).transpose(0, 2, 1, 3)


def weighted_attention(query: Array, keys: Array, values: Array, bias: Array) -> Array:
    """Attention weights times the lengths of the value vectors, averaged over heads (Atlas, arXiv 2208.03299, eq. 1).

    Args: as for ``softmax_mix``.
    Returns:
      [B, L, M] float32: how much of what query l gets comes from place m.
    """
    scores = jnp.einsum("blha,bmha->bhlm", query, keys, preferred_element_type=jnp.float32) + bias
    lengths = jnp.linalg.norm(values.astype(jnp.float32), axis=-1)
    return jnp.einsum("bhlm,bmh->blm", jax.nn.softmax(scores, axis=-1), lengths) / query.shape[2]


class Attention(nn.Module):
    """Multi-head attention without query scaling (T5 puts 1/sqrt(A) into the initialiser)."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        joined = config.num_heads * config.head_dim
        self.query = Dense(joined, ("embed", "joined_kv"), scale=1.0 / config.head_dim)
        self.key = Dense(joined, ("embed", "joined_kv"))
        self.value = Dense(joined, ("embed", "joined_kv"))
        self.out = Dense(config.embed_dim, ("joined_kv", "embed"))
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))  # all queries alike, as in T5X

    def keys_values(self, x: Array) -> tuple[Array, Array]:
        """x [B, M, D] -> keys and values [B, M, H, A]."""
        shape = (*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        return self.key(x).reshape(shape), self.value(x).reshape(shape)

    def attend(self, x: Array, keys: Array, values: Array, bias: Array, deterministic: bool = True) -> Array:
        """x [B, L, D] over keys, values [B, M, H, A] with additive bias -> [B, L, D]."""
        query = self.query(x).reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)
        if self.is_mutable_collection(RELEVANCE) and not self.is_initializing():
            self.sow(RELEVANCE, "weighted", weighted_attention(query, keys, values, bias))
        if deterministic:
            mixed = softmax_mix(query, keys, values, bias)
        else:
            scores = jnp.einsum("blha,bmha->bhlm", query, keys, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
            weights = self.dropout(weights, deterministic=False)
            mixed = jnp.einsum("bhlm,bmha->blha", weights, values)
        return self.out(mixed.reshape(*x.shape[:-1], -1))

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> Array:
        """Self-attention: x [B, L, D], bias broadcastable to [B, H, L, L]."""
        keys, values = self.keys_values(x)
        return self.attend(x, keys, values, bias, deterministic)
