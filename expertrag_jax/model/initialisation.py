"""A start for the encoder in which tokens look for copies of themselves.

A reader that is trained from scratch must first learn that a name in the question also occurs in a passage. From T5's
initial parameters the loss stays on a plateau of uncertain length, and then drops. Two things are missing at the start:

* attention to equal tokens. If the query kernel is a multiple of the key kernel, the scores are a positive
  semi-definite form, in which a token and its copy score highest: "mimetic initialization" (arXiv 2305.09828) starts
  there too, because trained models end there;
* attention away from oneself. Each token is its own best copy, and the result of attending to it is the same whether
  or not there is another one. A negative bias at distance 0 makes the other one visible.

docs/results/learning_to_read.md has the measurements. Only initial parameters change: the tree, the arithmetic and
loaded checkpoints do not.
"""

from __future__ import annotations

from typing import Any

import jax

from expertrag_jax.model.config import TransformerConfig

COPY_SCORE = 4.0  # expected score of a copy; of other tokens it is 0, with a standard deviation of 4 / sqrt(head_dim)
SELF_BIAS = -6.0  # added to a token's score for itself


def look_for_copies(params: dict[str, Any], config: TransformerConfig) -> dict[str, Any]:
    """The parameters with the encoder's self-attention started as the module describes.

    The scores of the first layer have the stated size, because its inputs have root mean square 1 and T5's key kernel
    has variance 1 / embed_dim.

    Args:
      params: a Transformer's, float32, plain or boxed arrays; layers scanned or not.
      config: of the Transformer.
    """
    encoder = dict(params["encoder"])
    for name, layer in encoder.items():
        if name.startswith("layers"):
            encoder[name] = _with_tied_queries(layer, COPY_SCORE / config.head_dim)
    encoder["relpos_bias"] = jax.tree.map(lambda table: table.at[:, 0].add(SELF_BIAS), dict(encoder["relpos_bias"]))
    return {**params, "encoder": encoder}


def _with_tied_queries(layer: dict[str, Any], scale: float) -> dict[str, Any]:
    """Every ``attention`` of a layer, or of a block of layers, with query kernel = scale * key kernel."""
    if "attention" in layer:
        query = jax.tree.map(lambda kernel: kernel * scale, dict(layer["attention"]["key"]))
        return {**layer, "attention": {**layer["attention"], "query": query}}
    return {name: _with_tied_queries(part, scale) if isinstance(part, dict) else part for name, part in layer.items()}
