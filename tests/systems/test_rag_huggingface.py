"""RAG beside the implementation in Hugging Face transformers, both with the same random weights.

Needs the extra `hf`: `pip install -c constraints.txt -e .[hf]` (for the CPU alone: torch from its CPU index).

Where theirs is right, ours must be equal, gradients too: labels that begin with the decoder's start token, answers of
two tokens and more (RAG-Token: any), no label smoothing. The other tests state where theirs is not right, each by what
it computes in place of the paper's formula, so that a version that mends one of them is noticed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems.rag import RAG

torch = pytest.importorskip("torch", reason="needs the extra hf: torch and transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra hf: torch and transformers")

VOCAB, PASSAGES, LENGTH, WIDTH = 12, 3, 4, 6
MODEL = TransformerConfig(
    vocab_size=VOCAB, embed_dim=8, num_heads=2, head_dim=4, mlp_dim=10, num_encoder_layers=2, num_decoder_layers=2,
    logits_via_embedding=True,  # transformers 5 ties the output layer of every T5
)  # fmt: skip
RETRIEVER = DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, output_dim=WIDTH)
THEIRS = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}
ONE, MORE = [[5, 0, 0, 0], [1, 0, 0, 0]], [[7, 1, 0, 0], [3, 9, 1, 0], [4, 4, 6, 1], [2, 8, 10, 3]]


def ours(marginal, **fields) -> RAG:
    return RAG(MODEL, RETRIEVER, marginal, temperature=0.2, max_target_length=LENGTH, **{"z_loss": 0.0, **fields})


def batch_of(answers, seed=0) -> Batch:
    rng, targets = np.random.default_rng(seed), np.asarray(answers, np.int32)
    size = len(targets)
    passages = rng.integers(2, VOCAB, (size, PASSAGES, 7)).astype(np.int32)
    passages[::2, 0, 5:] = 0
    return Batch(
        encoder_input_tokens=rng.integers(2, VOCAB, (size, 3)).astype(np.int32),
        query_tokens=rng.integers(2, VOCAB, (size, 3)).astype(np.int32),
        passage_tokens=passages,
        passage_vectors=rng.normal(size=(size, PASSAGES, WIDTH)).astype(np.float32),
        decoder_target_tokens=targets,
        decoder_input_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        decoder_loss_weights=(targets > 0).astype(np.float32),
    )


def their_names() -> dict[str, tuple[str, ...]]:
    """Their parameter -> the path of ours; kernels are transposed."""
    names = {"shared.weight": ("token_embedder", "embedding")}
    for stack in ("encoder", "decoder"):
        attentions = {"encoder": ["attention"], "decoder": ["self_attention", "encoder_decoder_attention"]}[stack]
        norms = {"attention": "attention", "self_attention": "self_attention", "encoder_decoder_attention":
                 "cross_attention"}  # fmt: skip
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        names[first] = (stack, "relpos_bias", "rel_embedding")
        names[f"{stack}.final_layer_norm.weight"] = (stack, f"{stack}_norm", "scale")
        for i in range(2):
            block, layer = f"{stack}.block.{i}.layer", f"layers_{i}"
            for place, attention in enumerate(attentions):
                theirs = f"{block}.{place}.{'EncDecAttention' if place else 'SelfAttention'}"
                for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out")):
                    names[f"{theirs}.{short}.weight"] = (stack, layer, attention, long, "kernel")
                names[f"{block}.{place}.layer_norm.weight"] = (
                    stack, layer, f"pre_{norms[attention]}_layer_norm", "scale"
                )  # fmt: skip
            last = len(attentions)
            names[f"{block}.{last}.layer_norm.weight"] = (stack, layer, "pre_mlp_layer_norm", "scale")
            for name in ("wi_0", "wi_1", "wo"):
                names[f"{block}.{last}.DenseReluDense.{name}.weight"] = (stack, layer, "mlp", name, "kernel")
    return names


def at(tree, path):
    for name in path:
        tree = tree[name]
    return np.asarray(tree)


def as_theirs(array: np.ndarray, path) -> np.ndarray:
    """Ours in their layout: kernels [in, out] and relative biases [heads, buckets] are transposed."""
    return array.T if path[-1] in ("kernel", "rel_embedding") else array


def theirs(marginal, params, **settings):
    """Their model with our weights, without a question encoder's part in anything."""
    generator = transformers.T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=10, num_layers=2, num_decoder_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    encoder = transformers.DPRConfig(
        vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config = transformers.RagConfig(
        question_encoder=encoder.to_dict(), generator=generator.to_dict(), n_docs=PASSAGES, pad_token_id=0, **settings
    )
    model = getattr(transformers, THEIRS[marginal])(
        config,
        question_encoder=transformers.DPRQuestionEncoder(encoder),
        generator=transformers.T5ForConditionalGeneration(generator),
    ).eval()
    state = model.generator.state_dict()
    names = their_names()
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")  # of shared.weight
    assert set(state) - set(copies) == set(names)
    with torch.no_grad():
        for name, path in names.items():
            state[name].copy_(torch.tensor(as_theirs(at(params, path), path)))
    return model


def their_inputs(made, params, batch: Batch, start: bool = True) -> dict:
    """Their arguments: candidates, prior scores, and labels, behind the decoder's start token unless told otherwise."""
    scores = jnp.einsum("bd,bkd->bk", made.query_vectors(params, batch.query_tokens), batch.passage_vectors)
    passages = torch.tensor(batch.passage_tokens.reshape(-1, batch.passage_tokens.shape[-1]), dtype=torch.long)
    labels = np.pad(batch.decoder_target_tokens, ((0, 0), (1, 0))) if start else batch.decoder_target_tokens
    return {
        "context_input_ids": passages,
        "context_attention_mask": (passages > 0).long(),
        "doc_scores": torch.tensor(np.asarray(scores) / made.temperature, requires_grad=True),
        "labels": torch.tensor(labels, dtype=torch.long),
    }


def our_nats(made, params, batch: Batch) -> np.ndarray:
    """-log p(y|x) [B] of every question alone; the loss is per token."""

    @jax.jit
    def one(row):
        return made.loss(params, row, None)[1]["loss"][0] * row.decoder_loss_weights.sum()

    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(batch.size)]
    return np.array([one(row) for row in rows])


def readings(model, inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Their log p(y_i|x, z, y_<i) from the labels' second token on [B, K, T], log p(z|x) [B, K], and the
    log-probabilities of every token [B, K, T + 1, V]."""
    with torch.no_grad():
        logits = model(**inputs).logits
    log_probs = torch.log_softmax(logits, -1).reshape(-1, PASSAGES, *logits.shape[1:]).numpy()
    targets = inputs["labels"].numpy()[:, 1:]
    found = np.take_along_axis(log_probs[:, :, :-1], targets[:, None, :, None], axis=-1)[..., 0]
    prior = torch.log_softmax(inputs["doc_scores"], 1).detach().numpy()
    return np.where(targets[:, None] > 0, found, 0.0), prior, log_probs


def log_sum_exp(x, axis):
    return np.log(np.exp(np.asarray(x, np.float64)).sum(axis))


@pytest.mark.parametrize("marginal, answers", [("sequence", MORE), ("token", MORE + ONE)])
def test_marginals_and_gradients_are_equal(marginal, answers, tiny):
    made, batch = ours(marginal), batch_of(answers)
    params = tiny.initial(made)
    model, inputs = theirs(marginal, params), their_inputs(made, params, batch)
    loss = model(**inputs).loss
    np.testing.assert_allclose(our_nats(made, params, batch), loss.detach().numpy(), rtol=2e-5)

    tokens = torch.tensor(batch.decoder_loss_weights.sum(-1))
    (loss / tokens).mean().backward()
    gradients = jax.jit(jax.grad(lambda p: made.loss(p, batch, None)[0]))(params)
    theirs_by_name = dict(model.generator.named_parameters())
    for name, path in their_names().items():
        expected, mine = theirs_by_name[name].grad.numpy(), as_theirs(at(gradients, path), path)
        np.testing.assert_allclose(mine, expected, atol=2e-5, err_msg=name)
    # The query encoder is ours alone: its gradient follows from that of their scores.
    _, pull = jax.vjp(lambda p: made.query_vectors(p, batch.query_tokens), params)
    to_queries = np.einsum("bk,bkd->bd", inputs["doc_scores"].grad.numpy(), batch.passage_vectors) / made.temperature
    (expected,) = pull(jnp.asarray(to_queries, jnp.float32))
    for mine, theirs_ in zip(jax.tree.leaves(gradients["query_encoder"]), jax.tree.leaves(expected["query_encoder"])):
        np.testing.assert_allclose(mine, theirs_, atol=2e-5)


@pytest.mark.parametrize("marginal", ["sequence", "token"])
def test_theirs_never_scores_the_first_token_of_plain_labels(marginal, tiny):
    """Labels as everywhere else, y_1 first: they are shifted and read as the decoder's input, so y_1 is only read."""
    made, batch = ours(marginal), batch_of(MORE)
    params = tiny.initial(made)
    model = theirs(marginal, params)
    plain = their_inputs(made, params, batch, start=False)
    with torch.no_grad():
        loss = model(**plain).loss.numpy()
    log_probs, prior, _ = readings(model, plain)  # of y_2, y_3, ..., behind y_1 without a start token
    if marginal == "sequence":
        # y_2's factor stands where y_1's should, and the prior is added at y_3: lost where the answer ends before.
        at_third = np.where(batch.decoder_target_tokens[:, None, 2] > 0, prior, 0.0)
        expected = -log_sum_exp(at_third + log_probs.sum(-1), 1)
    else:
        each = log_sum_exp(prior[..., None] + log_probs, 1)
        expected = -np.where(batch.decoder_target_tokens[:, 1:] > 0, each, 0.0).sum(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert np.abs(loss - our_nats(made, params, batch)).min() > 0.1


def test_theirs_loses_the_prior_of_a_one_token_answer(tiny):
    """RAG-Sequence adds log p(z|x) to the second token's log p, which is padding here."""
    made, batch = ours("sequence"), batch_of(ONE + MORE[:1])
    params = tiny.initial(made)
    model, inputs = theirs("sequence", params), their_inputs(made, params, batch)
    log_probs, prior, _ = readings(model, inputs)
    with torch.no_grad():
        loss = model(**inputs).loss.numpy()
    np.testing.assert_allclose(loss[:2], -log_sum_exp(log_probs[:2].sum(-1), 1), rtol=1e-4)  # as if p(z|x) were 1
    right = -log_sum_exp(prior + log_probs.sum(-1), 1)
    mine = our_nats(made, params, batch)
    np.testing.assert_allclose(mine, right, rtol=1e-4)
    assert (mine[:2] - loss[:2] > 0.3).all() and abs(mine[2] - loss[2]) < 1e-3


def test_theirs_smooths_the_prior_once_per_vocabulary_entry(tiny):
    """Smoothing sums log p over the vocabulary *with* log p(z|x) in each entry; ours smooths the generator alone."""
    made, batch, epsilon = ours("sequence"), batch_of(MORE), 0.1
    params = tiny.initial(made)
    inputs = their_inputs(made, params, batch)
    model = theirs("sequence", params, label_smoothing=epsilon)
    log_probs, prior, every = readings(model, inputs)
    with torch.no_grad():
        loss = model(**inputs).loss.numpy()
    real = batch.decoder_target_tokens[:, None] > 0
    spread = np.where(real, every[:, :, :-1].sum(-1), 0.0).sum(-1)
    nll = -log_sum_exp(prior + log_probs.sum(-1), 1)
    counted = -log_sum_exp(VOCAB * prior + spread, 1)  # the prior to the power of V
    np.testing.assert_allclose(loss, (1 - epsilon) * nll + epsilon / VOCAB * counted, rtol=1e-4)
    # Ours: smoothed token scores under each passage, the prior once.
    low, high = epsilon / (VOCAB - 1), 1 - epsilon
    constant = -(high * np.log(high) + (VOCAB - 1) * low * np.log(low))
    smooth = (high - low) * log_probs + low * every[:, :, :-1].sum(-1) + constant
    expected = -log_sum_exp(prior + np.where(real, smooth, 0.0).sum(-1), 1)
    mine = our_nats(ours("sequence", label_smoothing=epsilon), params, batch)
    np.testing.assert_allclose(mine, expected, rtol=1e-4)
    assert np.abs(mine - loss).min() > 1e-2


def test_theirs_forgets_the_number_of_documents_when_it_scores_hypotheses(tiny, monkeypatch):
    """`generate(n_docs=2)` searches two passages and scores with the configuration's three: it fails, or mixes rows."""
    made, batch = ours("sequence"), batch_of(MORE[:1])
    params = tiny.initial(made)
    model = theirs("sequence", params)
    inputs = their_inputs(made, params, batch)
    del inputs["labels"]
    few = {name: (value[:, :2] if name == "doc_scores" else value[:2]).detach() for name, value in inputs.items()}
    seen = []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        seen.append(kwargs.get("n_docs"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    with pytest.raises((AssertionError, RuntimeError)):
        model.generate(**few, n_docs=2, num_beams=2, max_length=LENGTH, do_deduplication=False)
    assert seen == [None]
