"""The almanac's examples: an iterator of dictionaries per split, all with the same fields.

Fields of every example:
  id: int, distinct over all splits but the two test splits, which ask the same questions.
  question: str.
  answers: [str].
  relation, entity: int; the entity is -1 for a name drawn from the inventories (open book).
  stratum: one of STRATA, or "none" where the values are random (open book).
  asked: int, closed-book training questions about the fact.
  weight: float, the fact's Zipf weight.
  changed: int, the edition in which the fact changes (0: never); for evaluation only.
  passages: [{"title": str, "text": str, "relevance": float}]; empty where the index is to be searched.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tasks.almanac.articles import ArticleForms
from tasks.almanac.config import QUESTION_SPLITS, STRATA, Lesson
from tasks.almanac.names import draw_namesakes
from tasks.almanac.phrasing import NUM_RELATIONS, RELATIONS, phrasings, split_phrasings
from tasks.almanac.world import World, random_values

Example = dict
_ID_STRIDE = 1_000_000_000
_LESSON_STRIDE = 10_000_000
_CHUNK = 4096


def closed_book_examples(world: World) -> Iterator[Example]:
    """Training questions about edition 0: Zipf(1.0) over the asked facts, phrasing uniform, order random."""
    popularity = world.popularity
    rng = world.config.rng("closed book")
    facts = rng.permutation(np.repeat(popularity.asked_facts, popularity.counts))
    texts = _training_questions(rng, [world.names[e] for e in facts // NUM_RELATIONS], facts % NUM_RELATIONS)
    yield from _fact_examples(world, facts, texts, edition=0, first_id=0)


def question_examples(world: World, split: str, edition: int) -> Iterator[Example]:
    """The "gate", "validation" or "test" questions with an edition's answers, in random order.

    Each fact is asked ``questions_per_fact`` times, each time in another phrasing of those of its split.
    """
    config = world.config
    rng = config.rng(f"{split} questions")
    choices = [split_phrasings(relation, split) for relation in range(NUM_RELATIONS)]
    facts = np.repeat(world.popularity.split_facts[split], config.questions_per_fact)
    turns = _turns(rng, len(facts) // config.questions_per_fact, config.questions_per_fact, len(choices[0]))
    order = rng.permutation(len(facts))
    facts, turns = facts[order], turns[order]
    texts = [
        choices[relation][turn].format(name=world.names[entity])
        for entity, relation, turn in zip(facts // NUM_RELATIONS, facts % NUM_RELATIONS, turns, strict=True)
    ]
    first_id = (3 + QUESTION_SPLITS.index(split)) * _ID_STRIDE
    yield from _fact_examples(world, facts, texts, edition, first_id)


def _turns(rng: np.random.Generator, facts: int, times: int, choices: int) -> np.ndarray:
    """Which of ``choices`` phrasings asks each of ``facts`` the first and, in another, the second time: int64
    [facts * times]. All are as likely the first time, so that asking once uses all alike."""
    first = rng.integers(choices, size=facts)
    other = (first + 1 + rng.integers(choices - 1, size=facts)) % choices
    return np.stack([first, other], axis=1)[:, :times].ravel()


def open_book_examples(world: World, lesson: str) -> Iterator[Example]:
    """Reading examples: K passages with random values, one of them about the question's name.

    All values are drawn afresh, so nothing but reading gives the answer. ``lesson`` names one of
    ``config.lessons``.
    """
    config = world.config
    rng = config.rng(f"open book {lesson}")
    # By name, so that the ids do not depend on the order of the lessons, which no digest tells.
    total, number = round(config.lesson_share * config.lessons[lesson].examples), sorted(config.lessons).index(lesson)
    for start in range(0, total, _CHUNK):
        first_id = _ID_STRIDE + number * _LESSON_STRIDE + start
        yield from _open_book_chunk(world, rng, config.lessons[lesson], min(_CHUNK, total - start), first_id)


def _open_book_chunk(
    world: World, rng: np.random.Generator, lesson: Lesson, count: int, first_id: int
) -> Iterator[Example]:
    config = world.config
    num_passages = lesson.passages
    entities = rng.integers(config.num_entities, size=count)
    entities[rng.random(count) < config.invented_name_share] = -1
    invented = rng.integers(config.inventory_sizes, size=(count, 2))
    gold_parts = np.where(entities[:, None] < 0, invented, world.parts[entities])
    parts = np.repeat(gold_parts[:, None], num_passages, axis=1)
    parts[:, 1:] = draw_namesakes(rng, parts[:, 1:], config.inventory_sizes, lesson.unrelated_share)

    names = world.full_names(parts.reshape(-1, 2))
    values = random_values(rng, count * num_passages)
    relations = rng.integers(NUM_RELATIONS, size=count)
    stated = _stated_relations(rng, np.repeat(relations, num_passages), lesson.facts)
    texts = ArticleForms(rng, count * num_passages, stated).render(names, values)
    questions = _training_questions(rng, names[::num_passages], relations)
    orders = np.argsort(rng.random((count, num_passages)), axis=1).tolist()
    for i, (relation, order) in enumerate(zip(relations.tolist(), orders, strict=True)):
        base = i * num_passages
        yield {
            "id": first_id + i,
            "question": questions[i],
            "answers": [RELATIONS[relation].values[values[base, relation]]],
            "relation": relation,
            "entity": int(entities[i]),
            "stratum": "none",
            "asked": 0,
            "weight": 0.0,
            "changed": 0,
            "passages": [
                {"title": names[base + k], "text": texts[base + k], "relevance": float(k == 0)} for k in order
            ],
        }


def _stated_relations(rng: np.random.Generator, asked: np.ndarray, facts: int) -> np.ndarray:
    """For each of ``asked`` [M], it and ``facts`` - 1 other relations in random order, int8 [M, facts]."""
    key = rng.random((len(asked), NUM_RELATIONS), np.float32)
    key[np.arange(len(asked)), asked] = -1.0
    chosen = np.argsort(key, axis=1)[:, :facts]
    return rng.permuted(chosen, axis=1).astype(np.int8)


def retriever_examples(world: World) -> Iterator[Example]:
    """Questions about random facts of edition 0 with two passages: the gold article, then a namesake's."""
    config = world.config
    rng = config.rng("retriever")
    corpus = world.passages(edition=0)
    facts = rng.integers(config.num_entities * NUM_RELATIONS, size=config.num_retriever_examples)
    entities = facts // NUM_RELATIONS
    negatives = corpus_namesakes(rng, world.parts, entities).tolist()
    texts = _training_questions(rng, [world.names[e] for e in entities], facts % NUM_RELATIONS)
    examples = _fact_examples(world, facts, texts, edition=0, first_id=2 * _ID_STRIDE)
    for example, negative in zip(examples, negatives, strict=True):
        example["passages"] = [
            {
                "title": corpus.titles[row],
                "text": corpus.texts[row],
                "relevance": float(row == example["entity"]),
            }
            for row in (example["entity"], negative)
        ]
        yield example


def corpus_namesakes(rng: np.random.Generator, parts: np.ndarray, entities: np.ndarray) -> np.ndarray:
    """For each of ``entities`` [M] a random other entity that shares a name part, int64 [M].

    The part is the first or the last at random; where nobody shares it, the other one; where nobody shares
    either, any other entity is drawn.
    """
    candidates = []
    for column in (0, 1):
        order = np.argsort(parts[:, column], kind="stable")
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        part = parts[entities, column]
        start = np.searchsorted(parts[order, column], part, side="left")
        size = np.searchsorted(parts[order, column], part, side="right") - start
        # 1 .. size - 1 places further among the sharers is never the entity itself.
        step = 1 + (rng.random(len(entities)) * (size - 1)).astype(np.int64)
        namesake = order[start + (position[entities] - start + step) % size]
        candidates.append(np.where(size > 1, namesake, -1))
    first, last = candidates
    prefer_first = rng.integers(2, size=len(entities)) == 0
    chosen = np.where(prefer_first, first, last)
    chosen = np.where(chosen < 0, np.where(prefer_first, last, first), chosen)
    anyone = (entities + rng.integers(1, len(parts), size=len(entities))) % len(parts)
    return np.where(chosen < 0, anyone, chosen)


def _training_questions(rng: np.random.Generator, names: list[str], relations: np.ndarray) -> list[str]:
    draws = rng.random(len(names)).tolist()
    texts = []
    for name, relation, draw in zip(names, relations.tolist(), draws, strict=True):
        choices = phrasings(relation, "training")
        texts.append(choices[int(draw * len(choices))].format(name=name))
    return texts


def _fact_examples(
    world: World, facts: np.ndarray, texts: list[str], edition: int, first_id: int
) -> Iterator[Example]:
    popularity = world.popularity
    values = world.values[edition].reshape(-1)
    columns = (facts, values[facts], popularity.stratum[facts], popularity.asked[facts],
    popularity.weight[facts],
               world.changed[facts])  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for i, (fact, value, stratum, asked, weight, changed) in enumerate(rows):
        entity, relation = divmod(fact, NUM_RELATIONS)
        yield {
            "id": first_id + i,
            "question": texts[i],
            "answers": [RELATIONS[relation].values[value]],
            "relation": relation,
            "entity": entity,
            "stratum": STRATA[stratum],
            "asked": asked,
            "weight": weight,
            "changed": changed,
            "passages": [],
        }


def splits(world: World) -> dict[str, Iterator[Example]]:
    """What the builder writes, by split."""
    lessons = {f"train_open_book_{name}": open_book_examples(world, name) for name in world.config.lessons}
    return {
        "train_closed_book": closed_book_examples(world),
        **lessons,
        "train_retriever": retriever_examples(world),
        "gate": question_examples(world, "gate", edition=1),
        "validation": question_examples(world, "validation", edition=1),
        "test_edition_1": question_examples(world, "test", edition=1),
        "test_edition_2": question_examples(world, "test", edition=2),
    }
