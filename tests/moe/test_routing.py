"""Routing against Switch's rule written as a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.moe import routing
from expertrag_jax.moe.statistics import choice_statistics

GROUPS, SIZE, EXPERTS = 2, 12, 4


def example(seed=0, skew=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(GROUPS, SIZE, EXPERTS)).astype(np.float32)
    logits[..., 1] += skew
    valid = rng.random((GROUPS, SIZE)) < 0.8
    return jnp.asarray(logits), jnp.asarray(valid)


def switch_rule(expert_index, valid, capacity):
    """All first choices in token order, then all second choices; an expert that is full takes no more."""
    kept = np.zeros(expert_index.shape, bool)
    for group in range(expert_index.shape[0]):
        filled = [0] * EXPERTS
        for choice in range(expert_index.shape[2]):
            for token in range(expert_index.shape[1]):
                expert = expert_index[group, token, choice]
                if valid[group, token] and filled[expert] < capacity:
                    kept[group, token, choice] = True
                    filled[expert] += 1
    return kept


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capacity", [1, 3, SIZE])
def test_drops_are_those_of_switch(k, capacity):
    logits, valid = example()
    choice = routing.route(logits, valid, k)
    buckets = routing.fill_buckets(choice, EXPERTS, capacity)
    kept = switch_rule(np.asarray(choice.expert_index), np.asarray(valid), capacity)
    slot = np.asarray(buckets.slot)
    np.testing.assert_array_equal(slot < EXPERTS * capacity, kept)
    assert kept.any() and (capacity == SIZE or (kept != np.asarray(valid)[..., None]).any())
    # Both directions of the index map say the same, and a kept choice sits with its own expert.
    token = np.asarray(buckets.token)
    for group, position, nth in np.argwhere(kept):
        assert token[group, slot[group, position, nth]] == position * k + nth
        assert slot[group, position, nth] // capacity == choice.expert_index[group, position, nth]
    assert (token < SIZE * k).sum() == kept.sum()
    dropped = choice_statistics(logits, choice, buckets).dropped
    count = np.asarray(valid).sum(1)
    np.testing.assert_allclose(dropped, 1 - kept.sum((1, 2)) / (k * count), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capacity", [1, 3])
def test_prioritised_drops_are_those_of_the_least_sure(k, capacity):
    logits, valid = example(5, skew=2.0)
    choice = routing.route(logits, valid, k)
    order = np.argsort(-np.asarray(choice.probabilities).max(-1), axis=1, kind="stable")
    index, real = np.asarray(choice.expert_index), np.asarray(valid)
    kept = np.zeros(index.shape, bool)
    for group in range(GROUPS):  # Switch's rule over the tokens from the surest to the least sure
        by_rank = switch_rule(index[group, order[group]][None], real[group, order[group]][None], capacity)[0]
        kept[group, order[group]] = by_rank
    buckets = routing.fill_buckets(choice, EXPERTS, capacity, prioritised=True)
    slot, token = np.asarray(buckets.slot), np.asarray(buckets.token)
    np.testing.assert_array_equal(slot < EXPERTS * capacity, kept)
    assert (kept != switch_rule(index, real, capacity)).any()
    for group, position, nth in np.argwhere(kept):
        assert token[group, slot[group, position, nth]] == position * k + nth
        assert slot[group, position, nth] // capacity == index[group, position, nth]


def test_sorted_choices_stand_by_expert_and_in_their_order():
    rng = np.random.default_rng(6)
    expert = rng.integers(0, EXPERTS + 1, (9, 2)).astype(np.int32)  # EXPERTS: padding
    slots, sizes = routing.sort_by_expert(jnp.asarray(expert), EXPERTS, spare=3)
    flat = expert.reshape(-1)
    real = [i for e in range(EXPERTS) for i in np.flatnonzero(flat == e)]
    np.testing.assert_array_equal(sizes, np.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS])
    np.testing.assert_array_equal(slots.token[0], real + [18] * (21 - len(real)))
    for place, choice in enumerate(real):
        assert slots.slot[0].reshape(-1)[choice] == place
    assert (np.asarray(slots.slot[0])[expert == EXPERTS] == 21).all()


@pytest.mark.parametrize("k", [1, 2])
def test_a_bias_moves_the_choice_and_neither_weight_nor_gradient(k):
    logits, valid = example(7)
    bias = jnp.asarray([0.0, -2.0, 0.3, 0.0])
    p = np.asarray(jax.nn.softmax(logits))
    choice = routing.route(logits, valid, k, bias)
    expected = np.argsort(-(p + np.asarray(bias)), -1, kind="stable")[..., :k]
    np.testing.assert_array_equal(choice.expert_index, expected)
    assert (expected != np.asarray(routing.route(logits, valid, k).expert_index)).any()
    weight = np.take_along_axis(p, expected, -1)
    weight = weight / weight.sum(-1, keepdims=True) if k > 1 else weight
    np.testing.assert_allclose(choice.weight, np.where(valid[..., None], weight, 0), rtol=1e-5)
    to_bias = jax.grad(lambda bias: (routing.route(logits, valid, k, bias).weight ** 2).sum())(bias)
    assert not to_bias.any()
    shifted = routing.route(logits, valid, k, bias + 1.0)
    np.testing.assert_array_equal(shifted.expert_index, expected)


@pytest.mark.parametrize("k", [1, 2])
def test_weights_and_their_gradients_are_those_of_the_sorted_softmax(k):
    logits, valid = example(1)

    def reference(logits):
        p = jax.nn.softmax(logits)
        weight = jax.lax.top_k(p, k)[0]
        weight = weight / weight.sum(-1, keepdims=True) if k > 1 else weight
        return jnp.where(valid[..., None], weight, 0.0)

    mixing = jnp.asarray(np.random.default_rng(3).normal(size=(GROUPS, SIZE, k)))
    ours = jax.value_and_grad(lambda x: (routing.route(x, valid, k).weight * mixing).sum())(logits)
    theirs = jax.value_and_grad(lambda x: (reference(x) * mixing).sum())(logits)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)
    index = np.asarray(routing.route(logits, valid, k).expert_index)
    np.testing.assert_array_equal(index, np.argsort(-np.asarray(logits), -1, kind="stable")[..., :k])


def test_padding_takes_no_slot_no_weight_and_enters_no_statistic():
    logits, valid = example(2)
    choice = routing.route(logits, valid, 2)
    buckets = routing.fill_buckets(choice, EXPERTS, 2)
    assert (np.asarray(choice.weight)[~np.asarray(valid)] == 0).all()
    other = jnp.where(valid[..., None], logits, 7.0 * jnp.arange(EXPERTS))  # padding may hold anything
    other_choice = routing.route(other, valid, 2)
    other_buckets = routing.fill_buckets(other_choice, EXPERTS, 2)
    jax.tree.map(np.testing.assert_array_equal, other_buckets, buckets)
    ours = choice_statistics(logits, choice, buckets)
    theirs = choice_statistics(other, other_choice, other_buckets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_statistics_are_means_over_valid_tokens():
    logits, valid = example(4)
    choice = routing.route(logits, valid, 1)
    figures = choice_statistics(logits, choice, None)
    for group in range(GROUPS):
        rows = np.asarray(logits, np.float64)[group][np.asarray(valid)[group]]
        p = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
        load = np.bincount(p.argmax(-1), minlength=EXPERTS) / len(rows)
        assert figures.tokens[group] == len(rows)
        expected = {
            "balance_loss": EXPERTS * (load * p.mean(0)).sum(),
            "z_loss": (np.log(np.exp(rows).sum(-1)) ** 2).mean(),
            "entropy": -(p * np.log(p)).sum(-1).mean(),
            "confidence": p.max(-1).mean(),
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(figures, name)[group], value, rtol=1e-5)
        np.testing.assert_allclose(figures.load[group], load, rtol=1e-6)


def test_balance_loss_is_one_under_uniform_load_and_larger_when_skewed():
    even = jnp.tile(jnp.eye(EXPERTS), (3, 1))[None]
    valid = jnp.ones(even.shape[:2], bool)
    uniform = choice_statistics(even, routing.route(even, valid, 1), None).balance_loss
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)
    skewed = even.at[..., 0].add(2.0)
    assert choice_statistics(skewed, routing.route(skewed, valid, 1), None).balance_loss[0] > 1.5


def test_a_group_without_tokens_is_finite():
    logits, _ = example()
    nothing = jnp.zeros((GROUPS, SIZE), bool)
    choice = routing.route(logits, nothing, 1)
    figures = choice_statistics(logits, choice, routing.fill_buckets(choice, EXPERTS, 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(figures))
    assert not figures.tokens.any() and not figures.balance_loss.any()


def test_group_size_is_the_largest_fitting_divisor():
    assert routing.group_size_for(96, 4096) == 96
    assert routing.group_size_for(96, 50) == 48
    assert routing.group_size_for(96, 12, batch_shards=8) == 12


def test_group_size_names_the_nearest_sizes_when_groups_do_not_divide():
    with pytest.raises(UserError, match=r"96 tokens .* groups of 96 .* 1 groups.* 8 batch shards; .*\[4, 6, 12\]"):
        routing.group_size_for(96, 4096, batch_shards=8)
    with pytest.raises(UserError, match="change the batch size"):
        routing.group_size_for(15, 4096, batch_shards=8)


def test_capacity():
    assert routing.expert_capacity(64, 8, 1, 1.25) == 10
    assert routing.expert_capacity(64, 8, 2, 1.0) == 16
    assert routing.expert_capacity(4, 8, 1, 1.0) == 1
    assert routing.expert_capacity(8, 2, 2, 4.0) == 8
