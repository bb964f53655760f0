"""The watchdog: a data set that blocks is found out, slow compilations and checkpoints are left in peace."""

import logging
import subprocess
import sys
import textwrap
import threading
import time

import jax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.training import hang, loop, telemetry


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """On a busy machine too, what is known to be slow ends in time."""
    monkeypatch.setattr(hang, "PATIENCE", dict.fromkeys(hang.PATIENCE, 1000.0))


def train(toy, model_dir, data, **options):
    options = {"mesh": partitioning.make_mesh(devices=jax.devices()[:1])} | options
    return loop.train(toy.Toy(steps=(4, 0)), {"body": data, "head": data}, model_dir, **options)


def test_a_blocked_data_set_is_told_of_and_the_run_goes_on(toy, tmp_path, capfd, caplog, told):
    gave_up = threading.Event()

    def wait_for_the_file_server():
        assert gave_up.wait(60)

    def look():
        while not (tmp_path / "m" / "logs" / "hang_2.txt").exists() and not gave_up.wait(0.05):
            pass
        gave_up.set()

    looker = threading.Thread(target=look, daemon=True)
    looker.start()
    with caplog.at_level(logging.ERROR):
        state = train(
            toy, tmp_path / "m", lambda start: toy.data(start, 2, wait_for_the_file_server), hang_seconds=1.0
        )
    looker.join()
    assert int(state.step) == 4
    assert [path.name for path in (tmp_path / "m" / "logs").glob("hang*")] == ["hang_2.txt"]
    text = (tmp_path / "m" / "logs" / "hang_2.txt").read_text()
    assert "Since step 2 'data' has not ended for 1 s" in text and "the run goes on waiting" in text
    assert "in wait_for_the_file_server" in text and "in next_batch" in text
    assert "in wait_for_the_file_server" in capfd.readouterr().err
    (message,) = told()
    assert "hang_2.txt" in message


@pytest.mark.parametrize("cause, hangs", [("compile", False), ("evaluation", False), ("data", True)])
def test_what_is_known_to_be_slow_has_more_time(tmp_path, cause, hangs, capfd):
    told = telemetry.Telemetry(tmp_path)
    with hang.Watchdog(tmp_path, told, 0.2), told.lost(cause):
        time.sleep(0.5)
    assert bool(list(tmp_path.glob("hang*"))) == hangs


def test_the_first_batch_of_a_phase_has_more_time(toy, tmp_path):
    def made_slowly(start):
        time.sleep(1.2)
        return toy.data(start, start, lambda: time.sleep(1.2))

    state = train(toy, tmp_path / "m", made_slowly, hang_seconds=1.0)
    assert int(state.step) == 4 and not list((tmp_path / "m" / "logs").glob("hang*"))


def test_a_steady_run_is_left_in_peace(tmp_path):
    told = telemetry.Telemetry(tmp_path)
    with hang.Watchdog(tmp_path, told, 1.0):
        for _ in range(15):
            told.goodput.step()
            time.sleep(0.1)
    assert not list(tmp_path.glob("hang*"))


def test_a_hang_ends_the_process_where_that_is_asked_for(tmp_path):
    program = """
        import sys, time
        from expertrag_jax.training import hang, telemetry
        told = telemetry.Telemetry(sys.argv[1])
        told.goodput.step()
        with hang.Watchdog(sys.argv[1], told, 0.3, abort=True):
            time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == hang.EXIT_CODE == 75
    assert "Since step 0 no step was finished for 0 s" in ended.stderr and "exit code 75" in ended.stderr
    assert (tmp_path / "hang_0.txt").exists()
