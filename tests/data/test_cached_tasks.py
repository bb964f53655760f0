"""SeqIO's offline cache, written here record by record in its format: what Beam's job leaves behind."""

import itertools
import json

import numpy as np
import pytest
import seqio
import tensorflow as tf

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from tasks.questions import register_questions

LENGTHS = {"inputs": 24, "targets": 8, "query": 24}


@pytest.fixture
def task(tmp_path, vocabulary):
    path = tmp_path / "questions.jsonl"
    records = [{"question": f"What is number {i}?", "answers": [f"red {i}", "blue"]} for i in range(7)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return register_questions("cached_questions", {"train": path}, Vocabularies(vocabulary.path))


@pytest.fixture
def cache_dirs():
    before = list(seqio.get_global_cache_dirs())
    yield
    seqio.set_global_cache_dirs(before)


def write_cache(task, folder):
    """The task's examples at its cache placeholder, as seqio_cache_tasks writes them."""
    folder.mkdir(parents=True)
    records = task.preprocessors[0](task.source.get_dataset("train", shuffle=False))
    spec = records.element_spec
    with tf.io.TFRecordWriter(str(folder / "train.tfrecord-00000-of-00001")) as writer:
        for record in records.as_numpy_iterator():
            writer.write(seqio.dict_to_tfexample(record).SerializeToString())
    features = {name: {"shape": s.shape.as_list(), "dtype": s.dtype.name} for name, s in spec.items()}
    info = {"num_shards": 1, "features": features, "seqio_version": seqio.__version__}
    (folder / "info.train.json").write_text(json.dumps(info))
    (folder / "stats.train.json").write_text(json.dumps({"examples": 7}))
    (folder / "COMPLETED").touch()


def test_cached_and_uncached_tasks_give_equal_batches(task, tmp_path, cache_dirs):
    write_cache(task, tmp_path / "cache" / task.name)
    seqio.add_global_cache_dirs([str(tmp_path / "cache")])
    (tmp_path / "questions.jsonl").unlink()  # the source is not read again
    cached = list(itertools.islice(Pipeline(task, LENGTHS, 3, seed=1, use_cached=True)(2), 4))

    records = [{"question": f"What is number {i}?", "answers": [f"red {i}", "blue"]} for i in range(7)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plain = list(itertools.islice(Pipeline(task, LENGTHS, 3, seed=1)(2), 4))
    for ours, wanted in zip(cached, plain, strict=True):
        for name in ("example_ids", "encoder_input_tokens", "query_tokens", "decoder_target_tokens"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(wanted, name))


def test_a_missing_cache_is_one_sentence(task, cache_dirs):
    with pytest.raises(UserError, match="USE_CACHED_TASKS is True, but task cached_questions has no complete cache"):
        next(Pipeline(task, LENGTHS, 3, use_cached=True)())
