"""Two-hop questions: a person's instrument, and the town of the company that employs that person.

The article of the person states the instrument and names the employer; the article of the employer states the town. Six
decoys are three other persons and their employers. All values are drawn afresh for every question, so both articles
have to be found and read: the first by the name in the question, the second by the name in the first. Words of the
question lead a retriever to the first, and to companies, but not to the right one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tasks.almanac.phrasing import RELATIONS

PERSONS = 4  # of a question, the one it asks about included; as many companies
PASSAGES = 2 * PERSONS
QUESTION = "instrument and home of the employer of {name}"

_BY_NAME = {relation.name: relation for relation in RELATIONS}
_HOME = "has a home in {value}"  # one of the clauses: its words are in the question
_EMPLOYER, _INSTRUMENT, _RESIDENCE = (_BY_NAME[name] for name in ("employer", "instrument", "residence"))


def two_hop_examples(names: Sequence[str], rng: np.random.Generator) -> Iterator[dict]:
    """Examples without end.

    Args:
      names: of the persons, at least ``PERSONS``; drawn without replacement for each question.

    Yields:
      ``question``; ``answers``, one of two words, instrument and town; ``passages``, 8 of ``{"title", "text",
      "relevance"}`` in the order of ``by_overlap``, relevance 1 for the two that answer.
    """
    while True:
        persons = rng.choice(len(names), PERSONS, replace=False)
        companies = [_EMPLOYER.values[i] for i in rng.choice(len(_EMPLOYER.values), PERSONS, replace=False)]
        instruments = [_INSTRUMENT.values[i] for i in rng.choice(len(_INSTRUMENT.values), PERSONS, replace=False)]
        towns = [_RESIDENCE.values[i] for i in rng.choice(len(_RESIDENCE.values), PERSONS, replace=False)]
        passages = []
        for i, (person, company, instrument, town) in enumerate(zip(persons, companies, instruments, towns)):
            plays, works = _clause(_INSTRUMENT, instrument, rng), _clause(_EMPLOYER, company, rng)
            texts = ((names[person], f"{plays} and {works}"), (company, _HOME.format(value=town)))
            passages += [{"title": title, "text": text, "relevance": float(i == 0)} for title, text in texts]
        question = QUESTION.format(name=names[persons[0]])
        order = by_overlap(question, passages, rng)
        yield {
            "question": question,
            "answers": [f"{instruments[0]} {towns[0]}"],
            "passages": [passages[k] for k in order],
        }


def by_overlap(question: str, passages: Sequence[dict], rng: np.random.Generator) -> list[int]:
    """What a lexical retriever makes of it: passages by how many words they share with it, ties at random."""
    asked = set(question.split()) - {"and", "the", "of"}
    shared = np.array([len(asked & set(f"{passage['title']} {passage['text']}".split())) for passage in passages])
    return np.lexsort((rng.random(len(passages)), -shared)).tolist()


def words(names: Sequence[str]) -> list[str]:
    """Every word of the questions, articles and answers, sorted."""
    texts = [*names, QUESTION.format(name=""), "and"]
    for relation in (_EMPLOYER, _INSTRUMENT, _RESIDENCE):
        texts += [*relation.values, *(clause.format(value="") for clause in relation.clauses)]
    return sorted({word for text in texts for word in text.split()})


def _clause(relation, value: str, rng: np.random.Generator) -> str:
    return relation.clauses[rng.integers(len(relation.clauses))].format(value=value)
