"""From passages and questions in files to answers, by the commands and gin files of docs/wikipedia.md, in small."""

import json

import numpy as np
import pytest

from expertrag_jax import encoders
from expertrag_jax.main import main
from expertrag_jax.retrieval.corpus import Passages, write_passages_tsv
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.training.pretrained import read_metadata

pytestmark = pytest.mark.usefixtures("fast_compile")

RETRIEVER = "--gin_file=examples/wikipedia_retriever.gin"
READER = "--gin_file=examples/wikipedia_qa.gin"
SMALL = (
    "--gin.BATCH_SIZE=8",
    "--gin.dual_encoder.DualEncoderConfig.embed_dim=16",
    "--gin.dual_encoder.DualEncoderConfig.output_dim=12",
)
SMALL_RETRIEVER = (*SMALL, "--gin.CLOZE_STEPS=60", "--gin.TRAIN_STEPS=60")
SMALL_READER = (
    *SMALL,
    "--gin.TRAIN_STEPS=24",
    "--gin.GATE_STEPS=4",
    "--gin.NUM_PASSAGES=2",
    "--gin.MAX_TARGET_LENGTH=8",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 8, 'query': 64, 'passages': 64}",
    "--gin.config.TransformerConfig.embed_dim=16",
    "--gin.config.TransformerConfig.mlp_dim=32",
    "--gin.config.TransformerConfig.num_heads=2",
    "--gin.config.TransformerConfig.head_dim=8",
    "--gin.config.TransformerConfig.num_encoder_layers=1",
    "--gin.config.TransformerConfig.num_decoder_layers=1",
    "--gin.config.TransformerConfig.expert_layer_period=1",
    "--gin.config.TransformerConfig.expert_group_size=8",  # eight devices share every batch
)


def corpus(tiny_model) -> Passages:
    """The tiny one's passages, and as many more as ScaNN needs, which answer no question."""
    names, more = tiny_model.passages(), range(1000)
    texts = [f"The {tiny_model.TRADES[i % 4]} of {tiny_model.TOWNS[i % 5]} met {i} people." for i in more]
    ids, titles = [f"n{i}" for i in more], [f"Note {i}" for i in more]
    return Passages([*names.ids, *ids], [*names.titles, *titles], [*names.texts, *texts])


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def write_questions(path, tiny_model, names):
    """Two questions on each of the places ``names`` in the corpus, with their gold passages."""
    records = []
    for place in names:
        name, gold = tiny_model.NAMES[place], [f"e{place}"]
        asked = {
            f"Where does {name} live?": tiny_model.TOWNS[place % 5],
            f"What is {name}'s trade?": tiny_model.TRADES[place % 4],
        }
        records += [{"question": q, "answers": [a], "gold_passage_ids": gold} for q, a in asked.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def walked(tmp_path_factory, tiny_model):
    """The folder after every command of the path has run in it."""
    folder = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_passages_tsv(corpus(tiny_model), "passages.tsv.gz")
        for name, places in (("train", range(9)), ("gate", range(9, 13)), ("test", range(13, 15))):
            write_questions(folder / f"{name}.jsonl", tiny_model, places)
        passages, train, gate = "--gin.CORPUS=passages.tsv.gz", "train.jsonl", "gate.jsonl"
        assert run("index", RETRIEVER, passages, "--vocabulary_size=400") == 0
        assert run("train", RETRIEVER, passages, f"--gin.QUESTIONS={train}", *SMALL_RETRIEVER) == 0
        assert run("index", READER, passages, f"--gin.TUNE_QUESTIONS={gate}") == 0
        questions = (f"--gin.QUESTIONS={train}", f"--gin.GATE_QUESTIONS={gate}")
        assert run("train", READER, *questions, *SMALL_READER) == 0
        assert run("calibrate", READER, f"--questions={gate}") == 0
        quick = ("--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.rounds=1")
        assert run("evaluate", READER, "--questions=test.jsonl", *quick) == 0
        asked = ("--questions=test.jsonl", "--retrieve=always")
        assert run("infer", READER, *asked, "--buckets=4") == 0
        assert run("export", READER, "--buckets=4", "--platforms=cpu") == 0
        assert run("infer", "--export_dir=runs/wikipedia/export", *asked, "--output=export.jsonl") == 0
        yield folder


def records(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_dual_encoder_learns_in_both_stages(walked):
    log = records(walked / "runs/wikipedia/retriever/logs/metrics.jsonl")
    assert [record["phase"] for record in log] == ["inverse_cloze"] * 2 + ["questions"] * 2
    cloze, questions = ([r["loss"] for r in log if r["phase"] == name] for name in ("inverse_cloze", "questions"))
    assert cloze[-1] < cloze[0] and questions[-1] < questions[0]


def test_the_hybrid_index_belongs_to_the_retriever(walked):
    loaded = open_index(walked / "runs/wikipedia/index")
    encoder = encoders.load_encoder(walked / "runs/wikipedia/retriever")
    assert (loaded.manifest.kind, loaded.manifest.dimension) == ("hybrid", 12)
    assert loaded.index.dense.kind == "scann" and not loaded.index.dense.is_exact
    assert loaded.manifest.encoder_digest == encoder.digest
    assert loaded.manifest.vocabulary_digests == {"reader": encoder.vocabulary.digest} | {
        "retriever": encoder.vocabulary.digest
    }
    retriever = encoders.open_retriever(loaded.directory, walked / "runs/wikipedia/retriever")
    found = retriever.retrieve(["Where does Bela Korv live?"], encoder.tokenise(["Where does Bela Korv live?"]), 2)
    assert loaded.passages.titles[found.rows[0, 0]] == "Bela Korv"


def test_the_reader_holds_the_retrievers_query_encoder_and_runs_both_phases(walked):
    reader = encoders.load_encoder(walked / "runs/wikipedia/reader")
    trained = encoders.load_encoder(walked / "runs/wikipedia/retriever")
    assert reader.digest == trained.digest
    tokens = trained.tokenise(["Where does Bela Korv live?"])
    np.testing.assert_array_equal(reader.encode_queries(tokens), trained.encode_queries(tokens))
    log = records(walked / "runs/wikipedia/reader/logs/metrics.jsonl")
    assert {record["phase"] for record in log} == {"generator", "gate"}
    facts = read_metadata(walked / "runs/wikipedia/reader")
    assert facts["num_passages"] == 2 and facts["index_dir"].endswith("runs/wikipedia/index")


def test_the_configuration_is_kept(walked):
    text = (walked / "runs/wikipedia/reader/config.gin").read_text()
    assert "generator_steps = %TRAIN_STEPS" in text and "TRAIN_STEPS = 24" in text
    assert run("train", f"--gin_file={walked / 'runs/wikipedia/reader/config.gin'}", "--dry_run") == 0


def test_the_report_has_all_policies_and_the_retrieval(walked):
    report = json.loads((walked / "runs/wikipedia/reader/evaluation/report.json").read_text())
    policies = report["editions"]["test"]["policies"]
    assert set(policies) == {"never", "always", "random", "gate", "oracle"}
    assert all(0 <= policy["em"] <= policy["f1"] <= 1 for policy in policies.values())
    assert (policies["never"]["retrieval_rate"], policies["always"]["retrieval_rate"]) == (0, 1)
    assert policies["always"]["encoder_tokens"] > policies["never"]["encoder_tokens"]
    recall = report["retrieval"]["recall"]
    assert set(recall) == {"1", "2", "5", "20", "100"} and recall["1"] <= recall["2"] <= recall["100"]
    assert len(records(walked / "runs/wikipedia/reader/evaluation/predictions.jsonl")) == 4


def test_model_and_export_answer_alike(walked):
    one, two = records(walked / "runs/wikipedia/answers/test-predict.jsonl"), records(walked / "export.jsonl")
    assert [record["prediction"] for record in one] == [record["prediction"] for record in two]
    assert all(len(record["passages"]) == 2 for record in one)
