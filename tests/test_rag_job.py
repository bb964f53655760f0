"""RAG on the command line: trained, resumed, asked, with another index, with candidates that are refreshed."""

import json
import shutil

import numpy as np
import pytest

from expertrag_jax.main import main
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.retrieval.manifest import parameters_digest
from expertrag_jax.trained_model import open_model
from expertrag_jax.training import parameters

pytestmark = pytest.mark.usefixtures("fast_compile")
SMALL = (
    "--gin.BATCH_SIZE=8", "--gin.NUM_PASSAGES=2", "--gin.MAX_TARGET_LENGTH=8", "--gin.train.train.log_period=1",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 48}",
    *(f"--gin.config.TransformerConfig.{size}" for size in ("embed_dim=16", "mlp_dim=32", "num_heads=2", "head_dim=8")),
    *(f"--gin.config.TransformerConfig.num_{side}_layers=1" for side in ("encoder", "decoder")),
    *(f"--gin.dual_encoder.DualEncoderConfig.{size}" for size in ("embed_dim=16", "output_dim=12")),
)  # fmt: skip


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tiny, tiny_model, tmp_path_factory):
    """Questions, a dual encoder's MODEL_DIR and dense indexes of two editions."""
    folder = tmp_path_factory.mktemp("rag")
    records = [
        {"question": f"Where does {name} live?", "answers": [tiny_model.TOWNS[place % 5]]}
        for place, name in enumerate(tiny_model.NAMES)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_model.write_retriever(folder / "retriever", tiny)
    for edition in (0, 1):
        tiny_model.write_passage_index(
            folder / f"index{edition}", tiny.system, tiny.params, tiny.vocabulary, edition
        )
    return folder


def training(files, tiny, model_dir, system="rag_token", **macros):
    paths = {
        "VOCABULARY": tiny.root / "vocabulary.model", "QUESTIONS": files / "questions.jsonl",
        "INDEX_DIR": files / "index0", "RETRIEVER": files / "retriever", "MODEL_DIR": model_dir,
    }  # fmt: skip
    given = [f"--gin.{name}={str(value)!r}" for name, value in paths.items()]
    given.append(f"--gin.dual_encoder.DualEncoderConfig.vocab_size={tiny.vocabulary.size}")
    given += [f"--gin.{name}={value!r}" for name, value in ({"TRAIN_STEPS": 2} | macros).items()]
    gin_files = [f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", f"systems/{system}")]
    return run("train", *gin_files, *SMALL, *given)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rag_trains_and_answers_from_either_index(files, tiny, tmp_path):
    model = tmp_path / "model"
    measured = {"EVAL_QUESTIONS": str(files / "questions.jsonl"), "EVAL_PERIOD": 1}
    form = {"DECODING": "thorough", "NUM_BEAMS": 2, "NULL_DOCUMENT": True}
    assert training(files, tiny, model, "rag_sequence", **form, **measured) == 0
    everything = records(model / "logs" / "metrics.jsonl")
    assert [record["step"] for record in everything if "eval/loss" in record] == [1, 2]
    logged = [record for record in everything if "eval/loss" not in record]
    assert all(record["loss"] > 0 and 0 < record["retrieval/prior_entropy"] for record in logged)
    before = parameters.flatten(tiny.params["query_encoder"])["projection/kernel"]
    after = parameters.flatten(open_model(model).params["query_encoder"])["projection/kernel"]
    assert np.abs(after - before).max() > 0  # it started there, and learned
    np.testing.assert_allclose(after, before, atol=0.1)
    for edition in (0, 1):  # another index, no training
        output = tmp_path / f"answers{edition}.jsonl"
        with_index = () if edition == 0 else ("--index_dir", files / "index1")
        assert ask(files, model, output, *with_index) == 0
        assert all(len(record["passages"]) == 2 and record["score"] < 0 for record in records(output))
    # Evaluation answers with the same decoder, and the arm without evidence reads the question alone.
    given = ("--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.throughput_questions=8")
    given += ("--gin.evaluate.evaluate.latency_questions=2", "--gin.evaluate.evaluate.rounds=1")
    asked = ("--questions", files / "questions.jsonl", "--output_dir", tmp_path / "report")
    assert run("evaluate", "--model_dir", model, *asked, *given) == 0
    predicted = records(tmp_path / "report" / "predictions.jsonl")
    answers = records(tmp_path / "answers0.jsonl")
    assert [(p["with"], p["passages"]) for p in predicted] == [
        (a["prediction"], [passage["id"] for passage in a["passages"]]) for a in answers
    ]
    assert all(p["retrieve"] and p["p_ret"] == 1 for p in predicted)
    policies = json.loads((tmp_path / "report" / "report.json").read_text())["editions"]["test"]["policies"]
    assert policies["gate"]["retrieval_rate"] == 1 and policies["never"]["retrieval_rate"] == 0


def ask(files, model, output, *options):
    asked = ("infer", "--model_dir", model, "--questions", files / "questions.jsonl", "--output", output)
    return run(*asked, "--gin.infer.infer.buckets=(4,)", *options)


def test_refreshed_candidates_survive_a_restart(files, tiny, tmp_path, capsys):
    """4 steps, candidates and passages refreshed every 2; a run that ended after 3 and went on ends with the same."""
    refreshed = {"REFRESH_PERIOD": 2, "CHECKPOINT_PERIOD": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for model, stops in ((whole, (4,)), (parts, (3, 4))):
        for steps in stops:
            given = refreshed | {"TRAIN_STEPS": steps, "VERSIONS_DIR": str(tmp_path / f"{model.name}_versions")}
            assert training(files, tiny, model, "rag_token", **given) == 0
    ours, theirs = (parameters.flatten(open_model(model).params) for model in (parts, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    np.testing.assert_allclose(ours["candidate_encoder/refreshes"], 3)
    logged = [records(model / "logs" / "metrics.jsonl")[-1]["loss"] for model in (parts, whole)]
    assert logged[0] == logged[1]
    model = open_model(whole)
    read = open_index(model.index_dir)  # the passages were embedded again, by the copy that the last step took
    assert read.directory == versions.current(tmp_path / "whole_versions")
    assert read.manifest.encoder_digest == parameters_digest(model.params["candidate_encoder"]["encoder"])
    assert ask(files, whole, tmp_path / "answers.jsonl") == 0
    assert all(record["passages"] for record in records(tmp_path / "answers.jsonl"))
    capsys.readouterr()
    assert ask(files, whole, tmp_path / "old.jsonl", "--index_dir", files / "index0") == 2  # other vectors
    assert "encoder" in capsys.readouterr().err
    shutil.rmtree(read.directory)
    assert ask(files, whole, tmp_path / "gone.jsonl") == 2
    assert "which is not there" in capsys.readouterr().err
    assert ask(files, whole, tmp_path / "old.jsonl", "--index_dir", files / "index0") == 2  # nor is it taken then
    assert "encoder" in capsys.readouterr().err
