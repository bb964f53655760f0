"""ExpertRAG: its two arms, its gate, its ways to join evidence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax import decoding
from expertrag_jax.errors import UserError
from expertrag_jax.model import fusion
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems import generator
from expertrag_jax.systems.expert_rag import GATE_OBJECTIVES, GateExamples
from expertrag_jax.training import parameters, step
from expertrag_jax.training.state import TrainState


@pytest.fixture(scope="module")
def arms(tiny):
    """System, parameters, batch, and both arms measured by both_arms."""
    system, batch = tiny.system(), tiny.batch(4)
    params = tiny.initial(system)
    return system, params, batch, jax.jit(system.both_arms)(params, batch)


def test_both_arms_equal_separate_evaluations(arms):
    system, params, batch, (examples, closed_nll, open_nll) = arms

    exact = type(system)(**{**vars(system), "z_loss": 0.0})
    run = jax.jit(exact.evaluation_loss)
    nlls = []
    for row in range(batch.size):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        for arm in (one.replace(passage_tokens=None), one):
            nlls.append(run(params, arm)[1]["loss"][0])
    nlls = np.array(nlls).reshape(-1, 2)
    np.testing.assert_allclose(np.stack([closed_nll, open_nll], 1), nlls, rtol=1e-5)
    np.testing.assert_allclose(examples.gain, np.exp(-nlls[:, 1]) - np.exp(-nlls[:, 0]), rtol=1e-4, atol=1e-8)
    assert np.isnan(examples.retrieval_needed).all()


def test_a_question_keeps_the_first_decoder_step(arms):
    """Its log-probabilities are teacher forcing's at position 0; the features end in entropy and margin."""
    system, params, batch, (examples, closed_nll, _) = arms
    question = jax.jit(system.encode_question)(params, batch.encoder_input_tokens)
    logits = jax.jit(lambda p: generator.target_loss(system.model, p, batch, question.memory)[1])(params)
    log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(question.first_log_probs, log_probs[:, 0], rtol=1e-4, atol=1e-5)
    p = np.sort(np.exp(log_probs[:, 0]), -1)
    np.testing.assert_allclose(question.features[:, -1], p[:, -1] - p[:, -2], atol=1e-5)
    np.testing.assert_allclose(question.features[:, -2], -(p * np.log(p)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(question.features, examples.features, rtol=1e-5, atol=1e-6)
    # The cache goes on from there: scoring the answer by steps gives the closed-book likelihood.
    scored = jax.jit(
        lambda p: decoding.score_targets(
            lambda tokens, cache: system.decode_step(p, question.memory, cache, tokens),
            question.cache,
            question.first_log_probs,
            jnp.asarray(batch.decoder_target_tokens),
        )
    )(params)
    np.testing.assert_allclose(-scored, closed_nll, rtol=1e-4)
    p_ret = system.decide(params, question)
    assert p_ret.shape == (4,) and ((p_ret > 0) & (p_ret < 1)).all()


@pytest.mark.parametrize("kind", GATE_OBJECTIVES)
def test_gate_loss_on_a_batch_equals_gate_loss_on_measured_arms(kind, arms):
    system, params, batch, (examples, _, _) = arms
    system = type(system)(**{**vars(system), "gate_objective": kind})
    needed = np.array([1, 0, np.nan, 1], np.float32)
    batch, examples = batch.replace(retrieval_needed=needed), examples.replace(retrieval_needed=needed)
    run = jax.jit(jax.value_and_grad(lambda p, b: system.gate_loss(p, b, None), has_aux=True))
    live, measured = run(params, batch), run(params, examples)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), live, measured)
    (_, metrics), gradient = live
    assert metrics["loss"][1] == (3 if kind == "supervised" else 4)
    flat = parameters.flatten(gradient)
    assert np.abs(flat["gate/hidden/kernel"]).max() > 0
    assert all(not np.any(leaf) for name, leaf in flat.items() if not name.startswith("gate/"))


def test_the_gate_phase_leaves_the_generator_as_it_is(arms):
    system, params, _, (examples, _, _) = arms
    phase = system.phases[1]
    trainable, frozen = parameters.split(params, phase.trainable)
    assert set(trainable) == {f"gate/{name}/{leaf}" for name in ("hidden", "output") for leaf in ("kernel", "bias")}
    optimizer = optax.adam(0.1)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, zero, zero, jax.tree.map(jnp.asarray, params), optimizer.init(trainable))
    run = step.make_train_step(phase.loss, optimizer, phase.trainable, donate=False)
    after, metrics = run(state, examples)
    assert metrics["finite"] == (1, 1)
    for name, leaf in parameters.flatten(after.params).items():
        assert np.array_equal(leaf, parameters.flatten(params)[name]) == (name not in trainable), name


@pytest.mark.parametrize("kind", fusion.FUSIONS)
def test_what_is_read_depends_on_every_passage_and_on_no_padding(kind, tiny):
    system = tiny.system(fusion=kind)
    params, batch = tiny.initial(system), tiny.batch(2)
    passages = batch.passage_tokens
    if kind == "concatenate":
        with pytest.raises(UserError, match="'concatenate'.* hold 2 per question"):
            system.read(params, passages)
        passages = passages.reshape(2, 1, -1)

    @jax.jit
    def first(passages):
        memory = system.read(params, passages, batch.encoder_input_tokens)
        return system.begin(params, memory)[0]

    usual = first(passages)
    for place in (0, 10):  # in the first passage and in the second
        other = passages.copy().reshape(2, -1)
        other[0, place] = 2 + (other[0, place] - 1) % (tiny.vocab - 2)
        changed = first(other.reshape(passages.shape))
        assert np.abs(changed[0] - usual[0]).max() > 1e-5
        np.testing.assert_allclose(changed[1], usual[1], rtol=1e-4, atol=1e-6)
    if kind != "concatenate":  # an absent passage is as good as none
        padded = np.concatenate([passages, np.zeros_like(passages[:, :1])], 1)
        np.testing.assert_allclose(first(padded), usual, rtol=1e-4, atol=1e-5)


def test_training_loss_draws_dropout_and_augment_trains_its_fusion(tiny):
    system = tiny.system({"dropout_rate": 0.3, "router_jitter": 0.1}, fusion="augment", label_smoothing=0.1)
    params, batch = tiny.initial(system), tiny.batch(4)
    run = jax.jit(jax.value_and_grad(system.generator_loss, has_aux=True))
    (loss, metrics), gradients = run(params, batch, jax.random.key(0))
    assert loss != run(params, batch, jax.random.key(1))[0][0]
    assert loss == run(params, batch, jax.random.key(0))[0][0]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["fusion"]))
    load, tokens = metrics["router/load"]
    np.testing.assert_allclose((load / tokens).sum(-1), 1, rtol=1e-5)


def test_the_tree_has_its_neighbours_and_axes_for_every_leaf(tiny):
    system = tiny.system(retriever=DualEncoderConfig(vocab_size=8, embed_dim=4, output_dim=4), fusion="augment")
    params = jax.eval_shape(system.init, jax.random.key(0))
    assert set(params) == {"token_embedder", "encoder", "decoder", "gate", "query_encoder", "fusion"}
    axes = system.logical_axes()
    ranks = jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)
    trained = parameters.trainable_names(params, system.phases[0].trainable)
    assert {name.split("/")[0] for name in trained} == {"token_embedder", "encoder", "decoder", "fusion"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"fusion": "sum"}, "FUSION is 'sum'"),
        ({"gate_objective": "x"}, "gate_objective"),
        ({"gain_kind": "x"}, "gain_kind"),
    ],
)
def test_wrong_settings_are_errors(fields, message, tiny):
    with pytest.raises(UserError, match=message):
        tiny.system(**fields)


def test_gate_examples_are_a_batch():
    examples = GateExamples(np.zeros((8, 3)), np.zeros(8), np.zeros(8))
    assert step.split_batch(examples, 2).gain.shape == (2, 4)
