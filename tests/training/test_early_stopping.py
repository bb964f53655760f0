"""Early stopping: when patience ends, what is skipped, and that a resumed run stops alike."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import pretrained
from expertrag_jax.training.early_stopping import EarlyStopping, Patience
from expertrag_jax.training.loop import Hook, train
from expertrag_jax.training.retention import Retention


def fed(rule, values, **where):
    patience = Patience(rule)
    for step, value in enumerate(values, 1):
        patience.add(step, where.get("phase", "a"), {rule.metric: value})
    return patience


@pytest.mark.parametrize(
    "values, larger, stops",
    [
        ([3, 2, 1, 0.5], False, False),
        ([3, 2, 2.5, 2], False, True),  # an equal value is no better
        ([3, 2, 2.5, 1.9, 2], False, False),
        ([1, 2, 1.5, 1.9], True, True),
        ([3, float("nan"), float("inf")], False, True),
        ([float("nan"), 3, 4], False, False),
    ],
)
def test_patience(values, larger, stops):
    rule = EarlyStopping("eval/loss", 2, larger_is_better=larger)
    patience = fed(rule, values)
    assert patience.exhausted == stops
    again = Patience(rule, json.loads(json.dumps(patience.as_json())))
    assert again.as_json() == patience.as_json() and again.exhausted == stops
    assert not Patience(None, patience.as_json()).exhausted


def test_other_phases_and_metrics_do_not_count():
    rule = EarlyStopping(patience=1, phases="max.*")
    patience = fed(rule, [1, 2, 3], phase="warm")
    patience.add(4, "max", {"eval/other": 3})
    assert patience.as_json() == {"best": None, "best_step": None, "in_vain": 0, "measured": []}
    patience.add(5, "max_1", {"eval/loss": 3})
    patience.add(6, "max_2", {"eval/loss": 4})
    assert patience.best_step == 5 and patience.skips("max_3") and not patience.skips("gate")


def test_impossible_rules_are_refused():
    for fields, message in (({"patience": 0}, "from 1 to"), ({"phases": "("}, "not a regular expression")):
        with pytest.raises(UserError, match=message):
            EarlyStopping(**fields)


def test_the_best_of_another_phase_counts_only_where_phases_are_compared():
    every = fed(EarlyStopping(), [3.0, 1.0, 2.0], phase="generator")
    assert every.best_for("generator") == 2 and every.best_for("gate") is None  # nothing was measured there
    every.add(9, "gate", {"eval/loss": 5.0})
    assert every.best_for("gate") is None  # its losses have nothing to do with the generator's
    iterations = fed(EarlyStopping(phases="(copy|em)_.*", patience=9), [3.0, 1.0], phase="em_1")
    iterations.add(9, "em_2", {"eval/loss": 2.0})
    assert iterations.best_for("em_2") == 2 == iterations.best_for("em_1")
    assert iterations.best_for("copy_3") is None is iterations.best_for("gate")
    again = Patience(EarlyStopping(phases="(copy|em)_.*", patience=9), json.loads(json.dumps(iterations.as_json())))
    assert again.best_for("em_2") == 2
    assert Patience(None).best_for("em_1") is None


@dataclasses.dataclass(frozen=True)
class Line:
    """Two phases that follow one slope, and a third."""

    def init(self, rng):
        del rng
        return {"w": jnp.zeros(())}

    def logical_axes(self):
        return {"w": ()}

    @property
    def phases(self):
        def loss(params, batch, rng):
            return -params["w"], {"loss": (-params["w"] * 8.0, jnp.asarray(8.0))}

        return tuple(Phase(name, 4, loss, optax.sgd(1.0)) for name in ("em_1", "em_2", "gate"))


def test_a_run_leaves_its_phase_and_stays_stopped(tmp_path):
    """The measured value is best at step 2; the run ends at 3, and `gate`, which the rule does not name, still runs."""
    seen = []

    def measure(params, step):
        seen.append(step)
        return {"loss": abs(float(params["w"]) - 2.0)}

    def data(start):
        return iter([np.zeros((8, 1), np.float32)] * (4 - start))

    def run(model="model", **more):
        hooks = (Hook("eval", 1, measure),)
        rule = EarlyStopping(patience=1, phases="em_.*")
        datasets = dict.fromkeys(("em_1", "em_2", "gate"), data)
        return train(Line(), datasets, tmp_path / model, hooks=hooks, early_stopping=rule, log_period=1, **more)

    state = run()
    assert float(state.params["w"]) == int(state.step) == 7 and seen == [1, 2, 3, 4, 5, 6, 7]
    assert int(run().step) == 7 and len(seen) == 7  # resumed: nothing is left to do
    for step in (6, 7):  # resumed where it had stopped: the rest of em_1 and em_2 stay out
        path = tmp_path / "model" / "checkpoints" / str(step)
        path.exists() and path.rename(tmp_path / f"moved_{step}")
    assert int(run().step) == 7 and seen[7:] == [4, 5, 6, 7]

    def opened(model):
        return float(pretrained.restore_parameters(tmp_path / model, {"w": jnp.zeros(())})["w"])

    # Whoever opens the directory gets the newest of `gate`, of which the rule says nothing; without that, the best.
    assert opened("model") == 7
    keep = Retention(latest=1, best=1, phases="em_.*")
    kept = {"phases": Line().phases[:2], "checkpoint_period": 1, "keep_checkpoints": keep}
    state = run("best", **kept)
    assert int(state.step) == 3 and opened("best") == 2
    assert sorted(path.name for path in (tmp_path / "best" / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    shutil.rmtree(tmp_path / "best" / "checkpoints" / "2")
    assert opened("best") == 3
