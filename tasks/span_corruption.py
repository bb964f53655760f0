"""Generator pre-training: span corruption on a corpus, and mixtures of it with other tasks at given rates."""

from __future__ import annotations

import os
from collections.abc import Sequence

import seqio
import tensorflow as tf

from expertrag_jax.data.question_tasks import output_features, register
from expertrag_jax.data.span_corruption import CorruptSpans
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import Count, Positive, Rate, Seed, checked
from expertrag_jax.retrieval.corpus import Passages, read_passages_tsv
from expertrag_jax.retrieval.documents import read_documents


@checked
def register_span_corruption(
    vocabularies: Vocabularies,
    corpus: LocalPath | None = None,
    documents: LocalPath | None = None,
    name: str = "span_corruption",
    sentinels: Count = 100,
    density: Rate = 0.15,
    mean_span: Positive = 3.0,
    copies: Count = 1,
    seed: Seed = 0,
) -> seqio.Task:
    """Registers the task over passages or raw text, with one split "train".

    Its features are those of closed-book questions (``query`` is empty), so both can stand in one mixture.

    Args:
      vocabularies: of reader and retriever; the reader's is used.
      corpus: the passages' TSV file. documents: in its place, a folder or file of text, Markdown or JSON lines.
      name: of the task.
      sentinels, density, mean_span, copies, seed: see ``data.span_corruption.CorruptSpans``. The generator needs
        embeddings for the vocabulary's pieces and the sentinels (``vocabulary.embedding_rows``).

    Raises:
      UserError: both places of the text or none. Reading the task raises it for bad files and lengths.
    """
    if (corpus is None) == (documents is None):
        raise UserError("span corruption needs a text: set either CORPUS, a TSV file of passages, or DOCUMENTS")
    source = seqio.FunctionDataSource(_Passages(corpus, documents), splits=("train",))
    corrupt = CorruptSpans(vocabularies.reader, sentinels, density, mean_span, copies, seed)
    steps = [seqio.CacheDatasetPlaceholder(), corrupt]
    return register(seqio.Task(name, source, output_features("closed_book", vocabularies), steps))


@checked
def register_mixture(name: str, tasks: Sequence[seqio.Task | str], rates: Sequence[Positive]) -> seqio.Mixture:
    """Registers a mixture of tasks with the same features.

    Args:
      name: of the mixture; an older one of that name gives way.
      tasks: registered ones, or their names. rates: relative numbers of examples, one per task.

    Raises:
      UserError: no tasks, another number of rates, or rates that are not above 0.
    """
    if not tasks or len(tasks) != len(rates):
        raise UserError(f"mixture {name} has {len(tasks)} tasks and rates {list(rates)}: give each task a rate.")
    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    names = [task if isinstance(task, str) else task.name for task in tasks]
    return seqio.MixtureRegistry.add(name, list(zip(names, map(float, rates))))


class _Passages:
    """``(split, shuffle_files, seed)`` -> dataset of passages; the files are read once."""

    __name__ = "passages"

    def __init__(self, corpus: str | os.PathLike | None, documents: str | os.PathLike | None):
        self._corpus, self._documents = corpus, documents
        self._passages: Passages | None = None

    def __call__(self, split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split; its order is the pipeline's business
        if self._passages is None:
            read = read_passages_tsv if self._documents is None else read_documents
            self._passages = read(self._corpus or self._documents)
        fields = {"title": self._passages.titles, "text": self._passages.texts}
        return tf.data.Dataset.from_tensor_slices({name: list(values) for name, values in fields.items()})
