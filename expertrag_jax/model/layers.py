"""T5's building blocks: dense kernels, RMS norm, embedding, feed-forward.

Shapes: B batch, L length, D model width. Parameter names and logical axes are T5X's (arXiv 2203.17189), so
that T5 1.1 checkpoints map one to one.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.product import project
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
        return project(x, kernel.astype(x.dtype), result)


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
        return project(x, self.embedding.T.astype(x.dtype), jnp.float32)


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


def feed_forward(config: TransformerConfig, layer: int, routing: str, name: str | None = "mlp") -> nn.Module:
    """The dense or sparse feed-forward of layer ``layer``; ``routing`` is the stack's."""
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
        dispatch=config.expert_dispatch,
        routing=routing,
        prioritised=config.batch_prioritised_routing,
        loss_free_balancing=config.loss_free_balancing,
        name=name,
    )
