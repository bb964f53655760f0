"""Algorithm 1: a split batch answers as a whole one does, computes what it says, and compiles nothing once warm."""

import dataclasses

import jax
import numpy as np
import pytest

from expertrag_jax.gate.policy import Always, Learned, Never, Oracle, Random
from expertrag_jax.service import service_from_model
from expertrag_jax.trained_model import open_model

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def asked(tiny, tiny_model):
    """(answerer with buckets 1, 2 and 4, 11 questions whose need is known)"""
    service = service_from_model(open_model(tiny.model_dir, buckets=(1, 2, 4)))
    questions = service.tokenise([tiny_model.QUESTIONS[i % len(tiny_model.QUESTIONS)] for i in range(11)])
    questions = dataclasses.replace(questions, ids=np.arange(11), retrieval_needed=np.arange(11) % 3 == 0)
    service.answerer.warm_up(questions)
    return service.answerer, questions


def under(answerer, questions, policy):
    answerer.policy = policy
    return answerer.answer(questions)


def policies(asked):
    p_ret = under(*asked, Never()).p_ret
    return [Learned(float(np.median(p_ret))), Random(rate=0.4, seed=1), Oracle()]


def test_a_split_batch_gives_the_answers_of_the_arms(asked):
    never, always = under(*asked, Never()), under(*asked, Always())
    for policy in policies(asked):
        split = under(*asked, policy)
        assert 0 < split.retrieve.sum() < 11
        np.testing.assert_array_equal(
            split.tokens, np.where(split.retrieve[:, None], always.tokens, never.tokens), str(policy)
        )
        np.testing.assert_array_equal(split.p_ret, never.p_ret)
        assert ((split.passage_rows >= 0).any(-1) == split.retrieve).all()


def test_it_computes_the_tokens_that_it_says(asked):
    answerer, questions = asked
    never, always = under(*asked, Never()), under(*asked, Always())
    for policy in policies(asked):
        split = under(*asked, policy)
        computed = answerer.padded_tokens(int(split.retrieve.sum()), questions)
        assert split.padded_encoder_tokens == computed
        assert never.padded_encoder_tokens < computed < always.padded_encoder_tokens


def test_nothing_compiles_once_it_is_warm(asked):
    answerer, questions = asked
    programs = answerer.programs
    compiled = [programs._question, programs._read, programs._generate, programs._query]
    before = [program._cache_size() for program in compiled]
    for policy in [Never(), Always(), *policies(asked)]:
        for count in (11, 4, 3, 1):
            under(answerer, questions.rows(np.arange(count)), policy)
    assert [program._cache_size() for program in compiled] == before


def test_another_checkpoint_answers_with_the_same_programs(tiny, tiny_model):
    first = open_model(tiny.model_dir, buckets=(4,))
    scaled = {k: v if k == "query_encoder" else jax.tree.map(lambda x: 1.3 * x, v) for k, v in first.params.items()}
    other = dataclasses.replace(
        first, params=scaled, settings=dataclasses.replace(first.settings, threshold=0.25), source=tiny.root
    )
    fresh, service = service_from_model(other), service_from_model(first)
    questions = service.tokenise(tiny_model.QUESTIONS)
    before = service.answerer.answer(questions)
    programs = service.answerer.programs
    compiled = [programs._question, programs._read, programs._generate]
    sizes = [program._cache_size() for program in compiled]
    taken_over = service.with_checkpoint(other)
    assert (taken_over.settings.threshold, taken_over.source) == (0.25, tiny.root)
    for policy in (None, Never(), Always()):
        for each in (taken_over, fresh):
            each.answerer.policy = policy or each.answerer.policy
        wanted, found = fresh.answerer.answer(questions), taken_over.answerer.answer(questions)
        for name in ("tokens", "scores", "p_ret", "retrieve"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
        assert (found.p_ret != before.p_ret).all()
    assert [program._cache_size() for program in compiled] == sizes
