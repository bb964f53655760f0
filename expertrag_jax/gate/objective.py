"""What a gate is trained for: pure functions of its logit.

Every objective returns ``(total, count)``: the sum of the loss over the examples that count, and their number
(or the sum of their weights). ``total / count`` is the loss to differentiate, and the pair is the metric to
log. Examples whose gain or label is NaN (unknown) count for nothing.

Notation: logit l, p = sigmoid(l) the probability of retrieving, g = u_with - u_without the gain of
retrieving, c its price, tau the temperature, H(p) = -p log p - (1-p) log(1-p).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GAINS = ("likelihood", "log_likelihood")


def gain_from_losses(closed_nll: jax.Array, open_nll: jax.Array, kind: str = "likelihood") -> jax.Array:
    """Gain of retrieving, from the losses of both arms on the right answer.

    Args:
      closed_nll: [B] -log p(y|x) in nats, summed over the answer's tokens, without evidence.
      open_nll: [B] -log p(y|x,z) likewise, with evidence.
      kind: "likelihood": p(y|x,z) - p(y|x), in [-1, 1], the gain in expected exact match of a sampled answer,
        so the price is in points of exact match. "log_likelihood": log p(y|x,z) - log p(y|x), unbounded: one
        surprising answer can outweigh many.

    Returns:
      [B] gain, without gradient: the readers are judged here, not trained.

    Raises:
      ValueError: another ``kind``.
    """
    if kind not in GAINS:
        raise ValueError(f"kind is {kind!r}, it must be one of {GAINS}")
    if kind == "likelihood":
        gain = jnp.exp(-open_nll) - jnp.exp(-closed_nll)
    else:
        gain = closed_nll - open_nll
    return jax.lax.stop_gradient(gain)


def binary_entropy(logit: jax.Array) -> jax.Array:
    """H(sigmoid(l)) in nats, [B] -> [B], as softplus(l) - l sigmoid(l), stable for large |l|."""
    return jax.nn.softplus(logit) - logit * jax.nn.sigmoid(logit)


def expected_utility_loss(
    logit: jax.Array,
    gain: jax.Array,
    price: float,
    temperature: float,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Minus the expected utility of a stochastic gate, with an entropy bonus.

    Both arms have been run, so the expectation over the two actions needs no sampling. Retrieving yields
    u_with - c, skipping u_without; up to the constant u_without the expected utility is ``p (g - c)``. With
    the bonus the gate maximises

        J(l) = p (g - c) + tau H(p),      dJ/dl = p (1 - p) [ (g - c) - tau l ],

    because dH/dp = log((1-p)/p) = -l. Over the examples with the same features x, E[dJ/dl] = 0 at

        l* = (E[g|x] - c) / tau,          p* = sigmoid((E[g|x] - c) / tau).

    So the gate retrieves (p >= 1/2) exactly where the expected gain is worth the price, and tau says how
    sharply. With tau = 0 there is no optimum: l runs to +-infinity.

    Args:
      logit: [B] gate logits.
      gain: [B] u_with - u_without (see `gain_from_losses`); NaN where unknown.
      price: cost of one retrieval, in the gain's unit.
      temperature: tau >= 0, in the gain's unit.
      weights: [B] weight of each example, default 1.

    Returns:
      (total, count), scalars.
    """
    known, weights = _known(gain, weights)
    advantage = jax.lax.stop_gradient(jnp.where(known, gain, 0.0) - price)
    utility = jax.nn.sigmoid(logit) * advantage + temperature * binary_entropy(logit)
    return _total(-utility, known, weights)


def supervised_bce(
    logit: jax.Array, needed: jax.Array, weights: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy in nats against "retrieval was needed", the paper's supervised form.

    Args:
      logit: [B] gate logits.
      needed: [B] 1 needed, 0 not, NaN unknown (ignored); values between are soft labels.
      weights: [B] weight of each example, default 1.

    Returns:
      (total, count), scalars.
    """
    known, weights = _known(needed, weights)
    label = jnp.where(known, needed, 0.0)
    return _total(jax.nn.softplus(logit) - label * logit, known, weights)


def reinforce_loss(
    logit: jax.Array,
    action: jax.Array,
    reward: jax.Array,
    baseline: jax.Array | float = 0.0,
    temperature: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """REINFORCE (Williams 1992) for the gate, when only the arm that was taken has been run.

    The loss is ``-(r - b) log pi(a) - tau H(p)`` with pi(1) = p, pi(0) = 1 - p. With r = a (g - c) and any
    baseline b that does not depend on the action, its gradient's expectation over a ~ pi equals that of
    `expected_utility_loss`; b lowers only the variance, and E[r] is a good choice.

    Args:
      logit: [B] gate logits.
      action: [B] bool (or 0/1), the action that was sampled.
      reward: [B] reward of that action, its price paid; NaN where unknown.
      baseline: [B] or scalar.
      temperature: tau, weight of the entropy bonus, differentiated exactly.
      weights: [B] weight of each example, default 1.

    Returns:
      (total, count), scalars. The value is not a loss to compare between steps; its gradient is what counts.
    """
    known, weights = _known(reward, weights)
    taken = action.astype(logit.dtype)
    log_pi = taken * logit - jax.nn.softplus(logit)
    advantage = jax.lax.stop_gradient(jnp.where(known, reward, 0.0) - baseline)
    return _total(-advantage * log_pi - temperature * binary_entropy(logit), known, weights)


def latent_decision_loss(
    logit: jax.Array,
    closed_nll: jax.Array,
    open_nll: jax.Array,
    price: float = 0.0,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The decision as a latent variable: -log[ p p(y|x,z) + (1-p) p(y|x) ] + c p, the paper's "soft mixture".

    Differentiable in both arms as well as in the logit, so a reader can be trained together with its gate.

    Args:
      logit: [B] gate logits.
      closed_nll, open_nll: [B] negative log-likelihoods in nats of the answer without and with evidence.
      price: cost of one retrieval, in nats.
      weights: [B] weight of each example, default 1.

    Returns:
      (total, count), scalars.
    """
    known, weights = _known(closed_nll + open_nll, weights)
    # The inner where keeps NaN out of the gradient of the branch that is not taken.
    closed_nll, open_nll = jnp.where(known, closed_nll, 0.0), jnp.where(known, open_nll, 0.0)
    log_with = jax.nn.log_sigmoid(logit) - open_nll
    log_without = jax.nn.log_sigmoid(-logit) - closed_nll
    loss = -jnp.logaddexp(log_with, log_without) + price * jax.nn.sigmoid(logit)
    return _total(loss, known, weights)


def straight_through(logit: jax.Array, threshold: float = 0.5) -> jax.Array:
    """1{p >= threshold} forward, the gradient of p back (Bengio et al. 2013); [B] -> [B]."""
    p = jax.nn.sigmoid(logit)
    hard = (p >= threshold).astype(p.dtype)
    return p + jax.lax.stop_gradient(hard - p)


def _known(values: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    known = ~jnp.isnan(values)
    weights = jnp.ones(values.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    return known, jnp.where(known, weights, 0.0)


def _total(loss: jax.Array, known: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(jnp.where(known, loss, 0.0) * weights), jnp.sum(weights)
