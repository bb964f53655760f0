"""Which facts are asked in training and how often, and which facts the gate, validation and test splits hold.

A fact is ``entity * NUM_RELATIONS + relation``.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tasks.almanac.config import QUESTION_SPLITS, STRATA, AlmanacConfig, AlmanacError, largest_remainder
from tasks.almanac.phrasing import NUM_RELATIONS

HEAD, TORSO, TAIL, NEVER, VOLATILE = range(len(STRATA))


@dataclasses.dataclass(frozen=True)
class Popularity:
    """Popularity of the F facts.

    Attributes:
      asked_facts: int64 [A], the asked facts in rank order, the most popular first.
      counts: int64 [A], how many closed-book training questions each of them has.
      rank: int32 [F], 1 for the most popular, 0 for a fact that is never asked.
      stratum: int8 [F], index in STRATA.
      weight: float32 [F], 1 / (rank + q); a fact that is never asked has the weight of rank A + 1.
      asked: int32 [F], training questions about each fact.
      split_facts: the facts of "gate", "validation" and "test": int64 [n], disjoint, in random order.
    """

    asked_facts: np.ndarray
    counts: np.ndarray
    rank: np.ndarray
    stratum: np.ndarray
    weight: np.ndarray
    asked: np.ndarray
    split_facts: dict[str, np.ndarray]


def draw_popularity(config: AlmanacConfig, volatile_relation: int) -> Popularity:
    """Ranks the asked facts at random, counts their questions and draws the question splits.

    The head's ranks hold enough facts of the volatile relation for all splits (the model must know what later
    goes stale); every other rank is drawn from all remaining facts alike. Raises AlmanacError where the world
    has too few facts of a stratum.
    """
    num_facts = config.num_entities * NUM_RELATIONS
    asked_facts, head_ranks = _rank_facts(config, volatile_relation, num_facts)
    num_asked = len(asked_facts)
    rank = np.zeros(num_facts, np.int32)
    rank[asked_facts] = np.arange(1, num_asked + 1)

    stratum = np.full(num_facts, TORSO, np.int8)
    stratum[(rank >= 1) & (rank <= head_ranks)] = HEAD
    stratum[rank > num_asked - config.tail_ranks] = TAIL
    stratum[rank == 0] = NEVER
    stratum[volatile_relation::NUM_RELATIONS] = VOLATILE

    weight = 1.0 / (np.where(rank > 0, rank, num_asked + 1) + config.zipf_shift)
    counts = question_counts(weight[asked_facts], config.num_training_questions)
    asked = np.zeros(num_facts, np.int32)
    asked[asked_facts] = counts
    return Popularity(
        asked_facts=asked_facts,
        counts=counts,
        rank=rank,
        stratum=stratum,
        weight=weight.astype(np.float32),
        asked=asked,
        split_facts=_draw_splits(config, stratum, rank, head_ranks),
    )


def question_counts(weights: np.ndarray, total: int) -> np.ndarray:
    """Questions per fact: ``total`` split in proportion to ``weights`` [A], but at least one for each.

    The facts whose share is below one question get one, and the others share what is left by largest
    remainder; so counts follow 1/rank exactly (to rounding) down to the rank where they reach one.
    Deterministic.
    """
    counts = np.ones(len(weights), np.int64)
    free = np.ones(len(weights), bool)
    while free.any():
        left = total - int((~free).sum())
        share = weights * (left / weights[free].sum())
        below = free & (share < 1)
        if not below.any():
            counts[free] = largest_remainder(weights[free], left)
            break
        free &= ~below
    return counts


def _rank_facts(config: AlmanacConfig, volatile_relation: int, num_facts: int) -> tuple[np.ndarray, int]:
    """The asked facts in rank order, and the number of head ranks."""
    needs = [config.facts_per_stratum(split) for split in QUESTION_SPLITS]
    need_static = sum(need["head"] for need in needs)
    need_volatile = sum(need["volatile"] for need in needs)
    head_ranks = config.head_ranks if config.head_ranks is not None else need_static + need_volatile
    volatile_in_head = round(head_ranks * need_volatile / max(1, need_static + need_volatile))
    if not head_ranks + config.tail_ranks <= config.num_asked_facts <= num_facts:
        raise AlmanacError(
            f"AlmanacConfig: head_ranks = {head_ranks} and tail_ranks = {config.tail_ranks} must fit in "
            f"num_asked_facts = {config.num_asked_facts}, and these in the world's {num_facts} facts; raise "
            "num_entities and num_asked_facts or lower gate_facts, validation_facts and test_questions."
        )
    if volatile_in_head > config.num_entities:
        raise AlmanacError(
            f"AlmanacConfig: the splits need {volatile_in_head} facts of one relation, but num_entities = "
            f"{config.num_entities}; raise num_entities or lower volatile_share."
        )
    rng = config.rng("popularity")
    facts = rng.permutation(num_facts)
    is_volatile = facts % NUM_RELATIONS == volatile_relation
    volatile, static = facts[is_volatile], facts[~is_volatile]
    static_in_head = head_ranks - volatile_in_head
    head = rng.permutation(np.concatenate([volatile[:volatile_in_head], static[:static_in_head]]))
    others = rng.permutation(np.concatenate([volatile[volatile_in_head:], static[static_in_head:]]))
    return np.concatenate([head, others[: config.num_asked_facts - head_ranks]]), head_ranks


def _draw_splits(
    config: AlmanacConfig, stratum: np.ndarray, rank: np.ndarray, head_ranks: int
) -> dict[str, np.ndarray]:
    rng = config.rng("splits")
    well_known = (rank >= 1) & (rank <= head_ranks)
    pools = []
    for index in range(len(STRATA)):
        eligible = stratum == index
        if index == VOLATILE:
            eligible &= well_known
        pools.append(rng.permutation(np.flatnonzero(eligible)))
    used = [0] * len(STRATA)
    splits = {}
    for split in QUESTION_SPLITS:
        chosen = []
        for index, (name, need) in enumerate(config.facts_per_stratum(split).items()):
            start, used[index] = used[index], used[index] + need
            if used[index] > len(pools[index]):
                raise AlmanacError(
                    f"AlmanacConfig: the splits need at least {used[index]} {name} facts and the world has "
                    f"{len(pools[index])}; raise num_entities, num_asked_facts or the stratum's ranks, or "
                    f"lower {name}_share."
                )
            chosen.append(pools[index][start : used[index]])
        splits[split] = rng.permutation(np.concatenate(chosen))
    return splits
