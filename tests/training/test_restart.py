"""Killed, interrupted and moved runs end as an undisturbed one does."""

import json
from pathlib import Path

import numpy as np
import pytest

TOY = Path(__file__).parent / "toy.py"


def final(model_dir):
    return dict(np.load(model_dir / "logs" / "final.npz"))


def records(model_dir):
    """Logged records without their timings."""
    timings = {"seconds_per_step", "examples_per_second", "tokens_per_second", "goodput", "wall_seconds"}
    lines = (model_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def steps(model_dir):
    return sorted(int(entry.name) for entry in (model_dir / "checkpoints").iterdir() if entry.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(run_python, tmp_path_factory):
    model_dir = tmp_path_factory.mktemp("undisturbed") / "model"
    result = run_python(TOY, model_dir)
    assert result.returncode == 0, result.stderr
    return model_dir


def test_a_killed_run_resumes_bit_for_bit(run_python, undisturbed, tmp_path):
    killed = run_python(TOY, tmp_path / "m", "--signal_at", 39)  # step 120 of 200, in the second phase
    assert killed.returncode == -9
    assert steps(tmp_path / "m")[-1] in (80, 100)  # 80 where the write of 100 was cut off
    resumed = run_python(TOY, tmp_path / "m")
    assert resumed.returncode == 0, resumed.stderr
    expected, found = final(undisturbed), final(tmp_path / "m")
    assert expected.keys() == found.keys() and len(expected) > 6
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert records(tmp_path / "m") == records(undisturbed)
    assert steps(tmp_path / "m") == steps(undisturbed) == [100, 150, 200]


def test_sigterm_saves_at_the_current_step_exits_0_and_resumes_on_another_mesh(
    run_python, undisturbed, tmp_path
):
    stopped = run_python(TOY, tmp_path / "m", "--signal_at", 56, "--signal", "SIGTERM")
    assert stopped.returncode == 0, stopped.stderr
    assert steps(tmp_path / "m")[-1] == 137  # the step on the batch at which the signal came
    assert not (tmp_path / "m" / "logs" / "final.npz").exists()
    spent = json.loads((tmp_path / "m" / "logs" / "goodput.json").read_text())["total"]
    assert set(spent["lost_seconds"]) == {"startup", "data", "compile", "checkpoint"}
    assert sum(spent["lost_seconds"].values()) < spent["wall_seconds"]
    mesh = json.dumps({"data": 1, "fsdp": 2, "tensor": 4})
    resumed = run_python(TOY, tmp_path / "m", "--mesh", mesh, devices=8)
    assert resumed.returncode == 0, resumed.stderr
    found = final(tmp_path / "m")
    for name, value in final(undisturbed).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_same_losses_on_every_mesh(run_python, undisturbed, tmp_path):
    result = run_python(TOY, tmp_path / "m", "--mesh", json.dumps({"data": 2, "fsdp": 2}), devices=4)
    assert result.returncode == 0, result.stderr
    pairs = list(zip(records(undisturbed), records(tmp_path / "m"), strict=True))
    assert len(pairs) == 10
    for one, other in pairs:
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["load"] == pytest.approx(other["load"], rel=1e-4)
