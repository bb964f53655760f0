"""Numbers outside their ranges, words where lists belong: one sentence with the macro's name, before data are read."""

from __future__ import annotations

import collections.abc
import inspect
import pathlib
import typing

import annotated_types
import gin
import numpy as np
import pytest

from expertrag_jax import gin_files, launch, main, ranges
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.index import make_index

ROOT = pathlib.Path(__file__).resolve().parents[2]
TRAIN = [
    "--gin_file=runs/train.gin", "--gin_file=models/t5_tiny.gin", "--gin_file=systems/closed_book.gin",
    "--gin.QUESTIONS=train.jsonl", "--gin.VOCABULARY=v.model", "--gin.MODEL_DIR=run",
]  # fmt: skip
COMMANDS = [command[0] for command in main.COMMANDS.values()]


def test_a_macro_outside_its_range_is_one_sentence(tmp_path, capsys, monkeypatch):
    """Each case is (macro, value, what the message says)."""
    monkeypatch.chdir(tmp_path)
    cases = [
        ("BATCH_SIZE", "0", "BATCH_SIZE, the Pipeline.batch_size, is 0: it must be a whole number from 1"),
        ("BATCH_SIZE", "word", "it must be a whole number"),
        ("BATCH_SIZE", "[1]", "it must be a whole number"),
        ("BATCH_SIZE", "1.5", "it must be a whole number"),
        ("TRAIN_STEPS", "-1", "TRAIN_STEPS, the ClosedBook.steps, is -1"),
        ("TRAIN_STEPS", "9" * 5000, "TRAIN_STEPS"),
        ("EVAL_PERIOD", "0", "EVAL_PERIOD"),
        ("DROPOUT_RATE", "2", "DROPOUT_RATE, the TransformerConfig.dropout_rate, is 2: it must be a number from 0"),
        ("DROPOUT_RATE", "1", "below 1"),
        ("DROPOUT_RATE", "1e999", "DROPOUT_RATE"),
        ("LABEL_SMOOTHING", "1", "LABEL_SMOOTHING"),
        ("Z_LOSS", "-1", "Z_LOSS"),
        ("LOSS_NORMALIZING_FACTOR", "0", "LOSS_NORMALIZING_FACTOR"),
        ("RANDOM_SEED", "-1", "RANDOM_SEED"),
        ("RANDOM_SEED", "1" + "0" * 30, "RANDOM_SEED"),
        ("NUM_EXPERTS", "-2", "NUM_EXPERTS"),
        ("TRAIN_EXPERT_CAPACITY_FACTOR", "-1", "TRAIN_EXPERT_CAPACITY_FACTOR"),
        ("TASK_FEATURE_LENGTHS", "{'inputs': 8, 'targets': 0}", "TASK_FEATURE_LENGTHS"),
        ("TASK_FEATURE_LENGTHS", "{'inputs': -3, 'targets': 4}", "TASK_FEATURE_LENGTHS"),
        ("TASK_FEATURE_LENGTHS", "16", "TASK_FEATURE_LENGTHS"),
        ("TransformerConfig.num_heads", "0", "TransformerConfig.num_heads is 0"),
        ("train.microbatches", "0", "train.microbatches is 0"),
        ("train.checkpoint_period", "0", "train.checkpoint_period is 0"),
        ("train.log_period", "0", "train.log_period is 0"),
        ("MODEL_DIR", "gs://bucket/run", "gs:// cannot be read or written"),
        ("MODEL_DIR", "a" * 300, "File name too long"),
    ]
    wrong = []
    for macro, value, message in cases:
        code = launch.execute("expertrag_jax.train", [*TRAIN, "--dry_run", f"--gin.{macro}={value}"])
        told = capsys.readouterr().err
        if code != 2 or message not in told or told.count("\n") != 1:
            wrong.append((macro, value[:20], code, told))
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "job, flags, message",
    [
        ("index:build_index", ["--corpus=c", "--index_dir=i", "--passage_length=0"], "--passage_length is 0"),
        ("index:build_index", ["--corpus=c", "--index_dir=gs://b/i"], "gs:// cannot be read or written"),
        ("index:build_index", ["--corpus=c", "--index_dir=i", "--vocabulary_size=-1"], "--vocabulary_size is -1"),
        ("mine", ["--questions=q", "--output=o", "--index_dir=i", "--num_negatives=0"], "--num_negatives is 0"),
        ("infer", ["--questions=q", "--output=s3://o", "--model_dir=m"], "s3:// cannot be read or written"),
        ("infer", ["--questions=q", "--output=o", "--model_dir=m", "--buckets=0"], "--buckets is [0]"),
        ("calibrate", ["--questions=q", "--model_dir=m", "--budget=nan"], "budget is nan"),
        ("calibrate", ["--questions=q", "--model_dir=m", "--price=2"], "--price is 2"),
        ("evaluate", ["--questions=q", "--model_dir=m", "--num_passages=0"], "--num_passages is 0"),
        ("export", ["--model_dir=m", "--export_dir=e", "--num_passages=-1"], "--num_passages is -1"),
        ("export", ["--model_dir=~nobody1/m", "--export_dir=e"], "not known here"),
    ],
)
def test_a_flag_outside_its_range_is_one_sentence(tmp_path, capsys, monkeypatch, job, flags, message):
    monkeypatch.chdir(tmp_path)
    for dry in ([], ["--dry_run"]):
        assert launch.execute(f"expertrag_jax.{job}", [*flags, *dry]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("bm25", {"k1": "x"}, "k1 is 'x'"),
        ("bm25", {"k1": -1}, "k1 is -1"),
        ("bm25", {"b": 7}, "b is 7"),
        ("bm25", {"foo": 1}, "no setting 'foo': it has k1, b, language, stopwords"),
        ("bm25", {"stopwords": "klingon"}, "stopwords is 'klingon'"),
        ("bm25", {"language": "klingon"}, "no stemmer for language 'klingon'"),
        ("scann", {"num_leaves": 0}, "num_leaves is 0"),
        ("scann", {"leaves": 3}, "no setting 'leaves'"),
        ("exact", {"block_size": 0}, "block_size is 0"),
        ("hybrid", {"weight": float("nan")}, "weight is nan"),
        ("hybrid", {"candidates": 0}, "candidates is 0"),
        ("hybrid", {"lexical_settings": {"b": 2}}, "b is 2"),
        ("hybrid", {"dense_settings": {"k1": 2}}, "no setting 'k1'"),
    ],
)
def test_a_setting_of_an_index_outside_its_range_is_one_sentence(kind, settings, message):
    with pytest.raises(UserError, match=message):
        make_index(kind, **settings)


def test_too_little_memory_is_one_sentence():
    with pytest.raises(MemoryError) as raised:
        np.zeros(2**62, np.uint8)
    assert launch.explain(raised.value).startswith("There is not enough memory (Unable to allocate")


def numbers_without_range(hint, limited=False) -> list[type]:
    """The ``int`` and ``float`` in an annotation that no range limits."""
    if typing.get_origin(hint) is typing.Annotated:
        base, *marks = typing.get_args(hint)
        known = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt)
        return numbers_without_range(base, limited or any(isinstance(mark, known) for mark in marks))
    if hint in (int, float):
        return [] if limited else [hint]
    if typing.get_origin(hint) in (collections.abc.Callable, type, typing.Literal):
        return []
    return [found for part in typing.get_args(hint) for found in numbers_without_range(part, limited)]


def bindable() -> dict[str, object]:
    """What the gin files bind and the commands are, by path."""
    found = {}
    for file in sorted((ROOT / "gin").rglob("*.gin")):
        try:
            gin_files.parse([str(file)])
        except UserError:
            pass  # a macro is missing; what the file binds is known all the same
        for entry in list(gin.config._REGISTRY._selector_map.values()):
            target = inspect.unwrap(entry.wrapped)
            if target.__module__.startswith(("expertrag_jax", "tasks")):
                found[f"{target.__module__}.{target.__qualname__}"] = entry.wrapped
    for job in COMMANDS:
        _, function = launch.load(job)
        found[f"{function.__module__}.{function.__qualname__}"] = function
    gin.clear_config()
    return found


def test_every_number_that_gin_can_bind_has_a_range():
    free = {"step_offset"}  # of a schedule: may be anything
    found = bindable()
    missing = [
        f"{path}.{name}"
        for path, target in found.items()
        for name, hint in ranges.hints_of(target).items()
        if name not in free and numbers_without_range(hint)
    ]
    assert len(found) > 40 and missing == []


def test_what_has_ranges_checks_them():
    unchecked = []
    for path, target in bindable().items():
        hints = ranges.hints_of(target)
        if any(typing.get_origin(hint) is typing.Annotated for hint in hints.values()):
            call = target.__init__ if inspect.isclass(target) else target
            if not hasattr(call, "__wrapped__"):
                unchecked.append(path)
    assert unchecked == []


def test_a_misspelt_macro_in_a_gin_file_is_refused(tmp_path, capsys):
    lines = "from __gin__ import dynamic_registration\ninclude 'runs/train.gin'\nTRAIN_STEP = 5\n"
    (tmp_path / "run.gin").write_text(lines)
    flags = [f"--gin_file={tmp_path / 'run.gin'}", *TRAIN[1:], "--dry_run"]
    assert launch.execute("expertrag_jax.train", flags) == 2
    assert "run.gin:3: nothing uses the macro TRAIN_STEP; did you mean 'TRAIN_STEPS'?" in capsys.readouterr().err
