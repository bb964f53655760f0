"""Learning to retrieve from a reader: what the reader's judgement of K passages makes of the retriever's scores.

Each loss is a pure function of retriever scores [B, K] and a judgement [B, K] of the same passages, and gives one loss
per question, [B]. The judgement is a constant: gradients flow into the scores alone. An absent passage (``present``
[B, K] bool) has no probability under either, whatever its numbers are. Atlas (Izacard et al. 2022, arXiv 2208.03299,
section 2.2) compares the four.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from expertrag_jax.systems.marginals import log_prior

Array = jax.Array


def perplexity_distillation(
    scores: Array, log_likelihoods: Array, present: Array, temperature: float = 1.0, target_temperature: float = 1.0
) -> Array:
    """PDist: KL(p_LM || p_retriever), p_LM proportional to p(y|x,z)^(1 / target_temperature) (Atlas, equation 3).

    Args:
      scores: [B, K] float32, the retriever's.
      log_likelihoods: [B, K] float32, log p(y|x,z) of the reader that sees passage z alone, in nats.
      present: [B, K] bool.
      temperature: divides the scores. target_temperature: divides the log-likelihoods.
    Returns:
      [B] float32, nats.
    """
    return divergence(log_prior(scores, present, temperature), log_likelihoods, present, target_temperature)


def leave_one_out(
    scores: Array, log_likelihoods: Array, present: Array, temperature: float = 1.0, target_temperature: float = 1.0
) -> Array:
    """LOOP: KL(p_LOOP || p_retriever), p_LOOP(z) proportional to exp(-log p(y|x, all but z)) (Atlas, equation 5).

    A passage counts by how much worse the answer gets without it, so two that say the same count little.

    Args:
      log_likelihoods: [B, K] float32, log p(y|x, all passages but z), in nats. The others: as for PDist.
    """
    return perplexity_distillation(scores, -log_likelihoods, present, temperature, target_temperature)


def attention_distillation(
    scores: Array, attention: Array, present: Array, temperature: float = 1.0, target_temperature: float = 1.0
) -> Array:
    """ADist: KL(p_ATT || p_retriever), p_ATT = softmax(attention / target_temperature) (Atlas, eq. 1; 2012.04584).

    Args:
      attention: [B, K] float32, cross-attention on the tokens of z, each weighted by the length of its value vector,
        summed over z and averaged over heads, layers and answer tokens. The others: as for PDist.
    """
    return perplexity_distillation(scores, attention, present, temperature, target_temperature)


def emdr2(
    scores: Array, log_likelihoods: Array, present: Array, temperature: float = 1.0, target_temperature: float = 1.0
) -> Array:
    """EMDR2: -log sum_z p_retriever(z|x) p(y|x,z) (Sachan et al. 2021, arXiv 2106.05346, equation 5; Atlas, eq. 2).

    Its gradient is one of expectation-maximisation: minus (posterior of z given x and y, less the prior).

    Args:
      log_likelihoods: [B, K] float32, log p(y|x,z), in nats; divided by target_temperature, which the papers have as 1.
        The others: as for PDist.
    """
    likelihoods = jax.lax.stop_gradient(jnp.where(present, log_likelihoods / target_temperature, 0.0))
    return -jax.nn.logsumexp(log_prior(scores, present, temperature) + likelihoods, axis=-1)


def divergence(log_probs: Array, judgement: Array, present: Array, temperature: float) -> Array:
    """KL(softmax(judgement / temperature) || p), p given by its logarithm; all [B, K] -> [B]."""
    target = jax.lax.stop_gradient(log_prior(judgement, present, temperature))
    return jnp.where(present, jnp.exp(target) * (target - log_probs), 0.0).sum(-1)


LOSSES: dict[str, Callable[..., Array]] = {
    "pdist": perplexity_distillation,
    "emdr2": emdr2,
    "loop": leave_one_out,
    "adist": attention_distillation,
}
