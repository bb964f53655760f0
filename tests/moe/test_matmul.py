"""Products of many experts against a loop in numpy, forward and backward, and what each platform is given."""

import sys
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.moe import matmul

D, F = 5, 7


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_batched_product_and_its_gradients():
    x, w, g = normal(3, 4, D), normal(3, D, F, seed=1), normal(3, 4, F, seed=2)
    y, back = jax.vjp(jax.jit(matmul.batched_matmul), x, w)
    np.testing.assert_allclose(y, np.einsum("ecd,edf->ecf", x, w), rtol=1e-5, atol=1e-6)
    to_x, to_w = back(g)
    np.testing.assert_allclose(to_x, np.einsum("ecf,edf->ecd", g, w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(to_w, np.einsum("ecd,ecf->edf", x, g), rtol=1e-5, atol=1e-6)


SIZES = {"uneven": [5, 0, 17, 1], "one has all": [0, 0, 23, 0], "none": [0, 0, 0, 0], "full blocks": [4, 8, 4, 0]}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grouped_product_and_its_gradients(sizes, dtype):
    block, total = 4, 23  # rows of experts; those between sum(sizes) and 23 belong to nobody
    x, w, g = normal(total + block, D), normal(4, D, F, seed=1), normal(total + block, F, seed=2)
    owner = np.repeat([0, 1, 2, 3, -1], [*sizes, total + block - sum(sizes)])
    g = jnp.where(owner[:, None] >= 0, g, 0)
    x, w, g = (each.astype(dtype) for each in (x, w, g))
    run = jax.jit(lambda x, w: matmul.grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), block))
    y, back = jax.vjp(run, x, w)
    to_x, to_w = back(g)
    assert y.dtype == to_x.dtype == to_w.dtype == dtype
    x, w, g, y, to_x, to_w = (np.asarray(each, np.float32) for each in (x, w, g, y, to_x, to_w))
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 4e-2}
    for e in range(4):
        mine = owner == e
        np.testing.assert_allclose(y[mine], x[mine] @ w[e], **close)
        np.testing.assert_allclose(to_x[mine], g[mine] @ w[e].T, **close)
        np.testing.assert_allclose(to_w[e], x[mine].T @ g[mine], **close)


def test_a_block_holds_few_rows_whole_and_many_in_parts():
    assert matmul.block_rows(4096, 64) == 80 and matmul.block_rows(8192, 64) == 160
    assert matmul.block_rows(4096, 8) == 128 and matmul.block_rows(3, 8) == 16


def program(platform):
    def objective(x, w, sizes):
        return matmul.grouped_matmul(x, w, sizes, 4).sum()

    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((20, D), "float32"), ((4, D, F), "float32"), ((4,), "int32"))]
    return str(jax.export.export(jax.jit(jax.grad(objective, (0, 1))), platforms=[platform])(*shapes).mlir_module())


def test_each_platform_is_given_its_product(monkeypatch):
    assert "ragged_dot" in program("tpu") and "while" not in program("tpu")
    assert "ragged_dot" not in program("cpu") and "while" in program("cpu")
    assert "ragged_dot" not in program("cuda")  # nothing tuned is installed
    calls = []
    library = types.ModuleType("tuned")
    library.ragged_dot = lambda *args: (calls.append(1), jax.lax.ragged_dot(*args))[1]
    library.__spec__ = types.SimpleNamespace(name="tuned")
    monkeypatch.setitem(sys.modules, "tuned", library)
    monkeypatch.setattr(matmul, "TUNED_GPU_LIBRARY", "tuned")
    assert "ragged_dot" in program("cuda") and calls
    assert "ragged_dot" not in program("cpu")
