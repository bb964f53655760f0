"""Programs for the shapes to come are compiled in another thread, once, and compute the same."""

import dataclasses
import logging
import threading

import jax
import numpy as np
import pytest

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import loop, optimizer


class Told:
    """The toy's batches of two shapes, and what a data set tells of them."""

    def __init__(self, toy):
        self.toy = toy

    def __call__(self, start):
        return self.toy.data(start)

    def example_batches(self, start_step=0):
        return [self.toy.rows(0, 16), self.toy.rows(1, 8), self.toy.rows(2, 16)]


@pytest.fixture
def trained(toy, tmp_path, caplog):
    """(end, threads that traced the loss, programs of the step) of a run over a data set."""

    def run(name, data, rules=partitioning.ACTIVATION_RULES, more=(), **options):
        traced = []

        def loss(params, batch, rng):
            assert partitioning._activation_rules.get() == rules
            traced.append((batch["x"].shape[0], threading.current_thread() is threading.main_thread()))
            return toy.loss(params, batch, rng)

        phase = Phase("body", 6, loss, toy.Toy().phases[0].optimizer)
        options = {"mesh": partitioning.make_mesh(devices=jax.devices()[:1])} | options
        caplog.clear()
        jax.config.update("jax_log_compiles", True)  # in every thread, which jax.log_compiles() would not
        try:
            with caplog.at_level(logging.WARNING), partitioning.activation_rules(rules):
                phases = [phase, *(dataclasses.replace(phase, **changes) for changes in more)]
                datasets = dict.fromkeys([phase.name for phase in phases], data)
                state = loop.train(toy.Toy(), datasets, tmp_path / name, phases=phases, **options)
        finally:
            jax.config.update("jax_log_compiles", False)
        programs = [record for record in caplog.records if "Finished XLA compilation of jit(step)" in record.message]
        return jax.device_get(state), traced, len(programs)

    return run


def test_shapes_to_come_are_compiled_once_in_another_thread(trained, toy):
    told, traced, programs = trained("told", Told(toy))
    plain, plainly_traced, plain_programs = trained("plain", toy.data)
    assert traced == [(16, False), (8, False)] and plainly_traced == [(16, True), (8, True)]
    assert programs == plain_programs == 2
    jax.tree.map(np.testing.assert_array_equal, told, plain)


def test_later_stages_of_the_same_loss_are_compiled_while_the_first_one_trains(trained, toy):
    later = {"name": "later", "optimizer": lambda: optimizer.adafactor(0.01, min_dim_size_to_factor=4)}
    shared = {"name": "shared"}  # the first stage's optimizer, so the first stage's programs
    told, traced, programs = trained("told", Told(toy), more=(later, shared))
    plain, _, plain_programs = trained("plain", toy.data, more=(later, shared))
    assert traced == [(16, False), (8, False)] * 2 and programs == plain_programs == 4
    jax.tree.map(np.testing.assert_array_equal, told, plain)


def test_one_shape_is_compiled_where_it_is_used(trained, toy):
    one = Told(toy)
    one.example_batches = lambda start_step=0: [toy.rows(0, 16), toy.rows(2, 16)]
    _, traced, programs = trained("one", one)
    assert traced == [(16, True), (8, True)] and programs == 2


def test_the_other_thread_knows_mesh_and_activation_rules(trained, toy):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, tensor=2), devices=jax.devices()[:4])
    rules = (("batch", "data"), ("mlp", None))
    told, traced, programs = trained("told", Told(toy), rules, mesh=mesh)
    plain, _, _ = trained("plain", toy.data, rules, mesh=mesh)
    assert [main for _, main in traced] == [False, False] and programs == 2
    jax.tree.map(np.testing.assert_array_equal, told, plain)


def test_what_cannot_be_compiled_fails_when_its_turn_comes(trained, toy):
    class Wrong(Told):
        def __call__(self, start):
            batches = self.toy.data(start)
            yield next(batches)
            yield {**next(batches), "y": np.zeros((8, 3), np.float32)}

        def example_batches(self, start_step=0):
            return list(self(0))

    with pytest.raises(TypeError, match="broadcast|shapes"):
        trained("wrong", Wrong(toy))


def test_a_run_that_fails_leaves_no_thread_behind(trained, toy):
    class Ended(Told):
        def __call__(self, start):
            return iter(())

        def example_batches(self, start_step=0):
            return [self.toy.rows(0, size) for size in range(8, 200, 8)]

    with pytest.raises(UserError, match="ended before step 1"):
        trained("ended", Ended(toy))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("compile")]
