"""Score a trained system, its retriever and its gate on questions with known answers.

Every question is answered without and with evidence; what the policies never, always, random, gate and oracle
make of these answers is scored, and their speed is measured. Written: report.json, report.html,
predictions.jsonl.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from expertrag_jax import comparison, launch
from expertrag_jax.errors import UserError
from expertrag_jax.evaluation.answers import check_rule, has_answer, score
from expertrag_jax.evaluation.report import EditionResult, build_report, write_report
from expertrag_jax.evaluation.table import print_report
from expertrag_jax.files.lock import one_writer
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.files.writing import check_output
from expertrag_jax.infer import write_records
from expertrag_jax.ranges import Count, Seed, checked
from expertrag_jax.retrieval.corpus import Question, read_questions_jsonl, texts_of
from expertrag_jax.retrieval.metrics import gold_rows, recall_at_k
from expertrag_jax.service import Service, service_from_model
from expertrag_jax.trained_model import Model, open_model
from expertrag_jax.training.log import expert_load, losses_by_phase
from expertrag_jax.vocabulary import Vocabulary

FLAGS = {
    "--model_dir": ("model_dir", "folder of the trained model"),
    "--questions": ("questions", "JSON lines with question, answers, optional gold_passage_ids and stratum"),
    "--output_dir": ("output_dir", "folder of the report, in place of MODEL_DIR/evaluation"),
    "--checkpoint_path": ("checkpoint_path", "one of the model's checkpoints, in place of the newest"),
    "--index_dir": ("index_dir", "index to search, in place of the training's"),
    "--num_passages": ("num_passages", "passages read per question that retrieves"),
    "--rule": ("rule", "how answers are scored: squad1, squad2, hotpot, kilt or regex"),
    "--overwrite": ("overwrite", "replace a report that is there"),
}
MACROS = ("MODEL_DIR", "EVAL_OUTPUT_DIR", "CHECKPOINT_PATH", "INDEX_DIR", "NUM_PASSAGES", "RANDOM_SEED")
EXAMPLE = "expertrag evaluate --model_dir=runs/qa --questions=test.jsonl"
CUTS = (1, 5, 20, 100)
PREDICTIONS = "predictions.jsonl"
WRITTEN = ("report.json", "report.html", PREDICTIONS)
EDITION = "test"  # the report's one set of questions

_LOG = logging.getLogger(__name__)


@checked
@one_writer(lambda given: report_dir(given["output_dir"], given["model_dir"]), "the report")
def evaluate(
    model_dir: LocalPath,
    questions: LocalPath | None = None,
    task: Any = None,
    split: str = "test",
    output_dir: LocalPath | None = None,
    checkpoint_path: LocalPath | None = None,
    index_dir: LocalPath | None = None,
    num_passages: Count | None = None,
    buckets: Sequence[Count] | None = None,
    rule: str = "squad1",
    throughput_questions: Count = 256,
    latency_questions: Count = 40,
    rounds: Count = 3,
    seed: Seed = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Evaluates and returns what ``report.json`` holds.

    Args:
      model_dir: written by training.
      questions: JSON lines. Or task and split: a question task (``data.question_tasks``); its source is read.
      output_dir: new, or an earlier report if ``overwrite``.
      checkpoint_path, index_dir, num_passages, buckets: see `infer`.
      rule: a key of ``evaluation.answers.SCORERS``.
      throughput_questions, latency_questions, rounds: see ``comparison.time_policies``.
      seed: of the policy random and of the intervals.

    Raises:
      UserError: bad input; nothing is overwritten.
    """
    start = time.monotonic()
    check_rule(rule)
    directory = report_dir(output_dir, model_dir)
    check_output_dir(directory, overwrite, inputs=[questions, model_dir, index_dir])
    asked = read_questions(questions, task, split, rule)
    model = open_model(model_dir, checkpoint_path, num_passages=num_passages, buckets=buckets)
    service = service_from_model(model, "gate", index_dir)
    if service.answerer.retriever is None:
        raise UserError("this system reads no passages, so there is no gate to evaluate: use `expertrag infer`.")
    gold = gold_rows(asked, service.answerer.retriever.loaded.passages)
    arms = answer_both(service, asked, rule)
    timing, policies = time_policies(service, asked, arms, throughput_questions, latency_questions, rounds, seed)
    tokens = service.tokenise(asked)
    results = comparison.policy_results(service.answerer, tokens, arms, policies, timing)
    retrieval = measure_retrieval(service, asked, gold, rule)
    edition = EditionResult(
        policies=results,
        p_ret=arms.p_ret,
        facts=np.arange(len(asked)),
        strata=[str(question.extra.get("stratum", "all")) for question in asked],
        threshold=service.settings.threshold,
        num_passages=service.settings.num_passages,
        retriever_recall=retrieval.get("recall_at_k", float("nan")),
        speed_up=timing.speed_up,
        differing=timing.differing,
        description=f"{len(asked)} questions of {questions or task}.",
    )
    index = service.answerer.retriever.loaded.directory
    report = build_report(
        {EDITION: edition}, time.monotonic() - start, seed=seed, losses=losses_by_phase(model_dir),
        expert_load=expert_load(model_dir),
        settings={"model": str(model.source), "index": str(index), "rule": rule},
    )  # fmt: skip
    add_scores(report, arms, results, model, asked, rule)
    report["retrieval"] = retrieval
    report["unwritable"] = count_unwritable(model.reader_vocabulary, asked, rule)
    write_report(report, directory)
    write_records(directory / PREDICTIONS, predictions(service, asked, arms, results))
    show(report, directory)
    return report


def report_dir(output_dir: str | None, model_dir: str) -> Path:
    """Where the report is written."""
    return Path(output_dir or Path(model_dir) / "evaluation")


def check_output_dir(directory: Path, overwrite: bool, inputs: Iterable[str | None]) -> None:
    """UserError where files of a report are there and are not to be replaced, or one of them is an input."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a folder for the report.")
    for name in WRITTEN:
        if (directory / name).exists() and not overwrite:
            raise UserError(f"{directory} holds a {name}: nothing was overwritten; use --output_dir or --overwrite.")
        check_output(directory / name, overwrite, inputs)


def read_questions(path: str | None, task: Any, split: str, rule: str) -> list[Question]:
    """The questions of a file or of a task, with answers that the rule can read; SQuAD 2.0's may have none.

    Raises:
      UserError: both or neither is given, or the questions or their answers cannot be read.
    """
    if (path is None) == (task is None):
        raise UserError("give either --questions, a file of JSON lines, or evaluate.task in a gin file.")
    if path is not None:
        asked = read_questions_jsonl(path, require_answers=rule != "squad2")
    else:
        from expertrag_jax.data.question_tasks import read_task_questions  # loads TensorFlow

        asked = read_task_questions(task, split)
    check_rule(rule, (question.answers for question in asked))
    return asked


def answer_both(service: Service, asked: Sequence[Question], rule: str) -> comparison.Arms:
    """Answers everything without and with evidence; right is what scores 1 by the rule's exact match."""
    tokens = service.tokenise(asked)
    service.answerer.warm_up(tokens)

    def correct(answer_tokens, rows):
        texts = [service.reader_vocabulary.decode(answer) for answer in answer_tokens.tolist()]
        return np.array([score(rule, text, asked[row].answers)["em"] == 1 for text, row in zip(texts, rows)])

    with tqdm(total=2 * len(asked), desc="answer", unit="question") as bar:
        return comparison.run_arms(service.answerer, tokens, correct, bar.update)


def time_policies(service, asked, arms, throughput_questions, latency_questions, rounds, seed):
    """(Timing, policies by name): real runs of every policy, which also check that no answer changes."""
    rate = float((arms.p_ret >= service.settings.threshold).mean())
    policies = comparison.five_policies(service.settings.threshold, rate, seed)
    with tqdm(total=rounds * len(policies), desc="time", unit="run") as bar:
        timing = comparison.time_policies(
            service.answerer, service.tokenise(asked), arms, policies, rounds=rounds, progress=bar.update,
            throughput_questions=throughput_questions, latency_questions=latency_questions,
        )  # fmt: skip
    if timing.differing:
        _LOG.warning("%d answers changed when a batch was split: rounding decides near ties", timing.differing)
    return timing, policies


def measure_retrieval(
    service: Service, asked: Sequence[Question], gold: Sequence[set[int]], rule: str
) -> dict[str, Any]:
    """R@k against gold passages, and the share of questions with an answer among the first k passages.

    ``recall_at_k`` is R@K of the K passages that are read; figures that nothing is known for are absent. ``gold`` holds
    the rows of each question's gold passages.
    """
    retriever, settings = service.answerer.retriever, service.settings
    passages = retriever.loaded.passages
    read = min(settings.num_passages, len(passages))
    cuts = sorted({k for k in (*CUTS, read) if k <= len(passages)})
    tokens = service.tokenise(asked)
    rows = retriever.retrieve(texts_of(asked), tokens.query_tokens, cuts[-1]).rows
    holds = np.array([
        [row >= 0 and has_answer(passages.texts[row], question.answers, rule) for row in found]
        for question, found in zip(asked, rows.tolist())
    ])  # fmt: skip
    figures: dict[str, Any] = {
        "questions": len(asked),
        "answer_in_first": {str(k): float(holds[:, :k].any(-1).mean()) for k in cuts},
    }
    known = [place for place, question in enumerate(asked) if question.gold_passage_ids]
    if known:
        recall = recall_at_k(rows[known], [gold[place] for place in known], cuts)
        figures["questions_with_gold_passages"] = len(known)
        figures["recall"] = {str(k): value for k, value in recall.items()}
        figures["recall_at_k"] = recall[read]
    return figures


def add_scores(report, arms, results, model: Model, asked: Sequence[Question], rule: str) -> None:
    """Adds every score of the rule but exact match, such as F1, to the report's policies."""
    decode = model.reader_vocabulary.decode
    scored = [
        [score(rule, decode(tokens), question.answers) for tokens, question in zip(arm.tokens.tolist(), asked)]
        for arm in (arms.never, arms.always)
    ]
    for name, result in results.items():
        for figure in scored[0][0]:
            without, with_evidence = (np.array([scores[figure] for scores in arm]) for arm in scored)
            mean = float(np.where(result.retrieve, with_evidence, without).mean())
            report["editions"][EDITION]["policies"][name].setdefault(figure, mean)


def count_unwritable(vocabulary: Vocabulary, asked: Sequence[Question], rule: str) -> dict[str, int]:
    """How many references the vocabulary has no pieces for, and how many questions have no other.

    Nothing is counted for the rule ``regex``, whose answers are patterns.
    """
    if rule == "regex":
        return {"references": 0, "questions": 0}
    writes = [[vocabulary.writes(answer) for answer in question.answers] for question in asked]
    return {
        "references": sum(row.count(False) for row in writes),
        "questions": sum(bool(row) and not any(row) for row in writes),
    }


def predictions(service, asked, arms, results) -> list[dict[str, Any]]:
    """One record per question: both answers, p_ret, the gate's decision, and the passages that were read."""
    decode, passages = service.reader_vocabulary.decode, service.answerer.retriever.loaded.passages
    return [
        {
            "id": question.id,
            "question": question.question,
            "answers": list(question.answers),
            "without": decode(arms.never.tokens[place].tolist()),
            "with": decode(arms.always.tokens[place].tolist()),
            "p_ret": float(arms.p_ret[place]),
            "retrieve": bool(results["gate"].retrieve[place]),
            "passages": [passages.ids[row] for row in arms.always.passage_rows[place].tolist() if row >= 0],
        }
        for place, question in enumerate(asked)
    ]


def show(report: dict[str, Any], directory: Path) -> None:
    """Prints the table, the scores beside exact match, what retrieval found, and where the report is."""
    print_report(report)
    for name, policy in report["editions"][EDITION]["policies"].items():
        others = {score: policy[score] for score in ("em", "f1", "accuracy", "rougel") if score in policy}
        told = ", ".join(f"{score} {value:.4f}" for score, value in others.items())
        print(f"{name:7} {told}, retrieval rate {policy['retrieval_rate']:.3f}")
    for name in ("recall", "answer_in_first"):
        cuts = report["retrieval"].get(name, {})
        if cuts:
            words = {"recall": "R@", "answer_in_first": "answer in first "}[name]
            print(", ".join(f"{words}{k} {value:.3f}" for k, value in cuts.items()))
    if (unwritable := report["unwritable"])["references"]:
        print(
            f"{unwritable['references']} references hold characters that the reader's vocabulary lacks; "
            f"{unwritable['questions']} questions have no other"
        )
    print(f"report: {directory / 'report.html'}", flush=True)


if __name__ == "__main__":
    launch.run("expertrag_jax.evaluate")
