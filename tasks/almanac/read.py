"""Reads a split of the prepared almanac back as the dictionaries that ``examples`` generated."""

from __future__ import annotations

import os

import tensorflow_datasets as tfds

from tasks.almanac.builder import prepare
from tasks.almanac.config import AlmanacConfig


def read_split(config: AlmanacConfig, data_dir: str | os.PathLike, split: str) -> list[dict]:
    """All examples of a split, in its order, with plain Python values; passages are left out."""
    builder = prepare(config, data_dir, progress=False)
    return [_plain(example) for example in tfds.as_numpy(builder.as_dataset(split=split))]


def _plain(example: dict) -> dict:
    return {
        "id": int(example["id"]),
        "question": example["question"].decode(),
        "answers": [answer.decode() for answer in example["answers"]],
        "relation": int(example["relation"]),
        "entity": int(example["entity"]),
        "stratum": example["stratum"].decode(),
        "asked": int(example["asked"]),
        "weight": float(example["weight"]),
        "changed": int(example["changed"]),
    }
