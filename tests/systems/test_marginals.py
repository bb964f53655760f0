"""The marginals against sums over every sequence and every passage, in probabilities and float64, gradients too."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.systems import marginals

VOCAB, LENGTH, PASSAGES = 4, 3, 3
KINDS = {"sequence": marginals.sequence_marginal, "token": marginals.token_marginal}
SEQUENCES = list(itertools.product(range(VOCAB), repeat=LENGTH))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class World:
    """One question: scores s[z] and p(y_i|z, y_<i) for every passage and every prefix, all drawn."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.scores = rng.normal(size=PASSAGES)
        self.tables = {
            prefix: softmax(2 * rng.normal(size=(PASSAGES, VOCAB)))
            for n in range(LENGTH)
            for prefix in itertools.product(range(VOCAB), repeat=n)
        }

    def token_probs(self, sequence):
        """p(y_i|z, y_<i): [K, T]."""
        return np.stack([self.tables[sequence[:i]][:, token] for i, token in enumerate(sequence)], axis=1)


def brute(kind, scores, probs):
    """p(y|x) by the definition: probs [K, T]."""
    prior = softmax(scores)
    if kind == "sequence":
        return (prior * probs.prod(1)).sum()
    return (prior[:, None] * probs).sum(0).prod()


def log_marginal(kind, scores, log_probs, weights=None, present=None, temperature=1.0):
    """Ours, for one question."""
    scores, log_probs = jnp.asarray(scores, jnp.float32)[None], jnp.asarray(log_probs, jnp.float32)[None]
    present = jnp.ones(scores.shape, bool) if present is None else jnp.asarray(present)[None]
    weights = jnp.ones((1, log_probs.shape[-1])) if weights is None else jnp.asarray(weights, jnp.float32)[None]
    return compiled(kind, scores, present, temperature, log_probs, weights)[0]


@functools.partial(jax.jit, static_argnums=0)
def compiled(kind, scores, present, temperature, log_probs, weights):
    return KINDS[kind](marginals.log_prior(scores, present, temperature), log_probs, weights)


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_equal_the_definition_over_all_sequences(kind):
    world = World()
    probs = np.stack([world.token_probs(sequence) for sequence in SEQUENCES])
    ours = jax.vmap(lambda p: log_marginal(kind, world.scores, p))(np.log(probs))
    expected = [brute(kind, world.scores, p) for p in probs]
    np.testing.assert_allclose(np.exp(ours), expected, rtol=1e-5)
    assert np.exp(np.float64(ours)).sum() == pytest.approx(1.0, abs=1e-5)  # a distribution over all answers


def test_the_two_marginals_differ_and_agree_on_one_token():
    """One token: the same formula, and the prior counts (it is lost where the first token is not mixed)."""
    world = World(9)
    probs = world.token_probs((2, 1, 3))
    both = [float(log_marginal(kind, world.scores, np.log(probs))) for kind in KINDS]
    assert abs(both[0] - both[1]) > 1e-2
    one = [float(log_marginal(kind, world.scores, np.log(probs[:, :1]))) for kind in KINDS]
    expected = np.log((softmax(world.scores) * probs[:, 0]).sum())
    np.testing.assert_allclose(one, expected, rtol=1e-5)
    assert abs(expected - np.log(probs[:, 0].mean())) > 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_central_differences_of_the_definition(kind):
    """With respect to scores and to log p of every token of every passage; float64, by the definition."""
    world, step = World(2), 1e-6
    log_probs = np.log(world.token_probs((3, 0, 1)))
    ours = jax.grad(lambda s, lp: log_marginal(kind, s, lp), (0, 1))(
        jnp.asarray(world.scores, jnp.float32), jnp.asarray(log_probs, jnp.float32)
    )
    for place, mine in enumerate(ours):
        expected = np.zeros(mine.shape)
        for index in np.ndindex(mine.shape):
            values = []
            for sign in (1, -1):
                moved = [world.scores.copy(), log_probs.copy()]
                moved[place][index] += sign * step
                values.append(np.log(brute(kind, moved[0], np.exp(moved[1]))))
            expected[index] = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose(mine, expected, atol=1e-5)
        assert np.abs(expected).max() > 1e-2


def test_the_gradient_to_the_scores_is_posterior_minus_prior():
    world = World(3)
    log_probs = np.log(world.token_probs((1, 1, 2)))
    gradient = jax.grad(lambda s: log_marginal("sequence", s, log_probs))(jnp.asarray(world.scores, jnp.float32))
    prior = softmax(world.scores)
    posterior = prior * np.exp(log_probs).prod(1)
    posterior /= posterior.sum()
    np.testing.assert_allclose(gradient, posterior - prior, atol=1e-6)
    found = marginals.log_posterior(jnp.log(prior), marginals.answer_log_probs(log_probs[None], np.ones((1, 3)))[0])
    np.testing.assert_allclose(np.exp(found), posterior, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_one_passage_change_nothing(kind):
    """The number of passages is counted: K equal passages of weight 1/K are one passage, not K."""
    log_probs = np.log(World(4).token_probs((0, 2, 1)))[:1]
    one = log_marginal(kind, np.zeros(1), log_probs)
    many = log_marginal(kind, np.full(5, 0.7), np.repeat(log_probs, 5, 0))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    np.testing.assert_allclose(one, log_probs.sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_passages_and_padding_count_for_nothing(kind):
    world = World(5)
    log_probs = np.log(world.token_probs((1, 3, 2)))
    absent = np.concatenate([log_probs, np.full((1, 3), -1.0)])
    padded = np.concatenate([absent, np.full((4, 2), -7.0)], axis=1)
    scores, present = np.append(world.scores, 9.0), np.array([True, True, True, False])

    def padded_marginal(scores, log_probs):
        return log_marginal(kind, scores, log_probs, [1, 1, 1, 0, 0], present)

    expected = log_marginal(kind, world.scores, log_probs)
    np.testing.assert_allclose(padded_marginal(scores, padded), expected, rtol=1e-5)
    to_scores, to_tokens = jax.grad(padded_marginal, (0, 1))(jnp.float32(scores), jnp.float32(padded))
    assert to_scores[3] == 0 and not to_tokens[3].any() and not to_tokens[:, 3:].any()
    assert np.isfinite(to_scores).all() and to_tokens[:3, :3].any()


def test_a_question_without_passages_has_finite_numbers():
    value, gradient = jax.value_and_grad(lambda s: log_marginal("token", s, np.zeros((2, 1)), present=[False, False]))(
        jnp.zeros(2)
    )
    assert np.isfinite(value) and not gradient.any()


def test_temperature_divides_the_scores():
    prior = marginals.log_prior(jnp.array([[0.1, 0.3]]), jnp.ones((1, 2), bool), 0.05)
    np.testing.assert_allclose(np.exp(prior[0]), softmax(np.array([2.0, 6.0])), rtol=1e-5)
    assert marginals.entropy(jnp.array([jnp.log(0.5), jnp.log(0.5), marginals.ABSENT])) == pytest.approx(np.log(2))


def scored(states, targets, kernel, label_smoothing=0.0):
    of_target, of_all, log_z = jax.jit(lambda s, k: marginals.token_scores(s, targets, lambda y: y @ k))(states, kernel)
    return marginals.smoothed(of_target, of_all, kernel.shape[1], label_smoothing), log_z


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_chunked_token_scores_equal_whole_logits_with_gradients(label_smoothing):
    """Against the definition: sum_v q(v) log p(v) + H(q), where q is 1 - s at the target, s / (V - 1) elsewhere."""
    rng = np.random.default_rng(6)
    states, kernel = jnp.float32(rng.normal(size=(5, 3, 4))), jnp.float32(rng.normal(size=(4, VOCAB)))
    targets = rng.integers(0, VOCAB, (5, 3))
    mix = jnp.float32(rng.normal(size=(2, 5, 3)))

    def whole(states, kernel):
        logits = states @ kernel
        log_probs = jax.nn.log_softmax(logits)
        q = jnp.where(targets[..., None] == jnp.arange(VOCAB), 1 - label_smoothing, label_smoothing / (VOCAB - 1))
        entropy = -(q * jnp.log(jnp.maximum(q, 1e-30))).sum(-1)
        values = (q * log_probs).sum(-1) + entropy
        return (mix[0] * values + mix[1] * jax.nn.logsumexp(logits, -1)).sum(), values

    def ours(states, kernel):
        values, log_z = scored(states, targets, kernel, label_smoothing)
        return (mix[0] * values + mix[1] * log_z).sum(), values

    (expected, values), expected_gradient = jax.value_and_grad(whole, (0, 1), has_aux=True)(states, kernel)
    (found, mine), gradient = jax.value_and_grad(ours, (0, 1), has_aux=True)(states, kernel)
    np.testing.assert_allclose(mine, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for one, other in zip(gradient, expected_gradient):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_leaves_the_prior_alone(kind):
    """Passages that say the same: however sure the prior, smoothed or not, the loss is that of one passage."""
    rng = np.random.default_rng(7)
    state, kernel = rng.normal(size=(1, 3, 4)), jnp.float32(rng.normal(size=(4, VOCAB)))
    targets = np.array([[1, 2, 3]])
    states = jnp.float32(np.repeat(state, PASSAGES, 0))

    def value(scores):
        values, _ = scored(states, np.repeat(targets, PASSAGES, 0), kernel, 0.2)
        return log_marginal(kind, scores, values)

    alone, _ = scored(jnp.float32(state), targets, kernel, 0.2)
    for scores in (np.zeros(3), np.array([5.0, -2.0, 0.5])):
        found, gradient = jax.value_and_grad(value)(jnp.float32(scores))
        np.testing.assert_allclose(found, alone.sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_no_array_of_all_logits_exists():
    """In the gradient program of N rows, T positions and V tokens nothing float32 has N * T * V entries."""
    rows, length, vocab = 8, 16, 512

    def loss(states, kernel):
        return scored(states, jnp.zeros((rows, length), jnp.int32), kernel)[0].sum()

    states, kernel = jnp.ones((rows, length, 4)), jnp.ones((4, vocab))
    program = jax.jit(jax.grad(loss, (0, 1))).lower(states, kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < rows * length * vocab * 4 / 2
