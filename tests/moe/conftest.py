"""Little programs, compiled quickly."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """These programs are compiled once and run once on a few numbers: optimizing them is lost time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
