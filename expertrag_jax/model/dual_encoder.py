"""The retriever's dual encoder: a question tower and a passage tower into one vector space.

A tower embeds tokens, runs a small T5 encoder (``num_layers`` may be 0: a bag of weighted tokens), pools with
learned token weights, projects to D and normalises. Score of a question and a passage: the inner product
(DPR, arXiv 2004.04906, equation 1).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax import registry
from expertrag_jax.model import layers as parts
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.transformer import Encoder
from expertrag_jax.ranges import Count, Layers, Rate, checked

Array = jax.Array


@registry.register("DualEncoderConfig")
@checked
@dataclasses.dataclass(frozen=True)
class DualEncoderConfig:
    """Sizes of the towers.

    Attributes:
      vocab_size: rows of the embedding. embed_dim: width of a token.
      num_layers, num_heads, head_dim, mlp_dim: the encoder.
      output_dim: D, width of a question or passage vector.
      shared: one tower for both sides (fewer parameters, and names match from the first step).
      dropout_rate: inside the encoder. dtype: activations.
    """

    vocab_size: Count = 1024
    embed_dim: Count = 128
    num_layers: Layers = 0
    num_heads: Count = 4
    head_dim: Count = 32
    mlp_dim: Count = 256
    output_dim: Count = 128
    shared: bool = True
    dropout_rate: Rate = 0.0
    dtype: str = "float32"

    def transformer(self) -> TransformerConfig:
        """The tower's encoder as a TransformerConfig."""
        return TransformerConfig(
            vocab_size=self.vocab_size,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            num_encoder_layers=self.num_layers,
            num_decoder_layers=0,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )


class Tower(nn.Module):
    """Tokens [B, L] int32 -> unit vectors [B, D] float32; a row of padding gives the zero vector."""

    config: DualEncoderConfig

    @nn.compact
    def __call__(self, tokens: Array, deterministic: bool = True) -> Array:
        config = self.config
        valid = tokens > 0
        x = parts.Embed(config.vocab_size, config.embed_dim, name="token_embedder")(
            tokens, jnp.dtype(config.dtype)
        )
        weight = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        weight = self.param("token_weight", weight, (config.vocab_size,))
        if config.num_layers:
            x = x + Encoder(config.transformer(), name="encoder")(x, valid.astype(jnp.int32), deterministic)
        importance = jnp.where(valid, jnp.exp(jnp.take(weight, tokens, axis=0)), 0.0)
        pooled = jnp.einsum("bl,bld->bd", importance, x.astype(jnp.float32))
        vector = parts.Dense(config.output_dim, ("embed", "unmodeled"), name="projection")(pooled)
        return vector * jax.lax.rsqrt(jnp.sum(vector * vector, -1, keepdims=True) + 1e-9)
