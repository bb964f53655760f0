"""Phases that end by mastery: when, what happens if they miss their mark, and that a killed run decides alike."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.systems.mark import Reached
from expertrag_jax.training import log, loop, optimizer, pretrained
from expertrag_jax.training.early_stopping import EarlyStopping
from expertrag_jax.training.interruption import Interrupted
from expertrag_jax.training.mastery import Missed

NEVER = Reached("loss", -1.0, over=4, larger_is_better=False)


@pytest.fixture
def run(toy, tmp_path):
    """Trains phase "body", with a mark, then phase "head" for 4 steps; returns the state."""

    def run(until, steps=40, folder="m", data=toy.data, first=None, **options):
        body, head = toy.Toy(steps=(steps, 4)).phases
        phases = (*([first] if first else []), dataclasses.replace(body, until=until), head)
        options = {"mesh": partitioning.make_mesh(devices=jax.devices()[:1]), "log_period": 2} | options
        datasets = {"waste": toy.data, "body": data, "head": toy.data}
        return loop.train(toy.Toy(), datasets, tmp_path / folder, phases=phases, **options)

    return run


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


def ended(path):
    return pretrained.read_metadata(path)["mastery"]["ended"]


def losses(run, toy, tmp_path):
    """(sum, units) of each of 40 steps of "body" without a mark."""
    logged = []
    run(None, folder="plain", log_period=1, progress=logged.append)
    means = [record["loss"] for record in logged if record.get("phase") == "body"]
    counts = [toy.rows(i, 8 if i % 2 else 16)["weight"].sum() for i in range(40)]
    return [(mean * count, count) for mean, count in zip(means, counts, strict=True)]


@pytest.mark.parametrize("at_least", [0, 25])
def test_a_phase_ends_at_the_first_record_whose_average_reaches_the_mark(run, toy, tmp_path, at_least):
    pairs = losses(run, toy, tmp_path)

    def average(step):  # over the last 4 steps
        total, count = np.sum(pairs[step - 4 : step], axis=0)
        return total / count

    mark = average(18) + 1e-6
    expected = next(step for step in range(4, 41, 2) if step >= at_least and average(step) <= mark)
    state = run(Reached("loss", mark, over=4, at_least=at_least, larger_is_better=False))
    assert int(state.step) == expected + 4
    (record,) = ended(tmp_path / "m")
    assert (record["phase"], record["steps"], record["attempts"], record["reached"]) == ("body", expected, 1, True)
    assert record["value"] == pytest.approx(average(expected), rel=1e-5)
    (logged,) = [r for r in log.read_records(tmp_path / "m") if "mastery/reached" in r]
    assert (logged["step"], logged["mastery/steps"], logged["mastery/reached"]) == (expected, expected, 1.0)


def test_the_next_phases_schedule_begins_where_the_phase_ended(run, toy, tmp_path):
    rate = optimizer.factors_schedule("constant * linear_warmup", 0.8, warmup_steps=8)
    body = dataclasses.replace(
        toy.Toy(steps=(40, 0)).phases[0], until=dataclasses.replace(NEVER, value=99.0), optimizer=optax.sgd(0.01)
    )
    later = loop.Phase("later", 3, toy.loss, lambda: optimizer.adafactor(rate))
    loop.train(
        toy.Toy(), {"body": toy.data, "later": toy.data}, tmp_path / "m", phases=(body, later), log_period=1,
        mesh=partitioning.make_mesh(devices=jax.devices()[:1]),
    )  # fmt: skip
    rates = [(r["step"], r["learning_rate"]) for r in log.read_records(tmp_path / "m") if "learning_rate" in r]
    assert rates == [(5, pytest.approx(0.0, abs=1e-6)), (6, pytest.approx(0.1)), (7, pytest.approx(0.2))]


def test_a_missed_mark_is_said_and_the_run_continues(run, toy, tmp_path, told):
    assert int(run(NEVER, steps=10).step) == 14
    (sentence,) = [text for text in told() if "mark" in text]
    value = ended(tmp_path / "m")[0]["value"]
    assert sentence == (
        f"Phase 'body' did not reach its mark: loss is {value:.4g} after 10 steps, the mark is -1."
    )
    assert not ended(tmp_path / "m")[0]["reached"]


def test_a_missed_mark_stops_the_run_until_it_gets_more_steps(run, tmp_path):
    stop = dataclasses.replace(NEVER, if_missed="stop")
    for _ in range(2):  # starting again with the same steps changes nothing
        with pytest.raises(Missed, match=r"did not reach its mark: loss is .* after 10 steps.*more steps"):
            run(stop, steps=10)
        assert pretrained.read_metadata(tmp_path / "m")["phase_step"] == 10
    reachable = dataclasses.replace(stop, value=99.0)
    assert int(run(reachable, steps=12).step) == 12 + 4


def test_a_retry_has_the_first_parameters_and_the_data_and_random_numbers_that_come_next(run, toy, tmp_path, told):
    retry = dataclasses.replace(NEVER, if_missed="retry", retries=2)
    state = run(retry, steps=10, keep_checkpoints=1, checkpoint_period=4)
    # The same without a mark: twice ten steps that change nothing, then ten that do.
    waste = loop.Phase("waste", 20, toy.loss, optax.sgd(0.0))
    expected = run(None, steps=10, folder="plain", first=waste, data=lambda start: toy.data(start + 20))
    assert int(state.step) == int(expected.step) == 34
    assert same(state.params, expected.params)
    (record,) = ended(tmp_path / "m")
    assert (record["attempts"], record["steps"], record["reached"]) == (3, 10, False)
    sentences = [text for text in told() if "mark" in text]
    assert ["starts again from step 0" in text for text in sentences] == [True, True, False]
    assert "at attempt 2" in sentences[1]


def test_the_checkpoint_of_a_retry_is_kept_until_the_phase_is_over(run, tmp_path):
    retry = dataclasses.replace(NEVER, if_missed="retry", retries=1)
    kept = []

    def look(params, step):
        kept.append({int(path.name) for path in (tmp_path / "m/checkpoints").iterdir() if path.name.isdigit()})
        return {}

    run(retry, steps=10, keep_checkpoints=1, checkpoint_period=2, asynchronous_checkpoints=False,
        hooks=[loop.Hook("look", 1, look)])  # fmt: skip
    assert all(0 in steps and len(steps) <= 2 for steps in kept[:20]) and 0 not in kept[-1]


def test_a_phase_that_early_stopping_ends_leaves_nothing_to_the_next_one(toy, tmp_path, told):
    retry = dataclasses.replace(NEVER, if_missed="retry", retries=1)
    body = dataclasses.replace(toy.Toy(steps=(10, 0)).phases[0], until=retry)
    hook = loop.Hook("eval", 2, lambda params, step: {"loss": 1.0})
    state = loop.train(
        toy.Toy(), {"body": toy.data, "later": toy.data}, tmp_path / "m", log_period=2, hooks=[hook],
        phases=(body, dataclasses.replace(body, name="later")), mesh=partitioning.make_mesh(devices=jax.devices()[:1]),
        early_stopping=EarlyStopping("eval/loss", patience=1, phases="body"),
    )  # fmt: skip
    (record,) = ended(tmp_path / "m")
    assert (record["phase"], record["attempts"], record["steps"]) == ("later", 2, 10)
    assert int(state.step) == 4 + 2 * 10
    assert any("starts again from step 4." in text for text in told())  # not from that of the phase before


@pytest.mark.parametrize("at", [3, 10, 15])
def test_a_run_that_is_stopped_inside_a_phase_ends_it_at_the_same_step_with_the_same_bits(run, toy, tmp_path, at):
    retry = Reached("loss", 0.0, over=5, larger_is_better=False, if_missed="retry", retries=1)
    expected = run(retry, steps=10, folder="whole")

    def interrupted(start):
        return toy.data(start, at, lambda: os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Interrupted):
        run(retry, steps=10, data=interrupted)
    state = run(retry, steps=10)
    assert same(expected, state)
    assert ended(tmp_path / "m") == ended(tmp_path / "whole")


@pytest.mark.parametrize("at", [8, 11])
def test_a_mark_on_an_average_that_a_stop_cuts_in_two_is_reached_at_the_same_step(run, toy, tmp_path, at):
    pairs = losses(run, toy, tmp_path)
    total, count = np.sum(pairs[7:14], axis=0)
    mark = Reached("loss", float(total / count) + 1e-6, over=7, larger_is_better=False)
    expected = run(mark, folder="whole")
    with pytest.raises(Interrupted):
        run(mark, data=lambda start: toy.data(start, at, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert same(expected, run(mark))
    assert json.dumps(ended(tmp_path / "m")) == json.dumps(ended(tmp_path / "whole"))


def test_a_metric_that_the_phase_does_not_log_is_refused(run):
    with pytest.raises(UserError, match="'accuracy', which this phase does not log; it logs .*loss"):
        run(Reached("accuracy", 0.9))


def test_impossible_marks_are_refused():
    with pytest.raises(UserError, match="Reached.over is 0"):
        Reached("loss", 1.0, over=0)
    with pytest.raises(UserError, match="if_missed is 'again'; it must be one of continue, stop, retry"):
        Reached("loss", 1.0, if_missed="again")
