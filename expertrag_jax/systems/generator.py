"""What all systems with a T5-style generator share: its losses on logits, its router's losses, its steps."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expertrag_jax.batch import Batch
from expertrag_jax.model import initialisation
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.transformer import DecoderCache, Memory, Transformer, empty_cache
from expertrag_jax.moe.statistics import RouterStatistics

Array = jax.Array
ROUTER_METRICS = ("balance_loss", "z_loss", "dropped", "entropy", "confidence")
LAYER_METRICS = ("dropped", "entropy", "confidence")


def cross_entropy(logits: Array, targets: Array, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Array:
    """T5X's token loss in nats: smoothed cross-entropy plus ``z_loss * logsumexp(logits)^2``.

    Args:
      logits: [B, T, V] float32; targets: [B, T] int32.
      label_smoothing: mass spread evenly over the other V - 1 tokens; the constant entropy of the smoothed
        target is subtracted, so a perfect prediction has loss 0.
    Returns:
      [B, T] float32.
    """
    vocab = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum, not a gather: it splits over a sharded vocabulary, and its gradient is no scatter.
    is_target = targets[..., None] == jnp.arange(vocab)
    right = jnp.where(is_target, logits, 0.0).sum(-1) - log_z
    loss = -right
    if label_smoothing:
        low = label_smoothing / (vocab - 1)
        confidence = 1.0 - label_smoothing
        entropy = -(confidence * jnp.log(confidence) + (vocab - 1) * low * jnp.log(low + 1e-20))
        loss = -(confidence - low) * right - low * (logits.sum(-1) - vocab * log_z) - entropy
    return loss + z_loss * jnp.square(log_z)


def router_losses(collection: Any, balance_factor: float, z_factor: float) -> tuple[Array, dict]:
    """Balance and z-loss over all sparse layers, and what is logged of the routing.

    Args:
      collection: the variables of ``router`` (empty for a dense model).
      balance_factor: T5X's AUX_LOSS_FACTOR. z_factor: ROUTER_Z_LOSS_FACTOR.
    Returns:
      (scalar, metrics). In the scalar, layers and groups that hold a token count equally. Metrics: means over layers
      and groups under ``router/<name>``; one row per sparse layer, in the order of the model (encoder first where the
      collection has it first), of ``router/load`` [layers, E] and ``router/layer_<name>`` [layers], means over tokens.
    """
    layers = sparse_layers(collection)
    if not layers:
        return jnp.zeros(()), {}

    def flat(name):
        return jnp.concatenate([getattr(layer, name).reshape(-1) for layer in layers])

    full = (flat("tokens") > 0).astype(jnp.float32)
    count = jnp.maximum(full.sum(), 1.0)

    def total(name):
        return (flat(name) * full).sum()

    loss = (balance_factor * total("balance_loss") + z_factor * total("z_loss")) / count
    metrics = {f"router/{name}": (total(name), count) for name in ROUTER_METRICS}

    def by_layer(name):
        def one(layer):  # scanned layers carry one more leading axis: [blocks, G] tokens
            values = getattr(layer, name)
            trailing = values.shape[layer.tokens.ndim :]
            weights = layer.tokens.reshape(layer.tokens.shape + (1,) * len(trailing))
            return (values * weights).sum(layer.tokens.ndim - 1).reshape(-1, *trailing)

        return jnp.concatenate([one(layer) for layer in layers])

    tokens = jnp.concatenate([layer.tokens.sum(-1).reshape(-1) for layer in layers])
    metrics |= {f"router/layer_{name}": (by_layer(name), tokens) for name in LAYER_METRICS}
    return loss, metrics | {"router/load": (by_layer("load"), tokens[:, None])}


def sparse_layers(collection: Any) -> list[RouterStatistics]:
    """The sowed statistics in the order of the model: ``layers_10`` after ``layers_9``, a tuple's parts as they are."""
    leaves = jax.tree_util.tree_flatten_with_path(collection, is_leaf=lambda x: isinstance(x, RouterStatistics))[0]

    def position(path):
        return [(int(n) if (n := re.sub(r"\D", "", str(key))) else 0, str(key)) for key in path]

    return [leaf for _, leaf in sorted(leaves, key=lambda pair: position(pair[0]))]


def initial_parameters(config: TransformerConfig, rng: Array) -> dict:
    """The generator's parameters, boxed with their logical axes."""
    tokens = jnp.ones((1, 8), jnp.int32)
    params = Transformer(config).init(rng, tokens, tokens)["params"]
    return initialisation.look_for_copies(params, config) if config.attention_init == "copies" else params


def plain(params: Any) -> dict:
    """Boxed parameters -> nested dict of arrays."""
    return nn.unbox(params)


def axes_of(params: Any) -> dict:
    """Boxed parameters (abstract ones do) -> the same nested dict with tuples of logical names."""
    specs = nn.get_partition_spec(params)
    return jax.tree.map(
        lambda spec, leaf: tuple(spec) + (None,) * (leaf.ndim - len(spec)),
        specs,
        nn.unbox(params),
        is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec),
    )


def apply(config: TransformerConfig, params: Any, *args, method: str, rng: Array | None = None, **kwargs):
    """Runs a Transformer method; returns (output, router collection). A ``rng`` means training."""
    rngs = None
    if rng is not None:
        dropout, jitter = jax.random.split(rng)
        rngs = {"dropout": dropout, "jitter": jitter}
    output, state = Transformer(config).apply(
        {"params": params}, *args, method=method, rngs=rngs, mutable=["router"], **kwargs
    )
    return output, state.get("router", {})


def target_loss(config, params, batch: Batch, memory: Memory, *, rng=None, label_smoothing=0.0, z_loss=0.0):
    """Token losses of the batch's targets given a memory.

    Returns:
      (losses [B, T] float32, unweighted; logits [B, T, V]; router collection)
    """
    segments = batch.decoder_segment_ids
    if segments is None:
        segments = (batch.decoder_target_tokens > 0).astype(jnp.int32)
    logits, router = apply(
        config, params, batch.decoder_input_tokens, segments, memory, rng is None, method="logits", rng=rng
    )
    return cross_entropy(logits, batch.decoder_target_tokens, label_smoothing, z_loss), logits, router


def loss_and_metrics(
    losses: Array,
    logits: Array,
    batch: Batch,
    extra: Array,
    metrics: dict,
    normalising_factor: float | None = None,
) -> tuple[Array, dict]:
    """The objective of a batch and what is logged of it.

    Args:
      losses: [B, T] float32 token losses. logits: [B, T, V].
      extra: scalar per-token penalty (the router's losses). metrics: to be joined by the loss's own.
      normalising_factor: T5X's LOSS_NORMALIZING_FACTOR: the objective is the sum over the batch's target
        tokens divided by this constant; None divides by their number.
    Returns:
      (objective, metrics). ``loss`` is always (sum, target tokens): a mean in nats per token. With a
      normalising factor ``loss_normalizer`` is there too, which tells the step to add micro-batches.
    """
    weights = batch.decoder_loss_weights
    count = weights.sum()
    total = (losses * weights).sum()
    # The target's logit is the largest one. An argmax says the same and takes longer than the whole loss (on a CPU).
    is_target = batch.decoder_target_tokens[..., None] == jnp.arange(logits.shape[-1])
    target_logit = jnp.where(is_target, logits, 0.0).sum(-1)
    right = (target_logit >= logits.max(-1)) * weights
    asked = (weights > 0).any(-1)  # the other rows are padding
    every_right = ((right > 0) | (weights == 0)).all(-1) & asked
    metrics = metrics | {
        "loss": (total, count),
        "token_accuracy": (right.sum(), count),
        "sequence_accuracy": (every_right.sum().astype(jnp.float32), asked.sum().astype(jnp.float32)),
        "target_tokens": (count, jnp.asarray(1.0)),
    }
    if normalising_factor is None:
        return total / jnp.maximum(count, 1.0) + extra, metrics
    metrics["loss_normalizer"] = (jnp.asarray(float(normalising_factor)), jnp.asarray(1.0))
    return (total + extra * count) / normalising_factor, metrics


def begin(
    config: TransformerConfig, params: Any, memory: Memory, length: int, active: Array
) -> tuple[Array, DecoderCache]:
    """First decoding step: log-probabilities of the first token [B, V] float32, and the cache behind it."""
    cache = empty_cache(config, active.shape[0], length)
    return decode_step(config, params, memory, cache, jnp.zeros(active.shape, jnp.int32), active)


def decode_step(
    config, params, memory: Memory, cache: DecoderCache, tokens: Array, active: Array | None = None
):
    """tokens [B] int32 -> (log-probabilities of the next token [B, V] float32, cache).

    ``active`` [B] bool keeps padding rows out of the experts' buffers.
    """
    active = memory.mask.any(-1) if active is None else active
    (logits, cache), _ = apply(config, params, tokens, memory, cache, active, method="step")
    return jax.nn.log_softmax(logits, axis=-1), cache
