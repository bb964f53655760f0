"""Which passages a question has, and when: the snapshot of the query encoder, searches, new versions of the index."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.retrieval.manifest import parameters_digest
from expertrag_jax.retrieval.retriever import Retriever
from expertrag_jax.systems.candidates import Candidates
from expertrag_jax.systems.snapshot import SNAPSHOT, with_snapshot
from expertrag_jax.training.optimizer import adamw

CONFIG = DualEncoderConfig(vocab_size=20, embed_dim=6, output_dim=5)
PASSAGES, LENGTH, READ = 9, 4, 10


def flat(value):
    return {"query_encoder/a": value, f"{SNAPSHOT}/encoder/a": -value, f"{SNAPSHOT}/refreshes": jnp.zeros(1)}


@pytest.mark.parametrize("period", [1, 3])
def test_the_copy_is_the_encoder_of_the_last_refresh(period):
    """The batch of step s meets the encoder as it was after s - s mod period updates."""
    optimizer = with_snapshot(optax.sgd(1.0), "query_encoder", period)
    variables = flat(jnp.arange(3.0))
    state, history = optimizer.init(variables), [variables["query_encoder/a"]]
    for step in range(7):
        if step:  # step 0 reads the encoder itself
            expected = history[step - step % period]
            np.testing.assert_allclose(variables[f"{SNAPSHOT}/encoder/a"], expected, rtol=1e-6)
            assert variables[f"{SNAPSHOT}/refreshes"][0] == (step if period == 1 else 1 + step // period)
        gradients = flat(jnp.ones(3) * (step + 1)) | {f"{SNAPSHOT}/encoder/a": jnp.zeros(3)}
        updates, state = optimizer.update(gradients, state, variables)
        variables = optax.apply_updates(variables, updates)
        history.append(variables["query_encoder/a"])
    np.testing.assert_allclose(history[-1], history[0] - 28)


def test_the_optimizer_proper_does_not_see_the_copy():
    inner = adamw(1e-3)
    made = with_snapshot(inner, "query_encoder", 2)
    assert made.learning_rate(0) == inner.learning_rate(0)
    shapes = jax.eval_shape(made.init, flat(jnp.ones(3)))
    assert jax.tree.structure(shapes.inner) == jax.tree.structure(
        jax.eval_shape(inner.init, {"query_encoder/a": jnp.ones(3)})
    )


def tower(seed):
    shapes = jax.eval_shape(Tower(CONFIG).init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nn.unbox(shapes))


def vectors_by(encoder, tokens):
    return np.asarray(jax.jit(Tower(CONFIG).apply)({"params": encoder}, tokens))


@pytest.fixture
def retriever(tmp_path):
    """Over an exact index made with tower(0)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 20, (PASSAGES, LENGTH)).astype(np.int32)
    corpus = Passages([f"p{i}" for i in range(PASSAGES)], ["t"] * PASSAGES, ["x"] * PASSAGES)
    vectors = vectors_by(tower(0), tokens)
    write_index(
        tmp_path / "index", make_index("exact").build(corpus, vectors), corpus, passage_tokens=tokens, vectors=vectors,
        encoder_digest=parameters_digest(tower(0)), vocabulary_digests={"reader": "v", "retriever": "v"},
    )  # fmt: skip
    return Retriever(open_index(tmp_path / "index"), lambda tokens: vectors_by(tower(0), tokens))


def batch(size=6, passages=3) -> Batch:
    rng = np.random.default_rng(1)
    questions = rng.integers(2, 20, (size, 3)).astype(np.int32)
    return Batch(
        encoder_input_tokens=questions,
        query_tokens=questions,
        passage_tokens=np.ones((size, passages, READ), np.int32),
        passage_rows=np.tile(np.arange(passages, dtype=np.int32), (size, 1)),
    )


def params_of(query, copy=None, refreshes=0.0):
    made = {"query_encoder": query}
    return made if copy is None else made | {SNAPSHOT: {"encoder": copy, "refreshes": np.float32([refreshes])}}


def test_without_refresh_passages_stay_and_gain_their_vectors(retriever):
    asked = batch()
    found = Candidates(retriever)(params_of(tower(3)), asked)
    np.testing.assert_array_equal(found.passage_rows, asked.passage_rows)
    np.testing.assert_array_equal(found.passage_tokens, asked.passage_tokens)
    np.testing.assert_array_equal(found.passage_vectors, np.asarray(retriever.loaded.vectors)[asked.passage_rows])
    with pytest.raises(UserError, match="no passage_rows"):
        Candidates(retriever)(params_of(tower(3)), asked.replace(passage_rows=None))


def test_candidates_are_those_of_the_copy_and_searched_once_per_refresh(retriever, monkeypatch):
    asked, prepare = batch(), Candidates(retriever, CONFIG)
    searches, search = [], retriever.loaded.index.search

    def counted(queries, k):
        searches.append(len(queries))
        return search(queries, k)

    monkeypatch.setattr(retriever.loaded.index, "search", counted)
    passages = np.asarray(retriever.loaded.vectors)
    for encoder, params in (
        (tower(1), params_of(tower(1), tower(2), 0)),  # before the first copy: the encoder itself
        (tower(2), params_of(tower(1), tower(2), 1)),
        (tower(2), params_of(tower(5), tower(2), 1)),  # the encoder moves on, candidates wait
        (tower(3), params_of(tower(5), tower(3), 2)),
    ):
        found = prepare(params, asked)
        expected = np.argsort(-vectors_by(encoder, asked.query_tokens) @ passages.T, axis=1)[:, :3]
        np.testing.assert_array_equal(found.passage_rows, expected)
        np.testing.assert_array_equal(found.passage_vectors, passages[expected])
        tokens = np.asarray(retriever.loaded.tokens)[expected]
        np.testing.assert_array_equal(found.passage_tokens[..., :3], np.repeat(asked.query_tokens[:, None], 3, 1))
        np.testing.assert_array_equal(found.passage_tokens[..., 4 : 4 + LENGTH], tokens)
    assert searches == [6, 6, 6]


def test_it_works_inside_the_mesh_of_a_run(retriever):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params_of(tower(1), tower(2), 1), everywhere)
    expected = Candidates(retriever, CONFIG)(params_of(tower(1), tower(2), 1), batch())
    with jax.set_mesh(mesh):
        found = Candidates(retriever, CONFIG)(params, batch())
    np.testing.assert_array_equal(found.passage_rows, expected.passage_rows)


def test_passages_are_embedded_again_into_a_new_version(retriever, tmp_path):
    """The old index stays as it was; the new one is current, of the new tower, and is what questions meet."""
    asked, root = batch(), tmp_path / "versions"
    prepare = Candidates(retriever, CONFIG, versions_dir=str(root))
    before = retriever.loaded
    prepare(params_of(tower(0), tower(0), 1), asked)
    assert not root.exists()  # the index is of this very tower
    found = prepare(params_of(tower(1), tower(2), 2), asked)
    loaded = open_index(versions.current(root))
    expected = vectors_by(tower(2), np.asarray(before.tokens))
    np.testing.assert_allclose(loaded.vectors, expected, atol=1e-6)
    assert loaded.manifest.encoder_digest == parameters_digest(tower(2))
    scores = vectors_by(tower(2), asked.query_tokens) @ expected.T
    np.testing.assert_array_equal(found.passage_rows, np.argsort(-scores, axis=1)[:, :3])
    np.testing.assert_allclose(found.passage_vectors, expected[found.passage_rows], atol=1e-6)
    assert open_index(before.directory).manifest.digest == before.manifest.digest
    # A run that starts again at the same refresh finds the version that is there.
    again = Candidates(Retriever(before, retriever.encode_query), CONFIG, versions_dir=str(root))
    time = (versions.current(root) / "manifest.json").stat().st_mtime_ns
    np.testing.assert_array_equal(again(params_of(tower(1), tower(2), 2), asked).passage_rows, found.passage_rows)
    assert (versions.current(root) / "manifest.json").stat().st_mtime_ns == time


def test_collapsed_retrieval_is_told(retriever, told):
    prepare = Candidates(retriever, collapse_window=8)
    rng = np.random.default_rng(2)
    for _ in range(3):  # rows 0, 1, 2 for every question
        prepare(params_of(tower(0)), batch().replace(query_tokens=rng.integers(2, 20, (6, 3)).astype(np.int32)))
    (warning,) = told()
    assert "Retrieval collapses" in warning


def test_what_it_refuses(retriever):
    with pytest.raises(UserError, match="shared = True"):
        Candidates(retriever, dataclasses.replace(CONFIG, shared=False), versions_dir="x")
    with pytest.raises(UserError, match="bind the query encoder's config"):
        Candidates(retriever)(params_of(tower(0), tower(0)), batch())
