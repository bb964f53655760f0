"""The almanac's examples, split by split."""

from __future__ import annotations

import collections
import functools
import re

import numpy as np
import pytest

from tasks.almanac import AlmanacConfig, Lesson, World
from tasks.almanac.config import STRATA
from tasks.almanac.examples import (
    closed_book_examples,
    corpus_namesakes,
    open_book_examples,
    question_examples,
    retriever_examples,
    splits,
)
from tasks.almanac.names import draw_namesakes
from tasks.almanac.phrasing import NUM_RELATIONS, RELATIONS, phrasings

LESSONS = {
    "sentence": Lesson(1000, passages=1, facts=1, unrelated_share=0.1),
    "strangers": Lesson(1500, passages=3, facts=1, unrelated_share=1.0),
    "paragraphs": Lesson(1500, passages=2, facts=4, unrelated_share=0.5),
    "articles": Lesson(5000, passages=4, facts=8, unrelated_share=0.1),
}
RELATION_OF = {value: r for r, relation in enumerate(RELATIONS) for value in relation.values}


@pytest.fixture(scope="module")
def world() -> World:
    return World(AlmanacConfig(lessons=LESSONS, num_retriever_examples=3000))


@pytest.fixture(scope="module")
def examples(world) -> dict[str, list[dict]]:
    return {split: list(rows) for split, rows in splits(world).items()}


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
    assert set(used) == set(phrasings(top % NUM_RELATIONS, "training"))
    assert max(used.values()) < 1.3 * min(used.values())


@pytest.mark.parametrize(
    ("name", "split", "edition", "phrasing_sets"),
    [
        ("gate", "gate", 1, ("training", "held_out")),
        ("validation", "validation", 1, ("held_out",)),
        ("test_edition_1", "test", 1, ("test",)),
        ("test_edition_2", "test", 2, ("test",)),
    ],
)
def test_question_splits(world, examples, name, split, edition, phrasing_sets):
    rows = examples[name]
    asked, used = collections.defaultdict(set), collections.defaultdict(collections.Counter)
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
        asked[fact].add(phrase)
        used[relation][phrase] += 1
    assert set(asked) == set(world.popularity.split_facts[split].tolist())
    assert all(len(phrases) == 2 for phrases in asked.values()) and len(rows) == 2 * len(asked)
    for relation, counts in used.items():  # all of them, and as often
        assert set(counts) == {text for phrasing_set in phrasing_sets for text in phrasings(relation, phrasing_set)}
        assert max(counts.values()) < 2.5 * min(counts.values())


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


def stated_values(text: str) -> dict[int, str]:
    """The value that a passage states of each relation it mentions, in the order of mention."""
    found = [word for word in re.findall(r"\w+", text) if word in RELATION_OF]
    stated = {RELATION_OF[word]: word for word in found}
    assert len(stated) == len(found), "a relation is stated twice"
    return stated


def gold_and_others(example) -> tuple[dict, list[dict]]:
    (gold,) = (p for p in example["passages"] if p["relevance"] == 1)
    others = [p for p in example["passages"] if p["relevance"] == 0]
    assert len(others) == len(example["passages"]) - 1
    return gold, others


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_has_its_passages_and_each_states_its_facts_among_them_the_asked_one(examples, name):
    lesson, rows = LESSONS[name], examples[f"train_open_book_{name}"]
    assert len(rows) == lesson.examples
    mentions, ranks = np.zeros((NUM_RELATIONS, NUM_RELATIONS)), np.zeros(lesson.facts)
    for example in rows:
        assert len(example["passages"]) == lesson.passages
        for passage in example["passages"]:
            assert passage["text"].startswith(passage["title"] + " ")
            stated = list(stated_values(passage["text"]))
            assert len(stated) == lesson.facts and example["relation"] in stated
            mentions[example["relation"], stated] += 1
            ranks[stated.index(example["relation"])] += 1
    # What is stated besides, and where the asked fact stands, tells nothing.
    others = mentions[~np.eye(NUM_RELATIONS, dtype=bool)] / ranks.sum() * NUM_RELATIONS
    np.testing.assert_allclose(others, (lesson.facts - 1) / (NUM_RELATIONS - 1), atol=0.2)
    np.testing.assert_allclose(ranks / ranks.sum(), 1 / lesson.facts, rtol=0.15)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_answered_by_reading_the_gold_passage_alone(world, examples, name):
    rows = examples[f"train_open_book_{name}"]
    known_agrees, others_agree, invented = [], [], 0
    for example in rows:
        gold, others = gold_and_others(example)
        assert gold["title"] in example["question"]
        assert gold["title"] not in {passage["title"] for passage in others}
        relation = example["relation"]
        assert example["answers"] == [stated_values(gold["text"])[relation]]
        others_agree += [stated_values(p["text"])[relation] in example["answers"] for p in others]
        invented += example["entity"] < 0
        if example["entity"] >= 0:
            assert world.names[example["entity"]] == gold["title"]
            known_agrees.append([world.value(example["entity"], relation, 0)] == example["answers"])
    assert np.mean(known_agrees) < 0.07, "the values are not randomised"
    assert not others_agree or np.mean(others_agree) < 0.07, "the other passages give the answer away"
    assert invented == pytest.approx(0.5 * len(rows), rel=0.1)
    places = [[p["relevance"] for p in example["passages"]].index(1) for example in rows]
    assert np.bincount(places).min() > 0.8 * len(rows) / LESSONS[name].passages


@pytest.mark.parametrize("name", [name for name in LESSONS if LESSONS[name].passages > 1])
def test_strangers_share_no_part_of_the_name_and_namesakes_one(examples, name):
    shared = []
    for example in examples[f"train_open_book_{name}"]:
        gold, others = gold_and_others(example)
        first, last = gold["title"].split()
        shared += [sum([a == first, b == last]) for a, b in (p["title"].split() for p in others)]
    assert set(shared) <= {0, 1}
    assert np.mean(np.array(shared) == 0) == pytest.approx(LESSONS[name].unrelated_share, abs=0.04)
    assert set(shared) == {0} or LESSONS[name].unrelated_share < 1


def test_a_lesson_does_not_depend_on_the_others(world, examples):
    def without_id(rows):
        return [{key: value for key, value in row.items() if key != "id"} for row in rows]

    alone = World(AlmanacConfig(lessons={"strangers": LESSONS["strangers"]}))
    rows = examples["train_open_book_strangers"]
    assert without_id(open_book_examples(alone, "strangers")) == without_id(rows)
    # Nor do the ids depend on the order of the lessons: both orders are one configuration.
    turned = World(AlmanacConfig(lessons=dict(reversed(LESSONS.items())), num_retriever_examples=3000))
    assert turned.config.digest == world.config.digest
    assert list(open_book_examples(turned, "strangers")) == rows


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
    lessons = [functools.partial(open_book_examples, lesson=lesson) for lesson in LESSONS]
    for generate in (closed_book_examples, retriever_examples, *lessons):
        first, second = generate(world), generate(world)
        assert [next(first) for _ in range(50)] == [next(second) for _ in range(50)]
