"""Articles: four to six short sentences that state a value of every relation; lessons state fewer."""

from __future__ import annotations

import itertools

import numpy as np

from tasks.almanac.phrasing import NUM_RELATIONS, PRONOUNS, RELATIONS

_MOST_PER_SENTENCE = 2
_NAME_SHARE = 0.3  # of the sentences after the first, those that repeat the name


def _sentence_plans(facts: int) -> list[list[tuple[int, ...]]]:
    """Per number of sentences (4, 5, 6 for 8 facts): every way to give each sentence one or two of them."""
    fewest = -(-facts // _MOST_PER_SENTENCE)
    plans = []
    for sentences in range(fewest, min(facts, fewest + 2) + 1):
        sizes = itertools.product(range(1, _MOST_PER_SENTENCE + 1), repeat=sentences)
        plans.append([plan for plan in sizes if sum(plan) == facts])
    return plans


_PLANS = {facts: _sentence_plans(facts) for facts in range(1, NUM_RELATIONS + 1)}
# [relation][clause][value] -> "lives in Oslo"
_CLAUSES = [
    [[clause.format(value=value) for value in relation.values] for clause in relation.clauses]
    for relation in RELATIONS
]


class ArticleForms:
    """The form of M articles, drawn apart from the values: an article keeps its form when a value changes.

    Attributes:
      order: int8 [M, n], the relations in order of mention; n = R in an article of the corpus.
      clauses: int8 [M, R], which clause states each relation.
      plans: list of M tuples, how many relations each sentence states.
      pronouns: int8 [M].
      repeats: bool [M, S], whether a sentence starts with the name rather than the pronoun; always so in the
        first. S is the most sentences of an article, 6 for all relations.
    """

    def __init__(self, rng: np.random.Generator, count: int, order: np.ndarray | None = None):
        """``order`` [M, n]: state these relations only, in this order; None: all, in random order."""
        if order is None:
            order = np.argsort(rng.random((count, NUM_RELATIONS), np.float32), axis=1).astype(np.int8)
        plans = _PLANS[order.shape[1]]
        self.order = order
        clause_counts = [len(relation.clauses) for relation in RELATIONS]
        self.clauses = rng.integers(clause_counts, size=(count, NUM_RELATIONS)).astype(np.int8)
        lengths = rng.integers(len(plans), size=count)
        choices = rng.random(count)
        self.plans = [
            plans[n][int(c * len(plans[n]))] for n, c in zip(lengths.tolist(), choices.tolist(), strict=True)
        ]
        self.pronouns = rng.integers(len(PRONOUNS), size=count).astype(np.int8)
        self.repeats = rng.random((count, len(plans[-1][0])), np.float32) < _NAME_SHARE
        self.repeats[:, 0] = True

    def render(self, names: list[str], values: np.ndarray) -> list[str]:
        """The M texts.

        Args:
          names: M full names.
          values: integers [M, R], the index of each relation's value.

        Returns:
          M articles; each states the values of its relations once.
        """
        rows = zip(
            names,
            self.order.tolist(),
            self.clauses.tolist(),
            self.plans,
            self.pronouns.tolist(),
            self.repeats.tolist(),
            values.tolist(),
            strict=True,
        )
        return [_render_one(*row) for row in rows]


def _render_one(name, order, clauses, plan, pronoun, repeats, values) -> str:
    stated = iter([_CLAUSES[relation][clauses[relation]][values[relation]] for relation in order])
    sentences = []
    for size, repeat in zip(plan, repeats, strict=False):
        subject = name if repeat else PRONOUNS[pronoun]
        sentences.append(f"{subject} {' and '.join(itertools.islice(stated, size))}.")
    return " ".join(sentences)
