"""Sizes and switches of the encoder-decoder, one plain dataclass that gin binds."""

from __future__ import annotations

import dataclasses

from expertrag_jax import registry
from expertrag_jax.errors import UserError
from expertrag_jax.moe.experts import ACTIVATIONS
from expertrag_jax.moe.layer import DISPATCHES, ROUTINGS
from expertrag_jax.ranges import Count, Layers, Natural, Positive, Rate, checked


@registry.register("TransformerConfig")
@checked
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
      encoder_routing, decoder_routing: ``token_choice``, or in the encoder ``expert_choice`` (arXiv 2202.09368). The
        three fields below are of layers where tokens choose.
      expert_dispatch: ``buckets`` (capacity; tokens beyond it are dropped) or ``dropless``; see ``moe.mixture``.
      batch_prioritised_routing: full experts drop the least sure tokens, not the last (arXiv 2106.05974).
      loss_free_balancing: a bias on the choice of experts, moved by their load, keeps the load even
        (arXiv 2408.15664); a parameter ``selection_bias`` per sparse layer. Set AUX_LOSS_FACTOR to 0 or near it.
      relative_buckets, relative_max_distance: T5's relative position bias.
      attention_init: initial parameters of the encoder's self-attention, ``t5``, or ``copies``, with which a reader
        that is trained from scratch learns to match names in fewer steps (see ``model.initialisation``).
      scan_layers: compile one block and scan over it. remat: ``none``, ``full`` (recompute everything in the
        backward pass) or ``dots`` (keep matrix products).
    """

    vocab_size: Count = 1024
    embed_dim: Count = 128
    num_heads: Count = 4
    head_dim: Count = 32
    mlp_dim: Count = 256
    num_encoder_layers: Layers = 2
    num_decoder_layers: Layers = 2
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: Rate = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    num_experts: Natural = 0
    expert_layer_period: Count = 2
    num_selected_experts: Count = 1
    train_expert_capacity_factor: Positive = 1.25
    eval_expert_capacity_factor: Positive | None = None
    expert_group_size: Count = 4096
    router_jitter: Rate = 0.0
    expert_dispatch: str = "buckets"
    encoder_routing: str = "token_choice"
    decoder_routing: str = "token_choice"
    batch_prioritised_routing: bool = False
    loss_free_balancing: bool = False
    relative_buckets: Count = 32
    relative_max_distance: Count = 128
    attention_init: str = "t5"
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
        if self.attention_init not in ("t5", "copies"):
            raise UserError(f"TransformerConfig.attention_init is {self.attention_init!r}; use 't5' or 'copies'.")
        if self.num_experts and not 1 <= self.num_selected_experts <= self.num_experts:
            raise UserError(
                f"NUM_SELECTED_EXPERTS is {self.num_selected_experts}: it must lie between 1 and "
                f"NUM_EXPERTS={self.num_experts}."
            )
        self._check_routing()
        if self.scan_layers:
            for depth in (self.num_encoder_layers, self.num_decoder_layers):
                if depth % self.block_size:
                    raise UserError(
                        "scan_layers needs a depth that is a multiple of "
                        f"expert_layer_period={self.block_size}, not {depth}."
                    )

    def _check_routing(self):
        for name, known in (
            ("expert_dispatch", DISPATCHES), ("encoder_routing", ROUTINGS), ("decoder_routing", ROUTINGS)
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise UserError(
                    f"TransformerConfig.{name} is {getattr(self, name)!r}; use {' or '.join(map(repr, known))}."
                )
        if self.decoder_routing == "expert_choice":
            raise UserError(
                "TransformerConfig.decoder_routing cannot be 'expert_choice': an expert that picks its tokens from the "
                "whole row sees later ones, so a decoder would learn from the future and fail when it generates; use "
                "'token_choice', and 'expert_choice' as encoder_routing."
            )

    @property
    def block_size(self) -> int:
        """Layers per scanned block: one, or up to and with the next sparse layer."""
        return self.expert_layer_period if self.num_experts else 1

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) has experts."""
        return bool(self.num_experts) and layer % self.expert_layer_period == self.expert_layer_period - 1
