"""A trained gate as the function that a SeqIO pipeline asks: question tokens to the probability of retrieving."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from expertrag_jax.answering import SystemPrograms, pad_rows
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import checked
from expertrag_jax.trained_model import open_model

ROWS = 64  # questions per call of the compiled program


@checked
def open_gate(model_dir: LocalPath, checkpoint_path: LocalPath | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """The calibrated gate of a trained system, for ``register_questions(p_ret=...)`` and the policy ``Learned``.

    Args:
      model_dir: of a system with a gate. checkpoint_path: one of its checkpoints; None means the newest.
    Returns:
      ``p_ret``: question tokens [n, L] int32 (reader's vocabulary, EOS last, 0-padded) -> [n] float32.
    Raises:
      UserError: the system has no gate; called with a question that is longer than in its training.
    """
    model = open_model(model_dir, checkpoint_path)
    if "gate" not in model.params:
        raise UserError(f"{model_dir} holds a {type(model.system).__name__}: it has no gate to decide.")
    programs, length = SystemPrograms(model.system, model.params), model.settings.question_length

    def p_ret(question_tokens: np.ndarray) -> np.ndarray:
        if question_tokens[:, length:].any():
            raise UserError(f"the gate of {model_dir} reads {length} tokens per question and one has more: shorten it.")
        tokens = question_tokens[:, :length]
        tokens = np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
        parts = [
            np.asarray(programs.question(pad_rows(tokens[start : start + ROWS], ROWS))[1])
            for start in range(0, len(tokens), ROWS)
        ]
        return np.concatenate(parts)[: len(tokens)]

    return p_ret
