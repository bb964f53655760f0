"""RAG's decoders against all answers enumerated, and the step-by-step transition against the marginals."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax import decoding
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems import generator, marginals, rag_decoding
from expertrag_jax.systems.rag import RAG

VOCAB, LENGTH, PASSAGES, QUESTIONS, WIDTH = 5, 3, 3, 4, 6
MODEL = TransformerConfig(
    vocab_size=VOCAB, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1
)
RETRIEVER = DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, output_dim=WIDTH)
ANSWERS = np.array([
    list(tokens) + [0] * (LENGTH - len(tokens))
    for n in range(1, LENGTH + 1)
    for tokens in itertools.product(range(1, VOCAB), repeat=n)
    if 1 not in tokens[:-1] and (tokens[-1] == 1 or n == LENGTH)
])  # fmt: skip
ENDED = (ANSWERS == 1).any(-1)
WIDE = len(ANSWERS)  # a beam of everything


class Asked:
    """A system, its documents, and p(y|x) of every answer from log p(y|x, z) by the definition."""

    def __init__(self, marginal, tiny, null_document=False):
        self.system = RAG(
            MODEL, RETRIEVER, marginal, temperature=0.3, max_target_length=LENGTH, null_document=null_document
        )
        self.params = tiny.initial(self.system, seed=3)
        self.params["decoder"]["logits_dense"]["kernel"] *= 4  # passages disagree
        rng = np.random.default_rng(1)
        tokens = rng.integers(2, VOCAB, (QUESTIONS, PASSAGES, 6)).astype(np.int32)
        tokens[1, 2] = 0  # an absent passage
        question = rng.integers(2, VOCAB, (QUESTIONS, 3)).astype(np.int32)
        vectors = rng.normal(size=(QUESTIONS, PASSAGES, WIDTH)).astype(np.float32)
        self.documents = jax.jit(self.system.read)(self.params, question, question, tokens, vectors)
        self.first, self.cache = jax.jit(self.system.begin)(self.params, self.documents)

    def run(self, search, *arguments):
        return jax.jit(lambda params, documents: search(self.system, params, documents, *arguments))(
            self.params, self.documents
        )

    def token_log_probs(self):
        """[B, answers, K, T] by teacher forcing, whole logits."""
        count = self.documents.log_prior.shape[1]

        @jax.jit
        def one(answer):
            targets = jnp.tile(answer, (QUESTIONS * count, 1))
            inputs = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
            ones = jnp.ones(targets.shape, jnp.int32)
            logits, _ = generator.apply(MODEL, self.params, inputs, ones, self.documents.memory, method="logits")
            found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[..., 0]
            return found.reshape(QUESTIONS, count, LENGTH)

        found = np.stack([one(answer) for answer in ANSWERS], 1).astype(np.float64)
        return np.where(ANSWERS[:, None] > 0, found, 0.0)

    def probabilities(self):
        """p(y|x) [B, answers] by the definition."""
        prior, probs = np.exp(np.float64(self.documents.log_prior)), np.exp(self.token_log_probs())
        if self.system.marginal == "sequence":
            return (prior[:, None] * probs.prod(-1)).sum(-1)
        mixed = (prior[:, None, :, None] * probs).sum(2)
        return np.where(ANSWERS > 0, mixed, 1.0).prod(-1)


@pytest.fixture(scope="module", params=["sequence", "token"])
def asked(request, tiny):
    """For either marginal."""
    return Asked(request.param, tiny)


@pytest.fixture(scope="module")
def sequence(tiny):
    """RAG-Sequence."""
    return Asked("sequence", tiny)


def best(probabilities):
    """Index of each question's likeliest answer, ended ones first, as ``decoding.beam`` orders them."""
    return np.where(ENDED, probabilities, -1.0).argmax(-1)


def test_the_transition_multiplies_to_the_marginal(asked):
    """score_targets over decode_step is p(y|x) for every answer: RAG-Token's product, RAG-Sequence's chain rule."""
    system, params, documents = asked.system, asked.params, asked.documents

    @jax.jit
    def score(targets):
        def step(tokens, cache):
            return system.decode_step(params, documents, cache, tokens)

        return decoding.score_targets(step, asked.cache, asked.first, jnp.tile(targets, (QUESTIONS, 1)))

    expected = np.log(asked.probabilities())
    for place in range(0, len(ANSWERS), 3):
        np.testing.assert_allclose(score(ANSWERS[place]), expected[:, place], rtol=1e-4, atol=1e-5)


def test_a_wide_beam_finds_the_likeliest_answer(asked):
    """One search over the marginal transition, wide enough for everything; all scores are p(y|x)."""
    probabilities = asked.probabilities()
    tokens, scores = asked.run(
        lambda system, params, documents: rag_decoding.beam(
            system, params, documents, asked.first, asked.cache, LENGTH, WIDE
        )
    )
    np.testing.assert_array_equal(tokens[:, 0], ANSWERS[best(probabilities)])
    for row in range(QUESTIONS):
        for found, score in zip(np.asarray(tokens[row]).tolist(), scores[row]):
            place = ANSWERS.tolist().index(found)
            assert np.exp(score) == pytest.approx(probabilities[row, place], rel=1e-3)


def test_greedy_follows_the_marginal_transition(asked):
    """Token by token against prefixes' probabilities summed over all answers."""
    tokens, scores = jax.jit(
        lambda: rag_decoding.generate(
            asked.system, asked.params, asked.documents, asked.first, asked.cache, LENGTH, jnp.ones(QUESTIONS, bool)
        )
    )()
    probabilities = asked.probabilities()
    for row, found in enumerate(np.asarray(tokens).tolist()):
        place = ANSWERS.tolist().index(found)
        assert np.exp(scores[row]) == pytest.approx(probabilities[row, place], rel=1e-3)
    first = np.argmax(np.asarray(asked.first)[:, 1:], -1) + 1
    np.testing.assert_array_equal(tokens[:, 0], first)


def test_thorough_decoding_is_exact_with_wide_beams(sequence):
    probabilities = sequence.probabilities()
    tokens, scores = sequence.run(rag_decoding.thorough, LENGTH, WIDE)
    real = np.asarray(decoding.is_real(scores))
    assert (real.sum(-1) == len(ANSWERS)).all()  # the union of all beams, each hypothesis once
    for row in range(QUESTIONS):
        order = np.lexsort((-probabilities[row], ~ENDED))
        np.testing.assert_allclose(np.exp(scores[row][real[row]]), probabilities[row, order], rtol=1e-3)
        assert np.asarray(tokens[row, 0]).tolist() == ANSWERS[order[0]].tolist()
    cut_off = np.where(ENDED, 0, probabilities).max(-1)  # for some question the likeliest, and still behind
    assert (cut_off > np.where(ENDED, probabilities, 0).max(-1)).any()


@pytest.mark.parametrize("beams", [2])
def test_thorough_and_fast_decoding_of_narrow_beams(sequence, beams):
    """Against both rules applied by hand to each passage's beam."""
    prior = np.exp(np.float64(sequence.documents.log_prior))
    likelihood = np.exp(sequence.token_log_probs()).prod(-1)  # [B, answers, K]
    searches = (rag_decoding.passage_beams, rag_decoding.thorough, rag_decoding.fast)
    (hypotheses, kept), *both = sequence.run(lambda *given: [search(*given, LENGTH, beams) for search in searches])
    by_rule = dict(zip(("thorough", "fast"), both))
    places = {tuple(answer): place for place, answer in enumerate(ANSWERS.tolist())}
    lower = 0
    for row in range(QUESTIONS):
        held = [set() for _ in range(PASSAGES)]
        for place, (tokens, score) in enumerate(zip(np.asarray(hypotheses[row]).tolist(), kept[row])):
            if decoding.is_real(score):
                held[place // beams].add(places[tuple(tokens)])
        assert not held[2] if row == 1 else held[2]  # an absent passage has no beam
        union = set().union(*held)
        expected = {
            "thorough": {y: sum(prior[row, z] * likelihood[row, y, z] for z in range(PASSAGES)) for y in union},
            "fast": {
                y: sum(prior[row, z] * likelihood[row, y, z] for z in range(PASSAGES) if y in held[z]) for y in union
            },
        }
        lower += sum(expected["fast"][y] < 0.999 * expected["thorough"][y] for y in union)
        for rule, (tokens, scores) in by_rule.items():
            found = {
                places[tuple(each)]: float(np.exp(score))
                for each, score in zip(np.asarray(tokens[row]).tolist(), scores[row])
                if decoding.is_real(score)
            }
            assert found == pytest.approx(expected[rule], rel=1e-3), (rule, row)
            ends = (np.asarray(tokens[row]) == 1).any(-1)
            rank = np.where(decoding.is_real(scores[row]), ~ends, 2)
            assert (np.diff(rank) >= 0).all() and all((np.diff(scores[row][rank == r]) <= 0).all() for r in (0, 1))
    assert lower  # the two rules do differ


@pytest.mark.parametrize("how", ["beam", "thorough", "fast"])
def test_generate_gives_the_best_hypothesis(how, sequence, tiny):
    system = dataclasses.replace(sequence.system, decoding=how, beams=3)
    active = jnp.array([True, True, False, True])
    tokens, scores = jax.jit(
        lambda: rag_decoding.generate(
            system, sequence.params, sequence.documents, sequence.first, sequence.cache, LENGTH, active
        )
    )()
    assert not np.any(tokens[2]) and scores[2] == 0 and (np.asarray(scores)[[0, 1, 3]] < 0).all()
    probabilities = sequence.probabilities()
    if how == "thorough":
        for row in (0, 1, 3):
            place = ANSWERS.tolist().index(np.asarray(tokens[row]).tolist())
            assert np.exp(scores[row]) == pytest.approx(probabilities[row, place], rel=1e-3)


def test_the_null_document_is_read_too(tiny):
    asked = Asked("token", tiny, null_document=True)
    assert asked.documents.log_prior.shape == (QUESTIONS, PASSAGES + 1)
    assert (np.asarray(asked.documents.log_prior)[:, -1] > marginals.ABSENT / 2).all()
    np.testing.assert_allclose(np.exp(asked.documents.log_prior).sum(-1), 1.0, rtol=1e-5)
