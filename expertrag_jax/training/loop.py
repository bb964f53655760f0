"""The training run: open, resume or start, go through the phases, and leave a checkpoint behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from expertrag_jax import partitioning
from expertrag_jax.errors import UserError
from expertrag_jax.moe.collapse import CollapseAlarm
from expertrag_jax.systems.description import other_architecture
from expertrag_jax.systems.system import Phase, System
from expertrag_jax.training import phases as phases_lib
from expertrag_jax.training.ahead import Ahead, Program, key
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.early_stopping import EarlyStopping, Patience
from expertrag_jax.training.hang import Watchdog
from expertrag_jax.training.integrity import Damaged
from expertrag_jax.training.interruption import Interrupted, Interruption
from expertrag_jax.training.mastery import Mastery, Missed, summary
from expertrag_jax.training.model_dir import CHECKPOINTS, LOGS, open_model_dir
from expertrag_jax.training.nonfinite import Watch
from expertrag_jax.training.pretrained import start_from
from expertrag_jax.training.profile import Profile
from expertrag_jax.training.retention import Retention
from expertrag_jax.training.state import Layout, TrainState
from expertrag_jax.training.step import TrainStep, make_train_step
from expertrag_jax.training.telemetry import Progress, Telemetry

Dataset = Callable[[int], Iterator[Any]]  # position in the phase -> the batches from there on


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something to measure during training.

    Attributes:
      name: its results are logged as ``name/<metric>``.
      period: in steps of the run; it also runs after the last step of each phase.
      measure: ``(params, step) -> {metric: number}``.
      phase: only in the phase of this name; None: in all.
      check: called before the first step; raises where there will be nothing to measure.
    """

    name: str
    period: int
    measure: Callable[[Any, int], Mapping[str, float]]
    phase: str | None = None
    check: Callable[[], None] = lambda: None


def train(
    system: System,
    datasets: Mapping[str, Dataset],
    model_dir: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: partitioning.Rules = partitioning.PARAMETER_RULES,
    phases: Sequence[Phase] | None = None,
    seed: int = 0,
    microbatches: int = 1,
    checkpoint_period: int = 1000,
    keep_checkpoints: int | Retention = 3,
    asynchronous_checkpoints: bool = True,
    log_period: int = 100,
    hooks: Sequence[Hook] = (),
    early_stopping: EarlyStopping | None = None,
    initial_checkpoint: str | Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    hang_seconds: float | None = 1800.0,
    hang_abort: bool = False,
    profile_steps: str | None = None,
    collapse_alarm: CollapseAlarm | None = None,
    started: float | None = None,
    begin: Callable[[], None] | None = None,
) -> TrainState:
    """Trains a system through its phases; a MODEL_DIR with a checkpoint is resumed from the newest one.

    A run that was killed and resumed ends with the same parameters, bit for bit, as one that was not, on the
    same mesh and with data sets that give the same batches from a position on.

    Args:
      system: see ``systems.system.System``.
      datasets: phase name -> ``(start_step) -> iterator`` of this process's rows, any pytree of arrays with a
        leading batch axis; batches of a phase may have several shapes. One with a method ``check()`` is asked, before
        the first step, whether it can serve; one with ``example_batches(start_step)``, for a batch of each shape to
        come: their programs are compiled while the first ones train.
      model_dir: new, empty, or a model directory.
      mesh: default: all devices on the axis ``data``. rules: parameters' logical axes -> mesh axes.
      phases: default: the system's.
      seed: of initial parameters and of each step's random numbers.
      microbatches: see ``step.make_train_step``.
      checkpoint_period, log_period: in steps of the run. A checkpoint is also written after each phase and on
        SIGTERM. A log line averages the steps since the last one or since the restart, so a resumed run logs
        the same lines if the second divides the first.
      keep_checkpoints: the newest so many, or see ``retention.Retention``.
      asynchronous_checkpoints: written while training goes on; see ``checkpoint.Checkpoints``.
      early_stopping: ends the run by what the hooks measure; None: it goes on to the last step.
      initial_checkpoint: for a run that starts: see ``pretrained.start_from``.
      metadata: JSON for the checkpoint; what stands in ``metadata["digests"]`` (vocabularies, corpus) must be
        the same when the run is resumed.
      progress: called with each record that is logged.
      hang_seconds, hang_abort: see ``hang.Watchdog``. profile_steps: see ``profile.Profile``. started: see
        ``goodput.Goodput``. collapse_alarm: of experts; None: with its own defaults.
      begin: called when the state and the data are known to be good, before the first step.
    Returns:
      The state after the last phase.
    Raises:
      UserError: bad configuration or checkpoint.
      Missed: a phase took all its steps without reaching its mark, and the mark says to stop; the state is saved.
      NonFiniteLoss: see there.
      Interrupted: after SIGTERM, when the state is saved; it is a SystemExit with code 0.
    """
    mesh = mesh or partitioning.make_mesh()
    phases = tuple(system.phases if phases is None else phases)
    model_dir = open_model_dir(model_dir)
    checkpoints = Checkpoints(model_dir / CHECKPOINTS, keep_checkpoints, asynchronous_checkpoints)
    telemetry = Telemetry(model_dir / LOGS, progress, started)
    watchdog = Watchdog(model_dir / LOGS, telemetry, hang_seconds, hang_abort)
    profile, ahead = Profile(model_dir / LOGS, profile_steps), Ahead()
    with jax.set_mesh(mesh), Interruption() as interruption, checkpoints, telemetry, ahead, watchdog, profile:
        with telemetry.lost("startup"):
            layout = Layout(system, mesh, rules)
            phases_lib.check(phases, datasets, layout.shapes)
            facts = {"seed": seed, "digests": {}, **(metadata or {})}
            stored: Mapping[str, Any] = {}
            if checkpoints.latest is not None:
                state = checkpoints.newest_whole(lambda step: resume(checkpoints, step, phases, layout, facts))
                stored = checkpoints.metadata(int(state.step))
            else:
                params = layout.initial_params(system, seed)
                params = start_from(initial_checkpoint, params) if initial_checkpoint else params
                state = phases_lib.enter(params, 0, 0, phases[0], layout)
            patience, mastery = Patience(early_stopping, stored.get("early_stopping")), Mastery(stored.get("mastery"))
        with telemetry.lost("data", doing="first batch"):
            phases_lib.check_data(phases_lib.to_come(phases, state, mastery), datasets, hooks)
        if begin is not None:
            begin()
        telemetry.resume(int(state.step))
        run = Run(
            phases, datasets, layout, checkpoints, telemetry, interruption, Watch(model_dir / LOGS), profile, ahead,
            tuple(hooks), patience, mastery, facts, seed, microbatches, checkpoint_period, log_period,
            collapse_alarm or CollapseAlarm(),
        )  # fmt: skip
        for index in range(int(state.phase), len(phases)):
            if patience.skips(phases[index].name) or mastery.finished(phases[index].name):
                continue
            if int(state.phase) != index:
                with telemetry.lost("startup"):
                    state = phases_lib.enter(state.params, int(state.step), index, phases[index], layout)
            state = run.phase(state, index)
        run.wait()
        return state


def resume(
    checkpoints: Checkpoints, step: int, phases: Sequence[Phase], layout: Layout, facts: Mapping[str, Any]
) -> TrainState:
    """A checkpoint's state on this run's mesh.

    Raises:
      UserError: it is of another seed, vocabulary, architecture, phase or shape.
      Damaged: it is not what was saved.
    """
    stored = checkpoints.metadata(step)
    missing = [name for name in ("seed", "digests", "phase") if name not in stored]
    if missing:
        raise UserError(
            f"The checkpoint at step {step} does not say its {' and '.join(missing)}, so no training can resume from "
            "it: name another MODEL_DIR, or start from it with INITIAL_CHECKPOINT_PATH."
        )
    if stored["seed"] != facts["seed"]:
        raise UserError(
            f"The checkpoint at step {step} is of a run with seed {stored['seed']}, and this one has "
            f"{facts['seed']}: set RANDOM_SEED to {stored['seed']}, or name another MODEL_DIR."
        )
    for name, digest in facts["digests"].items():
        if stored["digests"].get(name, digest) != digest:
            raise UserError(
                f"The checkpoint at step {step} was trained with another {name} (SHA-256 "
                f"{stored['digests'][name][:12]}..., now {digest[:12]}...): use that one, or another "
                "MODEL_DIR."
            )
    if stored.get("system") and facts.get("system"):
        difference = other_architecture(stored["system"], facts["system"])
        if difference:
            raise UserError(
                f"The checkpoint at step {step} is of another architecture: {difference}; set it back, or name another "
                "MODEL_DIR."
            )
    index = phases_lib.locate(phases, stored["phase"])
    state = checkpoints.restore(step, layout.abstract_state(phases[index]))
    place = partitioning.replicated(layout.mesh)
    return state.replace(phase=jax.device_put(jax.numpy.int32(index), place))


@dataclasses.dataclass
class Run:
    """What the steps of a run share."""

    phases: tuple[Phase, ...]
    datasets: Mapping[str, Dataset]
    layout: Layout
    checkpoints: Checkpoints
    telemetry: Telemetry
    interruption: Interruption
    watch: Watch
    profile: Profile
    ahead: Ahead
    hooks: tuple[Hook, ...]
    patience: Patience
    mastery: Mastery
    facts: Mapping[str, Any]
    seed: int
    microbatches: int
    checkpoint_period: int
    log_period: int
    alarm: CollapseAlarm
    steps: list[tuple[tuple, TrainStep]] = dataclasses.field(default_factory=list)  # made so far, by what made them

    def phase(self, state: TrainState, index: int) -> TrainState:
        """The remaining steps of a phase, and its retries.

        Raises:
          Interrupted: see ``train``.
          Missed: the phase took all its steps without reaching its mark, and the mark says to stop.
        """
        phase = self.phases[index]
        mark, start = phase.until, self.mastery.start
        if mark is None and int(state.phase_step) >= phase.steps:  # a checkpoint of its end was resumed
            return state
        if mark is not None and mark.if_missed == "retry" and start is None:
            self.mastery.start = start = int(state.step)
            self.save(state, phase, int(state.phase_step))
        self.checkpoints.hold(start)
        while True:
            state, stop = self.attempt(state, phase)
            phase_step = int(state.phase_step)
            if self.mastery.retries(mark, phase_step) and not self.patience.skips(phase.name):
                state = self.retry(state, index)
                continue
            missed = self.conclude(phase, phase_step)
            self.save(state, phase, phase_step)
            self.checkpoints.hold(None)
            if stop or missed:
                self.wait()
                raise missed or Interrupted(int(state.step))
            return state

    def attempt(self, state: TrainState, phase: Phase) -> tuple[TrainState, bool]:
        """Steps until the phase is over, and whether the run is to stop then.

        The device is one step ahead of everything that is looked at.
        """
        step, first = int(state.step), int(state.phase_step)
        train_step = self.profile.of(self.compiled_step(phase, state), step)
        with self.telemetry.lost("data", doing="first batch"):
            position = first + self.mastery.attempt * phase.steps  # a retry reads on
            batches = self.datasets[phase.name](position) if first < phase.steps else iter(())
        for phase_step in range(first + 1, phase.steps + 1):
            batch = self.next_batch(batches, phase, state.params, phase_step, phase_step == first + 1)
            state, metrics = train_step(state, batch)
            step += 1
            self.telemetry.count(batch)
            self.watch.add(step, metrics, batch)
            last = phase_step == phase.steps
            if step % self.log_period == 0 or last:
                last = self.log(step, phase, phase_step) or last
            self.run_hooks(state, step, phase, last)
            last = last or self.patience.skips(phase.name)
            stop = self.interruption.requested(step)
            if last:
                return state, stop
            if step % self.checkpoint_period == 0 or stop:
                self.save(state, phase, phase_step)
            if stop:
                self.wait()
                raise Interrupted(step)
        return state, False

    def log(self, step: int, phase: Phase, phase_step: int) -> bool:
        """Logs the steps since the last record; whether the phase has reached its mark."""
        metrics = self.watch.take()
        record = self.telemetry.log(step, phase.name, phase_step, metrics)
        for warning in self.alarm.observe(record):
            logging.warning("%s", warning)
        self.mastery.add(phase.until, metrics)
        return self.mastery.reached(phase.until, phase_step)

    def retry(self, state: TrainState, index: int) -> TrainState:
        """The phase's first parameters again; steps, data and random numbers go on from where they are."""
        phase, start, step = self.phases[index], self.mastery.start, int(state.step)
        record = self.mastery.retry(phase.name, phase.until, int(state.phase_step))
        logging.warning("%s It starts again from step %d.", summary(record), start)
        with self.telemetry.lost("startup"):
            self.wait()
            return phases_lib.enter(self.first_parameters(phase), step, index, phase, self.layout)

    def first_parameters(self, phase: Phase) -> Any:
        """The parameters with which the current phase began; UserError if their checkpoint is damaged."""
        start = self.mastery.start
        try:
            of = self.phases[phases_lib.locate(self.phases, self.checkpoints.metadata(start)["phase"])]
            return self.checkpoints.restore(start, self.layout.abstract_state(of)).params
        except Damaged as error:
            raise UserError(
                f"Phase '{phase.name}' cannot start again: its first checkpoint, at step {start}, is damaged "
                f"({error}); "
                'set if_missed to "continue", or train in another MODEL_DIR.'
            ) from error

    def conclude(self, phase: Phase, phase_step: int) -> Missed | None:
        """Records how a phase with a mark ended; the error that is to end the run, if any."""
        mark = phase.until
        if mark is None or self.patience.skips(phase.name):
            self.mastery.leave()
            return None
        if mark.if_missed == "stop" and not self.mastery.reached(mark, phase_step):
            record = self.mastery.judge(phase.name, mark, phase_step)
            return Missed(
                f"{summary(record)} The run stops here, as its mark says: give the phase more steps and start again to "
                'resume it, change what it trains with in another MODEL_DIR, or set if_missed to "continue" or "retry".'
            )
        record = self.mastery.end(phase.name, mark, phase_step)
        figures = {f"mastery/{name}": float(record[name]) for name in ("mark", "steps", "attempts", "reached")}
        figures |= {} if record["value"] is None else {"mastery/value": record["value"]}
        place = {"step": self.telemetry.step, "phase": phase.name, "phase_step": phase_step}
        self.telemetry.write(place | figures | {"mastery/metric": record["metric"]})
        (logging.info if record["reached"] else logging.warning)("%s", summary(record))
        return None

    def compiled_step(self, phase: Phase, state: TrainState) -> TrainStep:
        """The phase's step on this process's rows; seconds of waiting for a program are counted as lost."""
        step, seen = self.train_step(phase), set()
        with self.telemetry.lost("data", doing="first batch"):
            self.ahead.begin(self.programs(phase, state), self.layout.mesh)

        def run(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
            name = key(step, batch)
            arrays = partitioning.global_batch(batch, self.layout.mesh)
            if name in seen:
                return step(state, arrays)
            seen.add(name)
            with self.telemetry.lost("compile"):
                self.ahead.wait(name)
                return step(state, arrays)

        return run

    def programs(self, phase: Phase, state: TrainState) -> Iterator[Program]:
        """What the phase will need, and after it the phases that have the same loss, as the stages of one phase do."""
        first, index = int(state.phase_step), self.phases.index(phase)
        for later in self.phases[index:]:
            if later.loss != phase.loss:
                return
            like = state if later is phase else self.layout.abstract_state(later)
            for batch in self.example_batches(later, first if later is phase else 0):
                yield Program(self.train_step(later), like, batch)

    def example_batches(self, phase: Phase, first: int) -> Sequence[Any]:
        """A batch of each shape to come, where the data can tell and compiling beside the steps is safe.

        It is not where the host changes batches (``prepare``), where several processes would have to compile in the
        same order, and on a GPU, whose compiler tries kernels out in the memory that the steps use.
        """
        tell = getattr(self.datasets[phase.name], "example_batches", None)
        alone = jax.process_count() == 1 and self.layout.mesh.devices.flat[0].platform != "gpu"
        if tell is None or phase.prepare is not None or not alone or first >= phase.steps:
            return []
        return tell(first)

    def train_step(self, phase: Phase) -> TrainStep:
        """The phase's step; phases that differ in name, steps and data alone share it, and are compiled once."""
        made_of = (phase.loss, phase.optimizer, phase.trainable)
        for known, step in self.steps:
            if known == made_of:
                return step
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.layout.abstract_state(phase))
        step = make_train_step(
            phase.loss, phase.make_optimizer(), phase.trainable,
            microbatches=self.microbatches, seed=self.seed, state_shardings=shardings,
        )  # fmt: skip
        self.steps.append((made_of, step))
        return step

    def next_batch(self, batches: Iterator[Any], phase: Phase, params: Any, phase_step: int, first: bool) -> Any:
        """The next batch, prepared on the host; UserError where the data ends before the phase does."""
        with self.telemetry.lost("data", unless=self.watch.busy, doing="first batch" if first else None):
            batch = next(batches, None)
            if batch is None:
                raise UserError(
                    f"The data of phase '{phase.name}' ended before step {phase_step} of {phase.steps}: repeat "
                    "it, or train fewer steps."
                )
            return batch if phase.prepare is None else phase.prepare(params, batch)

    def run_hooks(self, state: TrainState, step: int, phase: Phase, last: bool) -> None:
        """Measures what is due, and logs it."""
        for hook in self.hooks:
            if hook.phase in (None, phase.name) and (last or step % hook.period == 0):
                self.watch.settle()
                with self.telemetry.lost("evaluation"):
                    figures = hook.measure(state.params, step)
                named = {f"{hook.name}/{key}": float(value) for key, value in figures.items()}
                self.telemetry.write({"step": step, "phase": phase.name} | named)
                self.patience.add(step, phase.name, named)

    def save(self, state: TrainState, phase: Phase, phase_step: int) -> None:
        """Writes a checkpoint of a state that is known to be good."""
        step = int(state.step)
        self.watch.settle()
        if phase.before_checkpoint is not None:
            with self.telemetry.lost("data", doing="before checkpoint"):
                phase.before_checkpoint(state.params)
        with self.telemetry.lost("checkpoint"):
            place = {"phase": phase.name, "phase_step": phase_step, "mesh": dict(self.layout.mesh.shape)}
            place["early_stopping"] = self.patience.as_json()
            place["best_step"] = self.patience.best_for(phase.name)
            place["mastery"] = self.mastery.as_json(phase.until, self.watch.pending())
            self.checkpoints.save(step, state, {**self.facts, **place}, self.telemetry.logged(step))

    def wait(self) -> None:
        """Returns when the checkpoints are on disk."""
        with self.telemetry.lost("checkpoint"):
            self.checkpoints.wait()
