"""`expertrag train` with gin/systems/dro.gin, and questions answered by what it leaves."""

import json
import shutil

import jax
import numpy as np
import pytest

from expertrag_jax.main import main
from expertrag_jax.retrieval.corpus import write_passages_tsv
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.trained_model import open_model

pytestmark = pytest.mark.usefixtures("fast_compile")
FILES = tuple(f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", "systems/dro"))
SMALL = (
    "--gin.BATCH_SIZE=8", "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 48}",
    "--gin.config.TransformerConfig.embed_dim=16", "--gin.config.TransformerConfig.mlp_dim=32",
    "--gin.config.TransformerConfig.num_heads=2", "--gin.config.TransformerConfig.head_dim=8",
    "--gin.config.TransformerConfig.num_encoder_layers=1", "--gin.config.TransformerConfig.num_decoder_layers=1",
    "--gin.NUM_PASSAGES=4", "--gin.NUM_SELECTED=2", "--gin.NUM_SAMPLES=3", "--gin.ITERATIONS=3", "--gin.TRAIN_STEPS=2",
    "--gin.WARM_GENERATOR_STEPS=2", "--gin.WARM_SELECTOR_STEPS=2", "--gin.EVAL_STEPS=1",
    "--gin.train.train.log_period=1",
)  # fmt: skip
WITHOUT_WARM_UP = ("--gin.WARM_GENERATOR_STEPS=0", "--gin.WARM_SELECTOR_STEPS=0")


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def files(tiny, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dro")
    write_passages_tsv(tiny_model.passages(), folder / "corpus.tsv.gz")
    shutil.copy(tiny.root / "vocabulary.model", folder)
    records = [
        {"question": f"Where does {name} live?", "answers": [tiny_model.TOWNS[i % 5]], "gold_passage_ids": [f"e{i}"]}
        for i, name in enumerate(tiny_model.NAMES)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    index = ("index", "--corpus", folder / "corpus.tsv.gz", "--vocabulary", folder / "vocabulary.model")
    run(*index, "--index_dir", folder / "bm25")
    params, vocabularies = {"query_encoder": tiny.params["query_encoder"]}, (tiny.vocabulary, tiny.vocabulary)
    tiny_model.write_model_dir(folder / "retriever", DualEncoder(tiny.system.retriever), params, vocabularies, None)
    return folder


def train(files, model_dir, *changes):
    macros = {name: files / "questions.jsonl" for name in ("QUESTIONS", "EVAL_QUESTIONS")}
    macros |= {"VOCABULARY": files / "vocabulary.model", "INDEX_DIR": files / "bm25", "MODEL_DIR": model_dir}
    run("train", *FILES, *SMALL, *(f"--gin.{name}='{value}'" for name, value in macros.items()), *changes)
    return [json.loads(line) for line in (model_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_dro_trains_in_alternation_and_answers(files, tmp_path):
    # At a learning rate of 0 nothing gets better: one iteration without gain ends the run.
    still = ("--gin.optimizer.adamw.learning_rate=0.0", "--gin.PATIENCE=1", *WITHOUT_WARM_UP)
    records = train(files, tmp_path / "model", *still)
    phases = list(dict.fromkeys(record["phase"] for record in records))
    iterations = ["estimation_1", "maximization_1", "estimation_2", "maximization_2"]
    assert phases == iterations  # of three
    measured = [record["eval/loss"] for record in records if "eval/loss" in record]
    assert len(measured) == 2 and measured[0] == measured[1]
    # Of equal ones the first is the best; it stays, and is the one that answers.
    assert sorted(path.name for path in (tmp_path / "model" / "checkpoints").glob("[0-9]*")) == ["4", "8"]
    assert open_model(tmp_path / "model").source.name == "4"
    sizes = [record["effective_sample_size"] for record in records if "effective_sample_size" in record]
    assert len(sizes) == 4 and all(1 <= size <= 3 for size in sizes)
    model = open_model(tmp_path / "model")
    assert set(model.params) == {"token_embedder", "encoder", "decoder", "selector", "previous"}
    asked = ("--questions", files / "questions.jsonl", "--output", tmp_path / "answers.jsonl")
    run("infer", "--model_dir", tmp_path / "model", *asked, "--buckets=4")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 15 and {len(answer["passages"]) for answer in answers} == {2}  # those that were chosen
    # Evaluation reads the same passages; and gives the same answers.
    small = [f"--gin.evaluate.evaluate.{name}" for name in ("buckets=(4,)", "throughput_questions=8", "rounds=1")]
    asked = ("--questions", files / "questions.jsonl", "--output_dir", tmp_path / "report")
    run("evaluate", "--model_dir", tmp_path / "model", *asked, *small, "--gin.evaluate.evaluate.latency_questions=2")
    predicted = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    for ours, theirs in zip(answers, predicted, strict=True):
        assert theirs["with"] == ours["prediction"] and theirs["passages"] == [p["id"] for p in ours["passages"]]
    # An export chooses and answers alike.
    run("export", "--model_dir", tmp_path / "model", "--export_dir", tmp_path / "export", "--buckets=4")
    asked = ("--questions", files / "questions.jsonl", "--output", tmp_path / "exported.jsonl")
    run("infer", "--export_dir", tmp_path / "export", *asked)
    exported = [json.loads(line) for line in (tmp_path / "exported.jsonl").read_text().splitlines()]
    for ours, theirs in zip(answers, exported, strict=True):
        assert ours["passages"] == theirs["passages"] and ours["prediction"] == theirs["prediction"]


def test_dro_trains_online_and_answers_over_a_dense_index(files, tiny, tmp_path):
    retriever = files / "retriever"
    dense = (
        f"--gin.INDEX_DIR='{tiny.index_dir}'", f"--gin.RETRIEVER='{retriever}'",
        "--gin.QUERY_ENCODER=@dual_encoder.DualEncoderConfig()",
        f"--gin.INITIAL_CHECKPOINT_PATH={{'query_encoder': '{retriever}'}}",
        *(f"--gin.dual_encoder.DualEncoderConfig.{size}" for size in ("embed_dim=16", "output_dim=12")),
        f"--gin.dual_encoder.DualEncoderConfig.vocab_size={tiny.vocabulary.size}",
    )  # fmt: skip
    online = ("--gin.ONLINE=True", "--gin.ITERATIONS=2", "--gin.TRAIN_STEPS=1", "--gin.PATIENCE=9")
    records = train(files, tmp_path / "model", *online, *dense)
    phases = [record["phase"] for record in records if "eval/loss" not in record]
    assert phases == ["warm_generator"] * 2 + ["warm_selector"] * 2 + ["online_1", "online_2"]
    assert [record["phase"] for record in records if "eval/loss" in record] == ["online_1", "online_2"]
    carried = open_model(tmp_path / "model").params["query_encoder"]
    jax.tree.map(np.testing.assert_array_equal, dict(carried), dict(tiny.params["query_encoder"]))
    asked = ("--questions", files / "questions.jsonl", "--output", tmp_path / "answers.jsonl")
    run("infer", "--model_dir", tmp_path / "model", *asked, "--buckets=4")
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 15 and {len(answer["passages"]) for answer in answers} == {2}


def test_a_run_that_stops_in_an_iteration_goes_on_bit_for_bit(files, tmp_path):
    """Cut off between two iterations and in the middle of one: both ends equal the run that was not."""
    given = ("--gin.ITERATIONS=2", "--gin.PATIENCE=9", "--gin.KEEP_CHECKPOINTS=0", "--gin.CHECKPOINT_PERIOD=1")
    given += ("--gin.optimizer.adamw.learning_rate=1e-3", "--gin.WARM_GENERATOR_STEPS=1", "--gin.WARM_SELECTOR_STEPS=1")
    records = train(files, tmp_path / "whole", *given)
    losses = {record["step"]: record["loss"] for record in records if "eval/loss" not in record}
    assert len(losses) == 10
    ends = open_model(tmp_path / "whole", tmp_path / "whole" / "checkpoints" / "10").params
    for step in (5, 7):  # in the first maximization, behind its estimation
        cut = tmp_path / f"cut_{step}"
        shutil.copytree(tmp_path / "whole", cut)
        for path in (cut / "checkpoints").glob("[0-9]*"):
            if int(path.name) > step:
                shutil.rmtree(path)
        resumed = train(files, cut, *given)
        assert {r["step"]: r["loss"] for r in resumed if "eval/loss" not in r} == losses
        again = open_model(cut, cut / "checkpoints" / "10").params
        jax.tree.map(np.testing.assert_array_equal, dict(again), dict(ends))


def test_bad_evaluation_questions_are_refused_before_the_first_step(files, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"question": "Who?", "answers": ["Ann"]}\n[]\n')
    with pytest.raises(AssertionError, match="2 == 0"):
        train(files, tmp_path / "model", f"--gin.EVAL_QUESTIONS='{tmp_path / 'bad.jsonl'}'")
    printed = capsys.readouterr()
    assert "bad.jsonl:2: a JSON object is expected" in printed.err and " step 1" not in printed.out
