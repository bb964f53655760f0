"""What fixes an almanac: every record is a function of this configuration and of nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import zlib
from collections.abc import Mapping

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, Fraction, Natural, Seed, Weight, checked
from tasks.almanac.phrasing import NUM_RELATIONS

STRATA = ("head", "torso", "tail", "never", "volatile")
QUESTION_SPLITS = ("gate", "validation", "test")
EDITIONS = 3


@dataclasses.dataclass(frozen=True)
class Lesson:
    """One step of learning to read: how hard the passages are (curriculum learning).

    Attributes:
      examples: how many there are.
      passages: K, the gold one and K - 1 others about other names.
      facts: relations that a passage states, the asked one among them; all 8 make an article.
      unrelated_share: part of the other passages whose names share no part with the gold one.
    """

    examples: int
    passages: int
    facts: int
    unrelated_share: float

    def check(self, name: str) -> None:
        """Raises AlmanacError, with the lesson's ``name``, where no passages can be like that."""
        if not re.fullmatch(r"\w+", name):
            raise AlmanacError(
                f"AlmanacConfig.lessons: {name!r} cannot name a split; use letters, digits and underscores."
            )
        if min(self.examples, self.passages, self.facts) < 1 or self.facts > NUM_RELATIONS:
            raise AlmanacError(
                f"AlmanacConfig.lessons: {name!r} has {self.examples} examples of {self.passages} passages "
                f"with {self.facts} facts; give at least 1 of each, and at most {NUM_RELATIONS} facts."
            )
        if not 0 <= self.unrelated_share <= 1:
            raise AlmanacError(
                f"AlmanacConfig.lessons: unrelated_share of {name!r} is {self.unrelated_share}; choose a "
                "share from 0 to 1."
            )


READING_LESSONS = {
    "strangers": Lesson(7_000, passages=2, facts=1, unrelated_share=1.0),
    "namesakes": Lesson(12_000, passages=2, facts=1, unrelated_share=0.1),
    "paragraphs": Lesson(6_000, passages=2, facts=4, unrelated_share=0.1),
    "articles": Lesson(3_200, passages=2, facts=8, unrelated_share=0.1),
    "families": Lesson(15_000, passages=4, facts=1, unrelated_share=0.0),
    "crowds": Lesson(6_000, passages=4, facts=8, unrelated_share=0.0),
}
"""The lessons of the demo, in order; the last two are practised to the end. A small reader that starts with whole
articles copies from any of them (its loss stays at ln K). From one sentence a passage it learns to copy and to match
names in about 200 steps (docs/results/learning_to_read.md), four sentences and whole articles then take about 150 and
60 steps. A batch of families is as costly as one of crowds and has more than twice as many names to tell apart: turns
of both teach reading and leave more of the model to facts than crowds alone."""


class AlmanacError(UserError, ValueError):
    """A configuration that no world can satisfy: what is wrong, and how to mend it."""


@checked
@dataclasses.dataclass(frozen=True)
class AlmanacConfig:
    """Sizes and seed of a generated world; all plain fields, so gin can set them.

    Attributes:
      num_entities: entities N, one article each.
      seed: the one seed; every random draw has its own stream derived from it.
      num_first_names, num_last_names: sizes of the two name inventories; None scales 64 x 128 (for 1,000
        entities) with the square root of ``num_entities``, so that the share of taken names, hence the
        density of namesakes, stays the same.
      num_asked_facts: facts that closed-book training asks about; the popularity rank runs from 1 to this.
      num_training_questions: closed-book training questions, Zipf(1.0) over the ranks.
      zipf_shift: q in the weight 1/(rank + q) of Zipf-Mandelbrot; 0 is plain Zipf(1.0).
      head_ranks: ranks that count as head; None takes exactly as many as the splits need.
      tail_ranks: how many of the rarest ranks count as tail; the ranks between head and tail are the torso.
      head_share ... volatile_share: what part of each question split comes from each stratum; they sum to 1.
      questions_per_fact: how often a fact is asked in a question split, another phrasing each time (1 or 2).
      gate_facts, validation_facts: distinct facts in these splits.
      test_questions: test questions, so ``test_questions / questions_per_fact`` distinct facts.
      lessons: reading examples with randomised values; one split ``train_open_book_<name>`` for each.
      lesson_share: part of the lessons' examples that is generated; below 1 for a quick look.
      invented_name_share: part of the open-book examples whose name is drawn from the inventories, not from
        the corpus.
      num_retriever_examples: question, positive and hard negative for the dual encoder.
    """

    num_entities: Count = 1000
    seed: Seed = 0
    num_first_names: Count | None = None
    num_last_names: Count | None = None
    num_asked_facts: Count = 6000
    num_training_questions: Count = 60_000
    zipf_shift: Weight = 0.0
    head_ranks: Natural | None = None
    tail_ranks: Natural = 1500
    head_share: Fraction = 0.40
    torso_share: Fraction = 0.15
    tail_share: Fraction = 0.16
    never_share: Fraction = 0.17
    volatile_share: Fraction = 0.12
    questions_per_fact: Count = 2
    gate_facts: Natural = 1200
    validation_facts: Natural = 600
    test_questions: Natural = 4000
    lessons: Mapping[str, Lesson] = dataclasses.field(default_factory=lambda: dict(READING_LESSONS))
    lesson_share: Fraction = 1.0
    invented_name_share: Fraction = 0.5
    num_retriever_examples: Natural = 16_000

    def rng(self, stream: str) -> np.random.Generator:
        """The random stream of that name; streams are independent of one another and of the calls' order."""
        return np.random.default_rng([self.seed, zlib.crc32(stream.encode())])

    @property
    def inventory_sizes(self) -> tuple[int, int]:
        """Numbers of first and of last name parts."""
        scale = math.sqrt(self.num_entities / 1000)
        return (
            self.num_first_names or max(4, round(64 * scale)),
            self.num_last_names or max(8, round(128 * scale)),
        )

    @property
    def split_facts(self) -> dict[str, int]:
        """Distinct facts of each question split."""
        return {
            "gate": self.gate_facts,
            "validation": self.validation_facts,
            "test": self.test_questions // self.questions_per_fact,
        }

    def facts_per_stratum(self, split: str) -> dict[str, int]:
        """How many facts of each stratum a split holds: the shares, rounded by largest remainder."""
        shares = np.array([getattr(self, f"{stratum}_share") for stratum in STRATA])
        counts = largest_remainder(shares, self.split_facts[split])
        return dict(zip(STRATA, counts.tolist(), strict=True))

    @property
    def digest(self) -> str:
        """Twelve hex digits that name this configuration."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:12]

    def check(self) -> None:
        """Raises AlmanacError where fields contradict one another, whatever the world looks like."""
        shares = sum(getattr(self, f"{stratum}_share") for stratum in STRATA)
        if abs(shares - 1) > 1e-6:
            raise AlmanacError(
                f"AlmanacConfig: the five stratum shares sum to {shares:g}; make them sum to 1."
            )
        if self.questions_per_fact not in (1, 2):
            raise AlmanacError(
                f"AlmanacConfig.questions_per_fact is {self.questions_per_fact}; a fact is asked once or "
                "twice."
            )
        if self.test_questions % self.questions_per_fact:
            raise AlmanacError(
                f"AlmanacConfig.test_questions is {self.test_questions}, not a multiple of "
                f"questions_per_fact = {self.questions_per_fact}; choose one that is."
            )
        if self.num_training_questions < self.num_asked_facts:
            raise AlmanacError(
                f"AlmanacConfig.num_training_questions is {self.num_training_questions}, but each of the "
                f"num_asked_facts = {self.num_asked_facts} is asked at least once; raise the one or lower "
                "the other."
            )
        first, last = self.inventory_sizes
        if first * last < 2 * self.num_entities:
            raise AlmanacError(
                f"AlmanacConfig: {first} first and {last} last names give {first * last} full names, too "
                f"few for {self.num_entities} entities; raise num_first_names or num_last_names."
            )
        for name, lesson in self.lessons.items():
            lesson.check(name)


def largest_remainder(weights: np.ndarray, total: int) -> np.ndarray:
    """Splits ``total`` in whole numbers proportional to ``weights`` [n]; ties go to the earlier entry.

    Returns int64 [n] that sums to ``total``.
    """
    ideal = np.asarray(weights, np.float64) * (total / np.sum(weights))
    counts = np.floor(ideal).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - ideal, kind="stable")[:missing]] += 1
    return counts
