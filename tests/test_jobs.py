"""The jobs index, train, evaluate and calibrate on the command line; a mistake is one sentence and exit code 2."""

import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from expertrag_jax import calibrate
from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import sealed
from expertrag_jax.main import main
from expertrag_jax.partitioning import PARAMETER_RULES
from expertrag_jax.retrieval.corpus import write_passages_tsv
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.train import keep_configuration
from expertrag_jax.trained_model import open_model

pytestmark = pytest.mark.usefixtures("fast_compile")
CLOSED_BOOK = tuple(f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", "systems/closed_book"))
EXPERT_RAG = (*CLOSED_BOOK[:2], "--gin_file=systems/expert_rag.gin")
DUAL_ENCODER = (CLOSED_BOOK[0], "--gin_file=systems/dual_encoder.gin")
LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 48}"
SMALL = (
    "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=2", LENGTHS, "--gin.config.TransformerConfig.embed_dim=16",
    "--gin.config.TransformerConfig.mlp_dim=32", "--gin.config.TransformerConfig.num_heads=2",
    "--gin.config.TransformerConfig.head_dim=8", "--gin.config.TransformerConfig.num_encoder_layers=1",
    "--gin.config.TransformerConfig.num_decoder_layers=1",
)  # fmt: skip
NARROW = ("--gin.dual_encoder.DualEncoderConfig.embed_dim=16", "--gin.dual_encoder.DualEncoderConfig.output_dim=12")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def snapshot(folder) -> dict:
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_json_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def files(tiny, tiny_model, tmp_path_factory):
    """A corpus, questions, a BM25 index of them, the tiny vocabulary, and a dual encoder's MODEL_DIR."""
    folder = tmp_path_factory.mktemp("files")
    corpus = tiny_model.passages()
    write_passages_tsv(corpus, folder / "corpus.tsv.gz")
    places = range(len(corpus))
    asked = [f"Where does {name} live?" for name in tiny_model.NAMES]
    write_json_lines(
        folder / "questions.jsonl",
        [{"question": asked[i], "answers": [tiny_model.TOWNS[i % 5]], "gold_passage_ids": [f"e{i}"]} for i in places],
    )
    shutil.copy(tiny.root / "vocabulary.model", folder)
    index = ("index", "--corpus", folder / "corpus.tsv.gz", "--vocabulary", folder / "vocabulary.model")
    assert run(*index, "--index_dir", folder / "bm25") == 0
    tiny_model.write_retriever(folder / "retriever", tiny)
    vocabularies = (tiny.vocabulary, tiny.vocabulary)
    wide = DualEncoder(dataclasses.replace(tiny.system.retriever, output_dim=20))
    params = jax.jit(wide.init)(jax.random.PRNGKey(0))
    tiny_model.write_model_dir(folder / "wide", wide, params, vocabularies, None)
    return folder


@pytest.fixture
def fails(capsys, files, tmp_path, monkeypatch):
    """Runs a command in an empty folder: exit code 2, one line of error, and no file changed anywhere."""

    def check(*arguments, also=()):
        monkeypatch.chdir(tmp_path)
        folders = [files, *also]
        before = [snapshot(folder) for folder in folders]
        capsys.readouterr()
        assert run(*arguments) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert printed[-1].startswith("error: ") and "Traceback" not in "".join(printed)
        assert [snapshot(folder) for folder in folders] == before
        return printed[-1]

    return check


# index


def test_documents_become_an_index_with_its_own_vocabulary(tmp_path, tiny_model):
    notes = tmp_path / "notes"
    notes.mkdir()
    for name, text in zip(tiny_model.NAMES, tiny_model.passages().texts):
        (notes / f"{name}.txt").write_text(text)
    place = tmp_path / "made" / "index"
    assert run("index", "--documents", notes, "--index_dir", place, "--vocabulary_size=320") == 0
    loaded = open_index(place)
    assert (loaded.manifest.kind, len(loaded)) == ("bm25", len(tiny_model.NAMES))
    assert loaded.tokens.shape == (len(loaded), 160) and loaded.passages.titles[0] == "Bela Korv"
    vocabulary = (place.parent / "vocabulary.model").read_bytes()
    assert run("index", "--documents", notes, "--index_dir", place, "--overwrite") == 0
    assert (place.parent / "vocabulary.model").read_bytes() == vocabulary


@pytest.mark.parametrize("kind", [None, "exact", "scann", "hybrid"])
def test_a_retriever_makes_the_index_dense(files, tmp_path, kind, capsys):
    arguments = ["--corpus", files / "corpus.tsv.gz", "--retriever", files / "retriever"]
    arguments += ["--index_dir", tmp_path / "index", "--tune_questions", files / "questions.jsonl"]
    assert run("index", *arguments, *([f"--kind={kind}"] if kind else [])) == 0
    manifest = open_index(tmp_path / "index").manifest
    assert (manifest.kind, manifest.dimension) == (kind or "hybrid", 12)
    assert ("weight" in capsys.readouterr().out) == (manifest.kind == "hybrid")


def test_index_says_what_is_wrong_with_the_corpus(files, fails, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "columns.tsv").write_text("id\ttext\ttitle\n1\tone\tA\n2\ttwo\n")
    (bad / "empty.tsv").write_text("id\ttext\ttitle\n")
    (bad / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (bad / "folder").mkdir()

    def index(*arguments):
        return fails("index", *arguments, "--index_dir", bad / "index", also=[bad])

    assert "nowhere.tsv: no such file" in index("--corpus", bad / "nowhere.tsv")
    assert "columns.tsv:3: 2 columns where 3 are expected" in index("--corpus", bad / "columns.tsv")
    assert "the corpus is empty" in index("--corpus", bad / "empty.tsv")
    assert "broken.jsonl:2: not JSON" in index("--documents", bad / "broken.jsonl")
    assert "no document in the folder" in index("--documents", bad / "folder")
    assert "either --corpus" in index() and "either --corpus" in index("--corpus=a", "--documents=b")


def test_index_says_what_does_not_fit(files, fails, tmp_path, tiny):
    corpus = ("index", "--corpus", files / "corpus.tsv.gz")
    place = ("--index_dir", tmp_path / "index")
    assert "a scann index needs vectors" in fails(*corpus, *place, "--kind=scann")
    assert "unknown kind of index 'faiss'" in fails(*corpus, *place, "--kind=faiss", "--retriever=x")
    assert "already holds an index" in fails(*corpus, "--index_dir", files / "bm25")
    assert "is not an index" in fails(*corpus, "--index_dir", files / "retriever")
    assert "not a SentencePiece model" in fails(*corpus, *place, "--vocabulary", files / "questions.jsonl")
    assert "holds no checkpoint" in fails(*corpus, *place, "--retriever", files / "bm25")
    wrong = tmp_path / "wrong.jsonl"
    write_json_lines(wrong, [{"question": "Who?", "gold_passage_ids": ["nobody"]}])
    dense = (*corpus, *place, "--retriever", files / "retriever", "--tune_questions", wrong)
    assert "which is not in the corpus" in fails(*dense)
    assert not (tmp_path / "index").exists()


# train


@pytest.fixture(scope="module")
def closed_book(files, tmp_path_factory):
    """A trained closed-book model, and the arguments that trained it."""
    place = tmp_path_factory.mktemp("closed_book") / "model"
    arguments = [
        "train", *CLOSED_BOOK, *SMALL, f"--gin.VOCABULARY='{files / 'vocabulary.model'}'",
        f"--gin.QUESTIONS='{files / 'questions.jsonl'}'", "--model_dir", place,
    ]  # fmt: skip
    assert run(*arguments) == 0
    return place, arguments


def test_training_leaves_a_model_directory_and_goes_on_from_it(closed_book, capsys):
    place, arguments = closed_book
    assert {path.name for path in place.iterdir()} == {"checkpoints", "config.gin", "logs", "vocabulary"}
    before = (place / "config.gin").read_text()
    assert run(*arguments, "--gin.TRAIN_STEPS=3") == 0
    told = capsys.readouterr().out
    assert "trained 3 steps" in told
    assert re.search(r"wall time [\d.]+ s, [\d.]+% of it in steps; lost: startup .*; over all 2 starts: wall", told)
    assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["2", "3"]
    assert (place / "config.gin").read_text() == before
    assert "TRAIN_STEPS = 3" in (place / "config-1.gin").read_text()


def test_training_starts_from_a_checkpoint(closed_book, tmp_path):
    place, arguments = closed_book
    again = [*arguments[:-1], tmp_path / "again", "--gin.TRAIN_STEPS=0", "--initial_checkpoint", place]
    assert run(*again) == 0
    logged = (tmp_path / "again" / "config.gin").read_text()
    assert "INITIAL_CHECKPOINT_PATH" in logged or "initial_checkpoint" in logged


def test_training_refuses_a_checkpoint_of_another_shape(closed_book, fails):
    place, arguments = closed_book
    wider = "--gin.config.TransformerConfig.embed_dim=32"
    assert "model.embed_dim was 16 and is 32" in fails(*arguments, wider, also=[place.parent / "model" / "checkpoints"])
    assert "of another shape" in fails(*arguments[:-1], "elsewhere", wider, "--initial_checkpoint", place, also=[place])


def test_logical_axis_rules_come_from_gin(closed_book, tmp_path, fails):
    place, arguments = closed_book
    rules = [(name, None) for name, _ in PARAMETER_RULES]
    again = [*arguments[:-1], tmp_path / "model"]
    assert run(*again, f"--gin.train.train.parameter_rules={rules}") == 0
    wrong = f"--gin.train.train.parameter_rules={[rule for rule in rules if rule[0] != 'embed']}"
    assert "logical axis" in fails(*arguments[:-1], tmp_path / "other", wrong, also=[place])


def test_training_refuses_to_go_on_with_another_architecture(closed_book, fails):
    place, arguments = closed_book
    nearer = "--gin.config.TransformerConfig.relative_max_distance=64"
    assert "model.relative_max_distance was 128 and is 64" in fails(*arguments, nearer, also=[place / "checkpoints"])


@pytest.mark.parametrize("gate", ["always", "never", "random", "learned"])
def test_a_gin_file_chooses_the_gate_of_the_pipeline(gate, tiny, files, tmp_path):
    macros = {
        "VOCABULARY": files / "vocabulary.model", "QUESTIONS": files / "questions.jsonl", "INDEX_DIR": files / "bm25",
        "MODEL_DIR": tmp_path / "model",
    } | ({"GATE_DIR": tiny.model_dir} if gate == "learned" else {})  # fmt: skip
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    system = (*CLOSED_BOOK[:2], "--gin_file=systems/decided.gin", f"--gin_file=gates/{gate}.gin")
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 8, 'query': 24}"
    assert run("train", *system, *SMALL, *given, lengths, "--gin.PACK=True", "--gin.train.train.log_period=1") == 0
    logged = (tmp_path / "model" / "logs" / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == 2 and all(json.loads(line)["loss"] > 0 for line in logged)


def test_concatenated_passages_train_and_answer(files, fails, tmp_path, tiny_model):
    model = tmp_path / "model"
    macros = {
        "VOCABULARY": files / "vocabulary.model", "QUESTIONS": files / "questions.jsonl", "INDEX_DIR": files / "bm25",
        "GATE_QUESTIONS": files / "questions.jsonl", "MODEL_DIR": model, "FUSION": "concatenate",
    }  # fmt: skip
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 96}"
    numbers = ("--gin.QUERY_ENCODER=None", "--gin.GATE_STEPS=1", "--gin.NUM_PASSAGES=2")
    assert run("train", *EXPERT_RAG, *SMALL, *given, *numbers, lengths) == 0
    asked = ("--questions", files / "questions.jsonl", "--retrieve=always", "--buckets=4")
    assert run("infer", "--model_dir", model, *asked, "--output", tmp_path / "answers.jsonl") == 0
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {len(record["passages"]) for record in records} == {2}

    write_passages_tsv(tiny_model.passages(edition=1), tmp_path / "other.tsv.gz")
    other = ("--corpus", tmp_path / "other.tsv.gz", "--vocabulary", files / "vocabulary.model")
    assert run("index", *other, "--index_dir", tmp_path / "other") == 0
    again = ("train", *EXPERT_RAG, *SMALL, *given, *numbers, lengths)
    swapped = fails(*again, f"--gin.INDEX_DIR='{tmp_path / 'other'}'", also=[model / "checkpoints"])
    assert "was trained with another corpus" in swapped


def test_the_data_of_later_phases_are_read_before_the_first_is_trained(files, fails, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "Who?"\n')
    macros = {
        "VOCABULARY": files / "vocabulary.model", "QUESTIONS": files / "questions.jsonl", "INDEX_DIR": files / "bm25",
        "GATE_QUESTIONS": tmp_path / "bad.jsonl", "MODEL_DIR": tmp_path / "model",
    }  # fmt: skip
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    assert "bad.jsonl:1" in fails("train", *EXPERT_RAG, *SMALL, *given, "--gin.QUERY_ENCODER=None")
    assert not list((tmp_path / "model" / "checkpoints").iterdir())


def test_a_killed_run_ends_with_the_same_parameters(files, compiled_programs, xla_flags, tmp_path):
    """ExpertRAG with experts, question files through SeqIO, turns of two kinds of batches, two phases; kill -9.

    All in processes of their own, which run the same programs: the first one compiles them.
    """
    macros = {name: files / "questions.jsonl" for name in ("QUESTIONS", "GATE_QUESTIONS")}
    macros |= {"VOCABULARY": files / "vocabulary.model", "INDEX_DIR": files / "bm25"}
    arguments = [
        "train", CLOSED_BOOK[0], "--gin_file=models/moe_tiny.gin", EXPERT_RAG[2], *SMALL,
        *(f"--gin.{name}='{value}'" for name, value in macros.items()),
        *("--gin.TRAIN_STEPS=200", "--gin.GATE_STEPS=4", "--gin.NUM_PASSAGES=2", "--gin.QUERY_ENCODER=None"),
        *("--gin.NUM_EXPERTS=2", "--gin.config.TransformerConfig.expert_layer_period=1"),
        *("--gin.DROPOUT_RATE=0.1", "--gin.CHECKPOINT_PERIOD=50", "--gin.train.train.log_period=1"),
    ]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def start(model_dir):
        command = [sys.executable, "-m", "expertrag_jax", *arguments, "--model_dir", model_dir]
        environment = os.environ | {
            "XLA_FLAGS": xla_flags(1),
            "JAX_COMPILATION_CACHE_DIR": compiled_programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, env=environment)

    assert start(whole).wait() == 0
    log, process = killed / "logs" / "metrics.jsonl", start(killed)
    try:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 120):
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert max(int(path.name) for path in (killed / "checkpoints").iterdir() if path.name.isdigit()) < 200

    assert start(killed).wait() == 0
    ours, theirs = (open_model(place).params for place in (killed, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_vocabulary_of_a_start_that_trained_nothing_binds_nobody(tiny_model, tmp_path):
    wrong, right = (tiny_model.vocabulary(tmp_path / f"{seed}.model", seed=seed) for seed in (3, 4))
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model" / "config.gin").write_text("of a start that failed")
    for vocabulary in (wrong, right):
        keep_configuration(tmp_path / "model", {"reader vocabulary": ("vocabulary/reader.model", vocabulary)})
    (tmp_path / "model" / "checkpoints" / "5").mkdir()
    kept = (tmp_path / "model" / "vocabulary" / "reader.model").read_bytes()
    with pytest.raises(UserError, match="is another reader vocabulary"):
        keep_configuration(tmp_path / "model", {"reader vocabulary": ("vocabulary/reader.model", wrong)})
    assert kept == (tmp_path / "4.model").read_bytes()
    assert kept == (tmp_path / "model" / "vocabulary" / "reader.model").read_bytes()


def test_training_says_what_is_wrong_with_its_input(closed_book, files, fails, tmp_path):
    place, arguments = closed_book

    def train(*changes):
        return fails(*arguments[:-1], tmp_path / "model", *changes, also=[place])

    broken, long_ = tmp_path / "broken.jsonl", tmp_path / "long.jsonl"
    broken.write_text('{"question": "Who?", "answers": ["A"]}\n{"question": "Who?"\n')
    write_json_lines(long_, [{"question": "Where " * 60 + "?", "answers": ["A"]}])
    assert "nowhere.jsonl: no such file" in train("--gin.QUESTIONS=nowhere.jsonl")
    assert "no file is named where one is read: set --gin.QUESTIONS" in train("--gin.QUESTIONS=None")
    assert "broken.jsonl:2: not JSON" in train(f"--gin.QUESTIONS='{broken}'")
    assert "but inputs holds 24" in train(f"--gin.QUESTIONS='{long_}'")
    assert "cannot read the vocabulary" in train("--gin.VOCABULARY=nowhere.model")
    assert "did you mean 'TRAIN_STEPS'?" in train("--gin.TRAIN_STEP=5")
    assert "TRAIN_STEPS, the ClosedBook.steps, is 'many': it must be a" in train("--gin.TRAIN_STEPS='many'")
    assert "has no parameter 'step'" in train("--gin.closed_book.ClosedBook.step=5")
    assert "did you mean 'models/t5_tiny.gin'?" in train("--gin_file=models/t5_tyni.gin")
    assert "only 128 embeddings" in train("--gin.config.TransformerConfig.vocab_size=128")
    assert "is no model directory" in fails(*arguments[:-1], files, also=[place])


def test_training_refuses_an_index_of_another_model(files, fails, tmp_path, tiny_model):
    def train(**changes):
        macros = {
            "VOCABULARY": files / "vocabulary.model",
            "QUESTIONS": files / "questions.jsonl",
            "GATE_QUESTIONS": files / "questions.jsonl",
            "INDEX_DIR": index,
            "RETRIEVER": files / "retriever",
            "MODEL_DIR": tmp_path / "model",
        } | changes
        given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
        return fails("train", *EXPERT_RAG, *SMALL, *NARROW, *given)

    index = tmp_path / "index"
    dense = ("index", "--corpus", files / "corpus.tsv.gz", "--kind=exact", "--index_dir", index)
    assert run(*dense, "--retriever", files / "retriever") == 0
    tiny_model.vocabulary(tmp_path / "other.model", seed=3)
    assert "reader vocabulary" in train(VOCABULARY=tmp_path / "other.model")
    assert "dimension 12 but dimension 20" in train(RETRIEVER=files / "wide")
    assert "no such index directory" in train(INDEX_DIR=tmp_path / "nowhere")
    assert "holds no checkpoint" in train(RETRIEVER=files / "bm25")


def test_hard_negatives_come_from_an_index_of_the_same_corpus(files, fails, tmp_path, tiny_model):
    write_passages_tsv(tiny_model.passages(edition=1), tmp_path / "later.tsv.gz")
    macros = {
        "VOCABULARY": files / "vocabulary.model",
        "QUESTIONS": files / "questions.jsonl",
        "CORPUS": tmp_path / "later.tsv.gz",
        "NEGATIVES_FROM": files / "bm25",
        "MODEL_DIR": tmp_path / "model",
    }
    given = [f"--gin.{name}='{value}'" for name, value in macros.items()]
    told = fails("train", *DUAL_ENCODER, "--gin.CLOZE_STEPS=0", *SMALL[:2], *NARROW, *given)
    assert "is of another corpus" in told


# evaluate and calibrate


def test_evaluation_scores_all_policies(tiny, files, tmp_path):
    arguments = ("evaluate", "--model_dir", tiny.model_dir, "--questions", files / "questions.jsonl")
    fast = ("--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.rounds=1")
    assert run(*arguments, "--output_dir", tmp_path / "report", *fast) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    edition, retrieval = report["editions"]["test"], report["retrieval"]
    assert edition["questions"] == retrieval["questions_with_gold_passages"] == 15
    assert retrieval["answer_in_first"]["5"] >= retrieval["recall"]["5"] >= retrieval["recall"]["1"]
    assert edition["retriever_recall"] == retrieval["recall"]["2"]
    rows = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    rate = np.mean([row["retrieve"] for row in rows])
    assert edition["policies"]["gate"]["retrieval_rate"] == pytest.approx(rate)
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_calibration_is_written_once(tiny, files, tmp_path, fails, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny.model_dir, model)
    arguments = ("calibrate", "--model_dir", model, "--questions", files / "questions.jsonl")
    assert "gate.json exists" in fails(*arguments, also=[model])
    assert run(*arguments, "--overwrite") == 0
    first = json.loads((model / "gate.json").read_text())
    assert first["questions"] == 15 and 0 <= first["retrieval_rate"] <= 1
    assert run(*arguments, "--overwrite", "--price=1") == 0  # no retrieval is worth more than it can gain
    assert json.loads((model / "gate.json").read_text())["retrieval_rate"] == 0
    assert "--price is -1.0: it must be" in fails(*arguments, "--overwrite", "--price=-1", also=[model])
    assert "--budget is 2.0: it must be" in fails(*arguments, "--overwrite", "--budget=2", also=[model])
    assert run(*arguments, "--overwrite") == 0  # starts from the gate as it was trained
    assert json.loads((model / "gate.json").read_text()) == first
    del first["checksum"]
    (model / "gate.json").write_text(sealed(first | {"checkpoint": "2"}))  # trained further since
    assert "calibrates the gate of checkpoint 2" in fails(
        "evaluate", "--model_dir", model, "--questions", files / "questions.jsonl", also=[model]
    )
    gains = types.SimpleNamespace(  # every question is right with evidence alone
        p_ret=np.linspace(0.1, 0.9, 15, dtype=np.float32),
        correct_without=np.zeros(15, bool),
        correct_with=np.ones(15, bool),
    )
    monkeypatch.setattr(calibrate, "answer_both", lambda *_: gains)
    for budget, rate in ((1, 1), (0.2, 0.2)):
        assert run(*arguments, "--overwrite", "--price=0", f"--budget={budget}") == 0
        assert json.loads((model / "gate.json").read_text())["retrieval_rate"] == rate


@pytest.mark.parametrize("job", ["evaluate", "calibrate"])
def test_evaluation_says_what_is_wrong_with_its_input(job, tiny, files, fails, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny.model_dir, model)
    (model / "gate.json").unlink()

    def ask(path, *changes):
        return fails(job, "--model_dir", model, "--questions", path, *changes, also=[model])

    broken, long_ = tmp_path / "broken.jsonl.gz", tmp_path / "long.jsonl"
    broken.write_bytes(gzip.compress(b'{"question": "Who?", "answers": ["A"]}\n[]\n'))
    write_json_lines(long_, [{"question": "Where " * 60 + "?", "answers": ["A"]}])
    assert "no such file" in ask("nowhere.jsonl")
    assert "broken.jsonl.gz:2: a JSON object is expected" in ask(broken)
    assert "question_length is 24" in ask(long_)
    assert "--rule=bleu is unknown" in ask(files / "questions.jsonl", "--rule=bleu")
    assert "no such index directory" in ask(files / "questions.jsonl", "--index_dir=nowhere")
    assert "does not answer questions" in fails(
        job, "--model_dir", files / "retriever", "--questions", files / "questions.jsonl"
    )
