"""SeqIO tasks over the almanac, the generated world (see ``tasks/almanac``)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from expertrag_jax.data import preprocessors
from expertrag_jax.data.inline_passages import InlinePassages
from expertrag_jax.data.preprocessors import record
from expertrag_jax.data.question_tasks import number, output_features, question_task, register
from expertrag_jax.data.vocabularies import Vocabularies
from tasks.almanac.builder import prepare, tfds_name
from tasks.almanac.config import AlmanacConfig

QUESTION_SPLITS = ("gate", "validation", "test_edition_1", "test_edition_2")


def register_almanac(
    config: AlmanacConfig, data_dir: str | os.PathLike, vocabularies: Vocabularies, name: str = "almanac"
) -> dict[str, seqio.Task]:
    """Registers the tasks that need no index; generates the world below ``data_dir`` if it is not there.

    Args:
      config: of the world.
      data_dir: TFDS's data directory.
      vocabularies: of reader and retriever.
      name: prefix of the tasks' names.

    Returns:
      Tasks by what they train:
        "closed_book" (split train): question and answer of edition 0;
        "open_book_<lesson>" (train), one for each of ``config.lessons``: K passages in ``passages``, the
        question in front, and their relevance;
        "retriever" (train): ``query``, and in ``passages`` the positive and a hard negative, title and text;
        "questions" (gate, validation, test_edition_1, test_edition_2): question and answer.
    """
    prepare(config, data_dir)
    tasks = {
        "closed_book": question_task(
            f"{name}_closed_book",
            almanac_source(config, data_dir, "train_closed_book"),
            _record,
            vocabularies,
        ),
        **{
            f"open_book_{lesson}": _open_book(name, config, data_dir, vocabularies, lesson)
            for lesson in config.lessons
        },
        "retriever": _retriever(f"{name}_retriever", config, data_dir, vocabularies),
        "questions": question_task(
            f"{name}_questions", almanac_source(config, data_dir, *QUESTION_SPLITS), _record, vocabularies
        ),
    }
    return {kind: register(task) for kind, task in tasks.items()}


def almanac_source(
    config: AlmanacConfig, data_dir: str | os.PathLike, *splits: str, passages: bool = False
) -> seqio.TfdsDataSource:
    """The prepared world as a source of what `_record` reads, and of the passages; a split "train_..." is called
    "train"."""
    names = {"train" if split.startswith("train") else split: split for split in splits}
    # read_only: the data is there, so TFDS need not look for it on the network.
    wanted = dict.fromkeys(("id", "question", "answers", *(["passages"] if passages else [])), True)
    return _OrderedSource(
        tfds_name(config), tfds_data_dir=os.fspath(data_dir), splits=names, read_only=True,
        decoders=tfds.decode.PartialDecoding(wanted),
    )  # fmt: skip


class _OrderedSource(seqio.TfdsDataSource):
    """TFDS refuses to shuffle the files of an ordered set; the almanac's order is random as it is."""

    def get_dataset(self, split=None, shuffle=True, seed=None, shard_info=None, **options):
        """SeqIO's, in the order of the files."""
        return super().get_dataset(split, shuffle=False, seed=seed, shard_info=shard_info, **options)


def _record(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    return record(example["question"], example["answers"], id=example["id"])


def _record_with_passages(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
    passages = example["passages"]
    return _record(example) | {
        "titles": passages["title"],
        "texts": passages["text"],
        "passage_relevance": passages["relevance"],
    }


def _open_book(
    name: str, config: AlmanacConfig, data_dir: str | os.PathLike, vocabularies: Vocabularies, lesson: str
) -> seqio.Task:
    steps = [
        preprocessors.normalise(_record_with_passages),
        seqio.CacheDatasetPlaceholder(),
        preprocessors.in_chunks,
        preprocessors.TokeniseQuestions(vocabularies),
        InlinePassages(vocabularies.reader, with_question=True),
        preprocessors.single_examples,
    ]
    features = output_features("closed_book", vocabularies) | {
        "passages": seqio.Feature(vocabularies.reader, rank=2),
        "passage_relevance": number(tf.float32, 1),
    }
    source = almanac_source(config, data_dir, f"train_open_book_{lesson}", passages=True)
    return seqio.Task(f"{name}_open_book_{lesson}", source, features, steps)


def _retriever(
    name: str, config: AlmanacConfig, data_dir: str | os.PathLike, vocabularies: Vocabularies
) -> seqio.Task:
    steps = [
        preprocessors.normalise(_record_with_passages),
        seqio.CacheDatasetPlaceholder(),
        preprocessors.in_chunks,
        preprocessors.TokeniseQuestions(vocabularies, targets=False),
        InlinePassages(vocabularies.retriever, with_question=False),
        preprocessors.single_examples,
    ]
    features = {
        "id": number(tf.int64),
        "query": seqio.Feature(vocabularies.retriever),
        "passages": seqio.Feature(vocabularies.retriever, rank=2),
        "passage_relevance": number(tf.float32, 1),
    }
    return seqio.Task(name, almanac_source(config, data_dir, "train_retriever", passages=True), features, steps)
