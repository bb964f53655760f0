"""Sizes and switches of the encoder-decoder, one plain dataclass that gin binds."""

from __future__ import annotations

import dataclasses

from expertrag_jax.errors import UserError
from expertrag_jax.moe.experts import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A T5 1.1 style encoder-decoder; the defaults are a tiny model.

    Attributes:
      vocab_size: rows of the embedding; at least the vocabulary's size.
      embed_dim: model width d. num_heads, head_dim: attention heads and their width.
      mlp_dim: feed-forward width, of one expert in a sparse layer.
      num_encoder_layers, num_decoder_layers: depth.
      mlp_activations: one name (ungated) or two (gated, T5 1.1): ``gelu``, ``relu``, ``silu``, ``linear``.
      dropout_rate: on embeddings, attention weights, dense feed-forward hidden units and residual branches.
      logits_via_embedding: tie the output layer to the embedding and scale by d^-0.5.
      dtype: activations, ``float32`` or ``bfloat16``; parameters, softmax, routing and logits stay float32.
      num_experts: experts per sparse layer, 0 for a dense model. num_selected_experts: k.
      expert_layer_period: layer i is sparse if i % period == period - 1.
      train_expert_capacity_factor, eval_expert_capacity_factor: slots per expert relative to a uniform load;
        None for evaluation drops nothing. expert_group_size: upper bound of tokens in a routing group.
      router_jitter: multiplicative noise on router inputs in training.
      relative_buckets, relative_max_distance: T5's relative position bias.
      scan_layers: compile one block and scan over it. remat: ``none``, ``full`` (recompute everything in the
        backward pass) or ``dots`` (keep matrix products).
    """

    vocab_size: int = 1024
    embed_dim: int = 128
    num_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 256
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    num_experts: int = 0
    expert_layer_period: int = 2
    num_selected_experts: int = 1
    train_expert_capacity_factor: float = 1.25
    eval_expert_capacity_factor: float | None = None
    expert_group_size: int = 4096
    router_jitter: float = 0.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    scan_layers: bool = False
    remat: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in self.mlp_activations:
            if name not in ACTIVATIONS:
                raise UserError(f"mlp_activations names {name!r}; there are {', '.join(ACTIVATIONS)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"TransformerConfig.dtype is {self.dtype!r}; use 'float32' or 'bfloat16'.")
        if self.remat not in ("none", "full", "dots"):
            raise UserError(f"TransformerConfig.remat is {self.remat!r}; use 'none', 'full' or 'dots'.")
        if self.num_experts and not 1 <= self.num_selected_experts <= self.num_experts:
            raise UserError(
                f"NUM_SELECTED_EXPERTS is {self.num_selected_experts}: it must lie between 1 and "
                f"NUM_EXPERTS={self.num_experts}."
            )
        if self.scan_layers:
            for depth in (self.num_encoder_layers, self.num_decoder_layers):
                if depth % self.block_size:
                    raise UserError(
                        "scan_layers needs a depth that is a multiple of "
                        f"expert_layer_period={self.block_size}, not {depth}."
                    )

    @property
    def block_size(self) -> int:
        """Layers per scanned block: one, or up to and with the next sparse layer."""
        return self.expert_layer_period if self.num_experts else 1

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has experts."""
        return bool(self.num_experts) and layer % self.expert_layer_period == self.expert_layer_period - 1
