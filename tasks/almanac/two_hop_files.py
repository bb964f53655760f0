"""Two-hop questions as files: a corpus and questions for `expertrag index`, `train` and `evaluate` (docs/dro.md).

    python -m tasks.almanac.two_hop_files --output_dir runs/two_hop

Every question has a register of its own, of four persons and four companies, whose number stands in the question and in
their eight passages. A lexical index finds the person first, then the companies; which of them employs the person is
what a selector has to learn. No person is in two registers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, write_passages_tsv
from tasks.almanac.config import AlmanacConfig
from tasks.almanac.two_hop import PERSONS, two_hop_examples
from tasks.almanac.world import World

SPLITS = {"train": 10_000, "validation": 200, "test": 500}  # registers, a question each


def registers(names: list[str], rng: np.random.Generator) -> Iterator[dict]:
    """An example of ``two_hop_examples`` for every four of the names, in their order, its texts numbered from 1."""
    for number in range(1, len(names) // PERSONS + 1):
        persons = names[(number - 1) * PERSONS : number * PERSONS]
        example = next(two_hop_examples(persons, rng))
        mark = f"register R{number}"
        passages = [passage | {"text": f"{mark} {passage['text']}"} for passage in example["passages"]]
        yield example | {"question": f"{mark} {example['question']}", "passages": passages}


def write_two_hop(directory: str | Path, sizes: dict[str, int] | None = None, seed: int = 0) -> None:
    """Writes ``corpus.tsv.gz`` and a file of questions for each split: ``train.jsonl``, ``validation.jsonl``, ...

    Args:
      sizes: registers by split. seed: of names and values.

    Raises:
      UserError: the directory holds something already, or is a file.
    """
    directory, sizes = Path(directory), sizes or SPLITS
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty folder: nothing was written; name a new --output_dir.")
    directory.mkdir(parents=True, exist_ok=True)
    count = PERSONS * sum(sizes.values())
    parts = max(16, int(2 * count**0.5))
    names = World(AlmanacConfig(num_entities=count, num_first_names=parts, num_last_names=parts, seed=seed)).names
    examples, passages = registers(names, np.random.default_rng(seed)), []
    for split, size in sizes.items():
        with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(size):
                example = next(examples)
                ids = [f"p{len(passages) + place}" for place in range(len(example["passages"]))]
                passages += example["passages"]
                gold = [name for name, passage in zip(ids, example["passages"]) if passage["relevance"]]
                record = {"question": example["question"], "answers": example["answers"], "gold_passage_ids": gold}
                file.write(json.dumps(record) + "\n")
    titles, texts = ([passage[field] for passage in passages] for field in ("title", "text"))
    write_passages_tsv(Passages([f"p{row}" for row in range(len(texts))], titles, texts), directory / "corpus.tsv.gz")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", required=True, help="a new folder")
    for split, size in SPLITS.items():
        parser.add_argument(f"--{split}", type=int, default=size, help="registers with one question each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sizes = {split: getattr(options, split) for split in SPLITS}
    try:
        write_two_hop(options.output_dir, sizes, options.seed)
    except UserError as error:
        print(f"two_hop_files: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    told = ", ".join(f"{size} questions in {split}.jsonl" for split, size in sizes.items())
    print(f"{options.output_dir}: {told}, {sum(sizes.values())} registers of 8 passages in corpus.tsv.gz")


if __name__ == "__main__":
    main()
