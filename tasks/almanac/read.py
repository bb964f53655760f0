"""Reads a split of the prepared almanac back as the dictionaries that ``examples`` generated."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from expertrag_jax.data.preprocessors import SEPARATOR
from tasks.almanac.builder import prepare
from tasks.almanac.config import AlmanacConfig

_FIELDS = {
    "id": int, "question": bytes.decode, "answers": lambda joined: joined.decode().split(SEPARATOR), "relation": int,
    "entity": int, "stratum": bytes.decode, "asked": int, "weight": float, "changed": int,
}  # fmt: skip
_BATCH = 4096  # examples fetched at a time: one by one takes ten times as long


def read_split(config: AlmanacConfig, data_dir: str | os.PathLike, split: str) -> list[dict]:
    """All examples of a split, in its order, with plain Python values; passages are left out."""
    return read_prepared(prepare(config, data_dir, progress=False), split)


def read_prepared(builder: tfds.core.DatasetBuilder, split: str) -> list[dict]:
    """``read_split`` of a world that is there already, as ``tfds.builder_from_directory`` opens it."""
    wanted = tfds.decode.PartialDecoding(dict.fromkeys(_FIELDS, True))
    examples = builder.as_dataset(split=split, decoders=wanted).map(_with_joined_answers).batch(_BATCH)
    return [example for batch in tfds.as_numpy(examples) for example in _plain(batch)]


def _with_joined_answers(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return dict(example) | {"answers": tf.strings.reduce_join(example["answers"], separator=SEPARATOR)}


def _plain(batch: Mapping[str, np.ndarray]) -> Iterator[dict]:
    for row in zip(*(batch[name] for name in _FIELDS)):
        yield {name: make(value) for (name, make), value in zip(_FIELDS.items(), row)}
