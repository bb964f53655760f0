"""mips against brute force in numpy, on one device and on eight."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from expertrag_jax import mips


def brute_force(queries, vectors, k):
    """Rows and scores by a stable sort of all products, padded as mips does."""
    products = queries.astype(np.float64) @ vectors.astype(np.float64).T
    rows = np.argsort(-products, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(products, rows, axis=1)
    missing = k - rows.shape[1]
    rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
    return rows, np.pad(scores, ((0, 0), (0, missing)), constant_values=mips.ABSENT_SCORE)


def random(count, batch=5, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(batch, width)).astype(np.float32),
        rng.normal(size=(count, width)).astype(np.float32),
    )


@pytest.mark.parametrize("count, block", [(1, 8), (7, 8), (8, 8), (64, 8), (61, 8), (61, 1000)])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_exact_search_equals_brute_force(count, block, k):
    queries, vectors = random(count)
    rows, scores = mips.exact_topk(queries, vectors, k, block_size=block)
    wanted_rows, wanted_scores = brute_force(queries, vectors, k)
    assert rows.dtype == jnp.int32 and scores.dtype == jnp.float32
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5, atol=1e-5)


def test_equal_scores_come_in_order_of_rows():
    queries, vectors = np.ones((1, 2), np.float32), np.ones((20, 2), np.float32)
    rows, _ = mips.exact_topk(queries, vectors, 6, block_size=4)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4, 5]])


def test_rows_past_the_count_are_never_found():
    queries, vectors = random(20)
    vectors[13:] = 100 * np.sign(queries[0])  # padding that would win
    rows, scores = mips.exact_topk(queries, vectors, 16, count=13, block_size=6)
    np.testing.assert_array_equal(rows, brute_force(queries, vectors[:13], 16)[0])
    assert np.all(np.asarray(scores)[:, 13:] == np.float32(mips.ABSENT_SCORE))


def test_softmax_over_absent_passages_is_finite():
    queries, vectors = random(2)
    _, scores = mips.exact_topk(queries, vectors, 4)
    weights = jax.nn.softmax(scores)
    assert np.all(np.isfinite(weights)) and np.all(np.asarray(weights)[:, 2:] == 0)
    assert np.all(np.isfinite(jax.nn.log_softmax(jnp.full((1, 4), mips.ABSENT_SCORE))))


def test_no_temporary_holds_all_scores():
    queries, vectors = random(4096, batch=8)
    program = jax.make_jaxpr(lambda q, v: mips.exact_topk(q, v, 4, block_size=256))(queries, vectors)

    def largest(jaxpr):
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                yield int(np.prod(variable.aval.shape))
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from largest(inner)

    assert max(largest(program.jaxpr)) <= 256 * 16  # one block of vectors; all scores are 8 * 4096


def test_approximate_search_reaches_its_recall():
    queries, vectors = random(3000, batch=32)
    rows, scores = mips.approximate_topk(queries, vectors, 10, recall_target=0.9, block_size=1024)
    wanted, _ = brute_force(queries, vectors, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(np.asarray(rows).tolist(), wanted.tolist())])
    assert recall >= 0.9
    products = np.take_along_axis(queries @ vectors.T, np.asarray(rows), axis=1)
    np.testing.assert_allclose(scores, products, rtol=1e-4, atol=1e-4)


def test_sharded_search_refuses_vectors_that_do_not_divide():
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    queries, vectors = random(10)
    rows, _ = mips.sharded_topk(queries, vectors, 3, mesh=mesh, axis="data")
    np.testing.assert_array_equal(rows, brute_force(queries, vectors, 3)[0])
    wide = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(ValueError, match="do not divide over 4 shards"):
        mips.sharded_topk(queries, vectors, 3, mesh=wide, axis="data")


EIGHT_DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType
from expertrag_jax import mips
from expertrag_jax.retrieval.mesh_index import ExactIndex
from expertrag_jax.retrieval.protocol import Queries

assert len(jax.devices()) == 8
rng = np.random.default_rng(0)
queries = rng.normal(size=(5, 16)).astype(np.float32)
vectors = rng.normal(size=(61, 16)).astype(np.float32)
vectors[40] = vectors[3]  # equal scores on two shards: the lower row first
wanted = np.argsort(-(queries.astype(np.float64) @ vectors.T.astype(np.float64)), axis=1, kind="stable")
for shape, names, axis in (
    ((8,), ("data",), None),
    ((2, 4), ("data", "tensor"), None),
    ((2, 4), ("data", "tensor"), "tensor"),
):
    mesh = jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))
    for k in (1, 9, 70):
        index = ExactIndex(mesh=mesh, axis=axis, block_size=3).build(None, vectors)
        rows, scores = index.search(Queries(vectors=queries), k)
        np.testing.assert_array_equal(rows[:, : min(k, 61)], wanted[:, :k])
        assert np.all(rows[:, 61:] == -1)
    shards = {shard.data.shape[0] for shard in index._vectors.addressable_shards}
    assert shards == ({16} if axis else {8}), shards
    approximate = ExactIndex(mesh=mesh, axis=axis, recall_target=0.9).build(None, vectors)
    np.testing.assert_array_equal(approximate.search(Queries(vectors=queries), 4)[0], wanted[:, :4])
print("equal")
"""


def test_sharded_search_equals_brute_force_on_eight_devices(xla_flags):
    environment = {**os.environ, "XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-3000:]
