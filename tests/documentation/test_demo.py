"""The pages that begin with the demo, and what the demo leaves, at a tenth of its size."""

import json

import pytest

from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.index import open_index

POLICY_KEYS = {
    "em", "em_interval", "em_by_stratum", "retrieval_rate", "encoder_tokens", "padded_encoder_tokens",
    "questions_per_second", "p50_ms", "p95_ms",
}  # fmt: skip


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def demo(walk):
    """The demo's folder, after the commands of docs/rag.md."""
    return walk("docs/rag.md") / "runs/almanac"


def test_the_commands_of_a_page_run_in_its_order(walk, demo_page):
    walk(demo_page)


def test_the_report_of_the_demo_has_everything(demo):
    report = json.loads((demo / "report.json").read_text())
    assert set(report["editions"]) == {"1", "2"}
    for edition in report["editions"].values():
        assert set(edition["policies"]) == {"never", "always", "random", "gate", "oracle"}
        for policy in edition["policies"].values():
            assert POLICY_KEYS <= set(policy)
        quality = {"auroc", "auroc_static_relations", "average_precision", "ece", "normalised_area"}
        assert quality <= set(edition["gate_quality"])
        assert edition["policies"]["never"]["retrieval_rate"] == 0
        assert edition["policies"]["always"]["retrieval_rate"] == 1
        # computing less: the gate's padded tokens lie between those of the two arms
        padded = {name: edition["policies"][name]["padded_encoder_tokens"] for name in ("never", "gate", "always")}
        assert padded["never"] <= padded["gate"] <= padded["always"]
    assert "<html" in (demo / "report.html").read_text()[:200].lower()


def test_the_demos_retriever_finds_the_articles(demo):
    report = json.loads((demo / "report.json").read_text())
    assert report["editions"]["1"]["retriever_recall"] >= 0.95


def test_training_lowers_the_demos_losses(demo):
    losses = json.loads((demo / "report.json").read_text())["losses"]
    assert {"retriever", "generator", "gate"} <= set(losses)
    for points in (losses["retriever"], losses["generator"]):
        assert points[-1][1] < points[0][1]


def test_the_demos_export_answers_the_file(demo):
    questions, answers = (records(demo / f"{name}.jsonl") for name in ("questions", "answers"))
    assert [a["question"] for a in answers] == [q["question"] for q in questions]
    assert len(answers) == 20 and all("prediction" in a and "p_ret" in a for a in answers)


def test_rag_answers_the_changed_questions_from_either_index(demo):
    first, second = (records(demo / f"changed_by_index_{edition}.jsonl") for edition in (1, 2))
    assert first and [a["question"] for a in first] == [a["question"] for a in second]
    assert all(len(answer["passages"]) == 4 for answer in (*first, *second))


def test_rag_embeds_the_passages_again_below_versions_dir(demo):
    refreshed = open_index(versions.current(demo / "versions"))
    assert refreshed.manifest.encoder_digest != open_index(demo / "index_1").manifest.encoder_digest


def test_mining_adds_negatives_to_the_files_of_questions(walk):
    folder = walk("docs/retriever_training.md")
    given, first, second = (records(folder / f"{name}.jsonl") for name in ("train", "train_bm25", "train_mined"))
    for asked, one, two in zip(given, first, second, strict=True):
        mined, again = one["hard_negative_passage_ids"], two["hard_negative_passage_ids"]
        assert mined and again[: len(mined)] == mined and one.items() >= asked.items()
        assert not {*again} & {*asked["gold_passage_ids"]}
