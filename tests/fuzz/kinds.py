"""The kinds of file that commands read, how each is damaged, and the commands that read it."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import mutations
from bench import CLOSED_BOOK, DEMO, DUAL_ENCODER, RAG

ASKED = "Where does Bela Korv live?"
MODEL, READ = "--model_dir=model", "--index_dir=exact"
ON_CORPUS = ["index", "--vocabulary=vocabulary.model", "--passage_length=24", "--index_dir=new"]

COMMANDS: dict[str, list[str]] = {
    "index corpus": [*ON_CORPUS, "--corpus=passages.tsv"],
    "index packed corpus": [*ON_CORPUS, "--corpus=passages.tsv.gz"],
    "index documents": [*ON_CORPUS, "--documents=documents"],
    "index hybrid": [
        *ON_CORPUS, "--corpus=passages.tsv", "--retriever=retriever", "--tune_questions=questions.jsonl",
    ],
    "index --verify bm25": ["index", "--index_dir=bm25", "--verify"],
    "index --verify exact": ["index", "--index_dir=exact", "--verify"],
    "index --verify hybrid": ["index", "--index_dir=hybrid", "--verify"],
    "index --verify scann": ["index", "--index_dir=scann", "--verify"],
    "mine bm25": ["mine", "--questions=questions.jsonl", "--index_dir=bm25", "--output=mined.jsonl"],
    "mine exact": [
        "mine", "--questions=questions.jsonl", "--index_dir=exact", "--retriever=retriever", "--output=mined.jsonl",
    ],
    "mine hybrid": [
        "mine", "--questions=questions.jsonl", "--index_dir=hybrid", "--retriever=retriever", "--output=mined.jsonl",
    ],
    "mine scann": [
        "mine", "--questions=questions.jsonl", "--index_dir=scann", "--retriever=retriever", "--output=mined.jsonl",
    ],
    "train closed book": CLOSED_BOOK,
    "train retriever": DUAL_ENCODER,
    "train rag": RAG,
    "evaluate": [
        "evaluate", MODEL, READ, "--questions=questions.jsonl", "--output_dir=report",
        "--gin.evaluate.evaluate.buckets=(4,)", "--gin.evaluate.evaluate.rounds=1",
    ],
    "infer": ["infer", MODEL, READ, "--questions=questions.jsonl", "--output=partial.jsonl", "--buckets=4"],
    "infer export": ["infer", "--export_dir=export", READ, "--questions=questions.jsonl", "--output=answers.jsonl"],
    "answer": ["answer", MODEL, READ, ASKED],
    "answer export": ["answer", "--export_dir=export", READ, ASKED],
    "calibrate": ["calibrate", MODEL, READ, "--questions=questions.jsonl", "--overwrite"],
    "export": ["export", MODEL, READ, "--export_dir=exported", "--platforms=cpu", "--buckets=4"],
    "demo": DEMO,
}  # fmt: skip
"""Right commands on the files of ``bench.py``, in the case's folder."""

ANSWERING = ["infer", "answer", "evaluate", "calibrate", "export"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of the kind.
      files: patterns of paths in the bench.
      commands: names in ``COMMANDS`` that read it.
      mutations: of its bytes.
      free: whether other content may be valid too, so that success is not a fault: the file is text that its owner
        may have intended, a log, or code.
    """

    name: str
    files: Sequence[str]
    commands: Sequence[str]
    mutations: Sequence[mutations.Mutation]
    free: bool = False

    def paths(self, bench: Path) -> list[Path]:
        """Its files, relative to the bench, in order."""
        everything = sorted(path.relative_to(bench) for path in bench.rglob("*") if path.is_file())
        return [path for path in everything if any(fnmatch.fnmatch(str(path), pattern) for pattern in self.files)]


def _index(kind: str, commands: Sequence[str]) -> list[Kind]:
    """The manifest of an index, and its other files."""
    return [
        Kind(f"manifest of a {kind} index", [f"{kind}/manifest.json"], commands, mutations.OBJECT),
        Kind(f"files of a {kind} index", [f"{kind}/[!m]*"], commands, mutations.BYTES),
    ]


KINDS: list[Kind] = [
    Kind("passages", ["passages.tsv"], ["index corpus", "index hybrid", "train retriever"], mutations.TABLE, free=True),
    Kind("packed passages", ["passages.tsv.gz"], ["index packed corpus"], mutations.BYTES),
    Kind("JSON documents", ["documents/c.jsonl"], ["index documents"], mutations.LINES, free=True),
    Kind("text documents", ["documents/a.txt", "documents/b.md"], ["index documents"], mutations.TEXT, free=True),
    Kind("questions", ["questions.jsonl"], ["infer", "infer export", "evaluate", "calibrate", "mine bm25", "mine exact",
         "index hybrid", "train closed book", "train retriever"], mutations.LINES, free=True),
    Kind("vocabulary", ["vocabulary.model"], ["index corpus", "train closed book"], mutations.BYTES, free=True),
    *_index("bm25", ["index --verify bm25", "mine bm25"]),
    *_index("exact", ["index --verify exact", "mine exact", *ANSWERING]),
    *_index("hybrid", ["index --verify hybrid", "mine hybrid"]),
    *_index("scann", ["index --verify scann", "mine scann"]),
    Kind("checkpoint", ["model/checkpoints/*"], ANSWERING, mutations.BYTES),
    Kind("gate", ["model/gate.json"], ANSWERING, mutations.OBJECT),
    Kind("vocabulary of a model", ["model/vocabulary/*"], ANSWERING, mutations.BYTES),
    Kind("retriever", ["retriever/*"], ["mine exact", "index hybrid"], mutations.BYTES),
    Kind("manifest of an export", ["export/manifest.json"], ["infer export", "answer export"], mutations.OBJECT),
    Kind("files of an export", ["export/[!m]*"], ["infer export", "answer export"], mutations.BYTES),
    Kind("training", ["run/checkpoints/*", "run/vocabulary/*"], ["train closed book"], mutations.BYTES),
    Kind("logs of a training", ["run/config.gin", "run/logs/*"], ["train closed book"], mutations.BYTES, free=True),
    Kind("unfinished answers", ["partial.jsonl.*.partial"], ["infer"], mutations.LINES),
    Kind("retrieval cache", ["cache.sqlite"], ["train rag"], mutations.BYTES),
    Kind("world of the demo", ["demo/world.json"], ["demo"], mutations.OBJECT),
]  # fmt: skip


# arguments

WORDS = [
    "", " ", "-1", "0", "1.5", "nan", "inf", "1e999", "9" * 5000, "None", "True", "[", "[]", "{}", "{'a': 1}", "'",
    '"x', "x", "word", "@train", "%NOTHING", "nowhere", "./", "gs://bucket/x", "file:///nowhere/x", "~nobody1/x",
    "a" * 300, "a/" * 3000, "/dev/null", "/dev/zero", "/proc/self/mem", "loop", "pipe", "passages.tsv",
    "questions.jsonl", "bm25", "model", "export", "\x1b[31m", "\udcff", "苍鹭",
    "\u202e", "a\nb", "-", "--", "=", "$(x)",
    "`x`", "squad2", "regex", "gate",
]  # fmt: skip
"""What a person or a script may write where another value belongs."""

MACROS = [
    "BATCH_SIZE", "TRAIN_STEPS", "EVAL_PERIOD", "RANDOM_SEED", "NUM_PASSAGES", "TASK_FEATURE_LENGTHS", "QUESTIONS",
    "VOCABULARY", "INDEX_DIR", "MODEL_DIR", "DROPOUT_RATE", "LABEL_SMOOTHING", "NUM_EXPERTS", "CHECKPOINT_PERIOD",
    "INITIAL_CHECKPOINT_PATH", "FUSION", "BATCH_SIZ", "config.TransformerConfig.num_heads", "train.train.log_period",
    "train.train.parameter_rules", "LEARNING_RATE", "Z_LOSS", "CORPUS", "RETRIEVAL_COST", "USE_CACHED_TASKS",
]  # fmt: skip
