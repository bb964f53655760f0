from __future__ import annotations

import json
import os
import pathlib

import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.evaluation import kilt

needs_data = pytest.mark.skipif(not os.environ.get("EXPERTRAG_DATA"), reason="EXPERTRAG_DATA is not set")


def _scoring() -> pathlib.Path:
    return pathlib.Path(os.environ["EXPERTRAG_DATA"]) / "scoring"


def _records(name: str) -> list[dict]:
    return [json.loads(line) for line in (_scoring() / name).read_text("utf-8").splitlines() if line.strip()]


@needs_data
def test_downstream_equals_the_official_scorer():
    cases = json.loads((_scoring() / "expected.json").read_text())["kilt_downstream"]
    assert len(cases) == 3
    for case in cases:
        got = kilt.downstream(_records(case["gold"]), _records(case["guess"]))
        for group in ("asserted", "computed"):
            for part, expected in case[group].items():
                assert {name: got[part][name] for name in expected} == pytest.approx(expected, abs=1e-12), (
                    case["guess"]
                )


@needs_data
def test_retrieval_equals_the_official_scorer():
    cases = json.loads((_scoring() / "expected.json").read_text())["kilt_retrieval"]
    assert len(cases) == 6
    for case in cases:
        got = kilt.retrieval(_records(case["gold"]), _records(case["guess"]), case["ks"], case["rank_keys"])
        expected = case["asserted"]
        assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-12), case


def _record(*pages: str, answer: str = "x") -> dict:
    return {"id": 1, "output": [{"answer": answer, "provenance": [{"wikipedia_id": page} for page in pages]}]}


def test_a_partial_evidence_set_holds_one_place_until_it_is_complete():
    gold = {"id": 1, "output": _record("a", "b", "c")["output"]}
    scores = kilt.rank_scores(gold, _record("a", "z", "b", "c"), ks=(1, 2))
    # a, b and c shrink to one point, below z
    assert scores["precision@1"] == 0 and scores["recall@2"] == 1 and scores["Rprec"] == pytest.approx(2 / 3)


def test_repeated_predictions_and_repeated_sets_count_once():
    gold = {"id": 1, "output": _record("a")["output"] + _record("a")["output"] + _record("b")["output"]}
    scores = kilt.rank_scores(gold, _record("a", "a", "b"), ks=(2,))
    assert scores["recall@2"] == 1 and scores["precision@2"] == 1


def test_provenance_without_the_key_is_passed_over():
    guess = {"id": 1, "output": [{"answer": "x", "provenance": [{"title": "t"}, {"wikipedia_id": " a "}]}]}
    assert kilt.rank_scores(_record("a"), guess, ks=(1,))["precision@1"] == 1
    assert kilt.rank_scores(_record(), guess, ks=(1,)) == {
        "Rprec": 0,
        "precision@1": 0,
        "recall@1": 0,
        "success_rate@1": 0,
    }


def test_guesses_are_found_by_id():
    gold = [{**_record("a", answer="one"), "id": 1}, {**_record("b", answer="two"), "id": 2}]
    assert kilt.downstream(gold, gold[::-1])["kilt"]["KILT-em"] == 1
    with pytest.raises(UserError, match="lack 1"):
        kilt.downstream(gold, gold[:1])
    with pytest.raises(UserError, match="twice"):
        kilt.downstream(gold, gold + gold[:1])
    with pytest.raises(UserError, match="no records"):
        kilt.downstream([], gold)
