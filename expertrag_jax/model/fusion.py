"""How evidence joins the question (ExpertRAG, arXiv 2504.08744, section 3.3).

* ``per_passage``: every passage is encoded with the question as a row of its own, and the decoder attends to
  all of them together (Fusion-in-Decoder, arXiv 2007.01282). Cost is linear in the number of passages, and
  small readers learn to read this way.
* ``concatenate``: the paper's primary form, one encoder input ``question, passage 1, ..., passage K``.
* ``augment``: the paper's augmentation module, h_fused = sum_j alpha_j T_j(h_j) over the pooled question and
  passages, prepended to the memory of the question as one more context vector.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.model import layers as parts

FUSIONS = ("per_passage", "concatenate", "augment")


def fold_passages(passage_tokens: jax.Array) -> jax.Array:
    """[B, K, P] -> [B * K, P]: passages become rows of the encoder's batch."""
    return passage_tokens.reshape(-1, passage_tokens.shape[-1])


def unfold_passages(states: jax.Array, passages: int) -> jax.Array:
    """[B * K, P, D] -> [B, K * P, D]: one memory per question."""
    return states.reshape(-1, passages * states.shape[1], states.shape[-1])


def mean_pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over tokens: [..., L, D] and [..., L] bool -> [..., D] float32; zeros where there is no token."""
    weight = mask.astype(jnp.float32)[..., None]
    return (states.astype(jnp.float32) * weight).sum(-2) / jnp.maximum(weight.sum(-2), 1.0)


class Augmentation(nn.Module):
    """h_fused = sum_j alpha_j T_j(h_j) (section 3.3, "augmentation module"), j over question and passages.

    T_0 is the question's transformation and T_1 is shared by the passages, so that K is free; alpha is a
    softmax of learned scores of (h_q, h_j). An absent passage has no weight.
    """

    width: int

    @nn.compact
    def __call__(self, question: jax.Array, passages: jax.Array, present: jax.Array) -> jax.Array:
        """question [B, D], passages [B, K, D], present [B, K] bool -> [B, D]."""
        from_question = parts.Dense(self.width, ("embed", "unmodeled"), name="question")(question)
        from_passages = parts.Dense(self.width, ("embed", "unmodeled"), name="passage")(passages)
        values = jnp.concatenate([from_question[:, None], from_passages], axis=1)
        inputs = jnp.concatenate([question[:, None], passages], axis=1)
        keys = parts.Dense(self.width, ("embed", "unmodeled"), name="key")(inputs)
        scores = jnp.einsum("bd,bjd->bj", question, keys) / self.width**0.5
        allowed = jnp.concatenate([jnp.ones_like(present[:, :1]), present], axis=1)
        weights = jax.nn.softmax(jnp.where(allowed, scores, -1e9), axis=-1)
        return jnp.einsum("bj,bjd->bd", weights, values)
