"""How many steps a reader that starts from nothing needs before it matches names, seed by seed.

    python benchmarks/learning_to_read.py --seeds 100:110 --variants copies,t5 --work_dir runs/learning_to_read

The lessons of runs/almanac.gin (`--lessons` of them), each until its mark or its steps, by the demo's own functions.
The variants of a seed share world, vocabulary and batches, and run one after the other, so that a busy machine is busy
for all. Rows are kept in WORK_DIR/rows.jsonl: a run that was stopped resumes, and two with other seeds may run side by
side.

The table says for each variant how many seeds reached the mark of every lesson within the steps given, the median and
the worst number of steps, and seconds of training. Seeds 100 to 119 are for choosing; 204 to 223 are blind, and no
setting is chosen by them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax

from expertrag_jax import demo, gin_files
from expertrag_jax.model import initialisation
from expertrag_jax.stages import Stages
from expertrag_jax.train import train

CONSTANTS = {name: getattr(initialisation, name) for name in ("COPY_SCORE", "SELF_BIAS")}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the demo: gin bindings, and constants of ``model.initialisation``."""

    bindings: Sequence[str] = ()
    constants: Mapping[str, float] = dataclasses.field(default_factory=dict)


MODEL, RATE = "config.TransformerConfig.", "warm_up/optax.linear_schedule."
T5 = f"{MODEL}attention_init = 't5'"
VARIANTS = {
    "copies": Variant(),  # the demo
    "t5": Variant([T5]),  # the demo before
    "tied_queries": Variant(constants={"SELF_BIAS": 0.0}),
    "copies_dense": Variant([f"{MODEL}num_experts = 0"]),
    "t5_dense": Variant([T5, f"{MODEL}num_experts = 0"]),
    "copies_half_rate": Variant([f"{RATE}end_value = 0.01"]),
    "t5_half_rate": Variant([T5, f"{RATE}end_value = 0.01"]),
    "t5_long_warm_up": Variant([T5, f"{RATE}transition_steps = 200"]),
    "t5_three_layers": Variant([T5, f"{MODEL}num_encoder_layers = 3"]),
    "t5_four_heads": Variant([T5, f"{MODEL}num_heads = 4", f"{MODEL}head_dim = 32"]),
    "copies_four_heads": Variant([f"{MODEL}num_heads = 4", f"{MODEL}head_dim = 32"]),
    "t5_untied_output": Variant([T5, f"{MODEL}logits_via_embedding = False"]),
    "t5_no_drops": Variant([T5, f"{MODEL}train_expert_capacity_factor = 8.0"]),
}


def configured(gin_file: str, seed: int, variant: Variant) -> dict[str, Any]:
    """The demo's arguments as gin binds them."""
    gin.clear_config()
    gin_files.register(demo.demo)
    gin_files.parse([gin_file], [f"RANDOM_SEED = {seed}", *variant.bindings], [])
    return gin.get_bindings("demo", resolve_references=True)


def one_run(gin_file: str, seed: int, name: str, lessons: Sequence[str], steps: int, folder: Path) -> dict[str, Any]:
    """Trains the lessons; {"seed", "variant", "cpu_seconds", "lessons": {lesson: {"reached", "accuracy"}}}.

    "reached" is the number of steps to the mark, those of earlier attempts included; None if it was not reached.
    "accuracy" is [step, sequence accuracy of
    the last 20 steps], every 20 steps.
    """
    variant = VARIANTS[name]
    arguments = configured(gin_file, seed, variant)
    world, vocabulary_size = arguments.pop("world"), arguments.pop("vocabulary_size")
    world = dataclasses.replace(world, lessons={lesson: world.lessons[lesson] for lesson in lessons})  # and no others
    schedule = arguments["schedule"]
    taken = [dataclasses.replace(lesson, steps=steps) for lesson in schedule.lessons if lesson.name in lessons]
    run = demo.Demo(
        directory=folder / f"world_{seed}", world=demo.World(world), retriever=arguments["retriever"],
        system=dataclasses.replace(arguments["system"], retriever=None),
        schedule=dataclasses.replace(schedule, lessons=taken), measuring=arguments["measuring"],
        lengths=arguments["task_feature_lengths"], passage_length=arguments["passage_length"],
        retriever_batch=1, gate_batch=1, num_passages=1, retrieval_budget=1.0, seed=seed, stages=Stages(2),
    )  # fmt: skip
    run.directory.mkdir(parents=True, exist_ok=True)
    tasks = demo.generate(run, world, vocabulary_size)
    stages, data = demo.lessons(run, tasks)
    records: list[Mapping[str, Any]] = []
    model_dir = folder / f"model_{seed}_{name}"
    shutil.rmtree(model_dir, ignore_errors=True)
    for constant, value in (CONSTANTS | dict(variant.constants)).items():
        setattr(initialisation, constant, value)
    began = time.process_time()
    train(
        str(model_dir), run.system, data, run.vocabulary_path, run.lengths, stages=stages, seed=seed,
        checkpoint_period=100_000, log_period=20, progress=records.append,
    )  # fmt: skip
    seconds = time.process_time() - began
    shutil.rmtree(model_dir)
    found = {lesson.name: summary(records, lesson.name, steps) for lesson in taken}
    return {"seed": seed, "variant": name, "cpu_seconds": round(seconds, 1), "lessons": found}


def summary(records: Sequence[Mapping[str, Any]], lesson: str, limit: int) -> dict[str, Any]:
    """See ``one_run``; an attempt that missed the mark took ``limit`` steps."""
    logged = [record for record in records if record["phase"] == lesson]
    curve = [[r["phase_step"], round(r["sequence_accuracy"], 3)] for r in logged if "sequence_accuracy" in r]
    (ended,) = [record for record in logged if "mastery/reached" in record]
    steps = int(ended["mastery/steps"] + (ended["mastery/attempts"] - 1) * limit)
    return {"reached": steps if ended["mastery/reached"] else None, "accuracy": curve}


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per variant; steps are those of all lessons together."""
    print(f"{'variant':20}{'seeds':>6}{'mastered':>10}{'median':>8}{'worst':>8}{'CPU s':>8}  by step 200/400/800/1600")
    for name in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == name]
        totals = [total(row) for row in of]
        done = [steps for steps in totals if steps is not None]
        ordered = sorted(float("inf") if steps is None else steps for steps in totals)
        shares = "/".join(f"{sum(steps <= limit for steps in done) / len(of):.2f}" for limit in (200, 400, 800, 1600))
        cpu = statistics.median(row["cpu_seconds"] for row in of)
        median, worst = statistics.median(ordered), ordered[-1]
        print(f"{name:20}{len(of):6}{len(done):10}{median:8.0f}{worst:8.0f}{cpu:8.0f}  {shares}")


def total(row: Mapping[str, Any]) -> int | None:
    """Steps of all lessons; None if a mark was not reached."""
    steps = [lesson["reached"] for lesson in row["lessons"].values()]
    return None if None in steps else sum(steps)


def main() -> None:
    """Runs what is missing in the rows, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="100:103", help="FIRST:END")
    parser.add_argument("--variants", default="copies,t5", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--lessons", default="strangers,namesakes", help="of the gin file's lessons, in its order")
    parser.add_argument("--steps", type=int, default=1500, help="of each lesson at most")
    parser.add_argument("--gin_file", default="runs/almanac.gin")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/learning_to_read"))
    parser.add_argument("--json", type=Path, help="where to write all rows of WORK_DIR")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str((options.work_dir / "compilation_cache").absolute()))
    check_settings(options.work_dir / "settings.json", [options.gin_file, options.lessons, options.steps])
    path = options.work_dir / "rows.jsonl"
    for seed in range(*map(int, options.seeds.split(":"))):
        for name in options.variants.split(","):
            if any((row["seed"], row["variant"]) == (seed, name) for row in read(path)):
                continue
            row = one_run(
                options.gin_file, seed, name, options.lessons.split(","), options.steps, options.work_dir.absolute()
            )
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            steps = {lesson: found["reached"] for lesson, found in row["lessons"].items()}
            print(f"seed {seed}, {name}: {steps}, {row['cpu_seconds']} CPU seconds", flush=True)
    show(read(path))
    if options.json:
        options.json.write_text(json.dumps(read(path)) + "\n")


def check_settings(path: Path, settings: Sequence[Any]) -> None:
    """Ends the process if the rows so far were made with other settings; notes them where there are none."""
    if path.exists() and json.loads(path.read_text()) != list(settings):
        raise SystemExit(f"error: {path.parent} holds rows of {path.read_text().strip()}: name another --work_dir.")
    path.write_text(json.dumps(settings) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
