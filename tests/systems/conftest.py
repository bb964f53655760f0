"""A tiny ExpertRAG, its parameters and its batches."""

import types

import jax
import numpy as np
import pytest

from expertrag_jax import partitioning
from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.training import parameters, step
from expertrag_jax.training.state import Layout, TrainState

VOCAB, TARGET = 24, 4


def model(**changes) -> TransformerConfig:
    sizes = dict(vocab_size=VOCAB, embed_dim=8, num_heads=4, head_dim=4, mlp_dim=8, num_encoder_layers=1)
    experts = dict(num_experts=8, expert_layer_period=1, num_decoder_layers=1, expert_group_size=4)
    return TransformerConfig(**{**sizes, **experts, **changes})


def system(changes=None, **fields) -> ExpertRAG:
    return ExpertRAG(model(**(changes or {})), **{"max_target_length": TARGET, "gate_hidden": 4, **fields})


def initial(system, seed=0):
    """Random parameters without compiling anything; what divides or scales is near 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        noise = rng.normal(size=shape.shape)
        name = path[-1].key
        value = 1 + 0.1 * noise if "scale" in name else noise if name == "embedding" else 0.3 * noise
        return np.asarray(value, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(system.init, jax.random.key(0)))


def batch(size=8, passages=2, seed=0) -> Batch:
    """Both arms: questions [B, 4], reader inputs [B, K, 8], targets [B, 4] of 2 to 4 tokens, EOS included."""
    rng = np.random.default_rng(seed)
    question = rng.integers(2, VOCAB, (size, 4)).astype(np.int32)
    question[::3, 3:] = 0
    reader = rng.integers(2, VOCAB, (size, passages, 8)).astype(np.int32)
    reader[::2, -1, 6:] = 0
    target = rng.integers(2, VOCAB, (size, TARGET)).astype(np.int32)
    for row in range(size):
        end = 1 + row % (TARGET - 1)
        target[row, end], target[row, end + 1 :] = 1, 0
    return Batch(
        encoder_input_tokens=question,
        passage_tokens=reader,
        decoder_target_tokens=target,
        decoder_input_tokens=np.pad(target, ((0, 0), (1, 0)))[:, :-1],
        decoder_loss_weights=(target > 0).astype(np.float32),
    )


def one_step(system, optimizer, batch, sizes):
    """(metrics, parameters), on the host, behind one step of the system's last phase on a mesh of these sizes."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = partitioning.make_mesh(partitioning.MeshConfig(**{"data": 1} | sizes), devices)
    layout, phase = Layout(system, mesh), system.phases[-1]
    with jax.set_mesh(mesh):
        params = jax.tree.map(jax.device_put, initial(system), layout.params)
        variables, _ = parameters.split(params, phase.trainable)
        zero = np.zeros((), np.int32)
        state = TrainState(zero, zero, zero, params, optimizer.init(variables))
        run = step.make_train_step(phase.loss, optimizer, phase.trainable, donate=False)
        state, metrics = run(state, partitioning.global_batch(batch, mesh))
        return jax.device_get((metrics, state.params))


@pytest.fixture(scope="module")
def tiny():
    """The helpers above, as one fixture."""
    helpers = dict(model=model, system=system, initial=initial, batch=batch, one_step=one_step)
    return types.SimpleNamespace(**helpers, vocab=VOCAB, target=TARGET)
