"""The hybrid score by hand, and the weight that questions choose."""

from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.hybrid_index import HybridIndex, combine, normalise, sureness
from expertrag_jax.retrieval.index import Queries, make_index, open_index, write_index
from expertrag_jax.retrieval.metrics import recall_at_k

ABSENT = -1e30


def test_normalisation_by_hand():
    scores = np.array([[8, 4, 2], [5, 5, ABSENT], [-1, -3, ABSENT], [ABSENT] * 3], np.float32)
    wanted = [[1, 1 / 3, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(normalise(scores), wanted, atol=1e-6)
    assert normalise(np.zeros((2, 0), np.float32)).shape == (2, 0)


def test_combination_by_hand():
    dense = np.array([[7, 3, 5]]), np.array([[9.0, 6.0, 1.0]], np.float32)  # normalised 1, .625, 0
    lexical = np.array([[3, 8, -1]]), np.array([[20.0, 10.0, ABSENT]], np.float32)  # 1, 0
    rows, scores = combine(dense, lexical, 0.6, 5)
    np.testing.assert_array_equal(rows, [[3, 7, 5, 8, -1]])
    np.testing.assert_allclose(scores[0, :4], [0.6 * 0.625 + 0.4, 0.6, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(combine(dense, lexical, 1.0, 2)[0], [[7, 3]])
    np.testing.assert_array_equal(combine(dense, lexical, 0.0, 1)[0], [[3]])


def world(count=200, width=16, questions=80):
    """Half of the questions can be found by their words alone, half by their vectors alone."""
    rng = np.random.default_rng(0)
    texts = [f"name{row} " + " ".join(f"w{word}" for word in rng.integers(0, 20, 5)) for row in range(count)]
    vectors = rng.normal(size=(count, width)).astype(np.float32)
    gold = rng.integers(0, count, questions)
    words = [
        f"w1 name{row}" if place % 2 else f"w{rng.integers(0, 20)} w{rng.integers(0, 20)}"
        for place, row in enumerate(gold)
    ]
    queries = rng.normal(size=(questions, width)).astype(np.float32)
    queries[::2] = vectors[gold[::2]]
    passages = Passages([str(row) for row in range(count)], [""] * count, texts)
    return passages, vectors, Queries(words, queries), [{int(row)} for row in gold]


def test_the_weight_is_fitted_and_kept(tmp_path):
    passages, vectors, queries, gold = world()
    index = HybridIndex(dense="exact", candidates=50).build(passages, vectors)
    recalls = index.fit_weight(queries, gold, k=5)
    assert 0 < index.weight < 1 and recalls[index.weight] == max(recalls.values())
    for weight, part in ((0.0, index.lexical), (1.0, index.dense)):
        alone = recall_at_k(part.search(queries, 5)[0], gold, (5,))[5]
        # not equal: where one index finds fewer than k, the other's candidates fill up, by chance with gold
        assert alone <= recalls[weight] < recalls[index.weight]
    # but the dense index finds k for every question, so nothing fills up
    both = index.search_both(queries, 5)
    np.testing.assert_array_equal(combine(*both, 1.0, 5)[0], index.dense.search(queries, 5)[0])
    assert recalls[1.0] == alone
    assert recall_at_k(index.search(queries, 5)[0], gold, (5,))[5] == recalls[index.weight]
    manifest = write_index(tmp_path / "index", index, passages, vectors=vectors)
    loaded = open_index(tmp_path / "index").index
    assert loaded.weight == index.weight == manifest.settings["weight"] and loaded.dense.kind == "exact"
    for wanted, found in zip(index.search(queries, 5), loaded.search(queries, 5)):
        np.testing.assert_array_equal(wanted, found)


def test_the_surest_weight_is_the_one_that_costs_nothing_anywhere():
    """Against the rule written out; the best recall at 5 alone would cost some at 1."""
    passages, vectors, queries, gold = world()
    index = HybridIndex(dense="exact", candidates=50).build(passages, vectors)

    def right(weight, k):
        rows = combine(*index.search_both(queries, 5), weight, 5)[0]
        return np.array([bool(set(found[:k]) & answers) for found, answers in zip(rows.tolist(), gold)], float)

    recalls = index.fit_weight(queries, gold, k=5)
    free = index.weight
    assert right(free, 1).mean() < right(0.0, 1).mean()  # so that the condition binds
    for cuts in ((3, 5), (1, 5)):
        assert index.fit_weight(queries, gold, k=5, never_below=cuts) == recalls
        worth = {0.0: 0.0}
        for weight in recalls:
            gains = [right(weight, k) - right(0.0, k) for k in cuts]
            each = np.mean(gains, axis=0)
            if weight and min(g.mean() for g in gains) >= 0 and each.any():
                worth[weight] = each.mean() / (each.std() / len(each) ** 0.5)
        assert worth[index.weight] == pytest.approx(max(worth.values()))
        assert index.weight > 0
        assert all(right(index.weight, k).mean() >= right(0.0, k).mean() for k in cuts)
    # Vectors that say nothing: BM25 alone.
    noise = np.random.default_rng(5).normal(size=vectors.shape).astype(np.float32)
    useless = HybridIndex(dense="exact", candidates=50).build(passages, noise)
    useless.fit_weight(queries, gold, k=5, never_below=(1, 5))
    assert useless.weight == 0
    useless.fit_weight(queries, gold, k=5, weights=(0.9,), never_below=(1, 5))
    assert useless.weight == 0  # nor is it one that loses, where no other is tried
    sure = sureness(np.array([0, 0]), np.array([7, 9]), (1, 5))  # every question gains the same
    assert sure == np.inf and sureness(np.array([3]), np.array([3]), (1, 5)) == 0
    assert sureness(np.array([0, 6]), np.array([1, 4]), (1, 5)) == -np.inf  # one gained at 1, one lost at 5


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match="HybridIndex.dense is 'bm25'"):
        make_index("hybrid", dense="bm25")
    with pytest.raises(UserError, match="HybridIndex.weight is 1.5"):
        make_index("hybrid", weight=1.5)
