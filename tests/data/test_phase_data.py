"""One data set for the phases of a system."""

import itertools
import types

from expertrag_jax.data.phase_data import PhaseData


def test_phases_go_on_where_the_last_one_ended():
    phases = [types.SimpleNamespace(name=name, steps=steps) for name, steps in (("warm", 3), ("e_1", 2), ("m_1", 4))]
    system = types.SimpleNamespace(phases=phases)
    first = {name: next(data(5)) for name, data in PhaseData(itertools.count, system).items()}
    assert first == {"warm": 5, "e_1": 8, "m_1": 10}
    measured = PhaseData(itertools.count, system, "m_.*|e_.*", go_on=False)
    assert len(measured) == 2 and "warm" not in measured and {next(data(0)) for data in measured.values()} == {0}


def test_what_the_phases_share_is_checked_once():
    checked = []

    class Checked:
        def __call__(self, start):
            return itertools.count(start)

        def check(self):
            checked.append(self)

    phases = [types.SimpleNamespace(name=name, steps=3) for name in ("e_1", "m_1")]
    for data in PhaseData(Checked(), types.SimpleNamespace(phases=phases)).values():
        data.check()
    assert len(checked) == 1
