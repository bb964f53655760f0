"""T5's building blocks: dense kernels, RMS norm, relative position bias, attention, feed-forward.

Shapes: B batch, L or M lengths, D model width, H heads, A head width. Parameter names and logical axes are
T5X's (arXiv 2203.17189), so that T5 1.1 checkpoints map one to one.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.moe.experts import ACTIVATIONS, input_names
from expertrag_jax.moe.layer import MixtureOfExperts
from expertrag_jax.partitioning import constrain

Array = jax.Array


class Dense(nn.Module):
    """``y = x @ kernel`` without bias; kernel float32, product in the dtype of x."""

    features: int
    axes: tuple[str, str]
    scale: float = 1.0  # variance of the initialiser relative to 1 / fan_in

    @nn.compact
    def __call__(self, x: Array, result: jnp.dtype | None = None) -> Array:
        """x [..., D] -> [..., features], accumulated and given in the dtype ``result`` (None: that of x)."""
        init = nn.initializers.variance_scaling(self.scale, "fan_in", "truncated_normal")
        kernel = nn.with_logical_partitioning(init, self.axes)
        kernel = self.param("kernel", kernel, (x.shape[-1], self.features))
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=result)


class RMSNorm(nn.Module):
    """T5's layer norm: x / rms(x) * scale, no mean, no bias, eps 1e-6, statistics in float32."""

    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],)
        )
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (normal * scale).astype(x.dtype)


class Embed(nn.Module):
    """Token embedding, also the tied output layer."""

    vocab_size: int
    width: int

    def setup(self):
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (self.vocab_size, self.width))

    def __call__(self, tokens: Array, dtype) -> Array:
        """tokens [...] int32 -> [..., D]."""
        return jnp.take(self.embedding, tokens, axis=0).astype(dtype)

    def attend(self, x: Array) -> Array:
        """x [..., D] -> logits [..., vocab] float32."""
        return jnp.dot(x, self.embedding.T.astype(x.dtype), preferred_element_type=jnp.float32)


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
    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        """Positions [Lq], [Lk] int32 -> bias [1, H, Lq, Lk] float32."""
        config = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        init = nn.with_logical_partitioning(init, ("heads", "relpos_buckets"))
        table = self.param("rel_embedding", init, (config.num_heads, config.relative_buckets))
        distance = key_positions[None, :] - query_positions[:, None]
        bucket = relative_bucket(
            distance, self.bidirectional, config.relative_buckets, config.relative_max_distance
        )
        # A product with one-hot rows, as T5X has it: the gradient of a look-up would be a large scatter.
        rows = jax.nn.one_hot(bucket, config.relative_buckets, axis=0)
        return jnp.einsum("hb,bqk->hqk", table, rows, precision=jax.lax.Precision.HIGHEST)[None]


def attention_mask(allowed: Array) -> Array:
    """Bool mask broadcastable to [B, H, Lq, Lk] -> additive float32 mask."""
    return jnp.where(allowed, 0.0, -1e9).astype(jnp.float32)


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
        scores = jnp.einsum("blha,bmha->bhlm", query, keys, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
        weights = self.dropout(weights, deterministic=deterministic)
        mixed = jnp.einsum("bhlm,bmha->blha", weights, values)
        return self.out(mixed.reshape(*x.shape[:-1], -1))

    def __call__(self, x: Array, bias: Array, deterministic: bool) -> Array:
        """Self-attention: x [B, L, D], bias broadcastable to [B, H, L, L]."""
        keys, values = self.keys_values(x)
        return self.attend(x, keys, values, bias, deterministic)


class FeedForward(nn.Module):
    """Dense feed-forward: ``wi`` or gated ``wi_0 * wi_1``, then ``wo``."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, valid: Array, deterministic: bool) -> Array:
        config, names = self.config, self.config.mlp_activations
        hidden = 1
        for label, name in zip(input_names(names), names):
            hidden = hidden * ACTIVATIONS[name](Dense(config.mlp_dim, ("embed", "mlp"), name=label)(x))
        hidden = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))(hidden, deterministic=deterministic)
        hidden = constrain(hidden, "batch", "length", "mlp")
        return Dense(config.embed_dim, ("mlp", "embed"), name="wo")(hidden)


def feed_forward(config: TransformerConfig, layer: int, name: str = "mlp") -> nn.Module:
    """The dense or sparse feed-forward of layer ``layer``."""
    if not config.is_sparse(layer):
        return FeedForward(config, name=name)
    return MixtureOfExperts(
        num_experts=config.num_experts,
        hidden=config.mlp_dim,
        activations=config.mlp_activations,
        k=config.num_selected_experts,
        train_capacity_factor=config.train_expert_capacity_factor,
        eval_capacity_factor=config.eval_expert_capacity_factor,
        group_size=config.expert_group_size,
        jitter=config.router_jitter,
        name=name,
    )
