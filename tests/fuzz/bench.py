"""What the commands read, small and right: the folder from which every case of ``fuzz.py`` starts.

Made once from the tiny model of the tests, by the same functions and commands that users have.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

SHORT = ("--gin.BATCH_SIZE=8", "--gin.TRAIN_STEPS=2")
SMALL = (
    *SHORT, "--gin.NUM_PASSAGES=2",
    "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8, 'query': 24, 'passages': 48}",
    *(f"--gin.config.TransformerConfig.{size}" for size in ("embed_dim=16", "mlp_dim=32", "num_heads=2", "head_dim=8")),
    *(f"--gin.config.TransformerConfig.num_{side}_layers=1" for side in ("encoder", "decoder")),
)  # fmt: skip
NARROW = tuple(
    f"--gin.dual_encoder.DualEncoderConfig.{size}" for size in ("embed_dim=16", "output_dim=12", "vocab_size=200")
)
PATHS = {"VOCABULARY": "vocabulary.model", "QUESTIONS": "questions.jsonl"}


def training(*gin_files: str, sizes: Sequence[str] = SMALL, **macros: str) -> list[str]:
    """The arguments of a training of two steps, with paths relative to the case's folder."""
    given = [f"--gin.{name}={value!r}" for name, value in (PATHS | macros).items()]
    return ["train", *(f"--gin_file={name}" for name in gin_files), *sizes, *given]


CLOSED_BOOK = training("runs/train.gin", "models/t5_tiny.gin", "systems/closed_book.gin", MODEL_DIR="run")
DUAL_ENCODER = [
    *training("runs/train.gin", "systems/dual_encoder.gin", sizes=SHORT, CORPUS="passages.tsv", MODEL_DIR="run2"),
    *NARROW[:2],
    "--gin.TASK_FEATURE_LENGTHS={'query': 24, 'passages': 48}",
    "--gin.CLOZE_STEPS=2",
]
RAG = [
    *training(
        "runs/train.gin", "models/t5_tiny.gin", "systems/rag_token.gin", INDEX_DIR="exact", RETRIEVER="retriever",
        RETRIEVAL_CACHE="cache.sqlite", MODEL_DIR="run3",
    ),
    *NARROW,
    "--gin.MAX_TARGET_LENGTH=8",
]  # fmt: skip
DEMO = ["demo", "--gin_file=runs/almanac.gin", "--gin.RANDOM_SEED=1", "--model_dir=demo"]
"""Is refused on undamaged files too, since their seed is 0: another demo would train for minutes."""


def make(folder: Path) -> None:
    """Writes everything that the commands of ``kinds.py`` read; raises RuntimeError if a command fails.

    The folder appears when it is complete.
    """
    built = folder.absolute().with_name(f"{folder.name}.building")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    with contextlib.chdir(built):
        _fill(built)
    built.rename(folder)


def _fill(folder: Path) -> None:
    """Writes into the current folder."""
    import tiny_model

    from expertrag_jax.demo_folder import check_folder
    from expertrag_jax.files.sealed import sealed
    from expertrag_jax.retrieval.corpus import write_passages_tsv

    made = tiny_model.make(folder)
    (folder / "index").rename(folder / "exact")
    passages = tiny_model.passages()
    write_passages_tsv(passages, folder / "passages.tsv.gz")
    rows = zip(passages.ids, passages.texts, passages.titles)
    (folder / "passages.tsv").write_text("id\ttext\ttitle\n" + "".join("\t".join(row) + "\n" for row in rows))
    (folder / "documents").mkdir()
    records = [{"id": f"d{row}", "title": title, "text": text} for row, (title, text) in
               enumerate(zip(passages.titles, passages.texts))]  # fmt: skip
    write_records(folder / "documents" / "c.jsonl", records)
    (folder / "documents" / "a.txt").write_text("\n".join(passages.texts[:5]))
    (folder / "documents" / "b.md").write_text("".join(f"# {r['title']}\n\n{r['text']}\n\n" for r in records[:5]))
    write_records(folder / "questions.jsonl", questions(tiny_model))

    gate = {"threshold": made.threshold, "scale": 1.0, "bias": 0.0, "checkpoint": "3"}
    (folder / "model" / "gate.json").write_text(sealed(gate))
    tiny_model.write_retriever(folder / "retriever", made)

    corpus = ["index", "--corpus=passages.tsv", "--vocabulary=vocabulary.model", "--passage_length=24"]
    run(*corpus, "--index_dir=bm25")
    dense = ["--retriever=retriever", "--tune_questions=questions.jsonl"]
    run(*corpus, *dense, "--kind=hybrid", "--index_dir=hybrid")
    write_many(folder / "many.tsv", passages)
    run("index", "--corpus=many.tsv", *corpus[2:], *dense, "--kind=scann", "--index_dir=scann")
    run("export", "--model_dir=model", "--index_dir=exact", "--export_dir=export", "--platforms=cpu", "--buckets=4")
    run(*CLOSED_BOOK)
    write_partial(folder)
    check_folder(folder / "demo", "almanac of 1,000 entries", 0, "0" * 16)
    (folder / "demo" / "retriever").mkdir()
    run(*RAG, "--gin.MODEL_DIR='rag'")  # leaves the cache
    shutil.rmtree(folder / "rag")


def questions(tiny_model) -> list[dict]:
    """One question per passage, with everything that a record may have."""
    return [
        {
            "id": f"q{row}", "question": f"Where does {name} live?", "answers": [tiny_model.TOWNS[row % 5]],
            "gold_passage_ids": [f"e{row}"], "hard_negative_passage_ids": [f"e{(row + 1) % len(tiny_model.NAMES)}"],
            "stratum": "head" if row % 2 else "tail",
        }
        for row, name in enumerate(tiny_model.NAMES)
    ]  # fmt: skip


def write_many(path: Path, passages) -> None:
    """As many passages as ScaNN's partitions need; the first ones are ``passages``."""
    rows = [(f"e{row}", passages.texts[row % 15], f"{passages.titles[row % 15]} {row}") for row in range(1000)]
    path.write_text("".join("\t".join(row) + "\n" for row in rows))


def write_partial(folder: Path) -> None:
    """What a stopped ``infer`` of ``kinds.py`` leaves."""
    from expertrag_jax.infer import as_line, job_key, open_service, partial_file
    from expertrag_jax.retrieval.corpus import read_questions_jsonl

    path = folder / "questions.jsonl"
    service = open_service("model", index_dir="exact")
    key = job_key(service, path.read_bytes(), "predict", "gate")
    with open(partial_file("partial.jsonl", key), "w") as file:
        file.writelines(as_line(record) for record in service.predict(read_questions_jsonl(path)))


def write_records(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run(*arguments: str) -> None:
    """Runs a command in this process, in the current folder."""
    from expertrag_jax.main import main

    if main(arguments):
        raise RuntimeError(f"expertrag {' '.join(arguments)} failed")
