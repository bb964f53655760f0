"""KILT's scores (Petroni et al. 2021): the answer, the provenance, and the answer only where the provenance
is right.

A record is ``{"id", "output": [{"answer", "provenance": [{"wikipedia_id", ...}]}]}``. A gold record has one
output per accepted answer or evidence set; a guess has exactly one. Ids are compared as stripped strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertrag_jax.errors import UserError
from expertrag_jax.evaluation import answers

Record = dict[str, Any]


def downstream(gold: Sequence[Record], guesses: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Answer scores, KILT scores and page-level retrieval of a data set.

    Returns:
      {"downstream": {accuracy, em, f1, rougel}, "kilt": {"KILT-accuracy", "KILT-em", "KILT-f1",
      "KILT-rougel"}, "retrieval": {"Rprec", "recall@5"}}. A KILT score counts a question only if its
      R-precision is 1.

    Raises:
      UserError: gold without records, a gold id without a guess, an id twice, a guess with several outputs.
    """
    totals: dict[str, dict[str, float]] = {"downstream": {}, "kilt": {}, "retrieval": {}}
    pairs = _align(gold, guesses)
    for gold_record, guess in pairs:
        accepted = [str(output["answer"]) for output in gold_record["output"] if output.get("answer")]
        ranking = rank_scores(gold_record, guess, ks=(5,))
        for name, score in answers.kilt(str(guess["output"][0].get("answer", "")), accepted).items():
            _add(totals["downstream"], name, score)
            _add(totals["kilt"], f"KILT-{name}", score if ranking["Rprec"] == 1 else 0.0)
        for name in ("Rprec", "recall@5"):
            _add(totals["retrieval"], name, ranking[name])
    return {
        part: {name: total / len(pairs) for name, total in scores.items()} for part, scores in totals.items()
    }


def retrieval(
    gold: Sequence[Record],
    guesses: Sequence[Record],
    ks: Sequence[int] = (1, 5, 10, 20),
    rank_keys: Sequence[str] = ("wikipedia_id",),
) -> dict[str, float]:
    """Mean `rank_scores` over a data set; arguments as there, raises as `downstream`."""
    pairs = _align(gold, guesses)
    totals: dict[str, float] = {}
    for gold_record, guess in pairs:
        for name, score in rank_scores(gold_record, guess, ks, rank_keys).items():
            _add(totals, name, score)
    return {name: total / len(pairs) for name, total in totals.items()}


def rank_scores(
    gold: Record,
    guess: Record,
    ks: Sequence[int] = (1, 5, 10, 20),
    rank_keys: Sequence[str] = ("wikipedia_id",),
) -> dict[str, float]:
    """Ranking scores of one question.

    R-precision: of the first R predictions, R the size of an evidence set, the fraction that is in the set;
    the best set counts. For the others each evidence set is one point of the rank, standing where its last
    part was found.

    Args:
      gold, guess: records; the guess's provenance is in rank order.
      ks: cut-offs.
      rank_keys: the fields that identify a piece of evidence: page, page and section, or page and paragraphs.

    Returns:
      {"Rprec", "precision@k", "recall@k", "success_rate@k" for k in ks}.
    """
    predicted = _ids(guess["output"][0], rank_keys)
    evidence = [ids for output in gold["output"] if (ids := _ids(output, rank_keys))]
    sets = [
        set(ids) for index, ids in enumerate(evidence) if set(ids) not in [set(e) for e in evidence[:index]]
    ]
    r_precision = max((len(set(predicted[: len(ids)]) & ids) / len(ids) for ids in sets), default=0.0)
    scores = {"Rprec": r_precision}
    rank = _rank(predicted, sets)
    for k in ks:
        hits = sum(point is True for point in rank[:k])
        scores[f"precision@{k}"] = hits / k
        scores[f"recall@{k}"] = hits / len(sets) if sets else 0.0
        scores[f"success_rate@{k}"] = float(hits > 0)
    return scores


def _rank(predicted: list[str], evidence: list[set[str]]) -> list[bool | str]:
    """A point per complete set (True), partial set (its name) and prediction outside every set (False)."""
    missing = [set(ids) for ids in evidence]
    rank: list[bool | str] = []
    for prediction in predicted:
        inside = [index for index, ids in enumerate(missing) if prediction in ids]
        for index in inside:
            name = f"set {index}"
            if name in rank:  # the set moves down to where its latest part was found
                rank.remove(name)
            missing[index].remove(prediction)
            rank.append(name if missing[index] else True)
        if not inside:
            rank.append(False)
    return rank


def _ids(output: Record, rank_keys: Sequence[str]) -> list[str]:
    """Distinct ids of an output's provenance, in order; provenance that lacks a key is passed over."""
    ids = [
        "+".join(str(item[key]).strip() for key in rank_keys)
        for item in output.get("provenance") or []
        if all(key in item for key in rank_keys)
    ]
    return list(dict.fromkeys(ids))


def _align(gold: Sequence[Record], guesses: Sequence[Record]) -> list[tuple[Record, Record]]:
    by_id: dict[str, Record] = {}
    for guess in guesses:
        key = str(guess["id"]).strip()
        if key in by_id:
            raise UserError(f"KILT predictions answer id {key} twice: keep one record per question.")
        if len(guess["output"]) != 1:
            raise UserError(f"KILT prediction {key} has {len(guess['output'])} outputs: give exactly one.")
        by_id[key] = guess
    if not gold:
        raise UserError("the KILT gold file holds no records: name another file.")
    missing = [str(record["id"]) for record in gold if str(record["id"]).strip() not in by_id]
    if missing:
        raise UserError(
            f"KILT predictions lack {len(missing)} of the gold ids, the first is {missing[0]}: predict all."
        )
    return [(record, by_id[str(record["id"]).strip()]) for record in gold]


def _add(totals: dict[str, float], name: str, score: float) -> None:
    totals[name] = totals.get(name, 0.0) + score
