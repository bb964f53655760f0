"""Scanned and rematerialised stacks compute what the unrolled one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.training import parameters


def stacked(params, block_size):
    """Unrolled parameters -> T5X's scanned ones: axis 1 over blocks of layers."""
    flat, groups = {}, {}
    for path, leaf in parameters.flatten(params).items():
        parts = path.split("/")
        if not parts[1].startswith("layers_"):
            flat[path] = leaf
            continue
        block, inner = divmod(int(parts[1].removeprefix("layers_")), block_size)
        middle = [f"layers_{inner}"] if block_size > 1 else []
        groups.setdefault("/".join([parts[0], "layers", *middle, *parts[2:]]), {})[block] = leaf
    flat |= {path: np.stack([rows[i] for i in range(len(rows))], axis=1) for path, rows in groups.items()}
    return parameters.unflatten(flat)


def objective(tiny, settings):
    questions, targets = tiny.tokens(), tiny.tokens(3, 4, seed=1)

    def run(params):
        logits = tiny.logits(settings, params, questions, targets, (targets > 0).astype(np.int32))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(picked * (targets > 0)).mean(), logits

    return jax.jit(jax.value_and_grad(run, has_aux=True))


def close(ours, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_scanned_equals_unrolled(sparse, tiny):
    changes = {"num_encoder_layers": 4, "num_decoder_layers": 4} | (tiny.sparse if sparse else {})
    unrolled = tiny.config(**changes)
    scanned = tiny.config(**changes, scan_layers=True)
    params = tiny.initial(unrolled)
    (_, expected), gradients = objective(tiny, unrolled)(params)
    block_size = scanned.block_size
    assert block_size == (2 if sparse else 1)
    (_, logits), scanned_gradients = objective(tiny, scanned)(stacked(params, block_size))
    close(logits, expected)
    close(scanned_gradients, stacked(jax.tree.map(np.asarray, gradients), block_size))


@pytest.mark.parametrize("remat, scan", [("full", False), ("dots", True)])
def test_remat_equals_none(remat, scan, tiny):
    changes = {"scan_layers": scan} | tiny.sparse
    params = tiny.initial(tiny.config(**changes))
    expected = objective(tiny, tiny.config(**changes))(params)
    program = objective(tiny, tiny.config(**changes, remat=remat))
    close(program(params), expected)
    assert "remat" in str(program.trace(params).jaxpr)
