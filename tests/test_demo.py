"""The demo's folder: a run goes on in its own, and in no other's."""

import pytest

from expertrag_jax.demo import check_world
from expertrag_jax.errors import UserError
from tasks.almanac import AlmanacConfig


def test_a_folder_of_another_world_or_seed_is_refused(tmp_path):
    check_world(tmp_path, AlmanacConfig(), 0)
    check_world(tmp_path, AlmanacConfig(), 0)
    for world, seed in ((AlmanacConfig(), 1), (AlmanacConfig(num_entities=900), 0)):
        with pytest.raises(UserError, match="holds a run on another world or with another seed"):
            check_world(tmp_path, world, seed)
    (tmp_path / "old" / "world").mkdir(parents=True)  # nothing tells which world that is
    with pytest.raises(UserError, match="holds a run on another world"):
        check_world(tmp_path / "old", AlmanacConfig(), 0)
    assert not (tmp_path / "old" / "world.json").exists()
