"""Records: means, tokens, and the file after a restart."""

import errno
import json
import struct
import types

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from expertrag_jax import partitioning, train
from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.files import writing
from expertrag_jax.training import events, goodput, telemetry
from expertrag_jax.training.goodput import last_saved
from expertrag_jax.training.interruption import Interrupted


def test_means_weigh_steps_by_their_counts_and_leave_out_what_has_none():
    steps = [
        {"a": (2.0, 1.0), "v": (np.array([1.0, 3.0]), 1.0), "none": (0.0, 0.0)},
        {"a": (1.0, 3.0), "v": (np.array([2.0, 5.0]), 1.0), "sometimes": (6.0, 2.0)},
    ]
    expected = {"a": 0.75, "v": [1.5, 4.0], "sometimes": 3.0}
    assert telemetry.mean_metrics(steps) == expected


def test_tokens_are_what_is_not_padding_and_targets_count_once():
    batch = Batch(
        example_ids=np.arange(2),
        encoder_input_tokens=np.array([[4, 1, 0], [5, 6, 1]]),
        passage_tokens=np.array([[[4, 1], [0, 0]], [[7, 1], [8, 1]]]),
        decoder_input_tokens=np.array([[0, 9], [0, 9]]),
        decoder_target_tokens=np.array([[9, 1], [9, 1]]),
    )
    assert telemetry.token_count(batch) == 5 + 6 + 4


def test_records_beyond_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
        for step in (10, 20, 30):
            told.write({"step": step, "loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(20)
        told.write({"step": 30, "loss": 7.0, "load": [[1.0, 2.0], [3.0, 4.0]]})  # a load per layer and expert
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 0.1), (20, 0.05), (30, 7.0)]


def test_records_survive_a_start_that_is_killed(tmp_path, monkeypatch):
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
        told.write({"step": 10, "loss": 1.0})
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(writing.os, "replace", killed)
        telemetry.Telemetry(tmp_path).resume(0)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def stored_events(directory):
    """{(name, step): value} of all files; a histogram's value is its number of values."""
    found = {}
    for path in sorted(directory.glob("events.out.tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            for value in event.summary.value:
                found[value.tag, event.step] = value.histo.num or value.simple_value
    return found


def test_tensorboard_shows_numbers_and_what_lists_hold(tmp_path):
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
        told.write({"step": 3, "phase": "body", "loss": 0.5, "load": [[1.0, 2.0], [3.0, 6.0]]})
    expected = {("loss", 3): 0.5, ("load", 3): 4.0, ("load/max", 3): 6.0, ("load/mean", 3): 3.0}
    assert stored_events(tmp_path) == expected


def test_a_full_disk_met_by_tensorboards_file_is_told_of(tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events, "_FLUSH_SECONDS", -1.0)
    monkeypatch.setattr(events.EventsWriter, "flush", full)
    with pytest.raises(UserError, match="^The disk is full: the log could not be written to .* the newest of them.$"):
        with telemetry.Telemetry(tmp_path) as told:
            told.resume(0)
            told.write({"step": 3, "loss": 0.5})


def test_a_goodput_file_that_is_a_device_is_no_reason_not_to_train(tmp_path, caplog):
    (tmp_path / "goodput.json").symlink_to("/proc/self/mem")
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
    assert "goodput.json is damaged (" in caplog.text and "goodput.json cannot be written (" in caplog.text
    assert last_saved(tmp_path) is None


@pytest.mark.parametrize("text", ["", '{"this_start": {"wall', '{"total": {"wall": 3}}', "[]"])
def test_a_damaged_goodput_file_is_no_reason_not_to_train(tmp_path, text, caplog):
    (tmp_path / "goodput.json").write_text(text)
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
    assert "goodput.json is damaged (" in caplog.text and "is not counted" in caplog.text
    assert json.loads((tmp_path / "goodput.json").read_text())["total"]["starts"] == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until ``clock.now`` is set."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(goodput, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_rates_leave_out_stops_and_goodput_what_was_lost_to_data_too(tmp_path, clock):
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
        for cause, until, busy in (("compile", 8.0, False), ("data", 9.0, False), ("data", 10.0, True)):
            with told.lost(cause, unless=lambda busy=busy: busy):
                clock.now = until
        for _ in range(2):
            told.count({"tokens": np.array([[1, 1, 0]] * 8)})
        clock.now = 12.0
        record = told.log(2, "p", 2, [{"loss": (1.0, 1.0)}] * 2)
    assert record["seconds_per_step"] == 2.0  # (12 - 8) / 2
    assert record["examples_per_second"] == 4.0 and record["tokens_per_second"] == 8.0
    assert record["goodput"] == 1 - 9 / 12
    expected = "wall time 12.0 s, 25.0% of it in steps; lost: compile 8.0 s, data 1.0 s"
    assert told.goodput.summary() == expected


def test_goodput_counts_every_start_and_the_steps_taken_twice(tmp_path, clock):
    def start(first, steps, seconds_each):
        with telemetry.Telemetry(tmp_path) as told:
            with told.lost("startup"):
                clock.now += 1.0
            told.resume(first)
            for step in range(first + 1, first + steps + 1):
                told.count({"tokens": np.ones((1, 1))})
                clock.now += seconds_each
                if step % 4 == 0:
                    told.log(step, "p", step, [])
            return told.goodput

    start(0, 8, 0.5)  # a checkpoint is written at step 6
    clock.now += 100.0  # between the runs nobody waits
    told = start(6, 2, 0.25)
    assert told.summary() == goodput.read_summary(tmp_path) == (
        "wall time 1.5 s, 33.3% of it in steps; lost: startup 1.0 s; over all 2 starts: wall time 6.5 s, 53.8% of it "
        "in steps; lost: startup 2.0 s, repeated 1.0 s"
    )
    written = json.loads((tmp_path / "goodput.json").read_text())
    assert written["this_start"]["wall_seconds"] == 1.5
    assert written["total"] == {"wall_seconds": 6.5, "lost_seconds": {"startup": 2.0, "repeated": 1.0}, "starts": 2}


def test_what_came_before_training_is_lost_to_startup(clock):
    clock.now = 7.0
    told = goodput.Goodput(started=2.0)
    with told.lost("startup"):
        clock.now = 10.0
    clock.now = 16.0
    assert str(told.spent) == "wall time 14.0 s, 42.9% of it in steps; lost: startup 8.0 s"


def test_a_job_that_ends_by_an_error_tells_where_its_time_went(tmp_path, clock, capsys):
    mesh = partitioning.make_mesh()
    for seconds in (3.0, None):  # the second start does not come so far as to count
        with pytest.raises(ValueError), train.announced(tmp_path, [], mesh):
            if seconds is not None:
                with telemetry.Telemetry(tmp_path / "logs") as told, told.lost("checkpoint"):
                    told.resume(0)
                    clock.now = seconds
                    raise ValueError
            raise ValueError
    summaries = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wall time")]
    assert summaries == ["wall time 3.0 s, 0.0% of it in steps; lost: checkpoint 3.0 s"]


def test_an_interrupted_job_tells_where_its_time_went(tmp_path, clock, capsys):
    mesh = partitioning.make_mesh()
    with pytest.raises(Interrupted), train.announced(tmp_path, [], mesh):
        with telemetry.Telemetry(tmp_path / "logs") as told, told.lost("checkpoint"):
            told.resume(0)
            clock.now = 3.0
            raise Interrupted(7)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "interrupted, saved at step 7: start again to go on",
        "wall time 3.0 s, 0.0% of it in steps; lost: checkpoint 3.0 s",
    ]
