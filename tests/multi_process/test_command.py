"""The command ``expertrag train`` as two processes: losses as with one, and process 0 alone tells."""

import json
import re
import sys

import pytest

from expertrag_jax.main import main
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.systems.retriever import DualEncoder

LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 48}"
SMALL = (
    "--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=4", LENGTHS, "--gin.config.TransformerConfig.embed_dim=16",
    "--gin.config.TransformerConfig.mlp_dim=32", "--gin.config.TransformerConfig.num_heads=2",
    "--gin.config.TransformerConfig.head_dim=8", "--gin.config.TransformerConfig.num_encoder_layers=1",
    "--gin.config.TransformerConfig.num_decoder_layers=1", "--gin.train.train.log_period=1",
    "--gin.train.train.asynchronous_checkpoints=False", "--gin.CHECKPOINT_PERIOD=2", "--gin.KEEP_CHECKPOINTS=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tiny_model, tmp_path_factory):
    """Of a small closed-book training, without MODEL_DIR."""
    folder = tmp_path_factory.mktemp("files")
    vocabulary = tiny_model.vocabulary(folder / "vocabulary.model")
    questions = [{"question": f"Where does {name} live?", "answers": ["Arlen"]} for name in tiny_model.NAMES]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    files = [f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", "systems/closed_book")]
    named = [f"--gin.VOCABULARY='{vocabulary.path}'", f"--gin.QUESTIONS='{folder / 'questions.jsonl'}'"]
    return ["train", *files, *SMALL, *named]


def losses(model_dir, name):
    lines = (model_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


GLOO = re.compile(r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d\s]")


def own_lines(stdout):
    """What the command printed; Gloo's threads print beside it, and into one another's lines."""
    return [line for line in stdout.splitlines() if GLOO.sub("", line)]


def test_two_processes_train_as_one(arguments, run_together, tmp_path, fast_compile):
    measured = ["--gin.EVAL_DATASETS=%DATASETS", "--gin.EVAL_PERIOD=2", "--gin.EVAL_STEPS=2"]
    command = [*arguments, *measured, f"--model_dir={tmp_path / 'two'}", "--heartbeat_seconds=60"]
    ended = run_together([sys.executable, "-m", "expertrag_jax.main", *command], 2, devices=2)
    assert [process.returncode for process in ended] == [0, 0], ended
    first, second = (own_lines(each.stdout) for each in ended)
    assert f"trained 4 steps: {tmp_path / 'two' / 'checkpoints' / '4'}" in first[-1] and not second
    assert "data=4" in first[0]
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["4"]
    assert main([*arguments, *measured, f"--model_dir={tmp_path / 'one'}"]) == 0
    for name, count in (("loss", 4), ("eval/loss", 2)):
        found, expected = (losses(tmp_path / folder, name) for folder in ("two", "one"))
        assert len(found) == count and found == pytest.approx(expected, rel=1e-5)
    spent = json.loads((tmp_path / "two" / "logs" / "goodput.json").read_text())["this_start"]
    assert spent["wall_seconds"] > 0.8 * ended[0].seconds  # loading packages and joining are counted


def test_two_processes_refresh_candidates_and_passages_as_one(tiny, tiny_model, run_together, tmp_path, fast_compile):
    """RAG with a new version of the index every 2 steps, the last one behind the last step."""
    params, vocabularies = {"query_encoder": tiny.params["query_encoder"]}, (tiny.vocabulary, tiny.vocabulary)
    tiny_model.write_model_dir(tmp_path / "retriever", DualEncoder(tiny.system.retriever), params, vocabularies, None)
    questions = [
        {"question": f"Where does {name} live?", "answers": [tiny_model.TOWNS[place % 5]]}
        for place, name in enumerate(tiny_model.NAMES)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    files = [f"--gin_file={name}.gin" for name in ("runs/train", "models/t5_tiny", "systems/rag_token")]
    named = {
        "VOCABULARY": tiny.root / "vocabulary.model", "QUESTIONS": tmp_path / "questions.jsonl",
        "INDEX_DIR": tiny.index_dir, "RETRIEVER": tmp_path / "retriever",
    }  # fmt: skip
    given = ["train", *files, *SMALL, "--gin.REFRESH_PERIOD=2", "--gin.NUM_PASSAGES=2", "--gin.MAX_TARGET_LENGTH=8"]
    given += [f"--gin.{name}='{path}'" for name, path in named.items()]
    sizes = ("embed_dim=16", "output_dim=12", f"vocab_size={tiny.vocabulary.size}")
    given += [f"--gin.dual_encoder.DualEncoderConfig.{size}" for size in sizes]

    def places(name):
        return [f"--model_dir={tmp_path / name}", f"--gin.VERSIONS_DIR='{tmp_path / name}_versions'"]

    command = [sys.executable, "-m", "expertrag_jax.main", *given, *places("two"), "--heartbeat_seconds=60"]
    ended = run_together(command, 2, devices=2)
    assert [process.returncode for process in ended] == [0, 0], ended
    assert main([*given, *places("one")]) == 0
    found, expected = (losses(tmp_path / name, "loss") for name in ("two", "one"))
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-4)
    vectors = [open_index(versions.current(tmp_path / f"{name}_versions")).vectors for name in ("two", "one")]
    moved = abs(vectors[0] - open_index(tiny.index_dir).vectors).max()
    assert moved > 1e-4 and abs(vectors[0] - vectors[1]).max() < 0.1 * moved
