"""The gate G_ret(q): from what is known before retrieving to a probability of retrieving.

ExpertRAG (arXiv 2504.08744, section "Gating Mechanism for Retrieval") takes ``p_ret = sigmoid(w . h_q)`` with
h_q a pooled encoding of the question, and suggests the uncertainty of a first attempt at an answer as a
second source. Both are needed: uncertainty is blind to facts that changed after training, the pooled question
is weak on rare entities.

Parameters, under ``gate/``::

    feature_mean [F], feature_scale [F]     set by `standardise` from training features, never trained
    hidden/{kernel,bias}                    absent when hidden=0, the paper's form
    output/{kernel,bias}
    calibration/{scale,bias}                set by `with_calibration` after training, never trained

B examples, D width of the pooled question, F = D + 2 features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

TRAINABLE = r"gate/(hidden|output)/.*"
"""Which parameters a gate phase trains: the weights, not the stored statistics and not the calibration."""

UNCERTAINTY_FEATURES = 2  # entropy and margin, the last two of `gate_features`

_ACTIVATIONS = {"tanh": jnp.tanh, "gelu": nn.gelu}


class Calibration(nn.Module):
    """Platt's line ``scale * logit + bias``; the identity until it is fitted."""

    @nn.compact
    def __call__(self, logit: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        return scale * logit + bias


class GateNetwork(nn.Module):
    """Features to one logit per question, in float32.

    Attributes:
      hidden: width of the one hidden layer; 0 gives the paper's ``w . h_q`` (plus a bias).
      activation: "tanh" or "gelu", of the hidden layer.
      dropout_rate: dropout on the standardised features and on the hidden layer.
      dropout_width: how many of the leading features dropout may drop; None means all. The two uncertainty
        features stand last, so ``D`` keeps them.

    Example::

        gate = GateNetwork(hidden=32)
        params = gate.init(rng, features)["params"]
        params = standardise(params, training_features)
        logit = gate.apply({"params": params}, features)      # [B]
        p_ret = retrieval_probability(params, logit)          # [B], calibrated
    """

    hidden: int = 0
    activation: str = "tanh"
    dropout_rate: float = 0.0
    dropout_width: int | None = None

    @nn.compact
    def __call__(self, features: jax.Array, deterministic: bool = True) -> jax.Array:
        """[B, F] features -> [B] float32 logits, before calibration.

        Dropout (``deterministic=False``) draws from the rng collection "dropout".

        Raises:
          ValueError: an unknown ``activation``.
        """
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, it must be one of {sorted(_ACTIVATIONS)}")
        width = features.shape[-1]
        mean = self.param("feature_mean", nn.initializers.zeros, (width,), jnp.float32)
        scale = self.param("feature_scale", nn.initializers.ones, (width,), jnp.float32)
        # Stored statistics, kept among the parameters so that checkpoints and exports carry them: no
        # gradient.
        x_BxF = (features.astype(jnp.float32) - jax.lax.stop_gradient(mean)) / jax.lax.stop_gradient(scale)
        kept = width if self.dropout_width is None else self.dropout_width
        dropped = nn.Dropout(self.dropout_rate, name="feature_dropout")(x_BxF[:, :kept], deterministic)
        x_BxF = jnp.concatenate([dropped, x_BxF[:, kept:]], axis=-1)
        if self.hidden:
            x_BxF = _ACTIVATIONS[self.activation](nn.Dense(self.hidden, name="hidden")(x_BxF))
            x_BxF = nn.Dropout(self.dropout_rate, name="hidden_dropout")(x_BxF, deterministic)
        # Zero weights: an untrained gate answers 1/2 to everything instead of something at random.
        logit = nn.Dense(1, name="output", kernel_init=nn.initializers.zeros)(x_BxF)[:, 0]
        if self.is_initializing():
            Calibration(name="calibration")(logit)
        return logit


def gate_features(pooled: jax.Array, first_step_log_probs: jax.Array) -> jax.Array:
    """What the gate may know before anything is retrieved.

    Args:
      pooled: [B, D] pooled encoding of the question.
      first_step_log_probs: [B, V] log-probabilities (nats) of the closed-book decoder's first token; -inf is
        allowed.

    Returns:
      [B, D + 2] float32: the pooled encoding, the entropy -sum_v p_v log p_v in nats, and the margin p_(1) -
      p_(2) between the two likeliest tokens.
    """
    log_probs = first_step_log_probs.astype(jnp.float32)
    probabilities = jnp.exp(log_probs)
    # A forbidden token contributes 0 to the entropy, where 0 * -inf would be NaN.
    terms = jnp.where(probabilities > 0, probabilities * jnp.where(probabilities > 0, log_probs, 0.0), 0.0)
    entropy = -jnp.sum(terms, axis=-1)
    top = jax.lax.top_k(probabilities, 2)[0]
    margin = top[:, 0] - top[:, 1]
    return jnp.concatenate([pooled.astype(jnp.float32), entropy[:, None], margin[:, None]], axis=-1)


def retrieval_probability(params: Any, logit: jax.Array) -> jax.Array:
    """Calibrated ``p_ret = sigmoid(scale * logit + bias)``, [B] -> [B], from the gate's own parameters."""
    line = params["calibration"]
    return jax.nn.sigmoid(line["scale"] * logit + line["bias"])


def standardise(params: Any, features: Any) -> dict:
    """Gate parameters with the mean and standard deviation of ``features`` stored in them.

    Args:
      params: the gate's parameters.
      features: [N, F] features of training questions.

    Returns:
      new parameters; a feature that does not vary gets scale 1, so it becomes 0 and never a division by 0.

    Raises:
      ValueError: no rows, or another number of features than the parameters have.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features) or features.shape[1:] != params["feature_mean"].shape:
        width = params["feature_mean"].shape[0]
        raise ValueError(
            f"features have shape {features.shape}, the gate stores statistics of {width} features: give"
            " [N, F] with N >= 1"
        )
    mean, scale = features.mean(0), features.std(0)
    scale = np.where(scale > 1e-6 * np.maximum(1.0, np.abs(mean)), scale, 1.0)
    stored = {
        "feature_mean": jnp.asarray(mean, jnp.float32),
        "feature_scale": jnp.asarray(scale, jnp.float32),
    }
    return {**params, **stored}


def with_calibration(params: Any, scale: float, bias: float) -> dict:
    """Gate parameters with Platt's line (see ``calibration.fit_platt``) stored in them."""
    line = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    return {**params, "calibration": line}


LOGICAL_AXES = {
    "feature_mean": ("unmodeled",),
    "feature_scale": ("unmodeled",),
    "hidden": {"kernel": ("unmodeled", "unmodeled"), "bias": ("unmodeled",)},
    "output": {"kernel": ("unmodeled", "unmodeled"), "bias": ("unmodeled",)},
    "calibration": {"scale": (), "bias": ()},
}
"""Logical axes of every parameter: a gate is small, so it is replicated."""


def logical_axes(hidden: int) -> dict:
    """Logical axis names of a gate with this ``hidden``, in the structure of its parameters."""
    return {name: axes for name, axes in LOGICAL_AXES.items() if hidden or name != "hidden"}
