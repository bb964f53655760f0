"""Train a system: a retriever, a generator, a gate, or all phases of one system in turn.

A run with a checkpoint in MODEL_DIR goes on from the newest one; another run never touches it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from expertrag_jax import launch, partitioning
from expertrag_jax.assembly import READER_VOCABULARY, RETRIEVER_VOCABULARY
from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import only_writer
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.files.writing import whole
from expertrag_jax.moe.collapse import CollapseAlarm
from expertrag_jax.ranges import Count, Natural, Positive, Seed, checked
from expertrag_jax.retrieval.manifest import read_manifest
from expertrag_jax.systems.description import describe
from expertrag_jax.systems.mark import Reached
from expertrag_jax.systems.system import Phase, System
from expertrag_jax.training import loop
from expertrag_jax.training.agreement import any_problem
from expertrag_jax.training.compilation import keep_programs
from expertrag_jax.training.early_stopping import EarlyStopping
from expertrag_jax.training.goodput import last_saved, read_summary
from expertrag_jax.training.interruption import Interrupted
from expertrag_jax.training.model_dir import CHECKPOINTS, LOGS, open_model_dir
from expertrag_jax.training.retention import Retention
from expertrag_jax.training.state import TrainState
from expertrag_jax.vocabulary import Vocabulary

SEVERAL_PROCESSES = True
FLAGS = {
    "--model_dir": ("MODEL_DIR", "folder of checkpoints, config.gin, vocabulary and logs"),
    "--initial_checkpoint": ("INITIAL_CHECKPOINT_PATH", "checkpoint to start from: a path, or a map"),
    "--profile_steps": ("profile_steps", "FIRST:END, steps to trace for XProf into MODEL_DIR/logs/profile, as 100:105"),
    "--compilation_cache_dir": ("compilation_cache_dir", "folder of compiled programs, for a faster next start"),
}
MACROS = (
    "MODEL_DIR", "INITIAL_CHECKPOINT_PATH", "TRAIN_STEPS", "BATCH_SIZE", "TASK_FEATURE_LENGTHS",
    "USE_CACHED_TASKS", "RANDOM_SEED", "EVAL_PERIOD", "EVAL_STEPS", "VOCABULARY", "INDEX_DIR", "NUM_PASSAGES",
    "DROPOUT_RATE", "Z_LOSS", "LABEL_SMOOTHING", "LOSS_NORMALIZING_FACTOR", "NUM_EXPERTS",
    "NUM_SELECTED_EXPERTS", "TRAIN_EXPERT_CAPACITY_FACTOR", "EVAL_EXPERT_CAPACITY_FACTOR", "AUX_LOSS_FACTOR",
    "ROUTER_Z_LOSS_FACTOR", "JITTER_NOISE", "RETRIEVAL_COST", "FUSION",
)  # fmt: skip
EXAMPLE = (
    "expertrag train --gin_file=runs/train.gin --gin_file=models/t5_tiny.gin --gin_file=systems/closed_book.gin "
    "--gin.VOCABULARY=vocabulary.model --gin.QUESTIONS=train.jsonl --gin.MODEL_DIR=runs/closed_book"
)


@checked
@dataclasses.dataclass(frozen=True)
class Stage:
    """A phase of the system, run under its own name on its own data; for the same loss on several data sets.

    Attributes:
      name: of the stage and of its data set.
      phase: name of the system's phase whose loss and trainable parameters it has.
      steps: length of this stage, or its upper bound if it has a mark; None: the phase's.
      optimizer: of this stage; None: the phase's. Its learning rate counts the stage's own steps.
      until: ends the stage before ``steps`` when a metric reaches a mark; None: the phase's.

    >>> from expertrag_jax.systems.mark import Reached
    >>> Stage("namesakes", "generator", steps=1500, until=Reached("sequence_accuracy", 0.95, over=40)).name
    'namesakes'
    """

    name: str
    phase: str
    steps: Natural | None = None
    optimizer: Callable[[], optax.GradientTransformation] | None = None
    until: Reached | None = None

    def of(self, phases: Sequence[Phase]) -> Phase:
        """The phase to run; UserError where the system has none of that name."""
        named = {phase.name: phase for phase in phases}
        if self.phase not in named:
            known = ", ".join(named)
            raise UserError(f"stage '{self.name}' is of the phase '{self.phase}'; there are {known}.")
        phase = named[self.phase]
        steps = phase.steps if self.steps is None else self.steps
        optimizer = self.optimizer or phase.optimizer
        return dataclasses.replace(
            phase, name=self.name, steps=steps, optimizer=optimizer, until=self.until or phase.until
        )


@checked
def train(
    model_dir: LocalPath,
    system: System,
    datasets: Mapping[str, loop.Dataset],
    vocabulary: LocalPath,
    task_feature_lengths: Mapping[str, Count],
    retriever_vocabulary: LocalPath | None = None,
    stages: Sequence[Stage] | None = None,
    mesh: Mesh | None = None,
    parameter_rules: partitioning.Rules = partitioning.PARAMETER_RULES,
    activation_rules: partitioning.Rules = partitioning.ACTIVATION_RULES,
    seed: Seed = 0,
    microbatches: Count = 1,
    checkpoint_period: Count = 1000,
    keep_checkpoints: Natural | Retention = 3,
    asynchronous_checkpoints: bool = True,
    log_period: Count = 50,
    initial_checkpoint: LocalPath | Mapping[str, LocalPath] | None = None,
    eval_datasets: Mapping[str, loop.Dataset] | None = None,
    eval_period: Count = 1000,
    eval_steps: Count = 20,
    early_stopping: EarlyStopping | None = None,
    num_passages: Count | None = None,
    index_dir: LocalPath | None = None,
    versions_dir: LocalPath | None = None,
    hang_seconds: Positive | None = 1800.0,
    hang_abort: bool = False,
    profile_steps: str | None = None,
    collapse_alarm: CollapseAlarm | None = None,
    compilation_cache_dir: LocalPath | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> TrainState:
    """Trains a system and leaves MODEL_DIR: ``checkpoints/``, ``config.gin``, ``vocabulary/``, ``logs/``.

    Args:
      model_dir: new, empty, or of this run, which then goes on.
      system: see ``systems``.
      datasets: by phase or stage, ``data.pipeline.Pipeline`` or anything that gives batches from a step on.
      vocabulary, retriever_vocabulary: model files of reader and retriever; None: the reader's.
      task_feature_lengths: of questions, answers, queries and passages; answering needs them again.
      stages: what to run in place of the system's phases.
      mesh: see ``partitioning.make_mesh``; None: all devices share the batch.
      parameter_rules, activation_rules: logical axes -> mesh axes, (name, axis or axes or None) each.
      seed, microbatches, checkpoint_period, keep_checkpoints, asynchronous_checkpoints, log_period,
        initial_checkpoint: see ``loop.train``.
      eval_datasets: by phase or stage, finite or not; the loss of its first ``eval_steps`` batches is logged
        every ``eval_period`` steps.
      early_stopping: ends the run where what ``eval_datasets`` gives no longer improves.
      num_passages, index_dir: what the generator was trained to read, noted for answering; a run goes on with an
        index of the same passages only.
      versions_dir: where passages that are embedded again become versions of the index (``candidates.Candidates``),
        noted for answering too.
      hang_seconds: after so long without a step, the stacks of all threads go to standard error and
        ``logs/hang_<step>.txt``; the start, first batches, compilation, checkpoints and evaluations may take four times
        as long. None: never.
      hang_abort: then the process also ends, with exit code 75; otherwise it goes on waiting.
      profile_steps: ``"100:105"`` traces the steps 100 to 104 for XProf, into ``logs/profile``.
      collapse_alarm: warns where most tokens go to few experts; None: over 200 steps, see ``moe.collapse``.
      compilation_cache_dir: keeps compiled programs for the next start, of other runs too; None: as JAX is set, by
        ``JAX_COMPILATION_CACHE_DIR``.
      progress: called with each log record in place of printing it.

    Raises:
      UserError: see ``loop.train``.
    """
    if compilation_cache_dir is not None:
        keep_programs(compilation_cache_dir)
    directory = open_model_dir(model_dir)
    reader, retriever = (Vocabulary.from_file(path) for path in (vocabulary, retriever_vocabulary or vocabulary))
    check_embeddings(system, reader, retriever)
    files = {
        "reader vocabulary": (READER_VOCABULARY, reader),
        "retriever vocabulary": (RETRIEVER_VOCABULARY, retriever),
    }
    phases = tuple(system.phases) if stages is None else tuple(stage.of(system.phases) for stage in stages)
    mesh = mesh or partitioning.make_mesh()
    first = jax.process_index() == 0
    told = first and progress is None
    run = partitioning.activation_rules(activation_rules)(loop.train)
    with only_training(directory), announced(directory, phases, mesh) if told else contextlib.nullcontext():
        state = run(
            system, datasets, directory, mesh=mesh, rules=parameter_rules, phases=phases, seed=seed,
            microbatches=microbatches, checkpoint_period=checkpoint_period, keep_checkpoints=keep_checkpoints,
            asynchronous_checkpoints=asynchronous_checkpoints,
            log_period=log_period, initial_checkpoint=initial_checkpoint,
            hooks=evaluation_hooks(system, phases, eval_datasets or {}, eval_period, eval_steps, mesh),
            early_stopping=early_stopping,
            metadata={
                "digests": {name: found.digest for name, (_, found) in files.items()} | corpus_digest(index_dir),
                "system": describe(system),
                "task_feature_lengths": dict(task_feature_lengths),
                "num_passages": num_passages,
                "index_dir": _absolute(index_dir),
                "versions_dir": _absolute(versions_dir),
            },
            progress=(progress or show) if first else None, hang_seconds=hang_seconds, hang_abort=hang_abort,
            profile_steps=profile_steps, collapse_alarm=collapse_alarm,
            begin=(lambda: keep_configuration(directory, files)) if first else None,
            started=launch.started("expertrag_jax.train"),
        )  # fmt: skip
    if told:
        print(f"trained {int(state.step)} steps: {directory / CHECKPOINTS / str(int(state.step))}", flush=True)
    return state


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def corpus_digest(index_dir: str | None) -> dict[str, str]:
    """``{"corpus": digest}`` of the passages in an index; empty where none is named or none is there yet."""
    if index_dir is None or not Path(index_dir).is_dir():
        return {}
    return {"corpus": read_manifest(index_dir).corpus_digest}


def check_embeddings(system: System, reader: Vocabulary, retriever: Vocabulary) -> None:
    """UserError where the system has fewer embeddings than its vocabulary has pieces (and DRO passages to name)."""
    towers = getattr(system, "config", None) or getattr(system, "retriever", None)
    identifiers = getattr(system, "num_candidates", 0)  # DRO's, behind the pieces
    readers = [(getattr(system, name, None), reader, identifiers) for name in ("model", "selector")]
    for config, vocabulary, more in (*readers, (towers, retriever, 0)):
        rows = getattr(config, "vocab_size", None)
        if rows is not None and rows < vocabulary.size + more:
            besides = f" and {more} identifiers of passages come behind them" if more else ""
            raise UserError(
                f"{vocabulary.path} has {vocabulary.size} pieces{besides}, and the {type(config).__name__} only {rows} "
                f"embeddings: set its vocab_size (or SENTINELS) to at least {vocabulary.size + more}."
            )


def keep_configuration(directory: Path, files: Mapping[str, tuple[str, Vocabulary]]) -> None:
    """Writes vocabularies and gin's operative configuration; what an earlier start wrote stays as it is.

    Where no checkpoint is, that start has trained nothing, and its vocabularies bind nobody.

    Raises:
      UserError: the directory holds checkpoints with another vocabulary.
    """
    trained = any(path.name.isdigit() for path in (directory / CHECKPOINTS).glob("*"))
    for name, (place, vocabulary) in files.items():
        path = directory / place
        if not path.exists() or not trained:
            vocabulary.save(path)
        elif Vocabulary.from_file(path).digest != vocabulary.digest:
            raise UserError(
                f"{path} is another {name} than {vocabulary.path}: use that one, or name another MODEL_DIR; "
                "nothing was changed."
            )
    text = gin.operative_config_str(max_line_length=110)
    if not text.strip():  # called from Python, not from gin
        return
    written = sorted(directory.glob("config*.gin")) if trained else []
    if not any(path.read_text(errors="replace") == text for path in written):
        name = "config.gin" if not written else f"config-{len(written)}.gin"
        with whole(directory / name) as file:
            file.write(text)


@contextlib.contextmanager
def only_training(directory: Path) -> Iterator[None]:
    """Keeps every other training out of MODEL_DIR; process 0 holds the lock for all.

    Raises:
      UserError: another job trains in it; in every process.
    """
    with contextlib.ExitStack() as held:
        problem = None
        if jax.process_index() == 0:
            try:
                held.enter_context(only_writer(directory, f"MODEL_DIR {directory}", inside=True))
            except UserError as error:
                problem = str(error)
        problem = any_problem(problem)
        if problem is not None:
            raise UserError(problem)
        yield


@contextlib.contextmanager
def announced(directory: Path, phases: Sequence[Phase], mesh: Mesh) -> Iterator[None]:
    """Says what will run and where its files are; when it has ended, by an error too, where the time went."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    plan = ", then ".join(_length(phase) for phase in phases)
    print(f"training {plan} on {axes}", flush=True)
    print(f"checkpoints {directory / CHECKPOINTS}; logs {directory / LOGS}", flush=True)
    before = last_saved(directory / LOGS)
    try:
        yield
    except Interrupted as stop:
        print(f"interrupted, saved at step {stop.step}: start again to go on")
        raise
    finally:
        if last_saved(directory / LOGS) != before:  # this start came so far as to count its time
            print(read_summary(directory / LOGS), flush=True)


def _length(phase: Phase) -> str:
    """The phase's name and steps, and its mark, if it has one."""
    if phase.until is None:
        return f"{phase.name} ({phase.steps} steps)"
    return f"{phase.name} (until {phase.until.metric} reaches {phase.until.value:g}, {phase.steps} steps at most)"


def show(record: Mapping[str, Any]) -> None:
    """One line per log record: place, losses, speed."""
    place = f"{record['phase']} step {record['step']}"
    skip = ("step", "phase", "phase_step", "seconds_per_step", "tokens_per_second", "goodput", "wall_seconds")
    told = {name: value for name, value in record.items() if name not in skip and isinstance(value, float)}
    numbers = [f"{name} {value:.4g}" for name, value in told.items()]
    print(f"  {place}: {', '.join(numbers)}", flush=True)


def evaluation_hooks(
    system: System,
    phases: Sequence[Phase],
    eval_datasets: Mapping[str, loop.Dataset],
    period: int,
    steps: int,
    mesh: Mesh,
) -> list[loop.Hook]:
    """Hooks that log the evaluation loss of the phases that have a data set for it."""
    unknown = sorted(set(eval_datasets) - {phase.name for phase in phases})
    if unknown:
        known = ", ".join(phase.name for phase in phases)
        raise UserError(f"eval_datasets has {', '.join(unknown)}; the phases are {known}.")
    measures = {
        phase.name: evaluation(system, phase, eval_datasets[phase.name], steps, mesh)
        for phase in phases
        if phase.name in eval_datasets
    }
    checks = {name: getattr(dataset, "check", lambda: None) for name, dataset in eval_datasets.items()}
    return [loop.Hook("eval", period, measure, name, checks[name]) for name, measure in measures.items()]


def evaluation(
    system: System, phase: Phase, dataset: loop.Dataset, steps: int, mesh: Mesh
) -> Callable[[Any, int], dict[str, float]]:
    """``(params, step) -> {"loss": ...}`` over the data set's first batches.

    Batches are prepared as the phase's own are. A system without an ``evaluation_loss`` is measured with its training
    loss, dropout included.
    """
    without_noise = getattr(system, "evaluation_loss", None)

    # Each process reads all of the metrics, so each has all of them, whatever the layout of what they are made from.
    @functools.partial(jax.jit, out_shardings=partitioning.replicated(mesh))
    def batch_metrics(params, batch):
        if without_noise is not None:
            return without_noise(params, batch)[1]
        return phase.loss(params, batch, jax.random.PRNGKey(0))[1]

    def measure(params: Any, step: int) -> dict[str, float]:
        del step
        totals: dict[str, np.ndarray] = {}
        for batch in itertools.islice(dataset(0), steps):
            batch = batch if phase.prepare is None else phase.prepare(params, batch)
            found = jax.device_get(batch_metrics(params, partitioning.global_batch(batch, mesh)))
            for name, (total, count) in found.items():
                if np.ndim(total) == 0:
                    totals[name] = totals.get(name, 0.0) + np.array([total, count], np.float64)
        return {name: total / max(count, 1e-9) for name, (total, count) in totals.items()}

    return measure


if __name__ == "__main__":
    launch.run("expertrag_jax.train")
