"""ScaNN against the exact index; its assets after a move; what serves where it cannot."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval import scann_index
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import Queries, make_index, open_index, write_index
from expertrag_jax.retrieval.metrics import index_recall
from expertrag_jax.retrieval.scann_index import ScannIndex, automatic_parameters

COUNT, WIDTH = 3000, 32


def clustered(count, seed=0):
    """Vectors in clusters, of uneven norms, and questions near some of them."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(50, WIDTH))
    vectors = centres[rng.integers(0, 50, count)] + 0.6 * rng.normal(size=(count, WIDTH))
    vectors *= rng.uniform(0.5, 1.5, size=(count, 1))
    questions = vectors[rng.integers(0, count, 64)] + 0.6 * rng.normal(size=(64, WIDTH))
    return vectors.astype(np.float32), Queries(vectors=questions.astype(np.float32))


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("scann")
    vectors, queries = clustered(COUNT)
    return vectors, queries, ScannIndex().build(None, vectors), make_index("exact").build(None, vectors)


def test_recall_and_scores(world):
    vectors, queries, index, exact = world
    assert not index.is_exact
    for k in (1, 20, 100):
        rows, scores = index.search(queries, k)
        assert rows.shape == (64, k) and rows.dtype == np.int32 and scores.dtype == np.float32
        assert index_recall(rows, exact.search(queries, k)[0]) >= 0.95
        products = np.einsum("bd,bkd->bk", queries.vectors, vectors[rows])
        np.testing.assert_allclose(scores, products, rtol=1e-4, atol=1e-4)
        assert np.all(np.diff(scores, axis=1) <= 0)


def test_building_again_gives_equal_results(world):
    vectors, queries, index, _ = world
    np.testing.assert_array_equal(
        ScannIndex().build(None, vectors).search(queries, 10)[0], index.search(queries, 10)[0]
    )


def test_rows_that_searched_leaves_do_not_hold_are_absent(world):
    vectors, queries, _, _ = world
    rows, scores = ScannIndex(leaves_to_search=1).build(None, vectors).search(queries, COUNT + 5)
    absent = rows == -1
    assert absent[:, -5:].all() and (~absent[:, 0]).all() and absent.sum() > 64 * COUNT / 2
    assert np.all(scores[absent] == np.float32(-1e30)) and np.all(np.isfinite(scores))
    found = [row[row >= 0] for row in rows]
    assert all(len(set(row.tolist())) == len(row) for row in found)


def test_tuning_searches_more_leaves_until_the_recall_is_reached(world):
    vectors, queries, _, exact = world
    index = ScannIndex(leaves_to_search=1).build(None, vectors)
    before = index_recall(index.search(queries, 20)[0], exact.search(queries, 20)[0])
    reached = index.tune(queries, vectors, k=20, recall=0.95)
    assert before < 0.95 <= reached and index.settings["leaves_to_search"] > 1
    assert reached == index_recall(index.search(queries, 20)[0], exact.search(queries, 20)[0])


def test_assets_are_relative_and_survive_a_move(tmp_path, world):
    vectors, queries, index, _ = world
    passages = Passages([str(row) for row in range(COUNT)], [""] * COUNT, ["text"] * COUNT)
    write_index(tmp_path / "a" / "index", index, passages, vectors=vectors)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assets = (tmp_path / "b" / "index" / "searcher" / "scann" / "scann_assets.pbtxt").read_text()
    assert "asset_path" in assets and "/" not in assets
    loaded = open_index(tmp_path / "b" / "index")
    for wanted, found in zip(index.search(queries, 20), loaded.index.search(queries, 20)):
        np.testing.assert_array_equal(wanted, found)


def test_the_exact_index_serves_where_scann_cannot_be_imported(tmp_path, world, monkeypatch, caplog):
    vectors, queries, index, exact = world
    passages = Passages([str(row) for row in range(COUNT)], [""] * COUNT, ["text"] * COUNT)
    write_index(tmp_path / "index", index, passages, vectors=vectors)
    monkeypatch.setattr(scann_index, "_pybind", lambda: None)
    with caplog.at_level(logging.INFO):
        loaded = open_index(tmp_path / "index")
        assert loaded.index.is_exact and ScannIndex().build(None, vectors).is_exact
    assert caplog.text.count("scann cannot be imported on this machine: the exact index serves") == 2
    np.testing.assert_array_equal(loaded.index.search(queries, 9)[0], exact.search(queries, 9)[0])


def test_the_exact_index_serves_small_corpora(caplog):
    vectors, queries = clustered(999)
    with caplog.at_level(logging.INFO):
        index = ScannIndex().build(None, vectors)
    assert (
        index.is_exact and caplog.text.count("999 passages are fewer than 1000: the exact index serves") == 1
    )
    products = queries.vectors @ vectors.T
    np.testing.assert_array_equal(index.search(queries, 3)[0], np.argsort(-products, axis=1)[:, :3])
    assert index.tune(queries, vectors) == 1.0
    with pytest.raises(UserError, match="embed the passages first"):
        ScannIndex().build(None, None)


def test_automatic_parameters_grow_with_the_corpus():
    sizes = [1000, 10_000, 66_000, 1_000_000, 21_000_000]
    parameters = [automatic_parameters(size) for size in sizes]
    leaves = [each["num_leaves"] for each in parameters]
    assert leaves == sorted(leaves) and leaves[3] == 1000
    assert all(each["leaves_to_search"] <= each["num_leaves"] for each in parameters)
