"""What each stage of a retriever's training brings, on passages and questions of DPR's formats.

    python benchmarks/retriever_training.py --data=$EXPERTRAG_DATA --work_dir=runs/retriever_training \
        --json=docs/results/retriever_training.json

Inverse cloze on the passages; from there DPR with BM25's hard negatives, in turn with more inverse cloze; from inverse
cloze again, the same with BM25's negatives and those mined from the index of the towers before; and, as a control, as
many more steps of inverse cloze alone. Measured: R@1, 5, 20 and 100 on three sets of questions, of whose articles no
stage saw a question, for each stage's dense index (exact search), BM25, and the hybrid. Questions of ten training
articles that the towers were not trained on choose the hybrid's towers (R@20) and its weight.

Needs below --data: wiki/passages.tsv.gz; qa/squad_new_wiki_train.jsonl.gz, and those of TESTS.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np

from expertrag_jax.encoders import load_encoder
from expertrag_jax.main import main as expertrag
from expertrag_jax.retrieval.corpus import read_questions_jsonl, texts_of
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.retrieval.metrics import gold_rows, recall_at_k
from expertrag_jax.retrieval.protocol import Queries

KS = (1, 5, 20, 100)
TRAINED = ("dpr", "dpr_mined")  # on questions
STAGES = ("inverse_cloze", "inverse_cloze_longer", *TRAINED)
TESTS = ("squad_new_wiki_dev", "squad2_dev_half", "nq_gold_dev")
HELD_OUT_ARTICLES = 10  # of the 41 training articles, for the hybrid's weight
LONGEST_QUESTION = 150  # characters; one is a line of commas


def split(path: Path, folder: Path, seed: int = 0) -> None:
    """Writes train.jsonl and weight.jsonl, which share no article."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        questions = [record for record in map(json.loads, lines) if len(record["question"]) < LONGEST_QUESTION]
    articles = sorted({record["article"] for record in questions})
    held_out = set(random.Random(seed).sample(articles, HELD_OUT_ARTICLES))
    for name, wanted in (("train", False), ("weight", True)):
        records = [record for record in questions if (record["article"] in held_out) == wanted]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


class Run:
    """The commands, with the seconds that each took."""

    def __init__(self, data: Path, folder: Path):
        self.corpus, self.folder, self.seconds = data / "wiki" / "passages.tsv.gz", folder, {}

    def command(self, name: str, *arguments: str | Path) -> None:
        """One `expertrag` command; SystemExit where it fails."""
        start = time.monotonic()
        if expertrag([str(argument) for argument in arguments]):
            raise SystemExit(f"{name} failed")
        self.seconds[name] = round(time.monotonic() - start, 1)

    def train(self, name: str, questions: str, steps: tuple[int, int], start: str | None = None, negatives: int = 1):
        """The towers ``name``: so many steps of inverse cloze, then of it and questions in turn; from ``start`` on."""
        values = {
            "VOCABULARY": self.folder / "vocabulary.model", "CORPUS": self.corpus, "MODEL_DIR": self.folder / name,
            "QUESTIONS": self.folder / questions, "CLOZE_STEPS": steps[0], "TRAIN_STEPS": steps[1],
            "NUM_NEGATIVES": negatives,
        } | ({"INITIAL_CHECKPOINT_PATH": self.folder / start} if start else {})  # fmt: skip
        given = [f"--gin.{key}={value}" for key, value in values.items()]
        self.command(name, "train", "--gin_file=runs/train.gin", "--gin_file=systems/dual_encoder.gin", *given)

    def index(self, name: str, *arguments: str | Path) -> None:
        """An index directory."""
        self.command(f"{name} index", "index", "--corpus", self.corpus, "--index_dir", self.folder / name, *arguments)

    def mine(self, name: str, questions: str, index: str, *arguments: str | Path) -> None:
        """A file of questions with hard negatives."""
        files = ("--questions", self.folder / questions, "--output", self.folder / name)
        self.command(name, "mine", *files, "--index_dir", self.folder / index, *arguments)


def run(data: Path, folder: Path, steps: tuple[int, int]) -> dict:
    """All stages and their figures, JSON-ready."""
    split(data / "qa" / "squad_new_wiki_train.jsonl.gz", folder)
    job, (cloze, behind) = Run(data, folder), steps
    job.index("bm25", "--vocabulary", folder / "vocabulary.model")
    job.train("inverse_cloze", "train.jsonl", (cloze, 0))
    job.train("inverse_cloze_longer", "train.jsonl", (behind, 0), "inverse_cloze")
    job.mine("train_bm25.jsonl", "train.jsonl", "bm25")
    job.train("dpr", "train_bm25.jsonl", (0, behind), "inverse_cloze")
    job.index("dpr_index", "--kind=exact", "--retriever", folder / "dpr")
    job.mine("train_mined.jsonl", "train_bm25.jsonl", "dpr_index", "--retriever", folder / "dpr")
    job.train("dpr_mined", "train_mined.jsonl", (0, behind), "inverse_cloze", negatives=2)
    for name in ("inverse_cloze", "inverse_cloze_longer", "dpr_mined"):
        job.index(f"{name}_index", "--kind=exact", "--retriever", folder / name)
    held_out = dense_recall(folder, folder / "weight.jsonl")
    best = max(TRAINED, key=lambda name: held_out[name][20])
    tuned = ("--retriever", folder / best, "--tune_questions", folder / "weight.jsonl")
    job.index("hybrid", "--kind=hybrid", "--gin.index.build_index.settings={'dense': 'exact'}", *tuned)
    start = time.monotonic()
    tests = {name: measure(folder, data / "qa" / f"{name}.jsonl.gz", best) for name in TESTS}
    job.seconds["measuring"] = round(time.monotonic() - start, 1)
    hybrid = open_index(folder / "hybrid")
    return {
        "passages": len(hybrid), "hybrid_towers": best, "hybrid_weight": hybrid.index.weight, "tests": tests,
        "held_out_recall": held_out, "steps": {"inverse_cloze": steps[0], "each DPR stage": steps[1]},
        "seconds": job.seconds,
    }  # fmt: skip


def dense_recall(folder: Path, path: Path) -> dict[str, dict[int, float]]:
    """R@k of every stage's towers, exact search, on a file of questions."""
    questions = [question for question in read_questions_jsonl(path) if question.gold_passage_ids]
    recall = {}
    for name in STAGES:
        loaded = open_index(folder / f"{name}_index")
        rows = loaded.index.search(encoded(folder / name, texts_of(questions)), KS[-1])[0]
        recall[name] = recall_at_k(rows, gold_rows(questions, loaded.passages), KS)
    return recall


def measure(folder: Path, test: Path, best: str) -> dict:
    """R@k of every index on the test questions; the hybrid is of the towers ``best``."""
    questions = [question for question in read_questions_jsonl(test) if question.gold_passage_ids]
    hybrid = open_index(folder / "hybrid")
    gold, queries = gold_rows(questions, hybrid.passages), encoded(folder / best, texts_of(questions))
    rows = {"bm25": hybrid.index.lexical, "hybrid": hybrid.index}
    found = {name: recall_at_k(index.search(queries, KS[-1])[0], gold, KS) for name, index in rows.items()}
    return {"questions": len(questions), "recall": dense_recall(folder, test) | found}


def encoded(model_dir: Path, texts: list[str]) -> Queries:
    """The questions and their vectors."""
    encoder = load_encoder(model_dir)
    tokens = encoder.tokenise(texts)
    vectors = [np.asarray(encoder.encode_queries(tokens[start : start + 256])) for start in range(0, len(texts), 256)]
    return Queries(texts, np.concatenate(vectors))


def gains(result: dict, test: str) -> tuple[float, dict[int, float]]:
    """(R@20 of the hybrid's towers over the better of inverse cloze alone, R@k of the hybrid over BM25 by k)."""
    recall = result["tests"][test]["recall"]
    alone = max(recall["inverse_cloze"][20], recall["inverse_cloze_longer"][20])
    dense = recall[result["hybrid_towers"]][20] - alone
    return dense, {k: recall["hybrid"][k] - recall["bm25"][k] for k in KS}


def show(result: dict) -> None:
    """A table per test, and the two claims."""
    for test, found in result["tests"].items():
        print(f"{test}: {found['questions']} questions, {result['passages']} passages")
        print(f"{'':20}" + "".join(f"{f'R@{k}':>8}" for k in KS))
        for name, recall in found["recall"].items():
            print(f"{name:20}" + "".join(f"{recall[k]:8.3f}" for k in KS))
        dense, hybrid = gains(result, test)
        print(f"dense R@20 of {result['hybrid_towers']}, over inverse cloze alone: {dense:+.3f}")
        print("hybrid over BM25: " + ", ".join(f"R@{k} {gain:+.4f}" for k, gain in hybrid.items()))
    print(f"weight of the dense score: {result['hybrid_weight']:.2f}; {sum(result['seconds'].values()):.0f} s in all")


def main() -> None:
    """Runs everything anew, prints the table, and exits with 1 where one of the two claims fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of wiki/ and qa/")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/retriever_training"), help="replaced")
    parser.add_argument("--cloze_steps", type=int, default=1250)
    parser.add_argument("--question_steps", type=int, default=600, help="of each stage behind inverse cloze")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    shutil.rmtree(options.work_dir, ignore_errors=True)
    options.work_dir.mkdir(parents=True)
    result = run(options.data, options.work_dir, (options.cloze_steps, options.question_steps))
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    every = [gains(result, test) for test in TESTS]
    held = all(dense > 0 and min(hybrid.values()) >= 0 for dense, hybrid in every)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
