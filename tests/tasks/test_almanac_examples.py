"""The almanac's examples, split by split."""

from __future__ import annotations

import collections
import re

import numpy as np
import pytest

from tasks.almanac import AlmanacConfig, World
from tasks.almanac.config import STRATA
from tasks.almanac.examples import (
    SPLITS,
    closed_book_examples,
    corpus_namesakes,
    open_book_examples,
    question_examples,
    retriever_examples,
)
from tasks.almanac.names import draw_namesakes
from tasks.almanac.phrasing import NUM_RELATIONS, RELATIONS, phrasings


@pytest.fixture(scope="module")
def world() -> World:
    return World(AlmanacConfig(num_open_book_examples=5000, num_retriever_examples=3000))


@pytest.fixture(scope="module")
def examples(world) -> dict[str, list[dict]]:
    return {split: list(generate(world)) for split, generate in SPLITS.items()}


def template(world, example) -> str:
    """The example's question with its name taken out."""
    return example["question"].replace(world.names[example["entity"]], "{name}")


def test_every_split_has_the_same_fields_and_distinct_ids(examples):
    fields = {frozenset(example) for rows in examples.values() for example in rows}
    assert len(fields) == 1
    ids = [e["id"] for split, rows in examples.items() if split != "test_edition_2" for e in rows]
    assert len(set(ids)) == len(ids)


def test_closed_book_counts_are_those_of_the_ranks(world, examples):
    popularity = world.popularity
    counts = collections.Counter(
        e["entity"] * NUM_RELATIONS + e["relation"] for e in examples["train_closed_book"]
    )
    assert counts == dict(zip(popularity.asked_facts.tolist(), popularity.counts.tolist()))
    top = popularity.asked_facts[0]
    assert counts[top] == pytest.approx(10 * counts[popularity.asked_facts[9]], rel=0.01)
    for example in examples["train_closed_book"][:2000]:
        entity, relation = example["entity"], example["relation"]
        assert example["answers"] == [world.value(entity, relation, 0)]
        assert template(world, example) in phrasings(relation, "training")
        assert example["asked"] == counts[entity * NUM_RELATIONS + relation]
    used = collections.Counter(
        template(world, e)
        for e in examples["train_closed_book"]
        if e["entity"] * NUM_RELATIONS + e["relation"] == top
    )
    assert len(used) == 5 and max(used.values()) < 1.3 * min(used.values())


@pytest.mark.parametrize(
    ("name", "split", "edition", "phrasing_set"),
    [
        ("gate", "gate", 1, "held_out"),
        ("validation", "validation", 1, "held_out"),
        ("test_edition_1", "test", 1, "test"),
        ("test_edition_2", "test", 2, "test"),
    ],
)
def test_question_splits(world, examples, name, split, edition, phrasing_set):
    rows = examples[name]
    asked = collections.defaultdict(set)
    for example in rows:
        entity, relation = example["entity"], example["relation"]
        assert example["answers"] == [world.value(entity, relation, edition)]
        assert example["passages"] == []
        fact = entity * NUM_RELATIONS + relation
        assert example["stratum"] == STRATA[world.popularity.stratum[fact]]
        assert (example["asked"] == 0) == (example["stratum"] == "never")
        stale = world.value(entity, relation, 0) != example["answers"][0]
        assert stale == (0 < example["changed"] <= edition)
        phrase = template(world, example)
        assert phrase in phrasings(relation, phrasing_set)
        asked[fact].add(phrase)
    assert set(asked) == set(world.popularity.split_facts[split].tolist())
    assert all(len(phrases) == 2 for phrases in asked.values()) and len(rows) == 2 * len(asked)


def test_half_of_the_volatile_test_answers_are_stale_in_edition_1_and_all_in_edition_2(examples):
    volatile = [e["changed"] for e in examples["test_edition_1"] if e["stratum"] == "volatile"]
    assert len(volatile) == 480
    assert 0.35 < np.mean(np.array(volatile) == 1) < 0.65 and set(volatile) == {1, 2}


def test_the_two_test_splits_ask_the_same(examples):
    first, second = examples["test_edition_1"], examples["test_edition_2"]
    for a, b in zip(first, second, strict=True):
        assert {k: v for k, v in a.items() if k != "answers"} == {
            k: v for k, v in b.items() if k != "answers"
        }


def test_asking_once_uses_both_phrasings():
    world = World(AlmanacConfig(questions_per_fact=1, test_questions=2000))
    phrases = collections.Counter(template(world, e) for e in question_examples(world, "test", 1))
    assert len(phrases) == sum(len(relation.test) for relation in RELATIONS)


def test_open_book_is_answered_by_reading_alone(world, examples):
    rows = examples["train_open_book"]
    gold_positions, known_agrees, invented, namesakes = [], [], 0, []
    for example in rows:
        titles = [passage["title"] for passage in example["passages"]]
        relevance = [passage["relevance"] for passage in example["passages"]]
        assert len(titles) == 4 and sorted(relevance) == [0, 0, 0, 1]
        gold = relevance.index(1)
        assert titles[gold] in example["question"] and titles.count(titles[gold]) == 1
        (answer,) = example["answers"]
        relation = RELATIONS[example["relation"]]
        stated = set(re.findall(r"\w+", example["passages"][gold]["text"])) & set(relation.values)
        assert stated == {answer}
        gold_positions.append(gold)
        invented += example["entity"] < 0
        first, last = titles[gold].split()
        namesakes += [
            t.startswith(first + " ") or t.endswith(" " + last) for t in titles if t != titles[gold]
        ]
        if example["entity"] >= 0:
            assert world.names[example["entity"]] == titles[gold]
            known_agrees.append(world.value(example["entity"], example["relation"], 0) == answer)
    assert np.bincount(gold_positions).min() > 0.2 * len(rows)
    assert np.mean(known_agrees) < 0.06, "the values are not randomised"
    assert invented == pytest.approx(0.5 * len(rows), rel=0.1)
    assert np.mean(namesakes) == pytest.approx(0.9, abs=0.03)


def test_retriever_examples(world, examples):
    corpus = world.passages(0)
    texts = dict(zip(corpus.titles, corpus.texts))
    for example in examples["train_retriever"]:
        positive, negative = example["passages"]
        assert positive["title"] == world.names[example["entity"]] != negative["title"]
        assert (positive["relevance"], negative["relevance"]) == (1, 0)
        assert texts[positive["title"]] == positive["text"] and texts[negative["title"]] == negative["text"]
        assert set(positive["title"].split()) & set(negative["title"].split()), "no namesake"
        assert template(world, example) in phrasings(example["relation"], "training")


def test_corpus_namesakes_fall_back():
    parts = np.array([[0, 0], [0, 1], [1, 1], [2, 2]])
    rng = np.random.default_rng(0)
    drawn = [set(corpus_namesakes(rng, parts, np.full(200, entity)).tolist()) for entity in range(4)]
    assert drawn == [{1}, {0, 2}, {1}, {0, 1, 2}]


def test_drawn_namesakes_share_exactly_one_part():
    parts = np.tile(np.array([[3, 5]]), (500, 1))
    others = draw_namesakes(np.random.default_rng(1), parts, (7, 9), unrelated_share=0.0)
    same = others == parts
    assert (same.sum(axis=1) == 1).all() and 150 < same[:, 0].sum() < 350
    assert others.min() >= 0 and others[:, 0].max() == 6 and others[:, 1].max() == 8
    strangers = draw_namesakes(np.random.default_rng(1), parts, (7, 9), unrelated_share=1.0)
    assert not (strangers == parts).any()


def test_generation_is_deterministic(world):
    for generate in (closed_book_examples, open_book_examples, retriever_examples):
        first, second = generate(world), generate(world)
        assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]
