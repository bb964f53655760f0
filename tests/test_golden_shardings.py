"""Every parameter lies where the golden files say."""

import difflib
import importlib.util
import pathlib

import pytest

PATH = pathlib.Path(__file__).with_name("golden_shardings.py")
SPEC = importlib.util.spec_from_file_location("golden_shardings", PATH)
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)


@pytest.mark.parametrize("model", golden.MODELS)
def test_parameters_and_moments_lie_where_the_golden_file_says(model):
    path = golden.GOLDEN / f"{model}.txt"
    expected, found = path.read_text() if path.exists() else "", golden.text(model)
    changed = difflib.unified_diff(expected.splitlines(), found.splitlines(), "golden", "now", lineterm="", n=0)
    assert found == expected, "\n".join([f"if this is meant, run `{golden.COMMAND}`:", *changed])


def test_every_mesh_file_and_no_other_model_is_in_the_golden_files():
    assert {path.stem for path in (golden.ROOT / "gin" / "meshes").glob("*.gin")} == set(golden.DEVICES)
    assert {path.stem for path in golden.GOLDEN.iterdir()} == set(golden.MODELS)
