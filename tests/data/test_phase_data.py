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
