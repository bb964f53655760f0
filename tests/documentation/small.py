"""How a test runs the commands of the documentation: page by page, in the order of the page, and made small.

A command that has neither an entry here nor a mark on its page (see ``pages.py``) fails
``test_every_command_of_the_documentation_is_run_or_marked``. A key is how the command begins. A value is what the test
appends to its words, so that it takes seconds: ``{here}`` is this folder and ``{port}`` a free port.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Apart:
    """The command is run in processes of its own, all those that it starts at once.

    Attributes:
      more: what is appended.
      codes: exit codes of a command that has done its work.
    """

    more: str = ""
    codes: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class SameAs:
    """The command is on another page too, in the same words, and is run there."""

    page: str


def _macros(prefix: str = "", **values) -> str:
    return " ".join(f'--gin.{prefix}{name}="{value}"' for name, value in values.items())


READER = " ".join(
    [
        _macros("config.TransformerConfig.", embed_dim=16, mlp_dim=32, num_heads=2, head_dim=8),
        _macros("config.TransformerConfig.", num_encoder_layers=1, num_decoder_layers=1),
        _macros(BATCH_SIZE=8, TRAIN_STEPS=2, EVAL_STEPS=1),
    ]
)
TOWERS = _macros("dual_encoder.DualEncoderConfig.", embed_dim=16, output_dim=12)
RETRIEVER = f"{TOWERS} {_macros(BATCH_SIZE=8, CLOZE_STEPS=2, TRAIN_STEPS=2)}"
VOCABULARY = "--vocabulary_size=400"
ANSWERS = "--buckets=8"
REPORT = _macros("evaluate.evaluate.", buckets=(8,), rounds=1, throughput_questions=8, latency_questions=2)

ALMANAC_RAG = " ".join(  # the sizes of demo.gin
    [
        _macros("config.TransformerConfig.", embed_dim=32, mlp_dim=64, num_heads=2, expert_layer_period=1),
        _macros("config.TransformerConfig.", num_encoder_layers=1, num_decoder_layers=1),
        _macros(TASK_FEATURE_LENGTHS={"inputs": 20, "targets": 8, "query": 20, "passages": 112}, MAX_TARGET_LENGTH=8),
        _macros(BATCH_SIZE=8, TRAIN_STEPS=4, EVAL_STEPS=1),
    ]
)
# Both trainings of docs/dro.md have the same shapes, so that the second one finds its programs compiled.
DRO = " ".join(
    [
        READER,
        _macros("config.TransformerConfig.", logits_via_embedding=True),
        _macros(TASK_FEATURE_LENGTHS={"inputs": 64, "targets": 24, "query": 64, "passages": 112}, MAX_TARGET_LENGTH=24),
        _macros(WARM_GENERATOR_STEPS=2, WARM_SELECTOR_STEPS=2, ITERATIONS=1),
    ]
)

# Pages that begin with the demo.
DEMO_PAGES: dict[str, dict[str, str | Apart | SameAs]] = {
    "docs/rag.md": {
        "make demo": Apart("--gin_file={here}/demo.gin", codes=(0, 3)),  # 3: promises on quality are missed
        "python -m tasks.almanac.question_files": "",
        "expertrag train --gin_file=examples/almanac_rag.gin": ALMANAC_RAG,
        "expertrag evaluate": REPORT,
        "for edition in 1 2": ANSWERS,
        "expertrag train --gin_file=examples/almanac_rag.gin --gin.REFRESH_PERIOD": f"{ALMANAC_RAG} "
        f"{_macros(REFRESH_PERIOD=2)}",
        "expertrag index --corpus=corpus.tsv --index_dir=runs/bm25": VOCABULARY,
        "expertrag train --gin_file=runs/train.gin --gin_file=systems/dual_encoder.gin": RETRIEVER,
        "expertrag index --corpus=corpus.tsv --vocabulary=runs/vocabulary.model --kind=exact": "",
        "expertrag train --gin_file=runs/train.gin --gin_file=models/t5_tiny.gin": f"{READER} {TOWERS}",
        "expertrag infer": ANSWERS,
    },
    "docs/retriever_training.md": {
        "make demo": SameAs("docs/rag.md"),
        "python -m tasks.almanac.question_files": "",
        "gzip": "",
        "cp runs/almanac/vocabulary.model": "",
        "cp runs/almanac/questions/gate.jsonl": "",
        "expertrag index --corpus=passages.tsv.gz": "",
        "expertrag mine --questions=train.jsonl": "",
        "expertrag train --gin_file=runs/train.gin": RETRIEVER,
        "expertrag index --kind=exact": "",
        "expertrag mine --questions=train_bm25.jsonl": "",
        "expertrag train --gin_file=runs/train.gin --gin_file=systems/dual_encoder.gin": f"{RETRIEVER} "
        f"{_macros(CLOZE_STEPS=0)}",
        "expertrag train --gin_file=runs/train.gin --gin_file=models/t5_tiny.gin": f"{READER} {TOWERS} "
        f"{_macros(GENERATOR_STEPS=2, NUM_PASSAGES=4)}",
        "expertrag index --kind=hybrid": "",
    },
}

# Pages that begin with files of the reader's own.
FILE_PAGES: dict[str, dict[str, str | Apart | SameAs]] = {
    "docs/dro.md": {
        "python -m tasks.almanac.two_hop_files": "--train=40 --validation=8 --test=8",
        "expertrag index --corpus=runs/two_hop/corpus.tsv.gz": "--vocabulary_size=340",
        "expertrag train --gin_file=examples/two_hop.gin": DRO,
        "expertrag evaluate": REPORT,
        "expertrag infer --model_dir=runs/two_hop/model": ANSWERS,
        "expertrag index --corpus=passages.tsv": "--vocabulary_size=340",
        "expertrag train --gin_file=runs/train.gin": DRO,
        "expertrag infer --model_dir=runs/dro": ANSWERS,
        "python benchmarks/dro_variance.py": "--problems=1 --trials=20 --samples 32",
    },
    "docs/gin.md": {"expertrag train": ""},
    "docs/pods.md": {
        "expertrag index": VOCABULARY,
        "for i in 0 1": Apart(f"{READER} --coordinator_address=127.0.0.1:{{port}}"),
    },
    "docs/raw_text.md": {
        "expertrag index": VOCABULARY,
        "expertrag train --gin_file=examples/raw_text.gin": f"{READER} {_macros(PRETRAINING_STEPS=2)}",
        "expertrag infer": ANSWERS,
        "expertrag train --gin_file=runs/train.gin": READER,
        "expertrag train --gin_file=runs/train.gin --gin_file=models/t5_tiny.gin --gin_file=systems/expert_rag.gin":
        f"{READER} {_macros(GATE_STEPS=2, NUM_PASSAGES=2)}",
    },
    "docs/wikipedia.md": {
        "import gzip": "",
        "expertrag index --documents=notes/": VOCABULARY,
        "expertrag index --index_dir=runs/notes/index --verify": "",
        "expertrag index --gin_file=examples/wikipedia_retriever.gin": VOCABULARY,
        "expertrag train --gin_file=examples/wikipedia_retriever.gin": f"{RETRIEVER} "
        f"{_macros(CLOZE_STEPS=60, TRAIN_STEPS=60)}",
        "expertrag index --gin_file=examples/wikipedia_qa.gin": "",
        "expertrag train --gin_file=examples/wikipedia_qa.gin": f"{READER} {TOWERS} "
        f"{_macros(NUM_EXPERTS=0, TRAIN_STEPS=24, GATE_STEPS=4)}",
        "expertrag calibrate": "",
        "expertrag evaluate": REPORT,
        "expertrag infer": f"{ANSWERS} --retrieve=always",
        "expertrag export": f"{ANSWERS} --platforms=cpu",
        "expertrag answer": "",
        "python benchmarks/retrieval.py": "",
        "expertrag train --gin_file=examples/wikipedia_qa.gin --gin.QUESTIONS=train.jsonl": f"{READER} "
        f"{_macros(NUM_EXPERTS=0, GATE_STEPS=2)}",
        "expertrag infer --model_dir=runs/wikipedia/lexical_reader": ANSWERS,
        "expertrag export --model_dir=runs/wikipedia/lexical_reader": f"{ANSWERS} --platforms=cpu",
    },
}

PAGES: dict[str, dict[str, str | Apart | SameAs]] = {
    **DEMO_PAGES,
    **FILE_PAGES,
    "README.md": {
        "make demo": SameAs("docs/rag.md"),
        "expertrag index --gin_file=examples/wikipedia_retriever.gin": SameAs("docs/wikipedia.md"),
        "expertrag train --gin_file=examples/wikipedia_retriever.gin": SameAs("docs/wikipedia.md"),
        "expertrag index --gin_file=examples/wikipedia_qa.gin": SameAs("docs/wikipedia.md"),
        "expertrag train --gin_file=examples/wikipedia_qa.gin": SameAs("docs/wikipedia.md"),
        "expertrag export": SameAs("docs/wikipedia.md"),
        "expertrag answer": SameAs("docs/wikipedia.md"),
    },
}

# Files that a page takes from its reader.
GIVEN: dict[str, tuple[str, ...]] = {
    "docs/dro.md": ("passages.tsv", "train.jsonl", "validation.jsonl", "test.jsonl"),
    "docs/pods.md": ("notes", "train.jsonl"),
    "docs/rag.md": ("corpus.tsv", "train.jsonl", "validation.jsonl", "test.jsonl"),
    "docs/raw_text.md": ("notes", "train.jsonl", "gate.jsonl", "test.jsonl"),
    "docs/wikipedia.md": ("passages.tsv.gz", "squad_new_wiki_train.jsonl.gz", "test.jsonl", "notes"),
}
