from __future__ import annotations

import dataclasses
import html.parser
import importlib.util
import io
import json
import pathlib
import re

import numpy as np
import pytest
from rich.console import Console

from expertrag_jax.evaluation import checks, gating, page, plots, report, table, words

_spec = importlib.util.spec_from_file_location("synthetic", pathlib.Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(synthetic)


@pytest.fixture(scope="module")
def example():
    return synthetic.built(checks=checks.almanac_checks)


def test_the_structure_is_the_promised_one(example):
    assert {"wall_seconds", "editions"} <= example.keys() and list(example["editions"]) == ["1", "2"]
    for edition in example["editions"].values():
        assert {"need", "gate_quality", "policies"} <= edition.keys()
        quality = {"auroc", "auroc_static_relations", "average_precision", "ece", "normalised_area"}
        assert quality <= edition["gate_quality"].keys()
        assert list(edition["policies"]) == ["never", "always", "random", "gate", "oracle"]
        for policy in edition["policies"].values():
            assert {"em", "em_interval", "em_by_stratum", "retrieval_rate", "encoder_tokens"} <= policy.keys()
            assert {"padded_encoder_tokens", "questions_per_second", "p50_ms", "p95_ms"} <= policy.keys()
            assert list(policy["em_by_stratum"]) == list(synthetic.STRATA)
            low, high = policy["em_interval"]
            assert low <= policy["em"] <= high


def test_the_numbers_are_those_of_the_arrays(example):
    result, edition = synthetic.edition(0), example["editions"]["1"]
    never, always = result.policies["never"].correct, result.policies["always"].correct
    gate = result.policies["gate"]
    assert edition["need"] == pytest.approx((~never & always).mean())
    assert edition["harm"] == pytest.approx((never & ~always).mean())
    shown = edition["policies"]["gate"]
    assert shown["em"] == pytest.approx(gate.correct.mean())
    assert shown["em_minus_always"] == pytest.approx(gate.correct.mean() - always.mean())
    volatile = result.strata == "volatile"
    assert shown["em_by_stratum"]["volatile"] == pytest.approx(gate.correct[volatile].mean())
    assert shown["always_right_kept_by_stratum"]["volatile"] == pytest.approx(
        gate.correct[volatile & always].mean()
    )
    assert shown["em_zipf"] == pytest.approx((gate.correct * result.weights).sum() / result.weights.sum())
    static = result.static
    assert edition["gate_quality"]["auroc_static_relations"] == pytest.approx(
        gating.auroc(result.p_ret[static], (~never & always)[static])
    )


def test_it_is_json_and_a_page_can_be_drawn_again_from_it(example, tmp_path):
    path = report.write_report(example, tmp_path / "deep" / "run")
    stored = json.loads((tmp_path / "deep" / "run" / "report.json").read_text())
    assert stored == example
    assert page.render(stored) == path.read_text(encoding="utf-8")
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]


class _Page(html.parser.HTMLParser):
    void = {"meta", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.scripts = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_is_well_formed(example):
    text = page.render(example)
    parser = _Page()
    parser.feed(text)
    assert not parser.open and not parser.scripts
    assert len(parser.images) == 2 * 2 + 2 + 1  # two per edition, two losses, the expert load
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in parser.images)
    assert not re.search(r"(src|href)=[\"']?http|@import|url\(", text)
    assert "width=device-width" in text and "Seed 17." in text and "9 min 31 s" in text
    assert example["versions"]["jax"] in text
    assert len(text) < 2_000_000


def test_missing_parts_leave_no_trace():
    result = dataclasses.replace(
        synthetic.edition(3, questions=60),
        weights=None,
        static=None,
        speed_up=None,
        retriever_recall=float("nan"),
    )
    built = report.build_report({"1": result}, 1.0, replicates=20)
    text = page.render(built)
    assert built["editions"]["1"]["gate_quality"]["auroc_static_relations"] is None
    assert "nan" not in json.dumps(built).lower() and "None" not in text
    assert "<h2>Training" not in text and "Promises" not in text and "Zipf" not in text


def test_a_gate_with_nothing_to_decide_is_reported_as_undefined():
    result = synthetic.edition(4, questions=50)
    right = report.PolicyResult(np.ones(50, bool), np.zeros(50, bool), 1.0, 1.0)
    result = dataclasses.replace(result, policies=dict.fromkeys(("never", "always", "gate"), right))
    built = report.build_report({"1": result}, 1.0, replicates=20, checks=checks.almanac_checks)
    assert built["editions"]["1"]["gate_quality"]["auroc"] is None
    assert {check["met"] for check in built["checks"] if check["name"].startswith("AUROC against")} == {None}
    page.render(built)


def test_wrong_arrays_are_refused():
    result = synthetic.edition(5, questions=50)
    with pytest.raises(ValueError, match="different lengths"):
        report.build_report({"1": dataclasses.replace(result, p_ret=result.p_ret[:-1])}, 1.0)
    with pytest.raises(ValueError, match="lacks the policies gate"):
        policies = {name: found for name, found in result.policies.items() if name != "gate"}
        report.build_report({"1": dataclasses.replace(result, policies=policies)}, 1.0)


def test_checks_compare_in_the_right_direction(example):
    by_name = {check["name"]: check for check in example["checks"]}
    assert len(by_name) == len(example["checks"]) == 15
    edition = example["editions"]["1"]
    gate = edition["policies"]["gate"]
    assert by_name["retrieval rate of the gate"]["met"] == (gate["retrieval_rate"] <= 0.6)
    assert by_name["gate minus always"]["met"] == (gate["em"] >= edition["policies"]["always"]["em"] - 0.01)
    assert by_name["AUROC against need"]["met"] == (edition["gate_quality"]["auroc"] >= 0.85)
    missed = json.loads(json.dumps(example))
    missed["editions"]["1"]["policies"]["gate"]["retrieval_rate"] = 0.61
    missed["editions"]["1"]["speed_up"]["fraction_of_bound"] = 0.89
    names = {check["name"] for check in checks.almanac_checks(missed) if check["met"] is False}
    assert {"retrieval rate of the gate", "fraction of the possible speed-up"} <= names


def changed(example, em=0.97, rate=0.5, fraction=0.95):
    """The checks of a report whose figures are far from their bars, but for these."""
    kept = [{**check, "met": True} for check in example["checks"]]
    measured = {
        "always retrieve, exact match": (em, em >= 0.9),
        "retrieval rate of the gate": (rate, rate <= 0.6),
        "fraction of the possible speed-up": (fraction, fraction >= 0.9),
    }
    found = {check["name"]: check for check in kept}
    for name, (value, met) in measured.items():
        found[name] |= {"measured": value, "met": met}
    return kept


def test_a_missed_promise_on_quality_names_the_figure_the_stage_and_what_to_change(example):
    assert checks.missed_quality(changed(example)) is None
    stage = "Phase 'namesakes' did not reach its mark."
    text = checks.missed_quality(changed(example, em=0.259, rate=0.7), [stage])
    assert text.startswith("2 of 13 promises on quality: always retrieve, exact match 0.259 (bar >= 0.9); ")
    assert "retrieval rate of the gate 0.700 (bar <= 0.6)" in text and stage in text
    assert "Lesson.steps" in text and "retrieval_budget" in text and "TRAIN_STEPS" not in text
    assert "Every stage with a mark reached it." in checks.missed_quality(changed(example, rate=0.7))


def test_a_missed_promise_on_speed_warns_and_does_not_fail(example):
    slow = changed(example, fraction=0.5)
    assert checks.missed_quality(slow) is None
    console = Console(file=io.StringIO(), width=80)
    table.print_report({**example, "checks": slow}, console)
    (line,) = [line for line in console.file.getvalue().splitlines() if "possible speed-up" in line]
    assert line.split()[-1] == "slow"
    assert "✗ slow:" in page.render({**example, "checks": slow})


def test_the_terminal_table_fits_80_columns(example):
    console = Console(file=io.StringIO(), width=80)
    table.print_report(example, console)
    text = console.file.getvalue()
    assert max(len(line) for line in text.splitlines()) <= 80
    for word in ("never asked", "padded", "oracle", "avoidable share f", "Promises", "wall time 9 min 31 s"):
        assert word in text
    gate = example["editions"]["1"]["policies"]["gate"]
    assert words.percent(gate["em"]).rstrip("%") in text and words.interval(gate["em_interval"]) in text
    assert "…" not in text  # nothing was cut


def test_figures_depend_on_the_numbers_alone(example):
    edition = example["editions"]["1"]
    first, second = (plots.accuracy_over_rate(edition) for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG")
    assert plots.reliability(edition) != plots.reliability(example["editions"]["2"])


def test_strata_are_ordered():
    assert report.strata_in_order(["zebra", "tail", "head", "ant"]) == ["head", "tail", "ant", "zebra"]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3.14, "3.1 s"), (75.2, "1 min 15 s"), (119.7, "2 min 00 s")]
)
def test_durations(seconds, expected):
    assert words.duration(seconds) == expected
