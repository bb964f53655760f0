"""The dual encoder's loss against brute force, and its towers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax import partitioning
from expertrag_jax.batch import Batch
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems.retriever import DualEncoder, fingerprint

VOCAB = 30


def example():
    """Four questions, two passages each; one duplicate, one absent passage, one row of padding."""
    rng = np.random.default_rng(0)
    query = rng.integers(2, VOCAB, (4, 5)).astype(np.int32)
    passages = rng.integers(2, VOCAB, (4, 2, 6)).astype(np.int32)
    query[1, 3:] = 0
    passages[2, 0] = passages[0, 0]  # question 2 asks about question 0's passage
    passages[1, 1] = 0
    query[3], passages[3] = 0, 0
    return Batch(query_tokens=query, passage_tokens=passages)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_loss_against_brute_force(shared, layers):
    sizes = dict(embed_dim=8, num_heads=2, head_dim=4, mlp_dim=8, output_dim=6)
    system = DualEncoder(DualEncoderConfig(vocab_size=VOCAB, num_layers=layers, shared=shared, **sizes))
    params, batch = jax.jit(system.init)(jax.random.key(0)), example()
    (loss, metrics), gradients = jax.jit(jax.value_and_grad(system.loss, has_aux=True))(
        params, batch, jax.random.key(1)
    )
    queries = np.asarray(jax.jit(system.encode_queries)(params, batch.query_tokens), np.float64)
    vectors = np.asarray(jax.jit(system.encode_passages)(params, batch.passage_tokens.reshape(8, 6)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=-1), [1, 1, 1, 0], atol=1e-4)
    # Candidates per question, written out: 0 and 4 are the same passage, 3, 6 and 7 are absent.
    candidates = {0: [0, 1, 2, 5], 1: [2, 0, 1, 4, 5], 2: [4, 1, 2, 5]}
    losses, right = [], 0
    for row, columns in candidates.items():
        scores = vectors[columns] @ queries[row] / 0.05
        losses.append(np.log(np.exp(scores).sum()) - scores[0])
        right += scores.argmax() == 0
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-4)
    assert metrics["loss"][1] == 3
    assert metrics["in_batch_accuracy"] == (right, 3)
    assert set(params) == ({"query_encoder"} if shared else {"query_encoder", "passage_encoder"})
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    ranks = jax.tree.map(len, system.logical_axes(), is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)


def test_the_same_row_is_no_negative_whatever_its_tokens():
    """Inverse cloze: two questions about one passage, each without a sentence of its own."""
    system = DualEncoder(DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, num_heads=2, head_dim=4, output_dim=6))
    params, batch = jax.jit(system.init)(jax.random.key(0)), example()
    rows = np.array([[7, 8], [3, 9], [7, 9], [0, 0]], np.int32)
    other = batch.passage_tokens.copy()
    other[2, 0, -1] = 2 + (other[2, 0, -1] - 1) % (VOCAB - 2)  # not question 0's tokens any more, but its row
    run = jax.jit(lambda batch: system.loss(params, batch, None)[0])
    queries = np.asarray(system.encode_queries(params, batch.query_tokens), np.float64)
    vectors = np.asarray(system.encode_passages(params, other.reshape(8, 6)), np.float64)
    for candidates, given in (
        ({0: [0, 1, 2, 5], 1: [2, 0, 1, 4, 5], 2: [4, 1, 2, 5]}, rows),
        ({0: [0, 1, 2, 4, 5], 1: [2, 0, 1, 4, 5], 2: [4, 0, 1, 2, 5]}, None),
    ):
        scores = [vectors[columns] @ queries[row] / 0.05 for row, columns in candidates.items()]
        expected = np.mean([np.log(np.exp(each).sum()) - each[0] for each in scores])
        loss = run(batch.replace(passage_tokens=other, passage_rows=given))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_padding_does_not_change_a_vector():
    system = DualEncoder(DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, num_layers=1, num_heads=2, head_dim=4))
    params, tokens = jax.jit(system.init)(jax.random.key(0)), example().query_tokens[:1]
    longer = np.pad(tokens, ((0, 0), (0, 7)))
    run = jax.jit(system.encode_queries)
    np.testing.assert_allclose(run(params, tokens), run(params, longer), rtol=1e-5, atol=1e-6)


def test_fingerprints_differ_for_different_rows():
    rng = np.random.default_rng(0)
    rows = np.unique(rng.integers(0, 6, (20000, 7)), axis=0).astype(np.int32)
    near = np.array([[4, 4, 6, 4, 4], [5, 4, 4, 4, 5], [4, 4, 4, 6, 4], [4, 6, 4, 4, 4]], np.int32)
    assert len(np.unique(fingerprint(jnp.asarray(near)))) == len(near)
    assert len(np.unique(fingerprint(jnp.asarray(rows)))) >= len(rows) - 1


def test_negatives_come_from_all_devices():
    """Loss and gradients on eight devices are one device's: the batch is one batch, not eight."""
    system = DualEncoder(DualEncoderConfig(vocab_size=VOCAB, embed_dim=8, output_dim=6))
    params, rng = jax.jit(system.init)(jax.random.key(0)), np.random.default_rng(1)
    query = rng.integers(2, VOCAB, (16, 5)).astype(np.int32)
    passages = rng.integers(2, VOCAB, (16, 2, 6)).astype(np.int32)
    passages[9, 0] = passages[0, 0]  # a positive that two devices hold
    batch = Batch(query_tokens=query, passage_tokens=passages)
    step = jax.jit(jax.value_and_grad(system.loss, has_aux=True))
    (loss, metrics), gradient = step(params, batch, None)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=8), jax.devices()[:8])
    with jax.set_mesh(mesh):
        shards = partitioning.global_batch(batch, mesh)
        assert len(shards.query_tokens.sharding.device_set) == 8
        (spread, spread_metrics), spread_gradient = step(params, shards, None)
    np.testing.assert_allclose(spread, loss, rtol=1e-5)
    assert spread_metrics["in_batch_accuracy"] == metrics["in_batch_accuracy"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), spread_gradient, gradient)
    alone = [step(params, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch), None)[0][0] for i in range(8)]
    assert loss > np.mean(alone) + 0.5  # with a device's own negatives alone it would be far lower
