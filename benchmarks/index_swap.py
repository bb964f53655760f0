"""Two corpora by two question sets, one model (RAG, arXiv 2005.11401, section 4.5 "Index hot-swapping").

    expertrag demo --gin_file=runs/almanac.gin --gin.MODEL_DIR=runs/almanac
    python benchmarks/index_swap.py --demo_dir runs/almanac --work_dir runs/rag --json index_swap.json

A RAG model starts from the demo's generator, which has learned to read, and its query encoder, and is trained through
the marginal on questions about edition 1 of the almanac with that edition's index. Then the test questions about facts
that changed between the editions 1 and 2 are answered with either index, nothing trained in between, and compared with
either edition's answers: where corpus and answers match the model must be right, where they do not, wrong. Facts that
the reader can copy are those whose passage is among the K that are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.encoders import open_retriever
from expertrag_jax.evaluation.answers import exact_match
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.service import service_from_model
from expertrag_jax.systems.candidates import Candidates
from expertrag_jax.systems.description import rebuild
from expertrag_jax.systems.rag import MARGINALS, RAG
from expertrag_jax.train import train
from expertrag_jax.trained_model import open_model
from expertrag_jax.training import optimizer
from expertrag_jax.training.pretrained import read_metadata
from tasks.almanac.question_files import changed, prepared_world, read_records
from tasks.questions import register_questions

EDITIONS = ("1", "2")


def trained(options: argparse.Namespace, records: list[dict]) -> str:
    """The RAG model's directory, trained on the records unless it is there already."""
    demo, work = Path(options.demo_dir), Path(options.work_dir)
    facts = read_metadata(demo / "generator")
    generator = rebuild(facts["system"])
    lengths, vocabulary = facts["task_feature_lengths"], str(demo / "vocabulary.model")
    retriever = open_retriever(demo / "index_1", str(demo / "retriever"), reader_vocabulary=vocabulary)
    system = RAG(
        generator.model, generator.retriever, options.marginal, max_target_length=generator.max_target_length,
        candidates=Candidates(retriever), steps=options.steps, optimizer=lambda: optimizer.adafactor(options.rate),
    )  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    lines = [{"question": record["question"], "answers": record["answers"]} for record in records]
    (work / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = register_questions(
        "index_swap", work / "train.jsonl", Vocabularies(vocabulary), mode="both_arms", retriever=retriever,
        num_passages=options.passages,
    )  # fmt: skip
    model = str(work / f"rag_{options.marginal}")
    train(
        model, system, {"rag": Pipeline(task, lengths, options.batch)}, vocabulary, lengths,
        initial_checkpoint=str(demo / "generator"), num_passages=options.passages, index_dir=str(demo / "index_1"),
        checkpoint_period=10_000, log_period=20,
    )  # fmt: skip
    return model


def swap(options: argparse.Namespace, model_dir: str, records: dict[str, list[dict]]) -> dict:
    """Right answers by (corpus, question set) on changed facts, of all and of those whose passage was read."""
    ask = [Question(str(record["id"]), record["question"], tuple(record["answers"])) for record in records["1"]]
    table = {}
    for corpus in EDITIONS:
        model = open_model(model_dir, buckets=(64,))
        service = service_from_model(model, "always", str(Path(options.demo_dir) / f"index_{corpus}"))
        found = service.predict(ask)
        read = np.array([
            f"e{record['entity']}" in {passage["id"] for passage in answer["passages"]}
            for record, answer in zip(records["1"], found)
        ])  # fmt: skip
        for asked in EDITIONS:
            right = np.array([
                bool(exact_match(answer["prediction"], record["answers"]))
                for answer, record in zip(found, records[asked])
            ])  # fmt: skip
            table[f"corpus {corpus}, questions {asked}"] = {
                "right": float(right.mean()), "right_of_read": float(right[read].mean()), "read": float(read.mean()),
            }  # fmt: skip
    return table


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo_dir", required=True, help="MODEL_DIR of a finished `expertrag demo`")
    parser.add_argument("--work_dir", required=True)
    parser.add_argument("--marginal", choices=MARGINALS, default="token")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate, relative to a parameter's size")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    world = prepared_world(Path(options.demo_dir))
    model_dir = trained(options, read_records(world, "gate"))
    records = {edition: read_records(world, f"test_edition_{edition}") for edition in EDITIONS}
    pairs = changed(records["1"], records["2"])
    table = swap(options, model_dir, {"1": [one for one, _ in pairs], "2": [two for _, two in pairs]})
    print(f"{len(pairs)} questions about facts that changed between the editions; K = {options.passages}")
    for name, figures in table.items():
        print(f"{name}: right {figures['right']:.3f}, of those read {figures['right_of_read']:.3f}")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if not name.endswith(("dir", "json"))}
        report = {"questions": len(pairs), "settings": settings, "table": table}
        Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
