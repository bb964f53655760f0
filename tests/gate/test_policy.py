from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.gate import policy


def test_constant_policies():
    inputs = policy.PolicyInputs(example_ids=np.arange(3))
    assert policy.Always().decide(inputs).tolist() == [True] * 3
    assert policy.Never().decide(inputs).tolist() == [False] * 3


def test_random_depends_on_id_and_seed_alone():
    ids = np.arange(20_000) * 7 - 3  # negative ids too
    rng = np.random.default_rng(0)
    order = rng.permutation(len(ids))
    decision = policy.Random(0.3).decide(policy.PolicyInputs(example_ids=ids))
    shuffled = policy.Random(0.3).decide(policy.PolicyInputs(example_ids=ids[order]))
    np.testing.assert_array_equal(decision[order], shuffled)
    alone = [policy.Random(0.3).decide(policy.PolicyInputs(example_ids=ids[i : i + 1]))[0] for i in range(50)]
    np.testing.assert_array_equal(decision[:50], alone)
    assert abs(decision.mean() - 0.3) < 0.015  # > 4 standard errors
    other = policy.Random(0.3, seed=1).decide(policy.PolicyInputs(example_ids=ids))
    assert abs((decision & other).mean() - 0.09) < 0.01  # independent of the other seed


def test_random_is_nested_and_reaches_both_ends():
    ids = policy.PolicyInputs(example_ids=np.arange(1000))
    low, high = policy.Random(0.2).decide(ids), policy.Random(0.6).decide(ids)
    assert not (low & ~high).any()
    assert not policy.Random(0.0).decide(ids).any() and policy.Random(1.0).decide(ids).all()
    with pytest.raises(UserError, match="a number from 0 to 1"):
        policy.Random(1.5)


def test_uniform_hash_is_uniform():
    values = policy.uniform_hash(np.arange(100_000), 5)
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi^2 with 19 degrees of freedom, p ~ 0.001


def test_oracle_follows_the_label():
    inputs = policy.PolicyInputs(retrieval_needed=np.array([1, 0, np.nan], np.float32))
    assert policy.Oracle().decide(inputs).tolist() == [True, False, True]
    assert policy.Oracle(when_unknown=False).decide(inputs).tolist() == [True, False, False]


def test_threshold_reads_the_best_score():
    scores = np.array([[0.2, 0.9], [0.4, 0.1], [np.nan, np.nan], [np.nan, 0.5]])
    decide = policy.Threshold(0.5).decide
    assert decide(policy.PolicyInputs(passage_scores=scores)).tolist() == [True, False, False, True]
    assert decide(policy.PolicyInputs(passage_scores=np.zeros((2, 0)))).tolist() == [False, False]


def test_learned_retrieves_from_the_threshold_on():
    inputs = policy.PolicyInputs(p_ret=np.array([0.29, 0.3, 0.31], np.float32))
    assert policy.Learned(0.3).decide(inputs).tolist() == [False, True, True]


def test_a_missing_input_is_named():
    with pytest.raises(UserError, match="Learned needs p_ret"):
        policy.Learned().decide(policy.PolicyInputs(example_ids=np.arange(2)))


def test_make_policy_by_name():
    assert policy.make_policy("random", rate=0.25, seed=3) == policy.Random(0.25, 3)
    assert {policy.make_policy(name).needs for name in policy.POLICIES} == {
        ("example_ids",), ("retrieval_needed",), ("passage_scores",), ("p_ret",)
    }  # fmt: skip
    with pytest.raises(UserError, match="sometimes"):
        policy.make_policy("sometimes")
    with pytest.raises(UserError, match="has no rate"):
        policy.make_policy("always", rate=1.0)
