"""The run: resuming, stopping on a bad loss, hooks, logs, and messages."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest

from expertrag_jax import partitioning, train
from expertrag_jax.errors import UserError
from expertrag_jax.moe.collapse import CollapseAlarm
from expertrag_jax.training import loop, optimizer, pretrained
from expertrag_jax.training.nonfinite import NonFiniteLoss


@pytest.fixture
def run(toy, tmp_path):
    """Trains the toy in ``tmp_path / "m"`` for (4, 4) steps unless told otherwise."""

    def run(steps=(4, 4), data=toy.data, width=8, **options):
        system = toy.Toy(width, steps)
        options = {"mesh": partitioning.make_mesh(devices=jax.devices()[:1]), "log_period": 2} | options
        datasets = options.pop("datasets", {"body": data, "head": data})
        return loop.train(system, datasets, options.pop("model_dir", tmp_path / "m"), **options)

    return run


def records(path):
    return [json.loads(line) for line in (path / "m" / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_logs_measures_and_saves(run, toy, tmp_path):
    told = []
    hook = loop.Hook("validation", 3, lambda params, step: {"width": params["head"]["kernel"].shape[0]})
    state = run(hooks=(hook,), progress=told.append, metadata={"config": "x = 1"})
    assert (int(state.step), int(state.phase), int(state.phase_step)) == (8, 1, 4)
    found = records(tmp_path)
    assert [json.loads(json.dumps(record)) for record in told] == found
    logged = [r for r in found if "loss" in r]
    assert [(r["step"], r["phase"], r["phase_step"]) for r in logged] == [
        (2, "body", 2), (4, "body", 4), (6, "head", 2), (8, "head", 4)
    ]  # fmt: skip
    assert len(logged[0]["load"]) == 8 and logged[0]["finite"] == 1.0
    assert all(r["seconds_per_step"] > 0 and 0 <= r["goodput"] <= 1 for r in logged)
    assert [r["step"] for r in found if "validation/width" in r] == [3, 4, 6, 8]
    assert list((tmp_path / "m" / "logs").glob("events.out.tfevents*"))
    metadata = pretrained.read_metadata(tmp_path / "m")
    assert (metadata["phase"], metadata["phase_step"], metadata["config"]) == ("head", 4, "x = 1")


def test_phases_that_do_the_same_are_traced_once(run, toy, tmp_path):
    traced = []

    def loss(params, batch, rng):
        traced.append(rng)
        return toy.loss(params, batch, None)

    once = loop.Phase("once", 2, loss, toy.Toy().phases[0].optimizer)
    run(phases=(once,), datasets={"once": toy.data}, model_dir=tmp_path / "once")
    first = len(traced)
    again = [dataclasses.replace(once, name=name) for name in ("first", "second", "third")]
    state = run(phases=tuple(again), datasets=dict.fromkeys(("first", "second", "third"), toy.data))
    assert first and len(traced) == 2 * first
    assert (int(state.step), int(state.phase), int(state.phase_step)) == (6, 2, 2)


def test_what_an_evaluation_measures_is_whole_in_every_process(toy, monkeypatch):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=4, tensor=2))
    read = []
    monkeypatch.setattr(train.jax, "device_get", lambda found: read.append(found) or jax.tree.map(np.asarray, found))

    def loss(params, batch, rng):
        scalar, metrics = toy.loss(params, batch, None)
        load = jax.lax.with_sharding_constraint(metrics["load"][0], jax.sharding.PartitionSpec("tensor"))
        return scalar, metrics | {"load": (load, metrics["load"][1])}

    system = toy.Toy()
    phase = loop.Phase("body", 2, loss, system.phases[0].optimizer)
    with jax.set_mesh(mesh):
        params = system.init(jax.random.key(0))
        figures = train.evaluation(system, phase, toy.data, 1, mesh)(params, 0)
    expected = float(toy.loss(params, toy.rows(0, 16), None)[0])
    assert figures == {"loss": pytest.approx(expected, rel=1e-5)}
    assert len(read) == 1 and all(leaf.is_fully_replicated for leaf in jax.tree.leaves(read[0]))


def test_the_logged_loss_is_the_mean_over_units_of_its_steps(run, toy, tmp_path):
    def loss(params, batch, rng):
        scalar, metrics = toy.loss(params, batch, None)
        total, count = (batch["weight"] * batch["x"][:, 0]).sum(), batch["weight"].sum()
        return scalar, metrics | {"first": (total, count)}

    phase = loop.Phase("body", 2, loss, toy.Toy().phases[0].optimizer)
    run(phases=(phase,))
    batches = [toy.rows(0, 16), toy.rows(1, 8)]
    total = sum((b["weight"] * b["x"][:, 0]).sum() for b in batches)
    assert records(tmp_path)[0]["first"] == pytest.approx(
        total / sum(b["weight"].sum() for b in batches), rel=1e-5
    )


def test_the_learning_rate_is_logged_from_each_phases_first_step_on(run, toy, tmp_path):
    schedule = optimizer.factors_schedule("constant * linear_warmup", 0.8, warmup_steps=8)
    phases = [
        loop.Phase("body", 4, toy.loss, lambda: optimizer.adafactor(schedule)),
        loop.Phase("plain", 2, toy.loss, optax.sgd(0.1)),
    ]
    run(phases=phases, datasets={phase.name: toy.data for phase in phases})
    logged = [record.get("learning_rate") for record in records(tmp_path)]
    expected = [0.1 * (a + b) / 2 for a, b in ((0, 1), (2, 3))]  # mean over two steps
    assert logged == [*map(pytest.approx, expected), None]  # an optimizer of another library keeps it to itself


def test_resuming_continues_from_the_position_in_the_data(run, toy, tmp_path):
    asked = []

    def data(start):
        asked.append(start)
        return toy.data(start)

    whole = run(model_dir=tmp_path / "whole")
    run(steps=(4, 0), data=data)
    run(steps=(4, 3), data=data)
    resumed = run(steps=(4, 4), data=data)
    assert asked == [0, 0, 3]
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    again = run(steps=(4, 4), data=data)  # nothing is left to do
    assert asked == [0, 0, 3]
    jax.tree.map(np.testing.assert_array_equal, again, resumed)
    assert [r["step"] for r in records(tmp_path)] == [2, 4, 6, 7, 8]


@pytest.mark.parametrize("bad", [3, 8])
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_its_batch(run, toy, tmp_path, bad):
    def data(start):
        for position, batch in enumerate(toy.data(start), start):
            batch["x"][0, 0] = np.nan if position == bad - 1 else batch["x"][0, 0]
            yield batch

    with pytest.raises(NonFiniteLoss, match=f"not finite at step {bad}") as stop:
        run(steps=(8, 4), data=data, checkpoint_period=bad)
    assert stop.value.step == bad
    directory = tmp_path / "m" / "logs" / f"nonfinite_step_{bad}"
    saved = np.load(directory / "batch.npz")
    expected = toy.rows(bad - 1, 8 if (bad - 1) % 2 else 16)
    assert np.isnan(saved["x"][0, 0])
    np.testing.assert_array_equal(saved["y"], expected["y"])
    assert f"step {bad}" in (directory / "message.txt").read_text()
    assert not (tmp_path / "m" / "checkpoints" / str(bad)).exists()


def test_prepare_sees_parameters_and_makes_the_batch(run, toy, tmp_path):
    seen = []

    def prepare(params, batch):
        seen.append(params["head"]["kernel"].shape)
        return batch | {"weight": np.zeros_like(batch["weight"]) + 1}

    phase = loop.Phase("body", 2, toy.loss, toy.Toy().phases[0].optimizer, prepare=prepare)
    run(phases=(phase,))
    assert seen == [(8, 8)] * 2


def test_what_a_checkpoint_needs_is_made_before_it(run, toy, tmp_path):
    seen = []

    def make(params):
        saved = sorted(path.name for path in (tmp_path / "m" / "checkpoints").glob("[0-9]*"))
        seen.append((np.asarray(params["head"]["kernel"]), saved))

    optimizer = toy.Toy().phases[0].optimizer
    phases = (
        loop.Phase("body", 4, toy.loss, optimizer, before_checkpoint=make), loop.Phase("head", 2, toy.loss, optimizer),
    )  # fmt: skip
    state = run(phases=phases[:1], checkpoint_period=2, asynchronous_checkpoints=False)
    assert [saved for _, saved in seen] == [[], ["2"]]
    assert np.any(seen[0][0] != seen[1][0])
    np.testing.assert_array_equal(seen[1][0], state.params["head"]["kernel"])
    run(phases=phases)  # goes on behind the phase
    assert len(seen) == 2


@pytest.mark.parametrize("alarm,window", [(None, 200), (CollapseAlarm(window=40), 40)])
def test_collapsed_experts_are_warned_of(run, toy, told, alarm, window):
    def loss(params, batch, rng):
        scalar, metrics = toy.loss(params, batch, rng)
        load = np.eye(1, 8, dtype=np.float32)  # one layer, all tokens to the first of eight experts
        return scalar, metrics | {"router/load": (load, np.ones((1, 1), np.float32))}

    phase = loop.Phase("body", window + 40, loss, toy.Toy().phases[0].optimizer)
    run(phases=(phase,), log_period=20, collapse_alarm=alarm)
    (message,) = (message for message in told() if "Experts collapse" in message)
    assert "1 of 8" in message and f"of the last {window} steps" in message


def test_a_directory_with_something_else_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty and is no model directory .it holds thesis.tex"):
        run()
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({}, {"seed": 1}, "run with seed 0, and this one has 1"),
        (
            {"metadata": {"digests": {"vocabulary": "abc"}}},
            {"metadata": {"digests": {"vocabulary": "xyz"}}},
            "another vocabulary",
        ),
        ({}, {"width": 16}, r"body/kernel is \(4, 8\) in the checkpoint and \(4, 16\) in the model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(run, first, second, message):
    run(steps=(1, 0), **first)
    with pytest.raises(UserError, match=message):
        run(steps=(2, 0), **second)


def test_a_checkpoint_of_another_phase_is_refused(run, toy):
    run(steps=(1, 0))
    other = loop.Phase("other", 1, toy.loss, toy.Toy().phases[0].optimizer)
    with pytest.raises(UserError, match="written in phase 'body' and the run has other"):
        run(phases=(other,), datasets={"other": toy.data})


def test_messages_before_anything_is_computed(run, toy):
    optimizer = toy.Toy().phases[0].optimizer
    with pytest.raises(UserError, match="'head' has no data set; there are body"):
        run(datasets={"body": toy.data})
    with pytest.raises(UserError, match="'gate/.*' matches no parameter; paths look like body/bias"):
        run(phases=(loop.Phase("body", 1, toy.loss, optimizer, ("gate/.*",)),))
    with pytest.raises(UserError, match="not a regular expression"):
        run(phases=(loop.Phase("body", 1, toy.loss, optimizer, ("(",)),))


def test_data_of_all_phases_are_checked_first(run, toy, tmp_path):
    class Bad:
        def __call__(self, start):
            raise AssertionError("it is not asked for batches")

        def check(self):
            raise UserError("the file is gone")

    with pytest.raises(UserError, match="the file is gone"):
        run(datasets={"body": toy.data, "head": Bad()})
    run()
    run(datasets={"body": Bad(), "head": Bad()})  # trained to the end: nothing is asked of it any more


def test_data_that_ends_too_early_is_an_error(run, toy):
    with pytest.raises(UserError, match="'body' ended before step 3 of 4"):
        run(data=lambda start: iter([toy.rows(0, 8), toy.rows(1, 8)][start:]))


def test_a_run_starts_from_trained_parameters(run, toy, tmp_path):
    trained = run(steps=(2, 0), model_dir=tmp_path / "first")
    started = run(steps=(0, 0), initial_checkpoint=str(tmp_path / "first"))
    jax.tree.map(np.testing.assert_array_equal, trained.params, started.params)
    assert int(started.step) == 0
