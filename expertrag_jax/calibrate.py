"""Calibrate a trained gate: make its probability honest and choose where to cut it, on validation questions.

Writes MODEL_DIR/gate.json, which answering, evaluation and export read. The questions should be none that the
generator or the gate was trained on.
"""

from __future__ import annotations

from pathlib import Path

from expertrag_jax import gate_training, launch
from expertrag_jax.errors import UserError
from expertrag_jax.evaluate import answer_both, read_questions
from expertrag_jax.evaluation.answers import check_rule
from expertrag_jax.files.lock import one_writer
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import Fraction, checked
from expertrag_jax.service import service_from_model
from expertrag_jax.trained_model import GATE_FILE, open_model

FLAGS = {
    "--model_dir": ("model_dir", "folder of the trained model"),
    "--questions": ("questions", "JSON lines with question and answers, for validation"),
    "--checkpoint_path": ("checkpoint_path", "one of the model's checkpoints, in place of the newest"),
    "--index_dir": ("index_dir", "index to search, in place of the training's"),
    "--rule": ("rule", "how answers are scored: squad1, squad2, hotpot, kilt or regex"),
    "--price": ("price", "accuracy that a retrieval must be worth, a fraction, in place of the training's"),
    "--budget": ("budget", "highest fraction of these questions that may retrieve (default: 1)"),
    "--overwrite": ("overwrite", "replace an earlier calibration"),
}
MACROS = ("MODEL_DIR", "CHECKPOINT_PATH", "INDEX_DIR")
EXAMPLE = "expertrag calibrate --model_dir=runs/qa --questions=validation.jsonl"


@checked
@one_writer(lambda given: Path(given["model_dir"]) / GATE_FILE, "the calibration")
def calibrate(
    model_dir: LocalPath,
    questions: LocalPath,
    checkpoint_path: LocalPath | None = None,
    index_dir: LocalPath | None = None,
    rule: str = "squad1",
    price: Fraction | None = None,
    budget: Fraction = 1.0,
    overwrite: bool = False,
) -> gate_training.Calibration:
    """Fits Platt's line and chooses the threshold; see ``gate_training.calibrate``.

    Args:
      price: accuracy that one retrieval per question must be worth; None: the RETRIEVAL_COST of the training.
      budget: highest fraction of these questions that may retrieve; fewer do where it is not worth the price.
      rule: how answers are scored. The rest: see the flags.
    Raises:
      UserError: bad input, or an earlier calibration and no ``overwrite``.
    """
    check_rule(rule)
    if (Path(model_dir) / GATE_FILE).exists() and not overwrite:
        raise UserError(f"{Path(model_dir) / GATE_FILE} exists: nothing was overwritten; add --overwrite.")
    asked = read_questions(questions, None, "", rule)
    model = open_model(model_dir, checkpoint_path, calibrated=False)
    if "gate" not in model.params:
        raise UserError(f"{model_dir} holds a {type(model.system).__name__}: it has no gate to calibrate.")
    price = model.system.retrieval_cost if price is None else price
    service = service_from_model(model, "gate", index_dir)
    arms = answer_both(service, asked, rule)
    found = gate_training.calibrate(arms.p_ret, arms.correct_without, arms.correct_with, price, budget)
    path = found.write(model_dir, model.source.name)
    print(
        f"threshold {found.threshold:.4f}: on {found.questions} questions, accuracy {found.accuracy:.4f} at a "
        f"retrieval rate of {found.retrieval_rate:.3f} (always {found.accuracy_always:.4f}, never "
        f"{found.accuracy_never:.4f})\n{path}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    launch.run("expertrag_jax.calibrate")
