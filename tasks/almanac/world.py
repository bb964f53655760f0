"""The world: entities, their facts in three editions, and the corpus that states them."""

from __future__ import annotations

import csv
import dataclasses
import functools
import os

import numpy as np

from tasks.almanac.articles import ArticleForms
from tasks.almanac.config import EDITIONS, AlmanacConfig
from tasks.almanac.names import draw_full_names, name_inventories
from tasks.almanac.phrasing import NUM_RELATIONS, RELATIONS
from tasks.almanac.popularity import Popularity, draw_popularity


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One edition's passages: row i is the article of entity i.

    Attributes:
      ids: N strings "e<entity>".
      titles: N full names.
      texts: N articles.
    """

    ids: list[str]
    titles: list[str]
    texts: list[str]


class World:
    """Everything about a generated world; a function of its configuration.

    Edition 0 is what the generator learns. In edition 1 a random half of the facts of one relation, drawn
    from the seed, has another value; in edition 2 the other half has one too. Which relation that is, and
    which facts, is known to this class and to the examples' evaluation fields only.

    Attributes:
      config: the configuration.
      first_names, last_names: the inventories of name parts.
      parts: int32 [N, 2], each entity's first and last part.
      names: N distinct full names.
      values: int8 [3, N, R], value index per edition, entity and relation.
      changed: int8 [N * R], the edition in which a fact changes, 0 for never.
    """

    def __init__(self, config: AlmanacConfig | None = None):
        """Draws the world; raises AlmanacError where the configuration cannot be satisfied."""
        config = config or AlmanacConfig()
        config.check()
        self.config = config
        self.first_names, self.last_names = name_inventories(config)
        self.parts = draw_full_names(config.rng("entities"), config.inventory_sizes, config.num_entities)
        self.names = self.full_names(self.parts)
        self._volatile_relation = int(config.rng("volatile relation").integers(NUM_RELATIONS))
        self.values, self.changed = _draw_values(config, self._volatile_relation)

    @functools.cached_property
    def popularity(self) -> Popularity:
        """Ranks, strata and splits of the facts; raises AlmanacError where the world is too small."""
        return draw_popularity(self.config, self._volatile_relation)

    def full_names(self, parts: np.ndarray) -> list[str]:
        """The full names of int [M, 2] name parts."""
        return [f"{self.first_names[first]} {self.last_names[last]}" for first, last in parts.tolist()]

    def value(self, entity: int, relation: int, edition: int) -> str:
        """The value of a fact in an edition (0, 1 or 2)."""
        return RELATIONS[relation].values[self.values[edition, entity, relation]]

    def passages(self, edition: int) -> Corpus:
        """The corpus of an edition; an article's words differ between editions in changed values only."""
        forms = ArticleForms(self.config.rng("articles"), self.config.num_entities)
        texts = forms.render(self.names, self.values[edition])
        ids = [f"e{entity}" for entity in range(self.config.num_entities)]
        return Corpus(ids=ids, titles=self.names, texts=texts)

    def write_corpus_tsv(self, path: str | os.PathLike, edition: int) -> None:
        """Writes an edition in DPR's format: tab-separated, CSV-quoted, header ``id text title``."""
        corpus = self.passages(edition)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["id", "text", "title"])
            writer.writerows(zip(corpus.ids, corpus.texts, corpus.titles, strict=True))


def random_values(rng: np.random.Generator, count: int) -> np.ndarray:
    """Uniform value indices int8 [count, R]."""
    sizes = [len(relation.values) for relation in RELATIONS]
    return rng.integers(sizes, size=(count, NUM_RELATIONS)).astype(np.int8)


def _draw_values(config: AlmanacConfig, volatile_relation: int) -> tuple[np.ndarray, np.ndarray]:
    """Values int8 [3, N, R] of all editions, and the edition of change int8 [N * R]."""
    rng = config.rng("values")
    values = np.stack([random_values(rng, config.num_entities)] * EDITIONS)
    num_values = len(RELATIONS[volatile_relation].values)
    # 1 .. n - 1 places further in the list is never the same value.
    shift = rng.integers(1, num_values, size=config.num_entities)
    other = (values[0, :, volatile_relation] + shift) % num_values
    first_half = rng.permutation(config.num_entities) < config.num_entities // 2
    values[1, first_half, volatile_relation] = other[first_half]
    values[2, :, volatile_relation] = other
    changed = np.zeros((config.num_entities, NUM_RELATIONS), np.int8)
    changed[:, volatile_relation] = np.where(first_half, 1, 2)
    return values, changed.reshape(-1)
