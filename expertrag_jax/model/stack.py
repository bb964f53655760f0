"""A stack of equal layers, unrolled or scanned, behind one loop.

Unrolled, the layers are modules ``layers_0, layers_1, ...`` and per-layer values are a tuple of length N.
Scanned, one block of ``config.block_size`` layers is compiled once; its parameters are stacked on axis 1 (as
T5X stores them) under ``layers``, and per-layer values are stacked on axis 0 (for blocks of n > 1: a tuple of
n such stacks).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from expertrag_jax.model.config import TransformerConfig


class Block(nn.Module):
    """n consecutive layers, the last of them sparse: the unit of a scan when there are experts."""

    layer_class: type[nn.Module]
    config: TransformerConfig

    def setup(self):
        self.layers = [self.layer_class(self.config, i) for i in range(self.config.block_size)]


def make_layers(layer_class: type[nn.Module], config: TransformerConfig, depth: int):
    """The layers of a stack; call in ``setup`` and assign to ``self.layers``."""
    if not config.scan_layers:
        return [layer_class(config, i) for i in range(depth)]
    return layer_class(config, 0) if config.block_size == 1 else Block(layer_class, config)


def run_layers(
    layers, config: TransformerConfig, body: Callable, carry: Any, inputs: Any = None, *, depth: int
):
    """Calls ``carry, output = body(layer, carry, input)`` layer after layer.

    Args:
      layers: from ``make_layers``.
      inputs: per-layer values in the layout described above, or None.
    Returns:
      (carry, per-layer outputs in the same layout)
    """
    body = _remat(body, config)
    if not config.scan_layers:
        outputs = []
        for index, layer in enumerate(layers):
            carry, output = body(layer, carry, None if inputs is None else inputs[index])
            outputs.append(output)
        return carry, tuple(outputs)

    def block_body(block, carry, block_inputs):
        if config.block_size == 1:
            return body(block, carry, block_inputs)
        outputs = []
        for index, layer in enumerate(block.layers):
            carry, output = body(layer, carry, None if block_inputs is None else block_inputs[index])
            outputs.append(output)
        return carry, tuple(outputs)

    scanned = nn.scan(
        block_body,
        variable_axes={"params": 1, "router": 0, "relevance": 0},
        split_rngs={"params": True, "dropout": True, "jitter": True},
        length=depth // config.block_size,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(layers, carry, inputs)


def _remat(body, config: TransformerConfig):
    if config.remat == "none":
        return body
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    return nn.remat(body, prevent_cse=not config.scan_layers, policy=policy)


def layered(config: TransformerConfig, depth: int, make: Callable[[tuple], Any]) -> Any:
    """Per-layer values made by ``make(prefix)``, where prefix is the stacked shape in front of each array."""
    if not config.scan_layers:
        return tuple(make(()) for _ in range(depth))
    if config.block_size == 1:
        return make((depth,))
    return tuple(make((depth // config.block_size,)) for _ in range(config.block_size))


def pair_layers(config: TransformerConfig, first: Any, second: Any) -> Any:
    """Two sets of per-layer values -> one set of pairs."""
    if config.scan_layers and config.block_size == 1:
        return first, second
    return tuple(zip(first, second, strict=True))
