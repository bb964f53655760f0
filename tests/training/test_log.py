"""What a run logged, read back."""

import json

from expertrag_jax.training.log import expert_load, losses_by_phase, read_records
from expertrag_jax.training.telemetry import Telemetry


def test_records_come_back_by_phase(tmp_path):
    assert read_records(tmp_path) == [] and losses_by_phase(tmp_path) == {} and expert_load(tmp_path) == {}
    with Telemetry(tmp_path / "logs") as telemetry:
        telemetry.resume(0)
        for step, phase, loss, load in ((1, "a", 3.0, [0.5, 0.5]), (2, "a", 2.0, [0.25, 0.75]), (3, "b", 1.0, [1, 0])):
            telemetry.write({"step": step, "phase": phase, "loss": loss, "router/load": [load, load]})
        telemetry.write({"step": 3, "phase": "b", "eval/loss": 4.0})
    assert losses_by_phase(tmp_path) == {"a": [(1, 3.0), (2, 2.0)], "b": [(3, 1.0)]}
    last_two = expert_load(tmp_path, records=2)
    assert last_two == {"sparse layer 1": [0.625, 0.375], "sparse layer 2": [0.625, 0.375]}
    assert json.loads((tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()[0])["loss"] == 3.0
