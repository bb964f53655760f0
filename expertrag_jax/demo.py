"""The main job, from nothing to a report: a generated world, a retriever, an index, ExpertRAG, its gate, an export.

Every step is one that a user's own job takes, by the same functions: ``train``, ``build_index``, ``export``, ``infer``.
A run that was stopped goes on where it was: what is trained, indexed and generated is not made again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from expertrag_jax import comparison, gate_training, launch
from expertrag_jax.assembly import tokenise_answers
from expertrag_jax.data.interleave import Batches, Weighted, interleave
from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.demo_folder import check_folder, recipe
from expertrag_jax.errors import QualityMissed, UserError
from expertrag_jax.evaluation.answers import exact_match
from expertrag_jax.evaluation.checks import almanac_checks, missed_quality
from expertrag_jax.evaluation.report import EditionResult, build_report, write_report
from expertrag_jax.evaluation.table import print_report
from expertrag_jax.export import export
from expertrag_jax.files.lock import one_writer
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.index import build_index
from expertrag_jax.infer import infer
from expertrag_jax.ranges import Count, Fraction, Natural, Seed, Weight, checked
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.service import Service, service_from_model
from expertrag_jax.stages import Stages, quiet
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.systems.mark import Reached
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.train import Stage, train
from expertrag_jax.trained_model import open_model
from expertrag_jax.training.log import expert_load, losses_by_phase, missed_marks
from expertrag_jax.training.phases import check_steps
from expertrag_jax.training.pretrained import save_parameters
from expertrag_jax.vocabulary import Vocabulary, train_vocabulary
from tasks.almanac import AlmanacConfig, World
from tasks.almanac.builder import VERSION, prepare
from tasks.almanac.demo_world import world_name
from tasks.almanac.phrasing import RELATIONS
from tasks.almanac.read import read_split
from tasks.almanac_tasks import register_almanac

FLAGS = {"--model_dir": ("model_dir", "folder of everything that the run writes")}
MACROS = ("MODEL_DIR", "RANDOM_SEED", "NUM_PASSAGES", "NUM_EXPERTS", "RETRIEVAL_COST")
EXAMPLE = "expertrag demo --gin_file=runs/almanac.gin --gin.MODEL_DIR=runs/almanac"
EDITIONS = ("1", "2")
NUM_STAGES = 12
MODEL_DIRS = ("retriever", "generator", "model")


@checked
@dataclasses.dataclass(frozen=True)
class Lesson:
    """Batches of ``batch_size`` from the almanac's lesson ``name``: a stage of the reader's curriculum, or practice.

    Attributes:
      length: P, tokens of question and passage.
      weight: of an answer's token in the loss, where one of a closed-book answer has 1. Felt where batches of both
        take turns, and where the loss is divided by a constant (``loss_normalizing_factor``).
      steps: length of the stage, or its upper bound if it has a mark; None for practice, which lasts to the end.
      until: ends the stage when the reader has learned it; None: it takes all its steps.
    """

    name: str
    batch_size: Count
    length: Count
    weight: Weight = 1.0
    steps: Natural | None = None
    until: Reached | None = None


@checked
@dataclasses.dataclass(frozen=True)
class Schedule:
    """What the generator reads and remembers, in which order.

    Attributes:
      lessons: open book only, one after the other, each a stage of its own.
      practice: lessons that are never over: to the end, their batches take turns with one another and with
        closed-book ones.
      closed_book_batch: questions in these.
      closed_book_share: how many of them to a batch of each practised lesson.
      lesson_optimizer: makes the optimizer of each lesson, whose learning rate counts the lesson's own steps; None
        uses the generator's.
    """

    lessons: Sequence[Lesson]
    practice: Sequence[Lesson]
    closed_book_batch: Count
    closed_book_share: Count
    lesson_optimizer: Callable[[], optax.GradientTransformation] | None = None


@checked
@dataclasses.dataclass(frozen=True)
class Measuring:
    """How much is measured.

    Attributes:
      throughput_questions: per timed run of a policy. rounds: runs of each, for either edition.
      latency_questions: asked one at a time. exported_questions: answered with the export.
      buckets: of answering, see ``Answerer``; close enough together that what is left at a stream's end wastes little
        padding. exported_buckets: of the export.
    """

    throughput_questions: Count = 384
    rounds: tuple[Count, Count] = (5, 3)
    latency_questions: Count = 60
    exported_questions: Count = 256
    buckets: tuple[Count, ...] = (1, 32, 64)
    exported_buckets: tuple[Count, ...] = (1, 64)


@dataclasses.dataclass
class Demo:
    """What the stages share; ``lengths`` are SeqIO's: inputs, targets, query, passages (the reader's input)."""

    directory: Path
    world: World
    retriever: DualEncoder
    system: ExpertRAG
    schedule: Schedule
    measuring: Measuring
    lengths: dict[str, int]
    passage_length: int
    retriever_batch: int
    gate_batch: int
    num_passages: int
    retrieval_budget: float
    seed: int
    stages: Stages

    @property
    def vocabulary_path(self) -> str:
        """The one vocabulary of reader and retriever."""
        return str(self.directory / "vocabulary.model")

    def index_dir(self, edition: str) -> str:
        """Where the index of an edition of the corpus lies."""
        return str(self.directory / f"index_{edition}")


@checked
@one_writer(lambda given: given["model_dir"], "MODEL_DIR")
def demo(
    model_dir: LocalPath,
    world: AlmanacConfig,
    retriever: DualEncoder,
    system: ExpertRAG,
    schedule: Schedule,
    measuring: Measuring,
    task_feature_lengths: dict[str, Count],
    passage_length: Count = 64,
    vocabulary_size: Count = 1600,
    retriever_batch: Count = 128,
    gate_batch: Count = 256,
    num_passages: Count = 4,
    retrieval_budget: Fraction = 1.0,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Runs the almanac: trains, gates, evaluates on two editions of the corpus, exports, answers.

    Args:
      model_dir: everything goes below it; ``report.html`` and ``report.json`` at the end.
      world: size and seed of the world. retriever, system: what is trained on it.
      schedule: of the generator. measuring: of the evaluation.
      task_feature_lengths: of ``inputs`` (questions), ``targets``, ``query`` and ``passages`` (the reader's input).
      passage_length: tokens of an article in the index. vocabulary_size: pieces at most.
      retriever_batch, gate_batch: batch sizes. num_passages: K. seed: of training and measuring.
      retrieval_budget: highest fraction of the validation questions that may retrieve.
    Returns:
      The report, as in ``report.json``.
    Raises:
      UserError: a setting is impossible, or ``model_dir`` holds another run.
      QualityMissed: everything is written, but a promise on quality was missed (see ``evaluation.checks``).
    """
    directory = Path(model_dir)
    if system.gate_objective != "utility":
        raise UserError("the demo measures losses of both arms, which are no labels: set gate_objective = 'utility'.")
    check_steps((*retriever.phases, *system.phases))
    generated = World(world)  # refuses impossible sizes before anything is written
    recipe_digest = recipe(system, retriever, schedule, task_feature_lengths)
    check_folder(directory, world_name(world.digest, VERSION), seed, recipe_digest)
    # Stages compile the same programs again, and so does a run that goes on.
    jax.config.update("jax_compilation_cache_dir", str(directory / "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    stages = Stages(NUM_STAGES)
    run = Demo(
        directory, generated, retriever, system, schedule, measuring, dict(task_feature_lengths), passage_length,
        retriever_batch, gate_batch, num_passages, retrieval_budget, seed, stages,
    )
    tasks = generate(run, world, vocabulary_size)
    train_retriever(run, tasks)
    index_editions(run)
    train_generator(run, tasks)
    service = train_gate(run, world)
    results = {edition: evaluate_edition(run, world, service, edition) for edition in EDITIONS}
    export_and_answer(run, world, service)
    report = build_report(
        results, stages.wall_seconds, title="ExpertRAG on the almanac", seed=seed, stages=stages.seconds,
        losses={phase: found for path in MODEL_DIRS for phase, found in losses_by_phase(directory / path).items()},
        expert_load=expert_load(directory / "generator"), settings=settings(run, world),
        notes=[*NOTES, compared(results)], checks=almanac_checks,
    )
    page = write_report(report, directory)
    print_report(report)
    print(f"report: {page}", flush=True)
    if missed := missed_quality(report["checks"], missed_marks(directory / "generator")):
        raise QualityMissed(missed)
    return report


NOTES = (
    "Exact match after SQuAD's normalisation; intervals resample facts.",
    "Speeds are medians of runs taken in turn on the machine named above, gate and search included.",
)


def compared(results: dict[str, EditionResult]) -> str:
    """What the timed runs of every policy found beside their time."""
    counts = ", ".join(f"{result.differing} on edition {edition}" for edition, result in results.items())
    return (
        "Answers of random, gate and oracle are those of the two arms. The timed runs compared theirs with them; "
        f"answers changed by splitting a batch: {counts}."
    )


def generate(run: Demo, world: AlmanacConfig, vocabulary_size: int) -> dict[str, Any]:
    """The world as TFDS splits, the corpus's editions as TSV, and the vocabulary; returns the SeqIO tasks."""
    with run.stages.stage("generate the world") as advance:
        prepare(world, run.directory / "world", progress=False)
        for edition in (0, 1, 2):
            run.world.write_corpus_tsv(run.directory / f"corpus_{edition}.tsv", edition)
        advance(note=f"{world.num_entities} entities, {world.num_training_questions} training questions")
    with run.stages.stage("train the vocabulary") as advance:
        if not Path(run.vocabulary_path).exists():
            corpus = run.world.passages(0)
            questions = read_split(world, run.directory / "world", "train_closed_book")
            sentences = [f"{title} {text}" for title, text in zip(corpus.titles, corpus.texts)]
            sentences += [f"{example['question']} {example['answers'][0]}" for example in questions]
            train_vocabulary(sentences, vocabulary_size, run.vocabulary_path)
        vocabulary = Vocabulary.from_file(run.vocabulary_path)
        check_values(vocabulary, run.lengths["targets"])
        advance(note=f"{vocabulary.size} pieces")
    return register_almanac(world, run.directory / "world", Vocabularies(run.vocabulary_path))


def check_values(vocabulary: Vocabulary, length: int) -> None:
    """UserError where an answer and its end have more than ``length`` tokens: names take pieces from values."""
    for value in sorted({value for relation in RELATIONS for value in relation.values}):
        tokens = len(vocabulary.encode(value)) + 1
        if tokens > length:
            raise UserError(
                f"the value {value!r} has {tokens} tokens in a vocabulary of {vocabulary.size} pieces, targets hold "
                f"{length}: raise VOCABULARY_SIZE (1600 suffices for 1,000 entities, 2400 for 4,000), or "
                "task_feature_lengths['targets'] and ExpertRAG.max_target_length; and name another MODEL_DIR."
            )


def train_retriever(run: Demo, tasks: dict[str, Any]) -> None:
    """Questions against articles: in-batch and namesake negatives."""
    lengths = {"query": run.lengths["query"], "passages": run.passage_length}
    pipeline = Pipeline(tasks["retriever"], lengths, run.retriever_batch, seed=run.seed)
    run_training(run, "train the retriever", "retriever", run.retriever, {"retriever": pipeline})


def index_editions(run: Demo) -> None:
    """One ScaNN index for each edition that is asked about."""
    with run.stages.stage("embed and index", total=len(EDITIONS)) as advance:
        for edition in EDITIONS:
            if not Path(run.index_dir(edition)).exists():
                with quiet():
                    build_index(
                        run.index_dir(edition), corpus=str(run.directory / f"corpus_{edition}.tsv"),
                        vocabulary=run.vocabulary_path, kind="scann", retriever=str(run.directory / "retriever"),
                        passage_length=run.passage_length,
                    )
            index = open_index(run.index_dir(edition)).index
            advance(note=f"edition {edition}: {'exact' if index.is_exact else index.kind}")


def train_generator(run: Demo, tasks: dict[str, Any]) -> None:
    """The reader's lessons, then articles and closed-book questions in turn."""
    schedule = run.schedule
    stages, data = lessons(run, tasks)
    closed_book = Pipeline(tasks["closed_book"], run.lengths, schedule.closed_book_batch, seed=run.seed)
    practice = [(reading(run, tasks, lesson), 1) for lesson in schedule.practice]
    data["generator"] = interleave([(closed_book, schedule.closed_book_share), *practice])
    run_training(
        run, "train the generator", "generator", run.system, data, [*stages, Stage("generator", "generator")],
        initial={"query_encoder": str(run.directory / "retriever")},
    )


def lessons(run: Demo, tasks: dict[str, Any]) -> tuple[list[Stage], dict[str, Batches]]:
    """The stages of the reader's curriculum, and the data set of each."""
    schedule = run.schedule
    stages = [
        Stage(lesson.name, "generator", lesson.steps, schedule.lesson_optimizer, lesson.until)
        for lesson in schedule.lessons
    ]
    return stages, {lesson.name: reading(run, tasks, lesson) for lesson in schedule.lessons}


def reading(run: Demo, tasks: dict[str, Any], lesson: Lesson) -> Batches:
    """Batches of a lesson, weighted."""
    lengths = run.lengths | {"passages": lesson.length}
    pipeline = Pipeline(tasks[f"open_book_{lesson.name}"], lengths, lesson.batch_size, seed=run.seed)
    return Weighted(pipeline, lesson.weight)


def run_training(run: Demo, title, folder, system, datasets, stages=None, initial=None) -> None:
    """One call of the job ``train`` with the stage's progress bar; a stage that ends early makes the bar jump."""
    phases = system.phases if stages is None else [stage.of(system.phases) for stage in stages]
    steps = {phase.name: phase.steps for phase in phases if phase.name in datasets}
    before = dict(zip(steps, itertools.accumulate(steps.values(), initial=0)))
    with run.stages.stage(title, total=sum(steps.values())) as advance:
        done = [0]

        def progress(record):
            here = before[record["phase"]] + record["phase_step"]
            accuracy = f", accuracy {record['sequence_accuracy']:.2f}" if "sequence_accuracy" in record else ""
            note = f"{record['phase']}: loss {record['loss']:.3f}{accuracy}" if "loss" in record else ""
            advance(here - done[0], note)
            done[0] = here

        train(
            str(run.directory / folder), system, datasets, run.vocabulary_path, run.lengths, stages=stages,
            seed=run.seed, checkpoint_period=1500, log_period=20, initial_checkpoint=initial,
            num_passages=run.num_passages, index_dir=run.index_dir("1"), progress=progress,
        )


def train_gate(run: Demo, world: AlmanacConfig) -> Service:
    """Measures both arms on the gate's questions, trains on them, calibrates on validation; the finished service."""
    prepared = run.directory / "gate_start"
    generator = open_model(run.directory / "generator", buckets=run.measuring.buckets)
    service = service_from_model(generator, "gate", run.index_dir("1"))
    records = read_split(world, run.directory / "world", "gate")
    questions = service.tokenise([record["question"] for record in records])
    vocabulary = Vocabulary.from_file(run.vocabulary_path)
    targets = tokenise_answers([record["answers"][0] for record in records], vocabulary, run.lengths["targets"])
    with run.stages.stage("measure both arms", total=len(records)) as advance:
        params = generator.params
        examples = gate_training.measure_arms(run.system, params, service.answerer, questions, targets, advance)
        if not prepared.exists():
            save_parameters(prepared, gate_training.with_standardised_gate(params, examples.features))
    dataset = gate_training.GateDataset(examples, run.gate_batch, run.seed)
    run_training(
        run, "train the gate", "model", run.system, {"gate": dataset}, [Stage("gate", "gate")], initial=str(prepared)
    )
    with run.stages.stage("calibrate the gate") as advance:
        model = open_model(run.directory / "model", calibrated=False, buckets=run.measuring.buckets)
        service = service.with_checkpoint(model)
        records = read_split(world, run.directory / "world", "validation")
        questions = service.tokenise([record["question"] for record in records])
        arms = comparison.run_arms(service.answerer, questions, correctness(records, vocabulary))
        price = run.system.retrieval_cost
        found = gate_training.calibrate(
            arms.p_ret, arms.correct_without, arms.correct_with, price, run.retrieval_budget
        )
        found.write(run.directory / "model", model.source.name)
        advance(note=f"threshold {found.threshold:.3f}, validation rate {found.retrieval_rate:.2f}")
    return service.with_checkpoint(model.calibrated(found.threshold, found.scale, found.bias))


def correctness(records: Sequence[dict], vocabulary: Vocabulary) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Exact match of answer tokens [n, T] with the records' answers at ``rows`` [n]."""

    def correct(tokens, rows):
        answers = [vocabulary.decode(row.tolist()) for row in tokens]
        return np.array([bool(exact_match(a, records[row]["answers"])) for a, row in zip(answers, rows)])

    return correct


def evaluate_edition(run: Demo, world: AlmanacConfig, service: Service, edition: str) -> EditionResult:
    """Five policies on the test questions, with this edition's index swapped in."""
    records = read_split(world, run.directory / "world", f"test_edition_{edition}")
    answerer, measuring = service.answerer, run.measuring
    loaded = open_index(run.index_dir(edition))
    answerer.retriever.swap(loaded)
    questions = service.tokenise([record["question"] for record in records])
    questions = dataclasses.replace(questions, ids=np.array([record["id"] for record in records]))
    answerer.warm_up(questions)
    rounds = dict(zip(EDITIONS, measuring.rounds))[edition]
    total = 2 * len(records) + 5 * rounds
    with run.stages.stage(f"evaluate on edition {edition}", total=total) as advance:
        arms = comparison.run_arms(answerer, questions, correctness(records, service.reader_vocabulary), advance)
        threshold = service.settings.threshold
        policies = comparison.five_policies(threshold, float((arms.p_ret >= threshold).mean()), run.seed)
        timing = comparison.time_policies(
            answerer, questions, arms, policies, throughput_questions=measuring.throughput_questions,
            latency_questions=measuring.latency_questions, rounds=rounds, progress=advance,
        )
        results = comparison.policy_results(answerer, questions, arms, policies, timing)
        row_of = loaded.passages.row_of()
        gold = [row_of[f"e{record['entity']}"] for record in records]
        advance(0, note=f"gate {results['gate'].correct.mean():.3f} at rate {results['gate'].retrieve.mean():.2f}")
    volatile = {record["relation"] for record in records if record["stratum"] == "volatile"}
    return EditionResult(
        policies=results, p_ret=arms.p_ret,
        facts=np.array([record["entity"] * 1000 + record["relation"] for record in records]),
        strata=np.array([record["stratum"] for record in records]),
        weights=np.array([record["weight"] for record in records]),
        static=np.array([record["relation"] not in volatile for record in records]),
        threshold=threshold, num_passages=run.num_passages,
        retriever_recall=comparison.recall(arms.always.passage_rows, gold),
        speed_up=timing.speed_up, differing=timing.differing, description=EDITION_NOTES[edition],
    )


EDITION_NOTES = {
    "1": "Half of the volatile facts changed after the generator was trained; the gate was trained on this edition.",
    "2": "The other half changed as well; the index was swapped in, and nothing was trained on this edition.",
}


def export_and_answer(run: Demo, world: AlmanacConfig, service: Service) -> None:
    """Exports the model, and answers a file of questions with the export."""
    questions, answers = run.directory / "questions.jsonl", run.directory / "answers.jsonl"
    with run.stages.stage("export") as advance, quiet():
        export(str(run.directory / "model"), str(run.directory / "export"), index_dir=run.index_dir("2"),
               buckets=run.measuring.exported_buckets, overwrite=True)
        advance()
    with run.stages.stage("answer with the export") as advance:
        records = read_split(world, run.directory / "world", "test_edition_2")[: run.measuring.exported_questions]
        lines = [{"id": str(r["id"]), "question": r["question"], "answers": r["answers"]} for r in records]
        questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with quiet():
            infer(str(questions), str(answers), export_dir=str(run.directory / "export"), overwrite=True)
        found = [json.loads(line)["prediction"] for line in answers.read_text().splitlines()]
        right = np.mean([bool(exact_match(a, r["answers"])) for a, r in zip(found, records)])
        advance(note=f"{len(found)} questions, exact match {right:.3f}: {answers}")


def settings(run: Demo, world: AlmanacConfig) -> dict[str, Any]:
    """What identifies the run in the report."""
    return {
        "entities": world.num_entities, "training questions": world.num_training_questions,
        "world": world.digest, "passages read": run.num_passages, "experts": run.system.model.num_experts,
        "generator steps": run.system.generator_steps,
        "price of a retrieval": run.system.retrieval_cost, "budget of retrievals": run.retrieval_budget,
    }


if __name__ == "__main__":
    launch.run("expertrag_jax.demo")
