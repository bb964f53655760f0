"""Training by several processes, eight devices in all, dense and with experts that lie on all of them: the same losses,
checkpoints for any layout, and whatever happens to one of the processes, all end and the next start goes on bit for
bit."""

import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import switch  # noqa: E402
import worker  # noqa: E402

from expertrag_jax import partitioning  # noqa: E402
from expertrag_jax.moe.layer import EXACT_CAPACITY_FACTOR  # noqa: E402


def logged(model_dir, *names):
    """{step: the values of these names} of the records that have them."""
    lines = (model_dir / "logs" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if names[0] in record]
    return {record["step"]: tuple(record[name] for name in names) for record in records}


def losses(model_dir):
    return logged(model_dir, "loss", "load")


def final(model_dir):
    return dict(np.load(model_dir / "logs" / "final.npz"))


def steps(model_dir):
    return sorted(int(entry.name) for entry in (model_dir / "checkpoints").iterdir() if entry.name.isdigit())


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys() and len(expected) > 6
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory, fast_compile):
    """One process with eight devices, this one."""
    model_dir = tmp_path_factory.mktemp("one") / "model"
    worker.run(model_dir)
    return model_dir


def finished(train, folder, count, *arguments):
    """Trains the dense system in ``model``, and the sparse one beside it."""
    model_dir = folder / "model"
    ended = train(model_dir, count, *arguments)
    assert [process.returncode for process in ended] == [0] * count, ended
    return model_dir


@pytest.fixture(scope="module")
def two_by_four(train, tmp_path_factory):
    runs = [f"--experts={name}" for name in switch.RUNS]
    return finished(train, tmp_path_factory.mktemp("two"), 2, *runs, "--measured")


@pytest.fixture(scope="module")
def four_by_two(train, tmp_path_factory):
    return finished(train, tmp_path_factory.mktemp("four"), 4, "--experts=expert8", "--experts=data2_expert4")


@pytest.mark.parametrize("layout", ["two_by_four", "four_by_two"])
def test_the_same_losses_as_one_process(one, layout, request):
    expected, found = losses(one), losses(request.getfixturevalue(layout))
    assert found.keys() == expected.keys() and len(expected) == 10
    for step, (loss, load) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5), step
        np.testing.assert_allclose(found[step][1], load, rtol=1e-4, err_msg=str(step))


def test_a_checkpoint_of_4x2_is_restored_exactly_by_2x4_1x8_and_1x1(four_by_two, train, tmp_path, fast_compile):
    expected = final(four_by_two)
    assert any("optimizer_state" in name for name in expected)
    for place in ("2x4", "1x8", "1x1"):  # a run that has ended restores its last checkpoint and trains no step
        shutil.copytree(four_by_two, tmp_path / place)
        (tmp_path / place / "logs" / "final.npz").unlink()
    assert [process.returncode for process in train(tmp_path / "2x4", 2)] == [0, 0]
    assert_same_bits(final(tmp_path / "2x4"), expected)
    assert_same_bits(worker.whole(worker.run(tmp_path / "1x8")), expected)
    alone = partitioning.make_mesh(devices=jax.devices()[:1])
    assert_same_bits(worker.whole(worker.run(tmp_path / "1x1", alone)), expected)


@pytest.fixture(scope="module")
def one_with_experts(tmp_path_factory, fast_compile):
    """The sparse system in one process with eight devices, on the mesh expert=8."""
    model_dir = tmp_path_factory.mktemp("one_with_experts")
    switch.run(model_dir, "expert8", measured=True)
    return model_dir


@pytest.mark.parametrize("layout", ["two_by_four", "four_by_two"])
@pytest.mark.parametrize("mesh", switch.MESHES)
def test_experts_of_several_processes_give_the_losses_of_one(one_with_experts, layout, mesh, request):
    names = ("loss", "router/balance_loss", "router/dropped")
    expected = logged(one_with_experts, *names)
    found = logged(request.getfixturevalue(layout).with_name(mesh), *names)
    assert list(found) == list(expected) == [1, 2, 3, 4]
    for step, values in expected.items():
        assert values[2] > 0.1, step
        assert found[step] == pytest.approx(values, rel=1e-5), step


@pytest.mark.parametrize("name", switch.OTHERS)
def test_other_ways_to_the_experts_give_the_losses_of_one_process(name, two_by_four, tmp_path, fast_compile):
    switch.run(tmp_path, name)
    names = ("loss", "router/balance_loss", "router/dropped")
    expected, found = logged(tmp_path, *names), logged(two_by_four.with_name(name), *names)
    assert list(found) == list(expected) == [1, 2, 3, 4]
    for step, values in expected.items():
        assert (values[2] == 0) == (name == "dropless"), step  # no expert chose a fourth of the tokens
        assert found[step] == pytest.approx(values, rel=1e-5), step


def test_several_processes_evaluate_without_drops_as_one(one_with_experts, two_by_four):
    names = ("eval/loss", "eval/fullest", "eval/router/dropped")
    expected, found = logged(one_with_experts, *names), logged(two_by_four.with_name("expert8"), *names)
    assert list(found) == list(expected) == [2, 4]
    for step, (loss, fullest, dropped) in expected.items():
        assert fullest > EXACT_CAPACITY_FACTOR and dropped == 0, step  # the slow path, which all devices take together
        assert found[step] == pytest.approx((loss, fullest, dropped), rel=1e-5), step


def test_experts_of_4_processes_are_restored_exactly_by_one(four_by_two, tmp_path, fast_compile):
    model_dir = four_by_two.with_name("expert8")
    written = [list(model_dir.glob(f"checkpoints/4/state/ocdbt.process_{index}/d/*")) for index in range(4)]
    assert all(written)  # each process its experts
    for mesh in switch.MESHES:  # a run that has ended restores its last checkpoint and trains no step
        shutil.copytree(model_dir, tmp_path / mesh)
        assert_same_bits(worker.whole(switch.run(tmp_path / mesh, mesh)), final(model_dir))


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """(folder of a run whose process 1 was killed at step 23 of 30, how the processes ended)."""
    folder = tmp_path_factory.mktemp("killed")
    return folder / "model", train(folder / "model", 2, "--signal_at=10", "--signal=SIGKILL", "--heartbeat=8")


def test_when_one_is_killed_the_others_end_within_the_heartbeat(killed):
    _, (first, second) = killed
    assert second.returncode == -9 and first.returncode not in (0, None)
    assert first.seconds - second.seconds < 8 + 1  # to exit
    assert "stopped sending heartbeats" in first.stderr


def test_a_killed_run_goes_on_bit_for_bit(killed, train, two_by_four, tmp_path):
    shutil.copytree(killed[0], tmp_path / "model")
    assert steps(tmp_path / "model")[-1] in (15, 20)  # 15 where the write of 20 was cut off
    ended = train(tmp_path / "model", 2)
    assert [process.returncode for process in ended] == [0, 0], ended
    assert_same_bits(final(tmp_path / "model"), final(two_by_four))
    assert losses(tmp_path / "model").keys() == losses(two_by_four).keys()


@pytest.fixture(scope="module")
def terminated(train, tmp_path_factory):
    """(folder of a run whose process 1 got SIGTERM at step 18 of 30, how the processes ended)."""
    folder = tmp_path_factory.mktemp("terminated")
    return folder / "model", train(folder / "model", 2, "--signal_at=5", "--signal=SIGTERM")


def test_sigterm_to_one_makes_all_save_at_the_same_step_and_exit_0(terminated):
    model_dir, ended = terminated
    assert [process.returncode for process in ended] == [0, 0], ended
    assert 18 <= steps(model_dir)[-1] < 30 and not (model_dir / "logs" / "final.npz").exists()
    metadata = json.loads((model_dir / "checkpoints" / str(steps(model_dir)[-1]) / "_CHECKPOINT_METADATA").read_text())
    assert metadata["custom_metadata"]["phase_step"] == steps(model_dir)[-1] - 12


def test_all_skip_a_damaged_checkpoint_and_end_bit_for_bit(terminated, train, two_by_four, tmp_path):
    shutil.copytree(terminated[0], tmp_path / "model")
    before, newest = steps(tmp_path / "model")
    written = list((tmp_path / "model" / "checkpoints" / str(newest) / "state").glob("ocdbt.process_1/d/*"))
    assert written
    for path in written:  # what process 1 wrote, and process 0 does not read
        path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))
    ended = train(tmp_path / "model", 2)
    assert [process.returncode for process in ended] == [0, 0], ended
    assert f"step {newest} is damaged (" in ended[0].stderr and f"going on from step {before}" in ended[0].stderr
    assert "is damaged" not in ended[1].stderr
    assert (tmp_path / "model" / "checkpoints" / f"{newest}.damaged").is_dir()
    assert_same_bits(final(tmp_path / "model"), final(two_by_four))
