"""Tiny models, and their compiled methods."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from expertrag_jax.model import transformer
from expertrag_jax.model.config import TransformerConfig

VOCAB = 20
SPARSE = {"num_experts": 4, "expert_group_size": 8, "eval_expert_capacity_factor": 4.0}  # room for all


def config(**changes) -> TransformerConfig:
    sizes = dict(vocab_size=VOCAB, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=12)
    return TransformerConfig(**{**sizes, **changes})


def initial(settings: TransformerConfig, seed: int = 0):
    """Random parameters without compiling anything: kernels by their fan-in, norm scales near 1."""
    tokens = np.ones((1, 4), np.int32)
    shapes = jax.eval_shape(transformer.Transformer(settings).init, jax.random.key(0), tokens, tokens)["params"]
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = path[-1].key
        value = 1 + 0.1 * noise if name == "scale" else noise if name == "embedding" else 0.3 * noise
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, nn.unbox(shapes))


def call(settings: TransformerConfig, params, *args, method):
    return transformer.Transformer(settings).apply({"params": params}, *args, method=method)


def logits(settings, params, encoder_tokens, decoder_tokens, segments=None):
    """Encoder, memory and decoder in one: [B, T, V]."""
    encoded = call(settings, params, encoder_tokens, method="encode")
    memory = call(settings, params, encoded, encoder_tokens > 0, method="memory")
    segments = np.ones_like(decoder_tokens) if segments is None else segments
    return call(settings, params, decoder_tokens, segments, memory, method="logits")


def tokens(batch=3, length=7, seed=0, padded=True):
    """[B, L] int32; row i ends in i padding tokens."""
    rows = np.random.default_rng(seed).integers(2, VOCAB, (batch, length)).astype(np.int32)
    for row in range(batch if padded else 0):
        rows[row, length - row :] = 0
    return rows


@pytest.fixture
def tiny():
    """The helpers above, as one fixture."""
    return types.SimpleNamespace(
        config=config, initial=initial, call=call, logits=logits, tokens=tokens, sparse=SPARSE, vocab=VOCAB
    )
