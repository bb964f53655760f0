"""The demo's folder: a run goes on in its own, and in no other's."""

import pytest

from expertrag_jax.demo import check_world
from expertrag_jax.errors import UserError
from expertrag_jax.main import main
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


def test_a_word_for_a_number_of_steps_is_one_sentence_before_anything_is_written(tmp_path, capsys):
    place = tmp_path / "new"
    command = ["demo", "--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={place}", "--gin.TRAIN_STEPS=many"]
    assert main(command) == 2
    assert "error: Phase 'generator' has 'many' steps" in capsys.readouterr().err and not place.exists()
