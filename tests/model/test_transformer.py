"""Properties of the encoder-decoder: causality, packing, caching, precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.model import transformer
from expertrag_jax.model.config import TransformerConfig


@pytest.mark.parametrize("sparse", [False, True])
def test_decoder_is_causal_by_gradient(sparse, tiny):
    """d logits[t] / d input[s] is 0 for s > t and not 0 for s <= t, in every row."""
    settings = tiny.config(**(tiny.sparse if sparse else {}))
    params = tiny.initial(settings)
    questions, targets = tiny.tokens(2, 5), tiny.tokens(2, 6, seed=1, padded=False)
    embedding = jnp.asarray(params["token_embedder"]["embedding"])[targets]

    class Decoder(transformer.Transformer):
        """Reads embedded targets, so that their gradient can be asked for."""

        def from_vectors(self, vectors, memory):
            states = self.decoder(vectors, jnp.ones(vectors.shape[:2], jnp.int32), memory, True)
            return self.output(states)

    def run(vectors):
        encoded = tiny.call(settings, params, questions, method="encode")
        memory = tiny.call(settings, params, encoded, questions > 0, method="memory")
        logits = Decoder(settings).apply({"params": params}, vectors, memory, method="from_vectors")
        return (logits * jnp.arange(1.0, settings.vocab_size + 1)).sum(-1)

    influence = jnp.abs(jax.jit(jax.jacrev(run))(embedding)).sum(-1)  # [B, t, B, s]
    for row in range(2):
        own = np.asarray(influence[row, :, row])
        assert (own[np.triu_indices(6, 1)] == 0).all()
        assert (own[np.tril_indices(6)] > 0).all()
        assert (np.asarray(influence[row, :, 1 - row]) == 0).all()


@pytest.mark.parametrize("sparse", [False, True])
def test_packed_rows_equal_separate_rows(sparse, tiny):
    settings = tiny.config(**(tiny.sparse if sparse else {}))
    params = tiny.initial(settings)
    questions, targets = tiny.tokens(2, 5, padded=False), tiny.tokens(2, 4, seed=1, padded=False)
    separate = jax.jit(lambda p: tiny.logits(settings, p, questions, targets))(params)

    def pack(rows, padding):
        tokens = np.concatenate([rows.reshape(1, -1), np.zeros((1, padding), np.int32)], 1)
        segments = np.repeat([1, 2, 0], [rows.shape[1], rows.shape[1], padding])[None].astype(np.int32)
        return tokens, segments

    packed, segments = pack(questions, 3)
    packed_targets, target_segments = pack(targets, 2)

    @jax.jit
    def run(params):
        encoded = tiny.call(settings, params, packed, segments, method="encode")
        memory = tiny.call(settings, params, encoded, segments, method="memory")
        return tiny.call(settings, params, packed_targets, target_segments, memory, method="logits")

    together = run(params)[0, :8].reshape(2, 4, -1)
    np.testing.assert_allclose(together, separate, rtol=1e-4, atol=1e-5)


KINDS = {
    "dense": {},
    "sparse": {"num_experts": 4, "num_selected_experts": 2},
    "scanned": {"scan_layers": True},
    "sparse scanned": {"num_experts": 4, "scan_layers": True},
    "remat": {"remat": "full", "num_experts": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_teacher_forcing(kind, tiny):
    """Over the joint memory of two passages per question."""
    settings = tiny.config(**KINDS[kind])
    params = tiny.initial(settings)
    passages, targets = tiny.tokens(4, 5), tiny.tokens(2, 4, seed=1, padded=False)

    def memory_of(params):
        states = tiny.call(settings, params, passages, method="encode").reshape(2, 10, -1)
        return tiny.call(settings, params, states, (passages > 0).reshape(2, 10), method="memory")

    @jax.jit
    def forced(params):
        return tiny.call(settings, params, targets, np.ones_like(targets), memory_of(params), method="logits")

    @jax.jit
    def cached(params):
        memory = memory_of(params)

        def step(cache, tokens):
            logits, cache = tiny.call(settings, params, tokens, memory, cache, method="step")
            return cache, logits

        cache, logits = jax.lax.scan(step, transformer.empty_cache(settings, 2, 6), targets.T)
        return logits.swapaxes(0, 1), cache

    logits, cache = cached(params)
    np.testing.assert_allclose(logits, forced(params), rtol=1e-4, atol=1e-5)
    assert cache.position == 4
    rows = transformer.take_rows(cache.layers, jnp.array([1, 1]), settings)
    axis = 1 if settings.scan_layers else 0
    for old, new in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(jnp.take(new, 0, axis), jnp.take(old, 1, axis))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_bfloat16_activations_stay_near(kind, tiny):
    questions, targets = tiny.tokens(3, 7), tiny.tokens(3, 4, seed=1, padded=False)
    wide, narrow = (tiny.config(**KINDS[kind], dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = tiny.initial(wide)

    def run(settings):
        def objective(params):
            logits = tiny.logits(settings, params, questions, targets)
            return (jax.nn.log_softmax(logits) ** 2).mean(), logits

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    (_, exact), (gradients, near) = run(wide), run(narrow)
    assert near.dtype == jnp.float32 and all(g.dtype == jnp.float32 for g in jax.tree.leaves(gradients))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    error = np.abs(np.asarray(near - exact))
    assert 0 < error.max() < 0.15 * np.abs(exact).max()
    states = jax.eval_shape(lambda p: tiny.call(narrow, p, questions, method="encode"), params)
    assert states.dtype == jnp.bfloat16


def test_dropout_is_random_in_training_only(tiny):
    settings = tiny.config(dropout_rate=0.5)
    params = tiny.initial(settings)
    questions = tiny.tokens()
    model = transformer.Transformer(settings)

    @jax.jit
    def train(key):
        return model.apply({"params": params}, questions, None, False, method="encode", rngs={"dropout": key})

    first, same, other = train(jax.random.key(0)), train(jax.random.key(0)), train(jax.random.key(1))
    np.testing.assert_array_equal(first, same)
    assert float(jnp.abs(first - other).max()) > 0.1
    evaluate, plain = (
        jax.jit(lambda p, s=s: tiny.call(s, p, questions, method="encode"))(params) for s in (settings, tiny.config())
    )
    np.testing.assert_array_equal(evaluate, plain)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dtype": "float16"}, "dtype"),
        ({"remat": "all"}, "remat"),
        ({"mlp_activations": ("swish", "linear")}, "'swish'; there are linear, gelu"),
        ({"num_experts": 2, "num_selected_experts": 3}, "NUM_SELECTED_EXPERTS is 3"),
        (
            {"num_experts": 2, "num_encoder_layers": 3, "scan_layers": True},
            "multiple of expert_layer_period=2",
        ),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(UserError, match=message):
        TransformerConfig(**changes)
