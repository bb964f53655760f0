"""BM25, dense and hybrid retrieval on one hybrid index: R@1/5/20/100, and ScaNN's recall of the exact search.

    python benchmarks/retrieval.py --index_dir=runs/wikipedia/index --retriever=runs/wikipedia/retriever \
        --questions=dev.jsonl.gz --json=retrieval.json

R@k is the share of questions with a gold passage among the first k. The hybrid's weight is the index's own,
fitted on the questions that `expertrag index --tune_questions` was given.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from expertrag_jax.encoders import check_encoder, load_encoder
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import read_questions_jsonl, texts_of
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.retrieval.mesh_index import ExactIndex
from expertrag_jax.retrieval.metrics import gold_rows, index_recall, recall_at_k
from expertrag_jax.retrieval.protocol import Queries

KS = (1, 5, 20, 100)


def compare(index_dir: str, retriever: str, questions_path: str) -> dict:
    """The comparison as a JSON-ready dict; UserError where the index is no hybrid one."""
    loaded = open_index(index_dir)
    if loaded.manifest.kind != "hybrid":
        raise UserError(
            f"{index_dir} is a {loaded.manifest.kind} index: build a hybrid one, which holds all three."
        )
    encoder = load_encoder(retriever)
    check_encoder(loaded, encoder)
    questions = [question for question in read_questions_jsonl(questions_path) if question.gold_passage_ids]
    texts, gold = texts_of(questions), gold_rows(questions, loaded.passages)
    queries = Queries(texts, np.asarray(encoder.encode_queries(encoder.tokenise(texts))))
    indexes = {
        "bm25": loaded.index.lexical,
        "dense (exact)": ExactIndex().build(None, loaded.vectors),
        f"dense ({loaded.index.dense.kind})": loaded.index.dense,
        "hybrid": loaded.index,
    }
    rows, seconds = {}, {}
    for name, index in indexes.items():
        index.search(queries.take(range(min(256, len(texts)))), max(KS))  # loads what is loaded late
        start = time.monotonic()
        rows[name] = index.search(queries, max(KS))[0]
        seconds[name] = time.monotonic() - start
    exact, dense = rows["dense (exact)"], rows[f"dense ({loaded.index.dense.kind})"]
    return {
        "questions": len(questions),
        "passages": len(loaded),
        "hybrid_weight": loaded.index.weight,
        "dense_recall_at_20_of_exact": index_recall(dense[:, :20], exact[:, :20]),
        "recall": {name: recall_at_k(found, gold, KS) for name, found in rows.items()},
        "questions_per_second": {name: len(questions) / value for name, value in seconds.items()},
    }


def show(result: dict) -> None:
    """The table."""
    print(f"{result['questions']} questions, {result['passages']} passages")
    print(f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS) + f"{'q/s':>9}")
    for name, recall in result["recall"].items():
        speed = result["questions_per_second"][name]
        print(f"{name:16}" + "".join(f"{recall[k]:8.3f}" for k in KS) + f"{speed:9.0f}")
    print(f"weight of the dense score in the hybrid: {result['hybrid_weight']:.2f}")
    print(
        f"recall@20 of the dense index against the exact search: {result['dense_recall_at_20_of_exact']:.3f}"
    )


def missed(result: dict) -> list[str]:
    """What falls short: ScaNN against exact search, and the hybrid against BM25 among the first 20."""
    recall, found = result["recall"], result["dense_recall_at_20_of_exact"]
    bars = {
        f"the dense index finds {found:.3f} of the exact search's first 20, under .95": found >= 0.95,
        "the hybrid's R@20 is under BM25's": recall["hybrid"][20] >= recall["bm25"][20],
    }
    return [sentence for sentence, met in bars.items() if not met]


def main() -> None:
    """Runs the comparison, prints it and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("index_dir", "retriever", "questions"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    try:
        result = compare(options.index_dir, options.retriever, options.questions)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if short := missed(result):
        parser.exit(1, "missed: " + "; ".join(short) + "\n")


if __name__ == "__main__":
    main()
