"""RAG's loss against every passage read by itself and every answer enumerated; its gradients; what it refuses."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems import generator, marginals
from expertrag_jax.systems.rag import RAG, with_question_alone
from expertrag_jax.systems.snapshot import with_snapshot
from expertrag_jax.training import parameters

VOCAB, LENGTH, WIDTH = 5, 3, 6
MODEL = TransformerConfig(
    vocab_size=VOCAB, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1
)
RETRIEVER = DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, output_dim=WIDTH)


def system(marginal="sequence", model=MODEL, **fields) -> RAG:
    fields = {"z_loss": 0.0, "temperature": 0.5, "max_target_length": LENGTH, **fields}
    return RAG(model, RETRIEVER, marginal, **fields)


def answers_of(sequences) -> dict:
    """Sequences [B, T] -> the decoder's fields."""
    targets = np.asarray(sequences, np.int32)
    return {
        "decoder_target_tokens": targets,
        "decoder_input_tokens": np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def batch_of(sequences, passages=3, seed=0) -> Batch:
    """A batch of one question and its passages, asked once per sequence."""
    rng, size = np.random.default_rng(seed), len(sequences)
    one = {
        "encoder_input_tokens": rng.integers(2, VOCAB, (1, 3)),
        "query_tokens": rng.integers(2, VOCAB, (1, 3)),
        "passage_tokens": rng.integers(2, VOCAB, (1, passages, 6)),
        "passage_rows": np.arange(passages)[None],
    }
    one = {name: np.repeat(value.astype(np.int32), size, 0) for name, value in one.items()}
    vectors = np.repeat(rng.normal(size=(1, passages, WIDTH)).astype(np.float32), size, 0)
    return Batch(**one, passage_vectors=vectors, **answers_of(sequences))


def all_answers() -> list[list[int]]:
    """Every answer: ended by EOS (1), or T tokens without it, PAD (0) among them, as a softmax may say it."""
    found = []
    for n in range(1, LENGTH + 1):
        for tokens in itertools.product(range(VOCAB), repeat=n):
            if 1 not in tokens[:-1] and (tokens[-1] == 1 or n == LENGTH):
                found.append(list(tokens) + [0] * (LENGTH - n))
    return found


# What can stand in a batch: a target's zeros are padding.
ANSWERS = [tokens for tokens in all_answers() if 0 not in tokens[: tokens.index(1) if 1 in tokens else LENGTH]]


def by_definition(made, params, batch):
    """log p(y|x) [B] as the paper writes it, in probabilities."""
    queries = made.query_vectors(params, batch.query_tokens)
    scores = np.einsum("bd,bkd->bk", np.asarray(queries, np.float64), batch.passage_vectors) / made.temperature
    prior = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    log_probs = np.asarray(jax.jit(readings_of(made))(params, batch), np.float64)
    probs = np.where(batch.decoder_target_tokens[:, None] > 0, np.exp(log_probs), 1.0)
    if made.marginal == "sequence":
        return np.log((prior * probs.prod(-1)).sum(-1))
    return np.log((prior[..., None] * probs).sum(1)).sum(-1)


def readings_of(made):
    """(params, batch) -> log p(y_i|x, z, y_<i) [B, K, T], each passage read by itself with the plain generator."""

    def read(params, batch):
        found = []
        for passage in range(batch.passage_tokens.shape[1]):
            tokens = batch.passage_tokens[:, passage]
            states, _ = generator.apply(made.model, params, tokens, method="encode")
            memory, _ = generator.apply(made.model, params, states, tokens > 0, method="memory")
            found.append(-generator.target_loss(made.model, params, batch, memory)[0])
        return jnp.stack(found, 1)

    return read


def objective(made):
    """(params, batch) -> the loss alone."""
    return jax.jit(lambda params, batch: made.loss(params, batch, None)[0])


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_the_loss_is_the_papers_for_every_answer(marginal, tiny):
    """Every answer in one batch; one-token answers, first tokens and unfinished ones among them."""
    made = system(marginal)
    params, batch = tiny.initial(made), batch_of(ANSWERS)
    expected = by_definition(made, params, batch)
    tokens = batch.decoder_loss_weights.sum(-1)
    loss, metrics = jax.jit(made.evaluation_loss)(params, batch)
    np.testing.assert_allclose(loss, (-expected / tokens).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][1], len(ANSWERS))
    alone = objective(made)
    for row in range(0, len(ANSWERS), 7):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], batch)
        np.testing.assert_allclose(alone(params, one), -expected[row] / tokens[row], rtol=1e-4)
    # What p(PAD) takes away is all that is missing from 1: nothing else is lost or counted twice.
    assert 0.3 < np.exp(expected).sum() < 1.0


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_the_probabilities_of_all_answers_add_up_to_one(marginal, tiny):
    """Weights are given by hand, so that PAD too may be said."""
    made = system(marginal)
    params = tiny.initial(made)
    batch = batch_of(all_answers())
    said = np.stack([
        np.arange(LENGTH) <= (tokens.index(1) if 1 in tokens else LENGTH) for tokens in all_answers()
    ]).astype(np.float32)  # fmt: skip

    def log_marginals(params, batch):
        inputs = (batch.encoder_input_tokens, batch.query_tokens, batch.passage_tokens, batch.passage_vectors)
        documents = made.read(params, *inputs)
        states, _ = generator.apply(
            made.model, params, jnp.repeat(batch.decoder_input_tokens, 3, 0), jnp.ones((3 * batch.size, LENGTH)),
            documents.memory, method="decode",
        )  # fmt: skip
        log_probs, _, _ = marginals.token_scores(
            states, jnp.repeat(batch.decoder_target_tokens, 3, 0),
            lambda y: generator.apply(made.model, params, y, method="output")[0],
        )  # fmt: skip
        sum_out = marginals.sequence_marginal if marginal == "sequence" else marginals.token_marginal
        return sum_out(documents.log_prior, log_probs.reshape(-1, 3, LENGTH), said)

    total = np.exp(np.float64(jax.jit(log_marginals)(params, batch))).sum()
    assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_gradients_equal_those_of_the_definition(marginal, tiny):
    """For every parameter, against autodiff through the naive sum of probabilities over passages read one by one."""
    made = system(marginal)
    params, batch = tiny.initial(made), batch_of(ANSWERS[3:40:6])

    def naive(params):
        queries = made.query_vectors(params, batch.query_tokens)
        prior = jax.nn.softmax(jnp.einsum("bd,bkd->bk", queries, batch.passage_vectors) / made.temperature)
        real = batch.decoder_target_tokens[:, None] > 0
        probs = jnp.where(real, jnp.exp(readings_of(made)(params, batch)), 1.0)
        if marginal == "sequence":
            found = jnp.log((prior * probs.prod(-1)).sum(-1))
        else:
            found = jnp.log((prior[..., None] * probs).sum(1)).sum(-1)
        return (-found / batch.decoder_loss_weights.sum(-1)).mean()

    ours = parameters.flatten(jax.jit(jax.grad(lambda p: made.loss(p, batch, None)[0]))(params))
    expected = parameters.flatten(jax.jit(jax.grad(naive))(params))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=2e-3, atol=2e-6, err_msg=name)
    assert np.abs(ours["query_encoder/projection/kernel"]).max() > 1e-4  # the query encoder learns through the marginal


def test_passage_vectors_are_constants(tiny):
    made = system()
    params, batch = tiny.initial(made), batch_of(ANSWERS[:4])
    gradient = jax.jit(jax.grad(lambda v: made.loss(params, batch.replace(passage_vectors=v), None)[0]))
    assert not np.any(gradient(jnp.asarray(batch.passage_vectors)))


@pytest.mark.parametrize("marginal", ["token"])
def test_absent_passages_and_empty_rows_count_for_nothing(marginal, tiny):
    made = system(marginal)
    params, batch = tiny.initial(made), batch_of(ANSWERS[2:5])
    loss = objective(made)
    expected = loss(params, batch)
    more = batch.replace(
        passage_tokens=np.pad(batch.passage_tokens, ((0, 0), (0, 2), (0, 0))),
        passage_rows=np.pad(batch.passage_rows, ((0, 0), (0, 2)), constant_values=-1),
        passage_vectors=np.pad(batch.passage_vectors, ((0, 0), (0, 2), (0, 0)), constant_values=9.0),
    )
    np.testing.assert_allclose(loss(params, more), expected, rtol=1e-5)
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:2])]), batch)
    value, gradient = jax.jit(jax.value_and_grad(lambda p: made.loss(p, empty, None)[0]))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_loss_does_not_grow_with_the_answers_length(tiny):
    """Per example and per token: an answer said twice as long, equally likely per token, weighs the same."""
    made = system("token")
    params = tiny.initial(made)
    params["decoder"]["logits_dense"]["kernel"] *= 0  # every token has probability 1 / V
    loss = objective(made)
    for answers in ([[1, 0, 0]], [[2, 3, 1]], [[1, 0, 0], [2, 3, 1]]):
        np.testing.assert_allclose(loss(params, batch_of(answers)), np.log(VOCAB), rtol=1e-5)


def test_smoothing_is_the_generators(tiny):
    """Where all passages are one, the smoothed loss is the plain generator's, whatever the prior is."""
    made = system("sequence", label_smoothing=0.2)
    params, batch = tiny.initial(made), batch_of([[3, 4, 1], [2, 1, 0]])
    same = np.repeat(batch.passage_tokens[:, :1], 3, 1)

    def plain(params):
        states, _ = generator.apply(made.model, params, same[:, 0], method="encode")
        memory, _ = generator.apply(made.model, params, states, same[:, 0] > 0, method="memory")
        return generator.target_loss(made.model, params, batch, memory, label_smoothing=0.2)[0]

    losses = jax.jit(plain)(params)
    weights = batch.decoder_loss_weights
    expected = ((losses * weights).sum(-1) / weights.sum(-1)).mean()
    for scale in (0.0, 3.0):
        asked = batch.replace(passage_tokens=same, passage_vectors=scale * batch.passage_vectors)
        np.testing.assert_allclose(objective(made)(params, asked), expected, rtol=1e-4)


def test_the_null_document_is_the_question_alone(tiny):
    """Its loss is that of one more passage, given by hand; its vector learns; a question is never cut."""
    made, plain = system("sequence", null_document=True), system("sequence")
    params, batch = tiny.initial(made), batch_of(ANSWERS[4:9])
    vector = params["null_document"]["vector"]
    alone = np.pad(batch.encoder_input_tokens, ((0, 0), (0, 3)))[:, None]
    by_hand = batch.replace(
        passage_tokens=np.concatenate([batch.passage_tokens, alone], 1),
        passage_vectors=np.concatenate([batch.passage_vectors, np.tile(vector, (batch.size, 1, 1))], 1),
    )
    (loss, metrics), gradient = jax.jit(jax.value_and_grad(lambda p: made.loss(p, batch, None), has_aux=True))(params)
    np.testing.assert_allclose(loss, objective(plain)(params, by_hand), rtol=1e-5)
    assert 0 < metrics["retrieval/null_probability"][0] < batch.size
    assert np.abs(gradient["null_document"]["vector"]).max() > 1e-6
    with pytest.raises(UserError, match="raise 'passages' in TASK_FEATURE_LENGTHS"):
        with_question_alone(batch.passage_tokens[..., :2], batch.encoder_input_tokens)


def test_metrics_tell_how_many_different_passages_are_read(tiny):
    made = system()
    params, batch = tiny.initial(made), batch_of(ANSWERS[:4])
    _, metrics = jax.jit(made.evaluation_loss)(params, batch)
    distinct, found = metrics["retrieval/distinct"]
    assert (distinct, found) == (3, 12)
    for name in ("retrieval/prior_entropy", "retrieval/posterior_entropy"):
        total, count = metrics[name]
        assert count == 4 and 0 < total / count < np.log(3)


def test_a_sparse_generator_trains(tiny):
    """Dropout, experts, both losses of the router; finite gradients everywhere."""
    model = tiny.model(vocab_size=VOCAB, dropout_rate=0.1)
    made = system("token", model=model, null_document=True, z_loss=1e-4)
    params, batch = tiny.initial(made), batch_of(ANSWERS[:8])
    (_, metrics), gradient = jax.jit(jax.value_and_grad(made.loss, has_aux=True))(params, batch, jax.random.key(0))
    assert "router/load" in metrics
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_what_it_refuses(tiny):
    with pytest.raises(UserError, match="must be one of sequence, token"):
        system("document")
    with pytest.raises(UserError, match="is RAG-Sequence's"):
        system("token", decoding="thorough")
    made = system()
    with pytest.raises(UserError, match="needs passage_vectors"):
        made.loss(tiny.initial(made), batch_of(ANSWERS[:2]).replace(passage_vectors=None), None)


def test_parameters_have_logical_axes():
    made = system(null_document=True, refresh_period=5)
    shapes = jax.eval_shape(made.init, jax.random.key(0))
    axes = made.logical_axes()
    assert parameters.flatten(shapes).keys() == parameters.flatten(axes).keys()
    for name, leaf in parameters.flatten(shapes).items():
        assert len(parameters.flatten(axes)[name]) == leaf.ndim, name
    (phase,) = made.phases
    trainable, frozen = parameters.split(shapes, phase.trainable)
    assert not frozen and any(name.startswith("candidate_encoder/") for name in trainable)


def test_a_step_on_a_mesh_is_the_step_of_one_device(tiny):
    """The null document and the candidates' encoder too, on data x tensor."""
    made = RAG(
        tiny.model(num_experts=0), dataclasses.replace(RETRIEVER, vocab_size=tiny.vocab), "token", temperature=0.5,
        null_document=True, refresh_period=2,
    )  # fmt: skip
    found = []
    for sizes in ({"data": 1}, {"data": 2, "tensor": 2}):
        optimizer = with_snapshot(optax.sgd(0.1), "query_encoder", 2)
        metrics, params = tiny.one_step(made, optimizer, batch_of(ANSWERS[:8]), sizes)
        found.append((float(metrics["objective"][0]), params))
    (expected, expected_params), (loss, params) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), params, expected_params)
