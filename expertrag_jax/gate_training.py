"""Training data for the gate, and its calibration (ExpertRAG, arXiv 2504.08744, section 3.6).

The generator is frozen, so what the gate sees of a question, and how well either arm answers it, never changes: both
arms are measured once per question, and the gate then trains on the measurements for as long as it likes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from expertrag_jax.answering import Answerer, Questions, pad_rows
from expertrag_jax.batch import Batch
from expertrag_jax.files.sealed import sealed
from expertrag_jax.files.writing import whole
from expertrag_jax.gate import calibration, network
from expertrag_jax.systems.expert_rag import GateExamples
from expertrag_jax.trained_model import GATE_FILE


def measure_arms(
    system: Any,
    params: Any,
    answerer: Answerer,
    questions: Questions,
    targets: np.ndarray,
    progress: Callable[[int], None] | None = None,
) -> GateExamples:
    """Runs both arms of N questions on their answers ``targets`` [N, T] int32.

    The passages come from the answerer's retriever and are laid out as it lays them out for reading.

    Returns:
      GateExamples of numpy arrays [N, ...]; ``retrieval_needed`` is NaN: losses are measured here, not answers.
    """
    run = jax.jit(lambda params, batch: system.both_arms(params, batch)[0])
    rows = answerer.buckets[-1]
    measured = []
    for start in range(0, len(questions), rows):
        index = np.arange(start, min(start + rows, len(questions)))
        batch = both_arms_batch(answerer, questions.rows(index), targets[index], rows)
        found = jax.device_get(run(params, batch))
        measured.append(_take(found, np.arange(len(index))))
        if progress is not None:
            progress(len(index))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *measured)


def both_arms_batch(answerer: Answerer, questions: Questions, targets: np.ndarray, rows: int) -> Batch:
    """A both-arms Batch of ``rows`` rows, zero rows behind the questions."""
    tokens = pad_rows(questions.question_tokens, rows)
    found = answerer.search(questions)
    targets = pad_rows(targets, rows)
    return Batch(
        example_ids=pad_rows(questions.ids, rows),
        encoder_input_tokens=tokens,
        passage_tokens=answerer.assemble(tokens, pad_rows(found.passage_tokens, rows)),  # a smaller bucket at the end
        decoder_input_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        decoder_target_tokens=targets,
        decoder_loss_weights=(targets > 0).astype(np.float32),
    )


def _take(examples: GateExamples, rows: np.ndarray) -> GateExamples:
    return jax.tree.map(lambda x: x[rows], examples)


@dataclasses.dataclass(frozen=True)
class GateDataset:
    """Batches of measured questions: ``dataset(start_step)`` shuffles every pass anew from the seed.

    Attributes:
      examples: [N, ...]. batch_size: B, at most N.
    """

    examples: GateExamples
    batch_size: int
    seed: int = 0

    def __call__(self, start_step: int = 0) -> Iterator[GateExamples]:
        """Endless batches [B, ...] from ``start_step`` on."""
        size = min(self.batch_size, len(self.examples.gain))
        per_pass = len(self.examples.gain) // size
        step = start_step
        while True:
            turn, place = divmod(step, per_pass)
            order = np.random.default_rng([self.seed, turn]).permutation(len(self.examples.gain))
            index = order[place * size : (place + 1) * size]
            yield _take(self.examples, index)
            step += 1


def with_standardised_gate(params: Any, features: np.ndarray) -> dict:
    """Parameters whose gate knows mean and scale of the features [N, F] that it will train on."""
    return dict(params) | {"gate": network.standardise(params["gate"], features)}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What ``gate.json`` in a MODEL_DIR holds.

    Attributes:
      scale, bias: Platt's line from the gate's logit to the logit of need.
      threshold: retrieve where p_ret reaches it.
      retrieval_rate, accuracy, accuracy_always, accuracy_never: on the validation questions.
      questions: how many there were.
    """

    scale: float
    bias: float
    threshold: float
    retrieval_rate: float
    accuracy: float
    accuracy_always: float
    accuracy_never: float
    questions: int

    def write(self, model_dir: str | Path, checkpoint: str) -> Path:
        """Puts ``gate.json`` into a MODEL_DIR, with the name of the checkpoint that it calibrates; returns its path."""
        path = Path(model_dir) / GATE_FILE
        with whole(path) as file:
            file.write(sealed(dataclasses.asdict(self) | {"checkpoint": checkpoint}))
        return path


def calibrate(
    p_ret: np.ndarray, correct_without: np.ndarray, correct_with: np.ndarray, price: float, budget: float = 1.0
) -> Calibration:
    """Fits Platt's line and chooses the threshold on N validation questions.

    Args:
      p_ret: [N] float32 of an uncalibrated gate. correct_without, correct_with: [N] bool, either arm's answer.
      price: accuracy that one retrieval per question must be worth, a fraction; budget: highest fraction of the
        questions that may retrieve. See ``choose_threshold``.
    """
    logit = np.log(np.clip(p_ret, 1e-7, 1 - 1e-7)) - np.log1p(-np.clip(p_ret, 1e-7, 1 - 1e-7))
    scale, bias = calibration.fit_platt(logit, ~correct_without & correct_with)
    calibrated = (1 / (1 + np.exp(-(scale * logit + bias)))).astype(np.float32)
    choice = calibration.choose_threshold(calibrated, correct_without, correct_with, price, budget=budget)
    return Calibration(
        scale=float(scale),
        bias=float(bias),
        threshold=float(choice.threshold),
        retrieval_rate=float(choice.retrieval_rate),
        accuracy=float(choice.accuracy),
        accuracy_always=float(choice.accuracy_always),
        accuracy_never=float(choice.accuracy_never),
        questions=len(p_ret),
    )
