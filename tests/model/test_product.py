"""The product with its own derivative is the product, and so are its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expertrag_jax.model.product import project


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("dtype, result, tolerance", [
    ("float32", None, 1e-6), ("bfloat16", None, 2e-2), ("bfloat16", "float32", 2e-2)
])  # fmt: skip
def test_values_and_gradients_are_those_of_dot(shape, dtype, result, tolerance):
    rng = np.random.default_rng(0)
    x, kernel, probe = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (4, 6), (*shape[:-1], 6)))

    def run(product):
        def objective(x, kernel):
            y = product(x, kernel)
            assert y.dtype == (result or dtype)
            return (y * probe).sum().astype(jnp.float32)

        return jax.value_and_grad(objective, argnums=(0, 1))(x, kernel)

    (value, found), (expected_value, expected) = (
        run(lambda x, w: project(x, w, result)),
        run(lambda x, w: jnp.dot(x, w, preferred_element_type=result)),
    )
    np.testing.assert_allclose(value, expected_value, rtol=tolerance)
    for mine, theirs in zip(found, expected):
        assert mine.dtype == theirs.dtype and float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(
            np.asarray(mine, np.float32), np.asarray(theirs, np.float32), rtol=tolerance, atol=tolerance
        )
