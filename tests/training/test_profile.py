"""The profiler's window: its steps are in the trace, and no others."""

import gzip
import json
import logging

import jax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.training import loop, profile


@pytest.fixture
def run(toy, tmp_path):
    def run(steps, window):
        mesh = partitioning.make_mesh(devices=jax.devices()[:1])
        loop.train(
            toy.Toy(steps=steps), {"body": toy.data, "head": toy.data}, tmp_path / "m", mesh=mesh, profile_steps=window
        )

    return run


def traced_steps(path):
    """Numbers of the steps in Chrome's format of the one trace in a folder."""
    (trace,) = path.glob("m/logs/profile/plugins/profile/*/*.trace.json.gz")
    assert len(list(trace.parent.glob("*.xplane.pb"))) == 1
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(int(event["args"]["step_num"]) for event in events if "step_num" in event.get("args", {}))


def test_the_window_is_traced_across_phases(run, tmp_path):
    run((3, 3), "3:5")
    assert traced_steps(tmp_path) == [3, 4]


def test_a_run_that_ends_early_or_starts_late_is_traced_as_far_as_it_goes(run, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run((2, 0), "10:12")
    assert "took none of these steps" in caplog.text
    assert not (tmp_path / "m" / "logs" / "profile").exists()
    run((4, 0), "2:100")  # resumes behind step 2
    assert traced_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("text", ["100", "5:5", "7:3", "a:b", "-1:4"])
def test_what_is_no_window(text):
    with pytest.raises(UserError, match="as in 100:105"):
        profile.window(text)
    assert profile.window("100:105") == range(100, 105)
