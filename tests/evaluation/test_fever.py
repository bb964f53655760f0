from __future__ import annotations

import gzip
import json
import os
import pathlib

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.evaluation import fever

needs_data = pytest.mark.skipif(not os.environ.get("EXPERTRAG_DATA"), reason="EXPERTRAG_DATA is not set")


@needs_data
def test_every_value_equals_the_official_scorer():
    scoring = pathlib.Path(os.environ["EXPERTRAG_DATA"]) / "scoring"

    def records(name):
        with gzip.open(scoring / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    cases = json.loads((scoring / "expected.json").read_text())["fever"]
    assert len(cases) == 5
    for case in cases:
        gold, predictions = (
            records(case["actual"])[: case["first_n"]],
            records(case["predictions"])[: case["first_n"]],
        )
        got = fever.fever_score(gold, predictions, case["max_evidence"])
        assert got == pytest.approx(case.get("asserted") or case["computed"], abs=1e-12)


def _claim(label, *groups):
    return {"label": label, "evidence": [[[0, 0, page, line] for page, line in group] for group in groups]}


def _prediction(label, *sentences):
    return {"predicted_label": label, "predicted_evidence": [list(sentence) for sentence in sentences]}


def test_half_a_group_is_not_evidence():
    claim = _claim("SUPPORTS", [("p", 1), ("q", 2)], [("r", 3)])
    half = fever.fever_score([claim], [_prediction("supports", ("p", 1), ("z", 0))])
    assert half == {"strict_score": 0, "label_accuracy": 1, "precision": 0.5, "recall": 0, "f1": 0}
    whole = fever.fever_score([claim], [_prediction("SUPPORTS", ("q", 2), ("p", 1))])
    assert whole["strict_score"] == whole["f1"] == 1
    assert (
        fever.fever_score([claim], [_prediction("SUPPORTS", ("z", 0), ("r", 3))], max_evidence=1)["recall"]
        == 0
    )


def test_not_enough_info_asks_for_no_evidence():
    scores = fever.fever_score([_claim("NOT ENOUGH INFO", [(None, None)])], [_prediction("NOT ENOUGH INFO")])
    assert scores["strict_score"] == 1 and scores["recall"] == 0


def test_one_prediction_per_claim():
    with pytest.raises(UserError, match="1 claims but 0"):
        fever.fever_score([_claim("SUPPORTS")], [])
