"""The almanac's questions as JSON lines, for `expertrag train`, `evaluate` and `infer` on the demo's models.

    python -m tasks.almanac.question_files --demo_dir runs/almanac

writes ``runs/almanac/questions/<split>.jsonl``: ``gate`` and ``validation``, the same test questions with the answers
of edition 1 and of edition 2, and those whose answer changed between the two. They are the questions of the demo's own
world, whatever its size and seed. See docs/rag.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from expertrag_jax.errors import UserError
from tasks.almanac.demo_world import read_world_name
from tasks.almanac.read import read_prepared

SPLITS = ("gate", "validation", "test_edition_1", "test_edition_2")


def prepared_world(demo: Path) -> Path:
    """Returns the folder of the demo's world, as TFDS has written it.

    Args:
      demo: MODEL_DIR of an `expertrag demo`.

    Raises:
      UserError: the folder holds no demo, or the demo has not generated its world yet.
    """
    digest, version = read_world_name(demo)
    found = list((demo / "world").glob(f"*/*_{digest}/{version}"))
    if not found:
        raise UserError(
            f"{demo / 'world'} lacks the world {digest} of version {version}: run the same `expertrag demo` again, "
            "which generates it."
        )
    return found[0]


def read_records(prepared: Path, split: str) -> list[dict]:
    """Returns the examples of a split of a prepared world, in its order, with plain Python values."""
    return read_prepared(tfds.builder_from_directory(prepared), split)


def write_question_files(prepared: Path, directory: Path) -> dict[str, int]:
    """Writes a file of questions for each split, and two of the questions whose answer changed.

    Args:
      prepared: folder of the world, see ``prepared_world``.
      directory: where the files go.

    Returns:
      The number of questions by the name of their file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    records = {split: read_records(prepared, split) for split in SPLITS}
    pairs = changed(records["test_edition_1"], records["test_edition_2"])
    for place, edition in enumerate((1, 2)):
        records[f"changed_edition_{edition}"] = [pair[place] for pair in pairs]
    for name, lines in records.items():
        (directory / f"{name}.jsonl").write_text("".join(map(_line, lines)), encoding="utf-8")
    return {name: len(lines) for name, lines in records.items()}


def changed(first: Sequence[dict], second: Sequence[dict]) -> list[tuple[dict, dict]]:
    """The records of two editions about the same question whose answers differ, in the order of the first."""
    by_question = {record["question"]: record for record in second}
    pairs = {record["question"]: (record, by_question[record["question"]]) for record in first}
    return [(one, two) for one, two in pairs.values() if set(one["answers"]) != set(two["answers"])]


def _line(record: dict) -> str:
    fields = {"id": str(record["id"]), "question": record["question"], "answers": record["answers"]}
    fields |= {"gold_passage_ids": [f"e{record['entity']}"], "stratum": record["stratum"]}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo_dir", required=True, help="MODEL_DIR of an `expertrag demo`")
    demo = Path(parser.parse_args(arguments).demo_dir)
    try:
        prepared = prepared_world(demo)
    except UserError as error:
        print(f"question_files: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for name, count in write_question_files(prepared, demo / "questions").items():
        print(f"{demo / 'questions' / name}.jsonl: {count} questions")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)  # TFDS warns of its own deprecated calls
    main()
