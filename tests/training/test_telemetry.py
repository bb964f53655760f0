"""Records: means, tokens, and the file after a restart."""

import json
import types

import numpy as np

from expertrag_jax.batch import Batch
from expertrag_jax.training import telemetry


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


def test_rates_leave_out_lost_seconds(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 1.0, 9.0, 12.0])  # start, resume, compile from 1 to 9, log at 12
    monkeypatch.setattr(telemetry, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with telemetry.Telemetry(tmp_path) as told:
        told.resume(0)
        with told.lost("compile"):
            pass
        for _ in range(2):
            told.count({"tokens": np.array([[1, 1, 0]] * 8)})
        record = told.log(2, "p", 2, [{"loss": (1.0, 1.0)}] * 2)
    assert record["seconds_per_step"] == 2.0  # (12 - 8) / 2
    assert record["examples_per_second"] == 4.0 and record["tokens_per_second"] == 8.0
    assert record["goodput"] == 1 - 8 / 12
