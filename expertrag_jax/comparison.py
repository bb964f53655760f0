"""One set of questions under five policies: never, always, random at the gate's rate, the gate, and the oracle.

An answer does not depend on its batch-mates, so two passes (never, always) give the answers of every policy. Speed is
measured on real runs of every policy, in turn; those runs also check that splitting a batch changed no answer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from expertrag_jax.answering import Answerer, Answers, Questions
from expertrag_jax.evaluation.cost import SpeedUp, latency_percentiles, summarise_speed_up
from expertrag_jax.evaluation.report import PolicyResult
from expertrag_jax.gate.policy import Always, Learned, Never, Oracle, Policy, PolicyInputs, Random

Correct = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (answer tokens [n, T], rows [n]) -> [n] bool


@dataclasses.dataclass(frozen=True)
class Arms:
    """Both arms of N questions.

    Attributes:
      never, always: the answers. correct_without, correct_with: [N] bool. p_ret: [N] float32.
    """

    never: Answers
    always: Answers
    correct_without: np.ndarray
    correct_with: np.ndarray

    @property
    def p_ret(self) -> np.ndarray:
        """[N] float32, the gate's probability, which both runs compute."""
        return self.never.p_ret

    @property
    def needed(self) -> np.ndarray:
        """[N] float32, 1 where only evidence gives the right answer."""
        return (~self.correct_without & self.correct_with).astype(np.float32)


def run_arms(answerer: Answerer, questions: Questions, correct: Correct, progress=None) -> Arms:
    """Answers everything twice, without and with evidence."""
    rows = np.arange(len(questions))
    answers = {}
    for name, policy in (("never", Never()), ("always", Always())):
        answerer.policy = policy
        answers[name] = answerer.answer(questions, progress=progress)
    without, with_evidence = (correct(answers[name].tokens, rows) for name in ("never", "always"))
    return Arms(answers["never"], answers["always"], without, with_evidence)


def five_policies(threshold: float, gate_rate: float, seed: int) -> dict[str, Policy]:
    """The policies of a report, in its order."""
    return {
        "never": Never(),
        "always": Always(),
        "random": Random(rate=gate_rate, seed=seed),
        "gate": Learned(threshold),
        "oracle": Oracle(),
    }


@dataclasses.dataclass(frozen=True)
class Timing:
    """What real runs of the policies measured.

    Attributes:
      questions_per_second: median over the rounds. latency_ms: (p50, p95), one question at a time.
      speed_up: of the gate. differing: answers that splitting the batch changed; 0.
    """

    questions_per_second: Mapping[str, float]
    latency_ms: Mapping[str, tuple[float, float]]
    speed_up: SpeedUp
    differing: int


def time_policies(
    answerer: Answerer, questions: Questions, arms: Arms, policies: Mapping[str, Policy], *,
    throughput_questions: int, latency_questions: int, rounds: int, progress=None,
) -> Timing:
    """Runs every policy on the first questions, in turn, ``rounds`` times; then one question at a time.

    Programs must be warm. Turns let a slow moment of the machine fall on every policy.
    """
    index = np.arange(min(throughput_questions, len(questions)))
    subset = dataclasses.replace(questions, retrieval_needed=arms.needed).rows(index)
    seconds: dict[str, list[float]] = {name: [] for name in policies}
    differing, rate = 0, 0.0
    for _ in range(rounds):
        for name, policy in policies.items():
            answerer.policy = policy
            start = time.perf_counter()
            answers = answerer.answer(subset)
            seconds[name].append(time.perf_counter() - start)
            expected = np.where(answers.retrieve[:, None], arms.always.tokens[index], arms.never.tokens[index])
            differing += int((answers.tokens != expected).any(-1).sum())
            rate = float(answers.retrieve.mean()) if name == "gate" else rate
            if progress is not None:
                progress(1)
    latency = {name: _latency(answerer, policy, subset, latency_questions) for name, policy in policies.items()}
    return Timing(
        {name: len(index) / statistics.median(taken) for name, taken in seconds.items()},
        latency,
        summarise_speed_up(seconds, rate),
        differing,
    )


def _latency(answerer: Answerer, policy: Policy, questions: Questions, count: int) -> tuple[float, float]:
    answerer.policy = policy
    seconds: list[float] = []
    for row in range(min(count, len(questions))):
        start = time.perf_counter()
        answerer.answer(questions.rows(np.array([row])))
        seconds.append(time.perf_counter() - start)
    return latency_percentiles(seconds)


def policy_results(
    answerer: Answerer, questions: Questions, arms: Arms, policies: Mapping[str, Policy], timing: Timing
) -> dict[str, PolicyResult]:
    """Joins what each policy decides with the arms' answers and the timings."""
    inputs = PolicyInputs(example_ids=questions.ids, p_ret=arms.p_ret, retrieval_needed=arms.needed)
    results = {}
    for name, policy in policies.items():
        retrieve = np.asarray(policy.decide(inputs), bool)
        reading = arms.always.encoder_tokens - arms.never.encoder_tokens
        results[name] = PolicyResult(
            correct=np.where(retrieve, arms.correct_with, arms.correct_without),
            retrieve=retrieve,
            encoder_tokens=float((arms.never.encoder_tokens + retrieve * reading).mean()),
            padded_encoder_tokens=answerer.padded_tokens(int(retrieve.sum()), questions) / len(questions),
            questions_per_second=timing.questions_per_second[name],
            p50_ms=timing.latency_ms[name][0],
            p95_ms=timing.latency_ms[name][1],
        )
    return results


def recall(rows: np.ndarray, gold: Sequence[int]) -> float:
    """R@K: fraction of questions whose gold row [N] is among the retrieved ``rows`` [N, K]."""
    return float((rows == np.asarray(gold)[:, None]).any(-1).mean())
