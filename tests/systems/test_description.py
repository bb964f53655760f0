"""A system's configuration through JSON and back."""

import json

import optax
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems.description import describe, rebuild
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.systems.retriever import DualEncoder


def test_a_system_comes_back_from_json_without_its_optimizers():
    system = ExpertRAG(
        TransformerConfig(vocab_size=96, num_experts=4, mlp_activations=("relu",)),
        DualEncoderConfig(output_dim=24),
        retrieval_cost=0.25,
        generator_optimizer=lambda: optax.sgd(0.1),
    )
    text = json.dumps(describe(system))
    assert "optimizer" not in text
    again = rebuild(json.loads(text))
    assert (again.model, again.retriever, again.retrieval_cost) == (system.model, system.retriever, 0.25)
    assert describe(again) == describe(system)
    assert rebuild(describe(DualEncoder(DualEncoderConfig()))).config == DualEncoderConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"class": "expertrag_jax.systems.nowhere:X"},
        {"class": "expertrag_jax.systems.retriever:Gone"},
        {"class": "os:system"},
        {"fields": {"config": None, "unknown": 1}},
    ],
)
def test_another_release_is_one_sentence(change):
    with pytest.raises(UserError, match="use the release it was trained with"):
        rebuild(describe(DualEncoder(DualEncoderConfig())) | change)
