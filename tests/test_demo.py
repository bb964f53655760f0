"""The demo's folder: a run goes on in its own, and in no other's."""

import pytest

from expertrag_jax.demo import check_values
from expertrag_jax.demo_folder import check_folder
from expertrag_jax.errors import UserError
from expertrag_jax.main import main
from expertrag_jax.vocabulary import train_vocabulary
from tasks.almanac.phrasing import RELATIONS

THIS = {"world": "a", "seed": 0, "trained": "x"}


def test_a_folder_of_another_run_is_refused(tmp_path):
    check_folder(tmp_path / "new", **THIS)
    check_folder(tmp_path / "new", **THIS)
    others = {"world": ("b", "on another world"), "seed": (1, "another seed"), "trained": ("y", "other models")}
    for name, (value, told) in others.items():
        with pytest.raises(UserError, match=f"holds a run .*{told}"):
            check_folder(tmp_path / "new", **THIS | {name: value})


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "questions.jsonl").write_text("mine")
    with pytest.raises(UserError, match="files of no demo"):
        check_folder(tmp_path, **THIS)
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


def test_an_impossible_world_is_refused_before_anything_is_written(tmp_path, capsys):
    command = ["demo", "--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={tmp_path / 'new'}"]
    assert main([*command, "--gin_bindings=AlmanacConfig.questions_per_fact = 3"]) == 2
    assert "questions_per_fact is 3" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_values_that_the_vocabulary_takes_apart_are_refused(tmp_path):
    words = [*(value for relation in RELATIONS for value in relation.values), *(f"name{i} other{i}" for i in range(90))]
    large, small = (train_vocabulary(words * 9, size, tmp_path / f"{size}.model") for size in (1100, 330))
    check_values(large, 2)
    with pytest.raises(UserError, match=r"tokens in a vocabulary of 330 pieces.* raise VOCABULARY_SIZE"):
        check_values(small, 2)


def test_a_file_for_a_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={tmp_path / 'file'}"]) == 2
    printed = capsys.readouterr().err
    assert "error: " in printed and "Traceback" not in printed


def test_a_word_for_a_number_of_steps_is_one_sentence_before_anything_is_written(tmp_path, capsys):
    place = tmp_path / "new"
    command = ["demo", "--gin_file=runs/almanac.gin", f"--gin.MODEL_DIR={place}", "--gin.TRAIN_STEPS=many"]
    assert main(command) == 2
    assert "error: TRAIN_STEPS, the ExpertRAG.generator_steps, is 'many'" in capsys.readouterr().err
    assert not place.exists()
