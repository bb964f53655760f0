"""The order of examples: passes are permutations, mixtures keep their shares, position determines all."""

import numpy as np

from expertrag_jax.data.order import Mixed, Order


def test_every_pass_is_its_own_permutation():
    order = Order(37, seed=4)
    passes = [order.at(np.arange(n * 37, (n + 1) * 37)) for n in range(3)]
    for examples in passes:
        assert sorted(examples) == list(range(37))
    assert (passes[0] != passes[1]).any() and (passes[0] != np.arange(37)).any()
    assert (Order(37, seed=5).at(np.arange(37)) != passes[0]).any()
    np.testing.assert_array_equal(Order(37, shuffle=False).at(np.arange(74)), np.tile(np.arange(37), 2))


def test_positions_may_be_asked_in_any_slices():
    order = Order(10, seed=1)
    whole = order.at(np.arange(100))
    np.testing.assert_array_equal(order.at(np.arange(33, 47)), whole[33:47])


def test_a_mixture_walks_each_source_in_its_own_order():
    orders = (Order(30, seed=0), Order(7, seed=0), Order(1000, seed=0))
    mixed = Mixed(orders, rates=(1.0, 0.5, 2.0), seed=3)
    source, example = mixed.at(np.arange(4096))
    counts = np.bincount(source[:1024], minlength=3)
    np.testing.assert_allclose(counts, np.array([1, 0.5, 2]) / 3.5 * 1024, atol=1)
    for s, order in enumerate(orders):
        drawn = example[source == s]
        np.testing.assert_array_equal(drawn, order.at(np.arange(len(drawn))))
    again = mixed.at(np.arange(1500, 2100))
    np.testing.assert_array_equal(again[0], source[1500:2100])
    np.testing.assert_array_equal(again[1], example[1500:2100])
