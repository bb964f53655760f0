"""A system's configuration through JSON and back."""

import json
import subprocess
import sys

import optax
import pytest

from expertrag_jax import registry
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
        {"class": "expertrag_jax.systems.retriever:os"},
        {"class": "DualEncoder.__init__"},
        {"class": ["DualEncoder"]},
        {"fields": {"config": None, "unknown": 1}},
    ],
)
def test_another_release_is_one_sentence(change):
    with pytest.raises(UserError, match="use the release it was trained with"):
        rebuild(describe(DualEncoder(DualEncoderConfig())) | change)


def test_a_description_of_the_first_release_is_read_wherever_its_class_is_now():
    system = DualEncoder(DualEncoderConfig(output_dim=24))
    old = {
        "class": "expertrag_jax.somewhere.before:DualEncoder",
        "fields": describe(system)["fields"]
        | {"config": {"class": "expertrag_jax.model.dual_encoder:DualEncoderConfig", "fields": {"output_dim": 24}}},
    }
    assert rebuild(old) == rebuild(describe(system)) and rebuild(old).config.output_dim == 24


def test_nothing_is_imported_because_a_file_names_it():
    code = (
        "import sys; from expertrag_jax.systems.description import rebuild\n"
        "from expertrag_jax.errors import UserError\n"
        "for name in ('antigravity:fly', 'expertrag_jax.evaluation.plots:DualEncoder', '__main__:x', 'this:s'):\n"
        "    try: rebuild({'class': name, 'fields': {}})\n"
        "    except UserError: pass\n"
        "assert not {'antigravity', 'this', 'expertrag_jax.evaluation.plots'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_belongs_to_one_class():
    with pytest.raises(ValueError, match="DualEncoder is the name of"):
        registry.register("DualEncoder")(type("Another", (), {}))
