"""The almanac's questions as JSON lines, for `expertrag train`, `evaluate` and `infer` on the demo's models.

    python -m tasks.almanac.question_files --demo_dir runs/almanac

writes ``runs/almanac/questions/<split>.jsonl``: ``gate`` and ``validation``, and the same test questions with the
answers of edition 1 and of edition 2, a file each, and once more those whose answer changed between the two. See
docs/rag.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from expertrag_jax.errors import UserError
from tasks.almanac.config import AlmanacConfig
from tasks.almanac.read import read_split

SPLITS = ("gate", "validation", "test_edition_1", "test_edition_2")


def write_question_files(world: AlmanacConfig, data_dir: str | Path, directory: str | Path) -> dict[str, int]:
    """Writes the files below ``directory``; returns how many questions there are, by name.

    Args:
      data_dir: TFDS's folder of the world, which is generated where it is not there.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = {split: read_split(world, data_dir, split) for split in SPLITS}
    pairs = changed(found["test_edition_1"], found["test_edition_2"])
    for place, edition in enumerate((1, 2)):
        found[f"changed_edition_{edition}"] = [pair[place] for pair in pairs]
    for name, records in found.items():
        (directory / f"{name}.jsonl").write_text("".join(map(_line, records)), encoding="utf-8")
    return {name: len(records) for name, records in found.items()}


def changed(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The records of two editions about the same question whose answers differ, in the order of the first."""
    by_question = {record["question"]: record for record in second}
    pairs = {record["question"]: (record, by_question[record["question"]]) for record in first}
    return [(one, two) for one, two in pairs.values() if set(one["answers"]) != set(two["answers"])]


def check_world(world: AlmanacConfig, demo: Path) -> None:
    """UserError where the folder is no demo's, or is of another world, whose entities are others."""
    noted = demo / "world.json"
    if not noted.is_file():
        raise UserError(f"{demo} holds no demo: name the MODEL_DIR of an `expertrag demo`.")
    if json.loads(noted.read_text())["world"] != world.digest:
        raise UserError(
            f"{demo} is a demo of another world than one of {world.num_entities} entities with seed {world.seed}: give "
            "--entities and --seed of that demo."
        )


def _line(record: dict) -> str:
    fields = {"id": str(record["id"]), "question": record["question"], "answers": record["answers"]}
    fields |= {"gold_passage_ids": [f"e{record['entity']}"], "stratum": record["stratum"]}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo_dir", required=True, help="MODEL_DIR of an `expertrag demo`")
    parser.add_argument("--entities", type=int, default=1000, help="of the demo's world")
    parser.add_argument("--seed", type=int, default=0, help="of the demo's world")
    options = parser.parse_args(arguments)
    demo = Path(options.demo_dir)
    world = AlmanacConfig(num_entities=options.entities, seed=options.seed)
    try:
        check_world(world, demo)
    except UserError as error:
        print(f"question_files: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, count in write_question_files(world, demo / "world", demo / "questions").items():
        print(f"{demo / 'questions' / name}.jsonl: {count} questions")


if __name__ == "__main__":
    main()
