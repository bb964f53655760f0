"""The demo in small, a tenth of its world and far fewer steps: every stage, the report, the export. What it learns is
the full demo's affair, and so few passages get the exact index in ScaNN's place."""

import json
import os
import subprocess
import sys

import pytest

SMALL = (
    "AlmanacConfig.num_entities = 100",
    "AlmanacConfig.num_asked_facts = 600",
    "AlmanacConfig.tail_ranks = 150",
    "AlmanacConfig.num_training_questions = 6000",
    "AlmanacConfig.num_retriever_examples = 1600",
    "AlmanacConfig.lesson_share = 0.1",
    "AlmanacConfig.gate_facts = 120",
    "AlmanacConfig.validation_facts = 60",
    "AlmanacConfig.test_questions = 200",
    "TransformerConfig.num_encoder_layers = 1",
    "TransformerConfig.num_decoder_layers = 1",
    "TransformerConfig.expert_layer_period = 1",
    # a small world's vocabulary splits more words
    "demo.task_feature_lengths = {'inputs': 20, 'targets': 8, 'query': 20, 'passages': 112}",
    "demo.passage_length = 90",
    "ExpertRAG.max_target_length = 8",
    # equal shapes, so that lessons of as many passages share a compiled program
    "Lesson.length = 112",
    "Lesson.batch_size = 8",
    "paragraphs/Lesson.batch_size = 8",
    "articles/Lesson.batch_size = 8",
    "families/Lesson.batch_size = 8",
    "crowds/Lesson.batch_size = 8",
    "paragraphs/Lesson.length = 112",
    "articles/Lesson.length = 112",
    "crowds/Lesson.length = 112",
    "Measuring.buckets = (1, 64)",
    "DualEncoder.steps = 100",
    "ExpertRAG.gate_steps = 40",
    "Lesson.steps = 5",
    "strangers/Lesson.steps = 5",
    "namesakes/Lesson.steps = 5",
    "paragraphs/Lesson.steps = 5",
    "articles/Lesson.steps = 5",
    "Measuring.throughput_questions = 64",
    "Measuring.rounds = (1, 1)",
    "Measuring.latency_questions = 5",
    "Measuring.exported_questions = 20",
)
POLICY_KEYS = {
    "em", "em_interval", "em_by_stratum", "retrieval_rate", "encoder_tokens", "padded_encoder_tokens",
    "questions_per_second", "p50_ms", "p95_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, xla_flags):
    directory = tmp_path_factory.mktemp("almanac")
    arguments = ["--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={directory}", "--gin.TRAIN_STEPS=45"]
    bindings = [f"--gin_bindings={line}" for line in SMALL]
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu"}  # one device, as a laptop has
    command = [sys.executable, "-m", "expertrag_jax.demo", *arguments, *bindings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


def test_the_report_has_everything(run):
    report = json.loads((run / "report.json").read_text())
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
    assert "<html" in (run / "report.html").read_text()[:200].lower()


def test_the_retriever_finds_the_articles(run):
    report = json.loads((run / "report.json").read_text())
    assert report["editions"]["1"]["retriever_recall"] >= 0.95


def test_training_lowers_the_losses(run):
    losses = json.loads((run / "report.json").read_text())["losses"]
    assert set(losses) == {"retriever", "generator", "gate"}
    for points in (losses["retriever"], losses["generator"]):
        assert points[-1][1] < points[0][1]


def test_the_export_answers_the_file(run):
    questions = [json.loads(line) for line in (run / "questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [a["question"] for a in answers] == [q["question"] for q in questions]
    assert len(answers) == 20 and all("prediction" in a and "p_ret" in a for a in answers)
