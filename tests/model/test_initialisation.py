"""The start in which encoder tokens look for copies of themselves."""

import functools

import jax
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.model import initialisation
from expertrag_jax.model.attention import relative_bucket
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.systems import generator
from expertrag_jax.training import parameters

SIZES = {"vocab_size": 40, "embed_dim": 64, "num_heads": 4, "head_dim": 16, "mlp_dim": 8}
TOKENS = np.array([5, 9, 11, 7, 20, 9, 30, 31])  # token 9 stands at places 1 and 5


@functools.lru_cache
def initial(**changes):
    config = TransformerConfig(**SIZES, **changes)
    return jax.jit(lambda rng: generator.plain(generator.initial_parameters(config, rng)))(jax.random.key(3))


def first_layer_weights(params):
    """Attention weights of the first encoder layer over TOKENS, [heads, 8, 8], by the textbook."""
    x = np.asarray(params["token_embedder"]["embedding"], np.float64)[TOKENS]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    layer = params["encoder"]["layers_0"]["attention"]
    query, key = (np.asarray(layer[name]["kernel"], np.float64) for name in ("query", "key"))
    heads = [(x @ query).reshape(8, 4, 16), (x @ key).reshape(8, 4, 16)]
    distance = np.arange(8)[None, :] - np.arange(8)[:, None]
    bucket = np.asarray(relative_bucket(distance, True, 32, 128))
    bias = np.asarray(params["encoder"]["relpos_bias"]["rel_embedding"])[:, bucket]
    scores = np.einsum("lha,mha->hlm", *heads) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_a_token_attends_to_its_copy_and_not_to_itself():
    weights = first_layer_weights(initial(attention_init="copies"))
    assert weights[:, 1, 5].mean() > 0.6 and weights[:, 5, 1].mean() > 0.6
    assert weights[:, range(8), range(8)].mean() < 0.1
    plain = first_layer_weights(initial())
    assert plain[:, 1, 5].mean() < 0.3


@pytest.mark.parametrize("changes", [
    {},
    {"scan_layers": True},
    {"scan_layers": True, "num_experts": 2, "num_encoder_layers": 4, "num_decoder_layers": 4},
])  # fmt: skip
def test_only_the_encoders_queries_and_its_bias_at_distance_0_start_otherwise(changes):
    one, other = (parameters.flatten(initial(attention_init=name, **changes)) for name in ("t5", "copies"))
    differing = {name for name in one if not np.allclose(one[name], other[name], rtol=1e-5)}
    queries = {name for name in one if name.startswith("encoder/layers") and name.endswith("attention/query/kernel")}
    assert queries and differing == queries | {"encoder/relpos_bias/rel_embedding"}
    for name in queries:
        key = other[name.replace("/query/", "/key/")]
        np.testing.assert_allclose(other[name], key * initialisation.COPY_SCORE / 16, rtol=1e-6)
    bias = other["encoder/relpos_bias/rel_embedding"] - one["encoder/relpos_bias/rel_embedding"]
    np.testing.assert_allclose(bias[:, 0], initialisation.SELF_BIAS, rtol=1e-5)
    assert not np.any(bias[:, 1:])


def test_an_unknown_start_is_refused():
    with pytest.raises(UserError, match="attention_init is 'T5'; use 't5' or 'copies'"):
        TransformerConfig(attention_init="T5")
