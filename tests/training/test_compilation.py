"""The second start compiles nothing, and computes the same."""

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.training import compilation, loop


@pytest.fixture
def restored():
    """The cache's settings as they were, after the test."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_second_start_compiles_nothing_anew(toy, tmp_path, restored):
    def start(name, width):
        jax.clear_caches()  # what a new process does not have
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        system = toy.Toy(width, (2, 0))
        state = loop.train(system, {"body": toy.data, "head": toy.data}, tmp_path / name, mesh=mesh)
        return jax.device_get(state), {path.name for path in (tmp_path / "programs").glob("*-cache")}

    compilation.keep_programs(tmp_path / "programs")
    first, programs = start("first", 8)
    second, found = start("second", 8)
    assert len(programs) > 3 and found == programs
    jax.tree.map(np.testing.assert_array_equal, first, second)
    _, more = start("third", 16)
    assert more > programs


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path, restored):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compilation_cache_dir .* cannot be made: Not a directory"):
        compilation.keep_programs(tmp_path / "file" / "programs")
