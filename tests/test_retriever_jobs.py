"""Training beside the reader's own on the command line: learning from a reader, and span corruption beforehand."""

import json
import shutil

import pytest

from expertrag_jax.main import main
from expertrag_jax.retrieval.corpus import Passages, write_passages_tsv
from expertrag_jax.systems.retriever import DualEncoder

pytestmark = pytest.mark.usefixtures("fast_compile")
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 16, 'query': 24, 'passages': 48}"
SMALL = (
    "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=2", LENGTHS, "--gin.config.TransformerConfig.embed_dim=16",
    "--gin.config.TransformerConfig.mlp_dim=32", "--gin.config.TransformerConfig.num_heads=2",
    "--gin.config.TransformerConfig.head_dim=8", "--gin.config.TransformerConfig.num_encoder_layers=1",
    "--gin.config.TransformerConfig.num_decoder_layers=1", "--gin.train.train.log_period=1",
)  # fmt: skip
SIZES = {"vocab_size": 200, "embed_dim": 16, "output_dim": 12}
NARROW = tuple(f"--gin.dual_encoder.DualEncoderConfig.{name}={size}" for name, size in SIZES.items())


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def train(system, model_dir, *arguments, **macros):
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    files = [f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", f"systems/{system}")]
    return run("train", *files, *SMALL, *given, *arguments, "--model_dir", model_dir)


def logged(model_dir) -> list[dict]:
    return [json.loads(line) for line in (model_dir / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tiny, tiny_model, tmp_path_factory):
    """A corpus, questions, a dual encoder's MODEL_DIR, a BM25 and a dense index."""
    folder = tmp_path_factory.mktemp("files")
    corpus = tiny_model.passages()
    write_passages_tsv(corpus, folder / "corpus.tsv.gz")
    records = [
        {"id": f"q{i}", "question": f"Where does {name} live?", "answers": [tiny_model.TOWNS[i % 5]],
         "gold_passage_ids": [f"e{i}"]} for i, name in enumerate(tiny_model.NAMES)
    ]  # fmt: skip
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    shutil.copy(tiny.root / "vocabulary.model", folder)
    params = {"query_encoder": tiny.params["query_encoder"]}
    vocabularies = (tiny.vocabulary, tiny.vocabulary)
    tiny_model.write_model_dir(folder / "retriever", DualEncoder(tiny.system.retriever), params, vocabularies, None)
    index = ("index", "--corpus", folder / "corpus.tsv.gz")
    assert run(*index, "--vocabulary", folder / "vocabulary.model", "--index_dir", folder / "bm25") == 0
    assert run(*index, "--retriever", folder / "retriever", "--kind=exact", "--index_dir", folder / "exact") == 0
    return folder


@pytest.mark.parametrize("signal", ["pdist", "adist"])
def test_a_query_encoder_learns_from_a_reader(signal, files, tmp_path, capsys):
    macros = {
        "VOCABULARY": files / "vocabulary.model", "QUESTIONS": files / "questions.jsonl", "SIGNAL": signal,
        "INDEX_DIR": files / "exact", "RETRIEVER": files / "retriever",
    }  # fmt: skip
    steps = ("--gin.NUM_PASSAGES=3", "--gin.GENERATOR_STEPS=1")
    assert train("distillation", tmp_path / "model", *steps, *NARROW, **macros) == 0
    reader, *retriever = logged(tmp_path / "model")
    assert (reader["phase"], [record["phase"] for record in retriever]) == ("generator", ["retriever"] * 2)
    assert all(record["loss"] > 0 and 0 <= record["agreement"] <= 1 for record in retriever)
    if signal == "pdist":
        again = ("index", "--corpus", files / "corpus.tsv.gz", "--index_dir", tmp_path / "index", "--kind=exact")
        assert run(*again, "--retriever", tmp_path / "model") == 0
        with_words = macros | {"INDEX_DIR": files / "bm25"}
        assert train("distillation", tmp_path / "other", *steps, *NARROW, **with_words) == 2
        assert "has no vectors" in capsys.readouterr().err


def test_from_raw_text_to_a_system_that_answers(files, tiny_model, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name, text in zip(tiny_model.NAMES, tiny_model.passages().texts):
        (notes / f"{name}.txt").write_text(text)
    macros = {"VOCABULARY": files / "vocabulary.model", "DOCUMENTS": notes, "QUESTIONS": files / "questions.jsonl"}
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    lengths = ("--gin.PRETRAINING_LENGTHS={'inputs': 48, 'targets': 24, 'query': 1}", "--gin.PRETRAINING_STEPS=3")
    model = tmp_path / "model"
    path = ("--gin_file=examples/raw_text.gin", *SMALL, *given, *lengths, "--model_dir", model)
    assert run("train", *path) == 0
    assert [record["phase"] for record in logged(model)] == ["span_corruption"] * 3 + ["mixture"] * 2
    assert logged(model)[0]["loss"] > 0
    asked = ("--questions", files / "questions.jsonl", "--buckets=4", "--output", tmp_path / "answers.jsonl")
    assert run("infer", "--model_dir", model, *asked) == 0
    again = {"INITIAL_CHECKPOINT_PATH": model, "QUESTIONS": files / "questions.jsonl"}
    again |= {"VOCABULARY": files / "vocabulary.model"}
    assert train("closed_book", tmp_path / "tuned", "--gin.SENTINELS=100", **again) == 0


def test_mined_negatives_are_trained_on(files, tmp_path, capsys):
    first, second = tmp_path / "bm25.jsonl", tmp_path / "both.jsonl"
    mine = ("mine", "--questions", files / "questions.jsonl", "--index_dir", files / "bm25", "--output", first)
    assert run(*mine) == 0 and run(*mine) == 2
    assert "bm25.jsonl exists" in capsys.readouterr().err
    dense = ("--index_dir", files / "exact", "--retriever", files / "retriever", "--num_negatives=2")
    assert run("mine", "--questions", first, *dense, "--output", second) == 0
    lexical, both = ([json.loads(line) for line in path.read_text().splitlines()] for path in (first, second))
    for place, (one, more) in enumerate(zip(lexical, both)):
        negatives = more["hard_negative_passage_ids"]
        assert one["gold_passage_ids"] == [f"e{place}"] and one["id"] == f"q{place}"
        assert negatives[:1] == one["hard_negative_passage_ids"] and 2 <= len(set(negatives)) == len(negatives) <= 3
        # Every fifth name lives in the same town: those hold the answer.
        assert all(int(name[1:]) % 5 != place % 5 for name in negatives)
    macros = {"VOCABULARY": files / "vocabulary.model", "CORPUS": files / "corpus.tsv.gz", "QUESTIONS": second}
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    system = ("--gin_file=runs/train.gin", "--gin_file=systems/dual_encoder.gin", LENGTHS, *NARROW, *given)
    steps = ("--gin.CLOZE_STEPS=0", "--gin.TRAIN_STEPS=1", "--gin.BATCH_SIZE=8", "--gin.NUM_NEGATIVES=2")
    assert run("train", *system, *steps, "--model_dir", tmp_path / "model") == 0
    write_passages_tsv(Passages(["x"], ["y"], ["Some text."]), tmp_path / "other.tsv")
    other = f"--gin.CORPUS='{tmp_path / 'other.tsv'}'"
    assert run("train", *system, *steps, other, "--model_dir", tmp_path / "wrong") == 2
    assert "is not in the corpus" in capsys.readouterr().err
