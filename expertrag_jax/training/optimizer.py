"""Optimizers and learning rate schedules with T5X's names and defaults; plain functions, ready for gin."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from expertrag_jax.errors import UserError
from expertrag_jax.ranges import Count, Fraction, Natural, Positive, Rate, Weight, checked

Schedule = Callable[[jax.Array], jax.Array]

_LEAST_SCALE = 1e-3  # a parameter at zero is still moved (arXiv:1804.04235, section 8)


class Scheduled(optax.GradientTransformation):
    """A gradient transformation that knows its learning rate; its state is the plain transformation's.

    Attributes:
      learning_rate: of a step, as ``update`` applies it: ``(int32 []) -> float32 []``, counted from 0.
    """

    learning_rate: Schedule

    def __new__(cls, transformation: optax.GradientTransformation, learning_rate: float | Schedule) -> Scheduled:
        """``transformation`` with the rate, constant or of the step, that it was made with."""
        made = super().__new__(cls, transformation.init, transformation.update)
        made.learning_rate = learning_rate if callable(learning_rate) else optax.constant_schedule(learning_rate)
        return made


@checked
def factors_schedule(
    factors: str = "constant * rsqrt_decay",
    base_learning_rate: Weight = 1.0,
    warmup_steps: Natural = 10000,
    decay_factor: Positive = 0.5,
    steps_per_decay: Count = 20000,
    steps_per_cycle: Count = 100000,
    step_offset: int = 0,
    min_learning_rate: Weight = 1e-8,
) -> Schedule:
    """A product of factors of the step t, as ``t5x.utils.create_learning_rate_scheduler`` computes it.

    With w = ``warmup_steps``, t counted from ``step_offset``, a factor is one of

    * ``constant``: base_learning_rate
    * ``linear_warmup``: min(1, t / w)
    * ``linear_decay``: base_learning_rate * min(t / w, 1 + decay_factor * (w - t)): warm-up included, do not
      combine it with the two above; it reaches 0 after 1 / decay_factor further steps
    * ``rsqrt_decay``: 1 / sqrt(max(t, w))
    * ``rsqrt_normalized_decay``: sqrt(w) / sqrt(max(t, w)), which is 1 at the end of the warm-up
    * ``decay_every``: decay_factor ** floor(t / steps_per_decay)
    * ``cosine_decay``: (1 + cos(pi * (p mod 1))) / 2 with p = max(0, (t - w) / steps_per_cycle)

    The product is never below ``min_learning_rate``. T5's pre-training: the defaults.

    Raises:
      UserError: an unknown factor, or a warm-up of 0 steps where a factor divides by it.
    """
    names = [name.strip() for name in factors.split("*")]
    known = {
        "constant": lambda t: base_learning_rate,
        "linear_warmup": lambda t: jnp.minimum(1.0, t / warmup_steps),
        "linear_decay": lambda t: (
            base_learning_rate * jnp.minimum(t / warmup_steps, 1.0 + decay_factor * (warmup_steps - t))
        ),
        "rsqrt_decay": lambda t: jax.lax.rsqrt(jnp.maximum(t, warmup_steps)),
        "rsqrt_normalized_decay": lambda t: (
            jnp.sqrt(warmup_steps) * jax.lax.rsqrt(jnp.maximum(t, warmup_steps))
        ),
        "decay_every": lambda t: decay_factor ** jnp.floor(t / steps_per_decay),
        "cosine_decay": lambda t: (
            0.5 * (1.0 + jnp.cos(jnp.pi * (jnp.maximum(0.0, (t - warmup_steps) / steps_per_cycle) % 1.0)))
        ),
    }
    for name in names:
        if name not in known:
            raise UserError(f"Learning rate factor '{name}' is unknown; there are {', '.join(known)}.")
    if warmup_steps <= 0 and set(names) - {"constant", "decay_every", "cosine_decay"}:
        raise UserError(f"Learning rate '{factors}' needs warmup_steps of at least 1, not {warmup_steps}.")

    def schedule(step: jax.Array) -> jax.Array:
        t = jnp.maximum(0.0, jnp.asarray(step, jnp.float32) - step_offset)
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate = rate * known[name](t)
        return jnp.maximum(rate, min_learning_rate)

    return schedule


@checked
def adafactor(
    learning_rate: Weight | Schedule | None = None,
    decay_rate: Fraction = 0.8,
    clipping_threshold: Positive | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    min_dim_size_to_factor: Count = 128,
    weight_decay: Fraction | None = None,
) -> Scheduled:
    """Adafactor (arXiv:1804.04235) with T5's settings: no momentum, factored second moments.

    Scanned layers are updated as unrolled ones: each has its own root mean squares, as in T5X. (Their second moments
    are apart in any case, while there are fewer layers than ``min_dim_size_to_factor``.)

    Args:
      learning_rate: a number or a schedule of the phase's step; None is ``factors_schedule()``. With
        ``multiply_by_parameter_scale`` it is relative to each parameter's root mean square.
      decay_rate: the second moment decays by 1 - t^-decay_rate.
      clipping_threshold: upper bound of an update's root mean square; None: none.
      min_dim_size_to_factor: smaller matrices keep their full second moment.
      weight_decay: multiplies parameters by (1 - weight_decay) each step; None: none.
    """
    learning_rate = factors_schedule() if learning_rate is None else learning_rate
    parts = [optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor)]
    if clipping_threshold is not None:
        parts.append(_by_layer(lambda update, _: update / jnp.maximum(1.0, _rms(update) / clipping_threshold)))
    parts.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        parts.append(_by_layer(lambda update, parameter: update * jnp.maximum(_rms(parameter), _LEAST_SCALE)))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay))
    update = optax.chain(*parts, optax.scale(-1.0))
    return Scheduled(update, learning_rate)


def _by_layer(change: Callable[[jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """``change(update, parameter)`` of each parameter, of each layer of a stack by itself."""

    def one(path: tuple, update: jax.Array, parameter: jax.Array) -> jax.Array:
        scanned = "layers" in str(path[-1].key).split("/")[:-1] if path else False
        return jax.vmap(change, 1, 1)(update, parameter) if scanned else change(update, parameter)

    def update(updates, state, params):
        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


@checked
def adamw(
    learning_rate: Weight | Schedule = 1e-3,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: Positive = 1e-8,
    weight_decay: Weight = 0.0,
    clip_norm: Positive | None = None,
) -> Scheduled:
    """AdamW (arXiv:1711.05101); weight decay spares vectors (norm scales, biases).

    Args:
      learning_rate: a number or a schedule of the phase's step.
      clip_norm: the gradient is scaled down to this global L2 norm where it is longer; None: never.
    """
    update = optax.adamw(
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=lambda p: jax.tree_util.tree_map_with_path(_decays, p),
    )
    if clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(clip_norm), update)
    return Scheduled(update, learning_rate)


def _decays(path: tuple, parameter: jax.Array) -> bool:
    """Whether it is a matrix; by name too, for the stacked vectors of scanned layers look like one."""
    name = str(path[-1].key).rpartition("/")[2] if path else ""
    return parameter.ndim >= 2 and name not in ("scale", "bias", "selection_bias")
