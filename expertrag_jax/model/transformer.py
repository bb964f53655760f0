"""The T5-style encoder-decoder, for two uses: training (all positions) and decoding (one position).

The decoder never sees encoder states. It sees a ``Memory``: cross-attention keys and values per decoder
layer, computed once per input. So a training step, a cached decoding step and an exported program share one
code path, and the memory of several passages is the concatenation of their memories.

Shapes: B batch, L input length, M memory length, T target length, N decoder layers, H heads, A head width.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from expertrag_jax.model import attention
from expertrag_jax.model import layers as parts
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.stack import layered, make_layers, pair_layers, run_layers

Array = jax.Array


@struct.dataclass
class Memory:
    """What the decoder attends to.

    Attributes:
      layers: (keys, values) per decoder layer, each [B, M, H, A]; in the layout of ``stack.run_layers``.
      mask: [B, M] bool, True where there is a token; for packed rows [B, M] int32 segment ids (0 is padding).
    """

    layers: Any
    mask: Array


@struct.dataclass
class DecoderCache:
    """Self-attention (keys, values) of the positions decoded so far, and how many there are.

    Attributes:
      layers: (keys, values) per decoder layer, each [B, T, H, A]; in the layout of ``stack.run_layers``.
      position: int32 scalar.
    """

    layers: Any
    position: Array


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a pre-norm and a residual."""

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(self, x: Array, bias: Array, valid: Array, deterministic: bool) -> Array:
        dropout = nn.Dropout(self.config.dropout_rate, broadcast_dims=(-2,))
        y = parts.RMSNorm(name="pre_attention_layer_norm")(x)
        y = attention.Attention(self.config, name="attention")(y, bias, deterministic)
        x = x + dropout(y, deterministic=deterministic)
        y = parts.RMSNorm(name="pre_mlp_layer_norm")(x)
        y = parts.feed_forward(self.config, self.layer, self.config.encoder_routing)(y, valid, deterministic)
        return parts.constrain(x + dropout(y, deterministic=deterministic), "batch", "length", None)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention over the memory, feed-forward."""

    config: TransformerConfig
    layer: int

    def setup(self):
        config = self.config
        self.pre_self_attention_layer_norm = parts.RMSNorm()
        self.self_attention = attention.Attention(config)
        self.pre_cross_attention_layer_norm = parts.RMSNorm()
        self.encoder_decoder_attention = attention.Attention(config)
        self.pre_mlp_layer_norm = parts.RMSNorm()
        self.mlp = parts.feed_forward(config, self.layer, config.decoder_routing, name=None)
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))

    def memory(self, encoded: Array) -> tuple[Array, Array]:
        """Encoder states [B, M, D] -> this layer's cross-attention keys and values [B, M, H, A]."""
        return self.encoder_decoder_attention.keys_values(encoded)

    def __call__(self, y, keys, values, self_bias, cross_bias, valid, deterministic):
        """y [B, T, D]: all positions at once."""
        normal = self.pre_self_attention_layer_norm(y)
        y = y + self.dropout(
            self.self_attention(normal, self_bias, deterministic), deterministic=deterministic
        )
        return self._rest(y, keys, values, cross_bias, valid, deterministic)

    def step(self, y, keys, values, cached_keys, cached_values, position, self_bias, cross_bias, valid):
        """y [B, 1, D]: one position; returns it and the updated cache of this layer."""
        normal = self.pre_self_attention_layer_norm(y)
        new_keys, new_values = self.self_attention.keys_values(normal)
        cached_keys = jax.lax.dynamic_update_slice_in_dim(cached_keys, new_keys, position, axis=1)
        cached_values = jax.lax.dynamic_update_slice_in_dim(cached_values, new_values, position, axis=1)
        y = y + self.self_attention.attend(normal, cached_keys, cached_values, self_bias)
        return self._rest(y, keys, values, cross_bias, valid, True), (cached_keys, cached_values)

    def _rest(self, y, keys, values, cross_bias, valid, deterministic):
        normal = self.pre_cross_attention_layer_norm(y)
        mixed = self.encoder_decoder_attention.attend(normal, keys, values, cross_bias, deterministic)
        y = y + self.dropout(mixed, deterministic=deterministic)
        normal = self.pre_mlp_layer_norm(y)
        y = y + self.dropout(self.mlp(normal, valid, deterministic), deterministic=deterministic)
        return parts.constrain(y, "batch", "length", None)


class Encoder(nn.Module):
    """Tokens embedded -> states; one relative bias for all layers."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.relpos_bias = attention.RelativePositionBias(config, bidirectional=True)
        self.encoder_norm = parts.RMSNorm()
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
        self.layers = make_layers(EncoderLayer, config, config.num_encoder_layers)

    def __call__(self, x: Array, segments: Array, deterministic: bool) -> Array:
        """x [B, L, D], segments [B, L] int32 (0 is padding) -> [B, L, D]."""
        same = (segments[:, None, :] == segments[:, :, None]) & (segments > 0)[:, None, :]
        bias = self.relpos_bias(0, x.shape[1], x.shape[1]) + attention.attention_mask(same)[:, None]
        x = self.dropout(x, deterministic=deterministic)
        x, _ = run_layers(
            self.layers,
            self.config,
            lambda layer, x, _: (layer(x, bias, segments > 0, deterministic), None),
            x,
            depth=self.config.num_encoder_layers,
        )
        return self.dropout(self.encoder_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """Targets embedded -> states, over a Memory."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.relpos_bias = attention.RelativePositionBias(config, bidirectional=False)
        self.decoder_norm = parts.RMSNorm()
        self.dropout = nn.Dropout(config.dropout_rate, broadcast_dims=(-2,))
        self.layers = make_layers(DecoderLayer, config, config.num_decoder_layers)
        if not config.logits_via_embedding:
            self.logits_dense = parts.Dense(config.vocab_size, ("embed", "vocab"))

    def memory(self, encoded: Array, mask: Array) -> Memory:
        """Encoder states [B, M, D] and their mask -> Memory."""
        _, layers = self._run(lambda layer, x, _: (x, layer.memory(x)), encoded)
        return Memory(layers, mask)

    def _run(self, body, carry, inputs=None):
        return run_layers(self.layers, self.config, body, carry, inputs, depth=self.config.num_decoder_layers)

    def __call__(self, y: Array, segments: Array, memory: Memory, deterministic: bool) -> Array:
        """y [B, T, D], segments [B, T] int32 (0 is padding) -> states [B, T, D]."""
        positions = jnp.arange(y.shape[1])
        causal = positions[:, None] >= positions[None, :]
        same = causal[None] & (segments[:, None, :] == segments[:, :, None])
        self_bias = self.relpos_bias(0, y.shape[1], y.shape[1]) + attention.attention_mask(same)[:, None]
        if memory.mask.dtype == jnp.bool_:
            cross = jnp.broadcast_to(memory.mask[:, None, :], (y.shape[0], 1, memory.mask.shape[1]))
        else:
            cross = (memory.mask[:, None, :] == segments[:, :, None]) & (memory.mask > 0)[:, None, :]
        cross_bias = attention.attention_mask(cross)[:, None]
        y = self.dropout(y, deterministic=deterministic)
        y, _ = self._run(
            lambda layer, y, kv: (layer(y, *kv, self_bias, cross_bias, segments > 0, deterministic), None),
            y,
            memory.layers,
        )
        return self.dropout(self.decoder_norm(y), deterministic=deterministic)

    def step(self, y: Array, memory: Memory, cache: DecoderCache, valid: Array) -> tuple[Array, DecoderCache]:
        """y [B, 1, D], valid [B] bool -> state [B, 1, D] and the cache with one more position."""
        length = jax.tree.leaves(cache.layers)[0].shape[-3]
        positions = jnp.arange(length)
        self_bias = self.relpos_bias(cache.position, 1, length)
        self_bias = self_bias + attention.attention_mask(positions <= cache.position)[None, None, None]
        cross_bias = attention.attention_mask(memory.mask > 0)[:, None, None]

        def body(layer, y, inputs):
            memory_pair, cached_pair = inputs
            return layer.step(
                y, *memory_pair, *cached_pair, cache.position, self_bias, cross_bias, valid[:, None]
            )

        y, layers = self._run(body, y, pair_layers(self.config, memory.layers, cache.layers))
        return self.decoder_norm(y), DecoderCache(layers, cache.position + 1)


class Transformer(nn.Module):
    """The generator: embeds, encodes, builds memories, decodes."""

    config: TransformerConfig

    def setup(self):
        self.token_embedder = parts.Embed(self.config.vocab_size, self.config.embed_dim)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    @functools.cached_property
    def dtype(self):
        """Activations' dtype."""
        return jnp.dtype(self.config.dtype)

    def encode(self, tokens: Array, segments: Array | None = None, deterministic: bool = True) -> Array:
        """tokens [B, L] int32 -> states [B, L, D]."""
        segments = (tokens > 0).astype(jnp.int32) if segments is None else segments
        return self.encoder(self.token_embedder(tokens, self.dtype), segments, deterministic)

    def memory(self, encoded: Array, mask: Array) -> Memory:
        """States [B, M, D] and mask [B, M] -> Memory."""
        return self.decoder.memory(encoded, mask)

    def logits(self, inputs: Array, segments: Array, memory: Memory, deterministic: bool = True) -> Array:
        """Decoder inputs [B, T] int32 -> logits [B, T, vocab] float32; segments 0 marks padding."""
        return self.output(self.decode(inputs, segments, memory, deterministic))

    def decode(self, inputs: Array, segments: Array, memory: Memory, deterministic: bool = True) -> Array:
        """Decoder inputs [B, T] int32 -> states [B, T, D], which ``output`` makes logits of."""
        return self.decode_embedded(self.token_embedder(inputs, self.dtype), segments, memory, deterministic)

    def decode_embedded(self, inputs: Array, segments: Array, memory: Memory, deterministic: bool = True) -> Array:
        """``decode`` of input vectors [B, T, D] that stand for no token of the vocabulary."""
        return self.decoder(inputs.astype(self.dtype), segments, memory, deterministic)

    def step(self, tokens: Array, memory: Memory, cache: DecoderCache, valid: Array | None = None):
        """One position: tokens [B] int32 -> (logits [B, vocab] float32, cache)."""
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        y = self.token_embedder(tokens[:, None], self.dtype)
        y, cache = self.decoder.step(y, memory, cache, valid)
        return self.output(y)[:, 0], cache

    def output(self, y: Array) -> Array:
        """Decoder states [B, T, D] -> logits [B, T, vocab] float32."""
        if self.config.logits_via_embedding:
            logits = self.token_embedder.attend(y) / self.config.embed_dim**0.5
        else:
            logits = self.decoder.logits_dense(y, jnp.float32)
        return parts.constrain(logits, "batch", "length", "vocab")

    def __call__(self, encoder_tokens: Array, decoder_tokens: Array) -> Array:
        """Touches every parameter, for initialisation: tokens [B, L], [B, T] -> logits [B, T, vocab]."""
        encoded = self.encode(encoder_tokens)
        memory = self.memory(encoded, encoder_tokens > 0)
        return self.logits(decoder_tokens, jnp.ones_like(decoder_tokens), memory)


def empty_cache(config: TransformerConfig, batch: int, length: int) -> DecoderCache:
    """A cache with room for ``length`` positions of ``batch`` rows."""
    shape = (batch, length, config.num_heads, config.head_dim)
    return DecoderCache(
        layered(
            config, config.num_decoder_layers, lambda prefix: (jnp.zeros(prefix + shape, config.dtype),) * 2
        ),
        jnp.zeros((), jnp.int32),
    )


def take_rows(tree: Any, rows: Array, config: TransformerConfig) -> Any:
    """Rows of a Memory's or DecoderCache's ``layers``; the batch axis is behind the scanned one, if any."""
    axis = 1 if config.scan_layers else 0
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), tree)
