"""The FEVER score (Thorne et al. 2018): a claim's label, and whether the evidence for it was found.

A gold record has ``label`` and ``evidence``: groups of ``[annotation, evidence id, page, sentence]``, each
group enough on its own. A prediction has ``predicted_label`` and ``predicted_evidence``: ``[page, sentence]``
pairs in rank order. Records are paired by position, since ids repeat in blind sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertrag_jax.errors import UserError

NOT_ENOUGH = "NOT ENOUGH INFO"

Record = dict[str, Any]


def fever_score(
    gold: Sequence[Record], predictions: Sequence[Record], max_evidence: int | None = 5
) -> dict[str, float]:
    """Scores of a data set.

    Args:
      gold, predictions: records, one prediction per claim, in the same order.
      max_evidence: how many predicted sentences count; None for all.

    Returns:
      "strict_score": fraction of claims with the right label and, unless the label is NOT ENOUGH INFO, a
      complete group of evidence; "label_accuracy"; "precision" and "recall" of the evidence, averaged over
      the claims that have evidence (a claim without predicted sentences has precision 1); "f1" of those two
      averages.

    Raises:
      UserError: no claims, or another number of predictions.
    """
    if not gold or len(gold) != len(predictions):
        raise UserError(
            f"FEVER has {len(gold)} claims but {len(predictions)} predictions: give one per claim."
        )
    strict = right_label = precision = recall = with_evidence = 0.0
    for claim, prediction in zip(gold, predictions, strict=True):
        found = {(page, sentence) for page, sentence in prediction["predicted_evidence"][:max_evidence]}
        groups = [{(page, sentence) for _, _, page, sentence in group} for group in claim["evidence"]]
        complete = any(group <= found for group in groups)
        label_is_right = claim["label"].upper() == prediction["predicted_label"].upper()
        without_evidence = claim["label"].upper() == NOT_ENOUGH
        right_label += label_is_right
        strict += label_is_right and (without_evidence or complete)
        if not without_evidence:
            with_evidence += 1
            precision += _precision(prediction["predicted_evidence"][:max_evidence], groups)
            recall += complete or not groups
    precision = precision / with_evidence if with_evidence else 1.0
    recall = recall / with_evidence if with_evidence else 0.0
    return {
        "strict_score": strict / len(gold),
        "label_accuracy": right_label / len(gold),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }


def _precision(predicted: Sequence[Sequence[Any]], groups: list[set[tuple[Any, Any]]]) -> float:
    """Fraction of the predicted sentences, repetitions included, that are in any group; 1 without any."""
    useful = {item for group in groups for item in group if item[1] is not None}
    return sum(tuple(item) in useful for item in predicted) / len(predicted) if predicted else 1.0
