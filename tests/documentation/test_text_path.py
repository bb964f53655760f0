"""The pages that begin with passages and questions in files, and what their commands leave."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from expertrag_jax import encoders
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.training.pretrained import read_metadata

PATH = "docs/wikipedia.md"


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_commands_of_a_page_run_in_its_order(walk, file_page):
    walk(file_page)


def test_the_dual_encoder_learns_in_both_stages(walk):
    log = records(walk(PATH) / "runs/wikipedia/retriever/logs/metrics.jsonl")
    assert [record["phase"] for record in log] == ["inverse_cloze"] * 2 + ["questions"] * 2
    cloze, questions = ([r["loss"] for r in log if r["phase"] == name] for name in ("inverse_cloze", "questions"))
    assert cloze[-1] < cloze[0] and questions[-1] < questions[0]


def test_the_hybrid_index_belongs_to_the_retriever(walk):
    folder = walk(PATH) / "runs/wikipedia"
    loaded = open_index(folder / "index")
    encoder = encoders.load_encoder(folder / "retriever")
    assert (loaded.manifest.kind, loaded.manifest.dimension) == ("hybrid", 12)
    assert loaded.index.dense.kind == "scann" and not loaded.index.dense.is_exact
    assert loaded.manifest.encoder_digest == encoder.digest
    assert loaded.manifest.vocabulary_digests == {"reader": encoder.vocabulary.digest} | {
        "retriever": encoder.vocabulary.digest
    }
    retriever = encoders.open_retriever(loaded.directory, folder / "retriever")
    found = retriever.retrieve(["Where does Bela Korv live?"], encoder.tokenise(["Where does Bela Korv live?"]), 2)
    assert loaded.passages.titles[found.rows[0, 0]] == "Bela Korv"


def test_the_reader_holds_the_retrievers_query_encoder_and_runs_both_phases(walk):
    folder = walk(PATH) / "runs/wikipedia"
    reader = encoders.load_encoder(folder / "reader")
    trained = encoders.load_encoder(folder / "retriever")
    assert reader.digest == trained.digest
    tokens = trained.tokenise(["Where does Bela Korv live?"])
    np.testing.assert_array_equal(reader.encode_queries(tokens), trained.encode_queries(tokens))
    log = records(folder / "reader/logs/metrics.jsonl")
    assert {record["phase"] for record in log} == {"generator", "gate"}
    facts = read_metadata(folder / "reader")
    assert facts["num_passages"] == 2 and facts["index_dir"].endswith("runs/wikipedia/index")


def test_the_configuration_is_kept(walk, runner):
    folder = walk(PATH)
    text = (folder / "runs/wikipedia/reader/config.gin").read_text()
    assert "generator_steps = %TRAIN_STEPS" in text and "TRAIN_STEPS = 24" in text
    runner.run(folder, "expertrag train --gin_file=runs/wikipedia/reader/config.gin --dry_run")


def test_the_report_has_all_policies_and_the_retrieval(walk):
    folder = walk(PATH) / "runs/wikipedia/reader/evaluation"
    report = json.loads((folder / "report.json").read_text())
    policies = report["editions"]["test"]["policies"]
    assert set(policies) == {"never", "always", "random", "gate", "oracle"}
    assert all(0 <= policy["em"] <= policy["f1"] <= 1 for policy in policies.values())
    assert (policies["never"]["retrieval_rate"], policies["always"]["retrieval_rate"]) == (0, 1)
    assert policies["always"]["encoder_tokens"] > policies["never"]["encoder_tokens"]
    recall = report["retrieval"]["recall"]
    assert set(recall) == {"1", "2", "5", "20", "100"} and recall["1"] <= recall["2"] <= recall["100"]
    assert len(records(folder / "predictions.jsonl")) == 4


def test_model_and_export_answer_alike(walk, runner):
    folder = walk(PATH)
    asked = "--questions=test.jsonl --retrieve=always --output=export.jsonl"
    runner.run(folder, f"expertrag infer --export_dir=runs/wikipedia/export {asked}")
    one, two = records(folder / "runs/wikipedia/answers/test-predict.jsonl"), records(folder / "export.jsonl")
    assert [record["prediction"] for record in one] == [record["prediction"] for record in two]
    assert all(len(record["passages"]) == 2 for record in one)


def test_the_program_of_the_page_splits_the_real_questions_by_article(tmp_path, documentation, pages, runner):
    data = pathlib.Path(os.environ.get("EXPERTRAG_DATA", "")) / "qa" / "squad_new_wiki_train.jsonl.gz"
    if not data.is_file():
        pytest.skip("EXPERTRAG_DATA names no folder with qa/squad_new_wiki_train.jsonl.gz")
    shutil.copy(data, tmp_path)
    (program,) = [c.text for c in pages.commands(PATH, documentation[PATH]) if c.language == "python"]
    runner.run_python(tmp_path, program)
    articles = [{q["article"] for q in records(tmp_path / f"{name}.jsonl")} for name in ("train", "gate", "validation")]
    assert len(articles[1]) == len(articles[2]) == 5 < len(articles[0])
    assert len(set.union(*articles)) == sum(map(len, articles))


def test_dro_answers_with_the_two_passages_that_it_chose(walk):
    answers = records(walk("docs/dro.md") / "runs/two_hop/answers.jsonl")
    assert len(answers) == 8 and all(len(answer["passages"]) == 2 for answer in answers)


def test_text_is_learned_before_questions_and_in_one_run(walk):
    folder = walk("docs/raw_text.md")
    log = records(folder / "runs/text/reader/logs/metrics.jsonl")
    assert list(dict.fromkeys(record["phase"] for record in log)) == ["span_corruption", "mixture"]
    assert all("prediction" in answer for answer in records(folder / "answers.jsonl"))


def test_two_processes_train_one_model(walk):
    folder = walk("docs/pods.md") / "runs/two_processes"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
