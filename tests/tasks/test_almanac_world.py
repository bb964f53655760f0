"""The world: names, editions, articles, popularity, strata and splits."""

from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from tasks.almanac import STRATA, AlmanacConfig, AlmanacError, Lesson, World
from tasks.almanac.articles import ArticleForms
from tasks.almanac.config import largest_remainder
from tasks.almanac.phrasing import NUM_RELATIONS, PHRASING_SETS, RELATIONS, own_words
from tasks.almanac.popularity import question_counts

ALL_VALUES = {value for relation in RELATIONS for value in relation.values}


@pytest.fixture(scope="module")
def world() -> World:
    return World(AlmanacConfig())


def words(text: str) -> set[str]:
    return set(text.replace(".", " ").split())


def test_vocabulary_of_the_almanac():
    assert NUM_RELATIONS >= 6
    values = [value for relation in RELATIONS for value in relation.values]
    assert len(set(values)) == len(values), "the relations' value lists overlap"
    assert all(16 <= len(relation.values) <= 40 for relation in RELATIONS)
    assert all(value.split() == [value] for value in values)


def test_phrasings_are_disjoint_and_held_out_ones_recombine_known_words():
    everything = [text for r in RELATIONS for name in PHRASING_SETS for text in getattr(r, name)]
    assert len(set(everything)) == len(everything)
    assert len({tuple(len(getattr(r, name)) for name in PHRASING_SETS) for r in RELATIONS}) == 1  # as many in each
    known = {word for relation in RELATIONS for text in relation.training for word in text.split()}
    for relation in RELATIONS:
        assert len(relation.training) >= 5 and len(relation.held_out) >= 2 and len(relation.test) >= 2
        for text in (*relation.training, *relation.held_out, *relation.test):
            assert text.count("{name}") == 1 and len(text.format(name="A B").split()) <= 12
            assert set(text.split()) <= known


def test_names(world):
    assert len(set(world.names)) == world.config.num_entities
    parts = [*world.first_names, *world.last_names]
    assert len(set(parts)) == len(parts) == 64 + 128
    assert not {part.lower() for part in parts} & own_words()
    _, sharers = np.unique(world.parts[:, 0], return_counts=True)
    assert np.mean(sharers) > 10, "too few namesakes to be hard negatives"
    _, sharers = np.unique(world.parts[:, 1], return_counts=True)
    assert np.mean(sharers) > 5


def test_editions_change_two_halves_of_one_relation(world):
    count = world.config.num_entities
    first, second = (world.values[edition] != world.values[0] for edition in (1, 2))
    (volatile,) = np.flatnonzero(second.any(axis=0))
    assert first.sum() == count // 2 and second.sum() == count
    assert (world.values[2] == world.values[1])[first].all(), "a change of edition 1 must persist"
    changed = world.changed.reshape(count, NUM_RELATIONS)
    np.testing.assert_array_equal(changed == 1, first)
    np.testing.assert_array_equal(changed == 2, second & ~first)
    assert set(np.flatnonzero(changed.any(axis=0))) == {volatile}


def test_the_volatile_relation_comes_from_the_seed():
    small = dict(num_entities=10, num_first_names=10, num_last_names=10)
    drawn = {int(World(AlmanacConfig(seed=s, **small)).changed.argmax()) % NUM_RELATIONS for s in range(40)}
    assert len(drawn) >= NUM_RELATIONS - 2


def test_values_are_uniform(world):
    for relation in range(NUM_RELATIONS):
        counts = np.bincount(world.values[0, :, relation], minlength=len(RELATIONS[relation].values))
        expected = counts.sum() / len(counts)
        # Chi-square of n - 1 degrees of freedom: mean n - 1, standard deviation sqrt(2 (n - 1)).
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert statistic < len(counts) - 1 + 5 * np.sqrt(2 * len(counts))


def test_articles_state_every_value_once(world):
    editions = [world.passages(edition) for edition in range(3)]
    assert editions[0].ids[7] == "e7" and editions[0].titles == world.names
    for edition, corpus in enumerate(editions):
        for entity, text in enumerate(corpus.texts):
            stated = words(text) & ALL_VALUES
            assert stated == {world.value(entity, r, edition) for r in range(NUM_RELATIONS)}
            sentences = text.split(". ")
            assert 3 <= len(sentences) <= 6 and len(text.split()) <= 60
            assert sentences[0].startswith(world.names[entity])
            assert all(s.startswith((world.names[entity], "He ", "She ")) for s in sentences)
    for entity in range(50):
        different = words(editions[0].texts[entity]) ^ words(editions[2].texts[entity])
        assert len(different) == 2, "only the volatile value may change"
    assert len({text.split(" ", 2)[2] for text in editions[0].texts}) > 900, "forms are too alike"


@pytest.mark.parametrize("facts", [1, 2, 3, NUM_RELATIONS])
def test_a_form_states_the_relations_it_is_given_in_their_order(facts):
    rng = np.random.default_rng(facts)
    order = np.argsort(rng.random((200, NUM_RELATIONS)))[:, :facts].astype(np.int8)
    values = rng.integers(16, size=(200, NUM_RELATIONS))
    lengths = set()
    for relations, row, text in zip(
        order, values, ArticleForms(rng, 200, order).render(["Tavo Melkin"] * 200, values)
    ):
        places = [text.split().index("Tavo")]
        known = [re.search(rf"\b{RELATIONS[r].values[row[r]]}\b", text) for r in relations]
        places += [match.start() for match in known]
        assert places == sorted(places) and len(words(text) & ALL_VALUES) == facts
        lengths.add(text.count("."))
    fewest = -(-facts // 2)
    assert lengths == set(range(fewest, min(facts, fewest + 2) + 1))


def test_corpus_tsv(world, tmp_path):
    world.write_corpus_tsv(tmp_path / "corpus.tsv", edition=1)
    with open(tmp_path / "corpus.tsv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    corpus = world.passages(1)
    assert header == ["id", "text", "title"]
    assert rows == [list(row) for row in zip(corpus.ids, corpus.texts, corpus.titles)]


def test_question_counts():
    weights = 1 / np.arange(1, 101)
    counts = question_counts(weights, 10_000)
    assert counts.sum() == 10_000
    np.testing.assert_allclose(counts, 10_000 * weights / weights.sum(), atol=1)
    scarce = question_counts(weights, 150)
    assert scarce.sum() == 150 and scarce.min() == 1 and (np.diff(scarce) <= 0).all()
    above = scarce > 1
    np.testing.assert_allclose(scarce[above], scarce[0] * weights[above], atol=1.1)
    assert (question_counts(weights, 100) == 1).all()
    assert largest_remainder(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]


def test_strata_follow_ranks(world):
    config, popularity = world.config, world.popularity
    rank, stratum = popularity.rank, popularity.stratum
    assert sorted(rank[rank > 0]) == list(range(1, config.num_asked_facts + 1))
    np.testing.assert_array_equal(rank > 0, popularity.asked > 0)
    assert popularity.asked.sum() == config.num_training_questions
    by = {name: rank[stratum == index] for index, name in enumerate(STRATA)}
    assert by["head"].min() >= 1 and by["head"].max() < by["torso"].min()
    assert by["torso"].max() < by["tail"].min() and (by["never"] == 0).all()
    np.testing.assert_array_equal(stratum == STRATA.index("volatile"), world.changed > 0)
    np.testing.assert_allclose(popularity.weight[rank > 0], 1 / rank[rank > 0], rtol=1e-6)
    np.testing.assert_allclose(popularity.weight[rank == 0], 1 / (config.num_asked_facts + 1), rtol=1e-6)


def test_splits_are_disjoint_and_shared_out(world):
    config, popularity = world.config, world.popularity
    everything = np.concatenate(list(popularity.split_facts.values()))
    assert len(np.unique(everything)) == len(everything) == 1200 + 600 + 2000
    for split, facts in popularity.split_facts.items():
        counts = np.bincount(popularity.stratum[facts], minlength=len(STRATA))
        assert dict(zip(STRATA, counts)) == config.facts_per_stratum(split)
        volatile = facts[popularity.stratum[facts] == STRATA.index("volatile")]
        well_known = max(popularity.rank[popularity.stratum == STRATA.index("head")])
        assert (popularity.rank[volatile] >= 1).all() and (popularity.rank[volatile] <= well_known + 50).all()


def test_neither_entity_nor_static_relation_tells_the_stratum(world):
    popularity = world.popularity
    facts = np.concatenate(list(popularity.split_facts.values()))
    facts = facts[world.changed[facts] == 0]
    stratum = popularity.stratum[facts]
    for group in (facts % NUM_RELATIONS, world.parts[facts // NUM_RELATIONS, 0]):
        table = np.zeros((group.max() + 1, len(STRATA)))
        np.add.at(table, (group, stratum), 1)
        table = table[table.sum(1) > 0][:, :-1]
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_everything_is_a_function_of_the_configuration(world):
    again = World(AlmanacConfig())
    assert again.names == world.names and again.passages(2) == world.passages(2)
    for split, facts in world.popularity.split_facts.items():
        np.testing.assert_array_equal(again.popularity.split_facts[split], facts)
    other = World(AlmanacConfig(seed=1))
    assert other.names != world.names
    lesson = {"reading": Lesson(5, 2, 1, 0.1)}
    assert len({AlmanacConfig(**c).digest for c in ({}, {"seed": 1}, {"lessons": lesson})}) == 3


def test_streams_do_not_depend_on_other_sizes(world):
    fewer = World(dataclasses.replace(AlmanacConfig(), num_training_questions=6000, lessons={}))
    assert fewer.names == world.names and (fewer.values == world.values).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_entities=100), "must fit in"),
        (dict(num_entities=1000, num_asked_facts=7900), "never facts"),
        (dict(volatile_share=0.42, head_share=0.1), "one relation"),
        (dict(tail_ranks=100), "tail facts"),
        (dict(head_share=0.5), "sum to 1.1"),
        (dict(test_questions=4001), "multiple"),
        (dict(num_training_questions=100), "at least once"),
        (dict(questions_per_fact=3), "once or twice"),
        (dict(num_first_names=10, num_last_names=10), "too few for 1000 entities"),
        (dict(num_first_names=6000), "exceed"),
        (dict(lessons={"two words": Lesson(5, 2, 1, 0.1)}), "'two words' cannot name a split"),
        (dict(lessons={"reading": Lesson(0, 2, 1, 0.1)}), "'reading' has 0 examples"),
        (dict(lessons={"reading": Lesson(5, 0, 1, 0.1)}), "of 0 passages"),
        (dict(lessons={"reading": Lesson(5, 2, 0, 0.1)}), "with 0 facts"),
        (dict(lessons={"reading": Lesson(5, 2, 9, 0.1)}), "at most 8 facts"),
        (dict(lessons={"reading": Lesson(5, 2, 1, 1.5)}), "unrelated_share of 'reading' is 1.5"),
    ],
)
def test_impossible_worlds_are_refused_in_one_sentence(changes, message):
    with pytest.raises(AlmanacError, match=message) as caught:
        World(dataclasses.replace(AlmanacConfig(), **changes)).popularity  # noqa: B018
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_generating_needs_no_tensorflow():
    code = "import sys; import tasks.almanac.examples; print([m for m in sys.modules if 'tensorflow' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
