"""Decoding on a toy step function whose whole distribution can be enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax import decoding

VOCAB, LENGTH, ROWS = 4, 4, 3


class Toy:
    """log p(next | whole prefix): the cache is the prefix read as a number in base V + 1, and the row.

    PAD is as likely as any token by default, and must not be given all the same.
    """

    def __init__(self, seed=0, sharpness=1.5, padding=0.0):
        rng = np.random.default_rng(seed)
        size = (VOCAB + 1) ** LENGTH
        logits = jnp.asarray(rng.normal(size=(ROWS, size, VOCAB)) * sharpness, jnp.float32)
        logits = logits.at[..., decoding.PAD].add(padding)
        self.table = jax.nn.log_softmax(logits)
        self.first = self.table[:, 0]

    def cache(self, repeats=1):
        zero = jnp.zeros(ROWS * repeats, jnp.int32)
        return {"prefix": zero, "row": jnp.repeat(jnp.arange(ROWS), repeats)}

    def step(self, tokens, cache):
        prefix = cache["prefix"] * (VOCAB + 1) + tokens + 1
        return self.table[cache["row"], prefix], {"prefix": prefix, "row": cache["row"]}

    def log_probability(self, row, tokens):
        total, prefix = 0.0, 0
        for token in tokens:
            total += float(self.table[row, prefix, token])
            prefix = prefix * (VOCAB + 1) + token + 1
        return total

    def hypotheses(self, row):
        """{tokens: (log-probability, finished)} of everything that decoding may give."""
        found = {}
        for n in range(1, LENGTH + 1):
            for tokens in itertools.product(range(1, VOCAB), repeat=n):
                if decoding.EOS in tokens[:-1] or (n < LENGTH and tokens[-1] != decoding.EOS):
                    continue
                found[tokens] = (self.log_probability(row, tokens), tokens[-1] == decoding.EOS)
        return found


def padded(tokens):
    return list(tokens) + [0] * (LENGTH - len(tokens))


EVERY = jnp.ones(ROWS, bool)


def reorder(cache, rows):
    return jax.tree.map(lambda x: x[rows], cache)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_takes_the_likeliest_token_at_every_position(seed):
    toy = Toy(seed)
    tokens, score = decoding.greedy(toy.step, toy.cache(), toy.first, LENGTH, EVERY.at[1].set(False))
    assert not tokens[1].any() and score[1] == 0
    for row in (0, 2):
        expected, prefix = [], 0
        while len(expected) < LENGTH and decoding.EOS not in expected:
            expected.append(1 + int(toy.table[row, prefix, 1:].argmax()))
            prefix = prefix * (VOCAB + 1) + expected[-1] + 1
        assert tokens[row].tolist() == padded(expected)
        np.testing.assert_allclose(score[row], toy.log_probability(row, expected), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_beam_as_wide_as_the_tree_is_exact(seed, alpha):
    toy, beams = Toy(seed), VOCAB**LENGTH
    tokens, score = decoding.beam(toy.step, toy.cache(beams), toy.first, LENGTH, beams, reorder, alpha)
    for row in range(ROWS):
        order = sorted(
            (
                (not finished, -log_p / ((5 + len(t)) / 6) ** alpha, padded(t))
                for t, (log_p, finished) in toy.hypotheses(row).items()
            )
        )
        assert len(order) < beams
        top = order[:20]  # finished ones first, each group by its score
        assert tokens[row, :20].tolist() == [t for _, _, t in top]
        np.testing.assert_allclose(score[row, :20], [-s for _, s, _ in top], rtol=1e-5)
        assert (score[row, len(order) :] == decoding.NEGATIVE).all()
        assert not tokens[row, len(order) :].any()


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_narrow_beam_equals_beam_search_in_python(beams):
    toy = Toy(7)
    tokens, score = decoding.beam(toy.step, toy.cache(beams), toy.first, LENGTH, beams, reorder)
    for row in range(ROWS):
        live, done = [((), 0.0)], []
        for _ in range(LENGTH):
            grown = [(t + (v,), toy.log_probability(row, t + (v,))) for t, _ in live for v in range(1, VOCAB)]
            best = sorted(grown, key=lambda x: -x[1])[: 2 * beams]
            done = sorted(done + [x for x in best if x[0][-1] == decoding.EOS], key=lambda x: -x[1])[:beams]
            live = [x for x in best if x[0][-1] != decoding.EOS][:beams]
        expected = (done + live)[:beams]
        assert tokens[row].tolist() == [padded(t) for t, _ in expected]
        np.testing.assert_allclose(score[row], [s for _, s in expected], rtol=1e-5)


def test_sampling_follows_the_probabilities():
    toy, draws = Toy(1, sharpness=0.7, padding=-30.0), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    run = jax.jit(jax.vmap(lambda k: decoding.sample(toy.step, toy.cache(), toy.first, LENGTH, EVERY, k)))
    tokens, score = run(keys)
    for row in range(ROWS):
        counts = {}
        for sampled in tokens[:, row].tolist():
            counts[tuple(sampled)] = counts.get(tuple(sampled), 0) + 1
        expected = {tuple(padded(t)): np.exp(p) for t, (p, _) in toy.hypotheses(row).items()}
        assert set(counts) <= set(expected)
        assert abs(sum(expected.values()) - 1) < 1e-4
        for answer, probability in expected.items():
            spread = np.sqrt(draws * probability * (1 - probability))
            assert abs(counts.get(answer, 0) - draws * probability) < 4.5 * spread + 2
        answer = tokens[0, row].tolist()
        answer = answer[: answer.index(1) + 1] if 1 in answer else answer
        np.testing.assert_allclose(score[0, row], toy.log_probability(row, answer), rtol=1e-5)


def test_low_temperature_is_greedy_and_the_score_is_untempered():
    toy = Toy(2)
    cold = decoding.sample(
        toy.step, toy.cache(), toy.first, LENGTH, EVERY, jax.random.key(0), temperature=1e-3
    )
    greedy = decoding.greedy(toy.step, toy.cache(), toy.first, LENGTH, EVERY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), cold, greedy)


@pytest.mark.parametrize("top_k", [1, 3, 9])
@pytest.mark.parametrize("top_p", [0.3, 0.75, 1.0])
def test_truncation_keeps_the_head(top_k, top_p):
    log_probs = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.25, 0.2], [0.9, 0.04, 0.03, 0.02, 0.01]]))
    kept = decoding.truncate(log_probs, top_k, top_p) > decoding.NEGATIVE / 2
    for row, p in enumerate(np.exp(log_probs)):
        order = np.argsort(-p)[:top_k]
        mass = np.cumsum(p[order] / p[order].sum())
        size = len(order) if top_p == 1 else int(np.argmax(mass >= top_p - 1e-6)) + 1
        assert set(np.flatnonzero(kept[row])) == set(order[:size].tolist())


def test_score_targets_is_the_probability_of_the_answer():
    toy = Toy(3)
    answers = [(2, 3, 1), (1,), (3, 2, 2, 3)]
    targets = jnp.array([padded(t) for t in answers])
    ours = jax.jit(lambda t: decoding.score_targets(toy.step, toy.cache(), toy.first, t))(targets)
    expected = [toy.log_probability(row, t) for row, t in enumerate(answers)]
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    padding = decoding.score_targets(toy.step, toy.cache(), toy.first, jnp.zeros((ROWS, LENGTH), jnp.int32))
    assert not padding.any()
