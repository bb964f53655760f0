"""Attention's two orders of arithmetic, and the bias that is spread without a gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.model.attention import Attention, diagonals, softmax_mix
from expertrag_jax.model.config import TransformerConfig


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 7), (2, 1), (5, 5), (3, 8), (8, 3)])
def test_diagonals_equal_a_look_up_in_value_and_gradient(queries, keys):
    by_distance = jax.random.normal(jax.random.key(0), (2, queries + keys - 1))
    weight = jax.random.normal(jax.random.key(1), (2, queries, keys))
    place = np.arange(keys)[None] - np.arange(queries)[:, None] + queries - 1

    np.testing.assert_array_equal(diagonals(by_distance, queries, keys), by_distance[:, place])
    ours = jax.grad(lambda x: (diagonals(x, queries, keys) * weight).sum())(by_distance)
    wanted = jax.grad(lambda x: (x[:, place] * weight).sum())(by_distance)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


def random_inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (3, 5, 2, 4), dtype)
    key, value = (jax.random.normal(k, (3, 7, 2, 4), dtype) for k in keys[1:3])
    masked = jax.random.uniform(keys[3], (3, 1, 1, 7)) < 0.4
    return query, key, value, jnp.where(masked.at[0].set(True), -1e9, 0.0)  # the first row may look at nothing


def test_softmax_mix_equals_the_textbook():
    query, key, value, bias = random_inputs()
    scores = np.einsum("blha,bmha->bhlm", *(np.asarray(x, np.float64) for x in (query, key))) + np.asarray(bias)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = np.einsum("bhlm,bmha->blha", weights / weights.sum(-1, keepdims=True), value)
    # A row of -1e9 loses the scores' digits in float32: it is the mean there, and must be finite.
    np.testing.assert_allclose(softmax_mix(query, key, value, bias)[1:], wanted[1:], atol=2e-6)
    assert np.isfinite(softmax_mix(query, key, value, bias)).all()


def test_large_scores_stay_finite():
    query, key, value, bias = random_inputs()
    assert np.isfinite(softmax_mix(100 * query, 100 * key, value, bias)).all()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_training_and_inference_agree(dtype, tolerance):
    config = TransformerConfig(vocab_size=8, embed_dim=8, num_heads=2, head_dim=4, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (3, 6, 8), dtype)
    bias = random_inputs()[3][..., :6]
    module = Attention(config)
    params = module.init(jax.random.key(1), x, bias, True)
    inference = module.apply(params, x, bias, True).astype(jnp.float32)
    training = module.apply(params, x, bias, False, rngs={"dropout": jax.random.key(2)}).astype(jnp.float32)
    np.testing.assert_allclose(inference, training, atol=tolerance, rtol=tolerance)
