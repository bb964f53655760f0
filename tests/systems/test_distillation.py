"""Distillation from the reader: losses by enumeration, judgements by reading one passage less or alone."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.model.transformer import Transformer
from expertrag_jax.systems import generator
from expertrag_jax.systems.description import describe, rebuild
from expertrag_jax.systems.distillation import Distillation
from expertrag_jax.systems.distillation_losses import LOSSES
from expertrag_jax.systems.expert_rag import ExpertRAG

PRESENT = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0]], bool)
TEMPERATURE, TARGET_TEMPERATURE = 0.5, 2.0


def numbers(seed):
    """Scores and judgements [3, 4], as different as nats of answers are; those of absent passages are absurd."""
    rng = np.random.default_rng(seed)
    scores, judgement = rng.normal(size=(3, 4)), -4 * rng.exponential(size=(3, 4))
    return np.where(PRESENT, scores, 1e3), np.where(PRESENT, judgement, 7e5)


def softmax(values):
    return np.exp(values - values.max()) / np.exp(values - values.max()).sum()


def brute_force(name, scores, judgement):
    """The loss of one question over the passages that are there, in float64."""
    p = softmax(scores / TEMPERATURE)
    if name == "emdr2":
        return -np.log(sum(p_z * np.exp(lik / TARGET_TEMPERATURE) for p_z, lik in zip(p, judgement)))
    target = softmax((-judgement if name == "loop" else judgement) / TARGET_TEMPERATURE)
    return sum(t * np.log(t / q) for t, q in zip(target, p))


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_against_enumeration(name):
    scores, judgement = numbers(0)

    def total(scores, judgement):
        losses = LOSSES[name](scores, judgement, PRESENT, TEMPERATURE, TARGET_TEMPERATURE)
        return losses.sum(), losses

    arguments = (jnp.float32(scores), jnp.float32(judgement))
    (_, losses), (gradient, to_reader) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*arguments)
    assert not np.any(to_reader)
    for row, there in enumerate(PRESENT):
        ours, theirs = scores[row, there], judgement[row, there]
        np.testing.assert_allclose(losses[row], brute_force(name, ours, theirs), rtol=1e-5, atol=1e-6)
        slopes = np.zeros(4)
        for place in np.flatnonzero(there):
            step = 1e-5 * (np.flatnonzero(there) == place)
            rise = brute_force(name, ours + step, theirs) - brute_force(name, ours - step, theirs)
            slopes[place] = rise / 2e-5
        np.testing.assert_allclose(gradient[row], slopes, rtol=1e-4, atol=1e-6)


def test_emdr2_moves_the_prior_towards_the_posterior():
    scores, likelihoods = numbers(1)
    scores, likelihoods = scores[:1], likelihoods[:1]
    gradient = jax.grad(lambda s: LOSSES["emdr2"](s, likelihoods, PRESENT[:1]).sum())(jnp.float32(scores))
    prior = softmax(scores[0])
    posterior = prior * np.exp(likelihoods[0]) / (prior * np.exp(likelihoods[0])).sum()
    np.testing.assert_allclose(gradient[0], prior - posterior, rtol=1e-5, atol=1e-7)


def test_equal_passages_are_told_apart_by_none():
    judgement = jnp.zeros((1, 4))
    for name, loss in LOSSES.items():
        np.testing.assert_allclose(loss(judgement, judgement, PRESENT[:1]), 0.0, atol=1e-6, err_msg=name)


# The reader's judgement


def system(tiny, changes=None, **fields):
    towers = DualEncoderConfig(vocab_size=tiny.vocab, embed_dim=8, output_dim=6)
    sizes = {"num_experts": 0, "num_decoder_layers": 2} | (changes or {})
    return Distillation(tiny.model(**sizes), towers, max_target_length=tiny.target, **fields)


def examples(tiny, passages=3, size=4):
    """Both arms with queries and vectors; the last passage of question 1 is absent."""
    batch, rng = tiny.batch(size, passages), np.random.default_rng(5)
    tokens = batch.passage_tokens.copy()
    tokens[1:2, -1] = 0
    return batch.replace(
        passage_tokens=tokens,
        query_tokens=rng.integers(2, tiny.vocab, (size, 5)).astype(np.int32),
        passage_vectors=rng.normal(size=(size, passages, 6)).astype(np.float32),
        passage_rows=np.arange(size * passages, dtype=np.int32).reshape(size, passages),
    )


def read(ours, params, batch):
    """log p(y|x, the batch's passages), by ExpertRAG's way to read."""
    reader = ExpertRAG(ours.model, max_target_length=ours.max_target_length)
    memory = reader.read(params, batch.passage_tokens)
    losses, _, _ = generator.target_loss(ours.model, params, batch, memory)
    return -(losses * batch.decoder_loss_weights).sum(-1)


@pytest.mark.parametrize("changes", [{}, {"num_experts": 8, "scan_layers": True}], ids=["dense", "sparse scanned"])
def test_likelihoods_are_those_of_reading_alone_and_without(tiny, changes):
    ours = system(tiny, changes)
    params, batch = tiny.initial(ours), examples(tiny)
    alone, without = (jax.jit(f)(params, batch) for f in (ours.likelihoods, ours.likelihoods_without))
    reading = jax.jit(lambda params, batch: read(ours, params, batch))
    for place in range(3):
        one = batch.replace(passage_tokens=batch.passage_tokens[:, [place]])
        others = batch.replace(passage_tokens=np.delete(batch.passage_tokens, place, axis=1))
        there = batch.passage_tokens[:, place].any(-1)
        np.testing.assert_allclose(alone[there, place], reading(params, one)[there], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(without[:, place], reading(params, others), rtol=1e-4, atol=1e-5)


def test_probabilities_of_all_answers_given_one_passage_sum_to_one(tiny):
    ours = system(tiny, {"vocab_size": 6})
    params, batch = tiny.initial(ours), examples(tiny, passages=2, size=1)
    answers = np.array(list(itertools.product(range(6), repeat=2)), np.int32)
    rows = jax.tree.map(lambda leaf: np.repeat(leaf % 6 if leaf.dtype == np.int32 else leaf, 36, axis=0), batch)
    rows = rows.replace(
        passage_tokens=np.maximum(rows.passage_tokens, 2),
        decoder_target_tokens=answers,
        decoder_input_tokens=np.pad(answers, ((0, 0), (1, 0)))[:, :2],
        decoder_segment_ids=np.ones_like(answers),  # here 0 is a token like any other
        decoder_loss_weights=np.ones(answers.shape, np.float32),
    )
    np.testing.assert_allclose(np.exp(jax.jit(ours.likelihoods)(params, rows)).sum(0), [1, 1], rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_attention_against_brute_force(tiny, scan):
    ours = system(tiny, {"scan_layers": scan})
    params, batch = tiny.initial(ours), examples(tiny)
    found = jax.jit(ours.attention)(params, batch)
    if scan:  # the unrolled model with the same layers
        flat = system(tiny)
        unrolled = tiny.initial(flat)
        for side in ("encoder", "decoder"):
            stacked = params[side].pop("layers")
            layers = [name for name in unrolled[side] if name.startswith("layers_")]
            for place, name in enumerate(sorted(layers)):
                params[side][name] = jax.tree.map(lambda leaf, place=place: leaf[:, place], stacked)
        ours = flat
    memory = ExpertRAG(ours.model).read(params, batch.passage_tokens)
    seen = []

    def listen(call, arguments, keywords, context):
        if context.method_name == "attend" and "encoder_decoder_attention" in context.module.path:
            x, keys, values = arguments[:3]
            heads = (ours.model.num_heads, ours.model.head_dim)
            seen.append((context.module.query(x).reshape(*x.shape[:2], *heads), keys, values))
        return call(*arguments, **keywords)

    segments = (batch.decoder_target_tokens > 0).astype(np.int32)
    with nn.intercept_methods(listen):
        Transformer(ours.model).apply(
            {"params": params}, batch.decoder_input_tokens, segments, memory, method="logits"
        )
    assert len(seen) == 2
    count, passages, length = batch.passage_tokens.shape
    expected = np.zeros((count, passages))
    for queries, keys, values in (map(np.float64, layer) for layer in seen):
        for b in range(count):
            answer = np.flatnonzero(batch.decoder_loss_weights[b])
            there = np.flatnonzero(batch.passage_tokens[b].reshape(-1))
            for t, head in itertools.product(answer, range(ours.model.num_heads)):
                weights = softmax(keys[b, there, head] @ queries[b, t, head])
                for place, weight in zip(there, weights):
                    share = weight * np.linalg.norm(values[b, place, head])
                    expected[b, place // length] += share / (2 * len(answer) * ours.model.num_heads)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# The system


@pytest.mark.parametrize("signal", LOSSES)
def test_the_query_encoder_alone_learns_and_comes_to_agree(signal, tiny):
    ours = system(tiny, signal=signal, target_temperature=0.5)
    params, batch = tiny.initial(ours), examples(tiny)
    step = jax.jit(jax.value_and_grad(ours.loss, has_aux=True))
    (first, metrics), gradient = step(params, batch, jax.random.key(0))
    judged = jax.jit(ours.judgement)(params, batch)
    present = batch.passage_tokens.any(-1)
    expected = LOSSES[signal](jax.jit(ours.scores)(params, batch), judged, present, 0.05, 0.5)
    np.testing.assert_allclose(first, expected.mean(), rtol=1e-4)
    assert metrics["loss"][1] == 4
    for name, part in gradient.items():
        assert any(np.any(leaf) for leaf in jax.tree.leaves(part)) == (name == "query_encoder"), name
    for _ in range(60):
        (last, metrics), gradient = step(params, batch, jax.random.key(0))
        moved = jax.tree.map(lambda p, g: p - 0.003 * g, params["query_encoder"], gradient["query_encoder"])
        params = params | {"query_encoder": moved}
    assert last < first - 0.1


def test_padding_counts_for_nothing(tiny):
    ours = system(tiny)
    params, batch = tiny.initial(ours), examples(tiny)
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros_like(leaf[:2])]), batch)
    loss, _ = jax.jit(ours.loss)(params, batch, None)
    same, metrics = jax.jit(ours.loss)(params, padded, None)
    np.testing.assert_allclose(same, loss, rtol=1e-5)
    assert metrics["loss"][1] == 4


def test_vectors_come_from_the_index_before_the_step(tiny):
    table = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    ours = system(tiny, passage_vectors=lambda rows: table[rows])
    batch = examples(tiny).replace(passage_vectors=None)
    generator_phase, retriever_phase = ours.phases
    assert generator_phase.prepare is None and retriever_phase.trainable == ("query_encoder/.*",)
    np.testing.assert_array_equal(retriever_phase.prepare(None, batch).passage_vectors, table.reshape(4, 3, 6))
    with pytest.raises(UserError, match="needs the vectors of the candidates"):
        ours.scores(tiny.initial(ours), batch)
    with pytest.raises(UserError, match="must be one of pdist, emdr2, loop, adist"):
        system(tiny, signal="kd")


def test_it_is_described_and_laid_out(tiny):
    ours = system(tiny, signal="loop", passage_vectors=lambda rows: rows)
    assert rebuild(describe(ours)) == dataclasses.replace(
        ours,
        passage_vectors=None,
        generator_optimizer=Distillation.generator_optimizer,
        retriever_optimizer=Distillation.retriever_optimizer,
    )
    shapes = jax.eval_shape(ours.init, jax.random.key(0))
    ranks = jax.tree.map(len, ours.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, shapes)
    assert set(shapes) == {"token_embedder", "encoder", "decoder", "query_encoder"}
