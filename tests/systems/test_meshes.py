"""The same losses and gradients on every mesh, through the real train step."""

import jax
import numpy as np
import optax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.training import parameters, step
from expertrag_jax.training.state import Layout, TrainState

MESHES = [{"data": 8}, {"fsdp": 8}, {"expert": 8}, {"data": 2, "tensor": 4}, {"data": 2, "expert": 4}]


STEPS = 3


def train(tiny, axes, steps):
    """Loss and gradient norm of SGD steps on open-book batches, and the parameters behind them."""
    system = tiny.system({"num_selected_experts": 2, "train_expert_capacity_factor": 1.0})
    count = int(np.prod(list(axes.values())))
    mesh = partitioning.make_mesh(partitioning.MeshConfig(**{"data": 1} | axes), jax.devices()[:count])
    layout = Layout(system, mesh)
    phase = system.phases[0]
    optimizer = optax.sgd(0.5)
    with jax.set_mesh(mesh):
        params = jax.tree.map(jax.device_put, start(tiny), layout.params)
        variables, _ = parameters.split(params, phase.trainable)
        zero = np.zeros((), np.int32)
        state = TrainState(zero, zero, zero, params, optimizer.init(variables))
        run = step.make_train_step(phase.loss, optimizer, phase.trainable, donate=False)
        losses, dropped = [], []
        for position in range(steps):
            batch = partitioning.global_batch(tiny.batch(8, seed=position), mesh)
            state, metrics = run(state, batch)
            losses.append([float(metrics[name][0]) for name in ("objective", "gradient_norm")])
            dropped.append(metrics["router/dropped"][0])
    return np.array(losses), jax.device_get(state.params), float(sum(dropped))


def start(tiny):
    return tiny.initial(tiny.system({"num_selected_experts": 2}))


@pytest.fixture(scope="module")
def one_device(tiny):
    """``train`` on one device, the reference."""
    return train(tiny, {"data": 1}, STEPS)


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_losses_and_parameters_are_those_of_one_device(axes, tiny, one_device):
    losses, params, dropped = one_device
    sharded_losses, sharded_params, sharded_dropped = train(tiny, axes, STEPS)
    assert dropped > 0  # capacity binds, so groups must be the same on every mesh
    np.testing.assert_allclose(sharded_dropped, dropped, rtol=1e-4)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), sharded_params, params)
