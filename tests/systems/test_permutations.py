"""Ordered choices against enumeration: probabilities, samples, posterior, bound, gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.systems import permutations

N, K = 8, 2
CHOICES = permutations.enumerate_choices(N, K)


def table(seed=0, candidates=N, scale=1.0):
    """Random logits of the first place [n], and of the second behind each first [n, n]."""
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for shape in ((candidates,), (candidates, candidates))
    )


def scorer(first, second):
    """An autoregressive scorer of two places."""

    def score(choices):
        start = jnp.broadcast_to(first, (*choices.shape[:-1], first.size))
        return jnp.stack([start, second[choices[..., 0]]], axis=-2)

    return score


def by_hand(first, second):
    """{(i, j): p(i) p(j | i)} in plain loops, with j drawn among the others."""
    first, second = np.exp(np.asarray(first, np.float64)), np.exp(np.asarray(second, np.float64))
    found = {}
    for i, j in itertools.permutations(range(len(first)), 2):
        others = [k for k in range(len(first)) if k != i]
        found[i, j] = first[i] / first.sum() * second[i, j] / second[i, others].sum()
    return found


@pytest.fixture(scope="module")
def problem():
    """Scorer's table, log p(z|x) and log p(y|x, z) of all 56 choices."""
    first, second = table()
    log_prior = permutations.log_probability(scorer(first, second)(CHOICES), CHOICES)
    log_likelihood = jnp.asarray(2 * np.random.default_rng(5).normal(size=len(CHOICES)) - 4, jnp.float32)
    return (first, second), log_prior, log_likelihood


def index_of(choices):
    """Place of choices [..., 2] among the 56."""
    place = np.full((N, N), -1)
    place[CHOICES[:, 0], CHOICES[:, 1]] = np.arange(len(CHOICES))
    found = place[choices[..., 0], choices[..., 1]]
    assert (found >= 0).all(), "a candidate was chosen twice"
    return found


def test_probabilities_of_all_choices_are_those_of_plain_loops(problem):
    tables, log_prior, _ = problem
    reference = by_hand(*tables)
    assert list(reference) == [tuple(z) for z in CHOICES.tolist()] and len(CHOICES) == 56
    np.testing.assert_allclose(np.exp(log_prior), list(reference.values()), rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_prior).sum(), 1, rtol=1e-5)
    again = np.array([[3, 3]], np.int32)
    assert permutations.log_probability(scorer(*tables)(again), again) < -1e20


def test_absent_candidates_come_last():
    tables = table(1, candidates=4)
    choices, present = permutations.enumerate_choices(4, 2), jnp.array([True, False, True, False])
    p = np.exp(permutations.log_probability(scorer(*tables)(choices), choices, present))
    allowed = np.isin(choices, (0, 2)).all(-1)
    np.testing.assert_allclose(p[allowed].sum(), 1, rtol=1e-6)
    assert not p[~allowed].any()
    one = jnp.array([False, False, True, False])  # then the second place is any of the others
    p = np.exp(permutations.log_probability(scorer(*tables)(choices), choices, one))
    np.testing.assert_allclose(p, np.where(choices[:, 0] == 2, 1 / 3, 0), rtol=1e-6)
    greedy = permutations.greedy(scorer(*tables), (1, 2), present)
    assert sorted(np.ravel(greedy)) == [0, 2]


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
def test_samples_are_drawn_from_the_proposal_that_is_reported(problem, temperature, top_p):
    (first, second), _, _ = problem
    draws = 40_000
    run = jax.jit(lambda key: permutations.sample(scorer(first, second), (draws, K), key, temperature, top_p))
    choices, log_q = jax.tree.map(np.asarray, run(jax.random.key(0)))
    place = index_of(choices)
    counts = np.bincount(place, minlength=len(CHOICES))
    q = np.zeros(len(CHOICES))
    q[place] = np.exp(log_q)
    assert abs(q.sum() - 1) < 1e-4  # all that can be drawn was drawn
    assert (np.abs(counts / draws - q) < 5 * np.sqrt(q / draws) + 1e-9).all()
    if top_p == 1:  # p(i)^(1/T) renormalised at every place
        reference = by_hand(first / temperature, second / temperature)
        np.testing.assert_allclose(q, list(reference.values()), rtol=1e-4)
    else:
        assert (q == 0).any()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_estimated_posterior_converges_to_the_enumerated_one(problem, temperature):
    """Whatever the proposal; with its correction left out it converges elsewhere."""
    tables, log_prior, log_likelihood = problem
    exact = np.exp(permutations.log_posterior(log_likelihood, log_prior))
    joint = np.exp(log_prior + log_likelihood)
    np.testing.assert_allclose(exact, joint / joint.sum(), rtol=1e-4)

    def distance(samples, corrected=True):
        choices, log_q = permutations.sample(scorer(*tables), (20, samples, K), jax.random.key(1), temperature)
        place = index_of(np.asarray(choices))
        prior = log_prior[place]
        weights = permutations.importance_weights(log_likelihood[place], prior, log_q if corrected else prior)
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        estimate = np.zeros((20, len(CHOICES)))
        for row in range(20):
            np.add.at(estimate[row], place[row], np.asarray(weights[row]))
        return 0.5 * np.abs(estimate - exact).sum(-1).mean()

    near = [distance(samples) for samples in (32, 128, 512, 2048)]
    # Total variation falls as m^-1/2: by 2 for each factor of 4, a little slower while m is small.
    assert all(1.4 < a / b < 2.4 for a, b in itertools.pairwise(near)), near
    assert near[-1] < 0.08
    if temperature != 1:
        assert distance(2048, corrected=False) > 2 * near[-1]


def test_effective_sample_size_and_evidence(problem):
    tables, log_prior, log_likelihood = problem
    assert permutations.effective_sample_size(jnp.full(8, 1 / 8)) == 8
    assert permutations.effective_sample_size(jnp.eye(8)[3]) == 1
    choices, log_q = permutations.sample(scorer(*tables), (4000, 8, K), jax.random.key(2), 1.3)
    place = index_of(np.asarray(choices))
    estimate = permutations.log_evidence(log_likelihood[place], log_prior[place], log_q)
    exact = jax.nn.logsumexp(log_likelihood + log_prior)
    estimates = np.exp(estimate)
    assert abs(estimates.mean() - np.exp(exact)) < 4 * estimates.std() / 4000**0.5  # unbiased
    assert estimate.mean() < exact


def test_the_bound_is_tight_at_the_posterior_only(problem):
    _, log_prior, log_likelihood = problem
    evidence = jax.nn.logsumexp(log_likelihood + log_prior)
    posterior = permutations.log_posterior(log_likelihood, log_prior)
    np.testing.assert_allclose(permutations.lower_bound(posterior, log_likelihood, log_prior), evidence, rtol=1e-5)
    gap = evidence - permutations.lower_bound(log_prior, log_likelihood, log_prior)
    divergence = (np.exp(log_prior) * (log_prior - posterior)).sum()
    np.testing.assert_allclose(gap, divergence, rtol=1e-4)
    assert gap > 0.1


def test_the_bound_rises_over_exact_em_steps():
    """A selector and a generator as tables, shared by 30 questions with answers of 4 tokens; closed forms."""
    rng = np.random.default_rng(3)
    answers = rng.integers(6, size=(30, 4))
    prior = rng.dirichlet(np.ones(len(CHOICES)))
    tokens = rng.dirichlet(np.ones(6), size=(len(CHOICES), 4))  # [56, 4, 6]

    def log_likelihoods():
        return np.log(tokens)[:, np.arange(4), answers].sum(-1).T  # [30, 56]

    bounds = []
    for _ in range(8):
        log_q = permutations.log_posterior(jnp.asarray(log_likelihoods()), jnp.asarray(np.log(prior)))  # E
        bounds.append(float(permutations.lower_bound(log_q, log_likelihoods(), np.log(prior)).sum()))
        evidence = jax.nn.logsumexp(log_likelihoods() + np.log(prior), -1).sum()
        np.testing.assert_allclose(bounds[-1], evidence, rtol=1e-5)
        q = np.exp(log_q)  # M
        prior = np.maximum(q.mean(0), 1e-12)
        counts = np.einsum("qz,qty->zty", q, np.eye(6)[answers])
        tokens = np.maximum(counts / counts.sum(-1, keepdims=True), 1e-12)
        bounds.append(float(permutations.lower_bound(log_q, log_likelihoods(), np.log(prior)).sum()))
    steps = np.diff(bounds)
    assert (steps > -1e-3).all() and (steps[:6] > 0.1).all(), bounds


def test_the_gradient_is_the_policy_gradient(problem):
    """With the exact posterior the M-step's gradient is that of log p(y|x), and REINFORCE's.

    The policy is p(z|x) and the reward p(y|x, z) / p(y|x); the latter's expectation is taken by enumeration.
    """
    tables, log_prior, log_likelihood = problem

    def prior_of(tables):
        return permutations.log_probability(scorer(*tables)(CHOICES), CHOICES)

    def m_step(tables):
        weights = jnp.exp(permutations.log_posterior(log_likelihood, prior_of(tables)))
        return permutations.expected(weights, prior_of(tables))

    def marginal(tables):
        return jax.nn.logsumexp(log_likelihood + prior_of(tables))

    reward = np.exp(log_likelihood - jax.nn.logsumexp(log_likelihood + log_prior))
    scores = jax.jacobian(prior_of)(tables)  # grad log p(z|x) for every z
    reinforce = jax.tree.map(lambda s: np.tensordot(np.exp(log_prior) * reward, s, 1), scores)
    em = jax.grad(m_step)(tables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), em, reinforce)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), em, jax.grad(marginal)(tables))
    # A baseline changes nothing: the expected score is 0.
    jax.tree.map(lambda s: np.testing.assert_allclose(np.tensordot(np.exp(log_prior), s, 1), 0, atol=1e-6), scores)


def test_gradient_variance_falls_as_one_over_m(problem):
    tables, log_prior, log_likelihood = problem
    scores = jax.vmap(lambda z: jax.grad(lambda t: permutations.log_probability(scorer(*t)(z), z))(tables)[0])(
        jnp.asarray(CHOICES)
    )

    def variance(samples):
        choices, log_q = permutations.sample(scorer(*tables), (600, samples, K), jax.random.key(3))
        place = index_of(np.asarray(choices))
        weights = permutations.importance_weights(log_likelihood[place], log_prior[place], log_q)
        return float(np.einsum("rm,rmn->rn", weights, scores[place]).var(0).sum())

    found = np.array([variance(samples) for samples in (16, 64, 256)])
    slope = np.polyfit(np.log([16, 64, 256]), np.log(found), 1)[0]
    assert -1.12 < slope < -0.85, (slope, found)
