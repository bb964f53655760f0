"""The inverse cloze task (arXiv 1906.00300): find the passage that a sentence was taken from.

It trains a dual encoder on passages alone, before (or without) questions.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data import preprocessors
from expertrag_jax.data.inline_passages import InlinePassages
from expertrag_jax.data.preprocessors import Lengths, length_limit, record, tokenise, with_eos
from expertrag_jax.data.question_tasks import number, register
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import Count, Fraction, Seed, checked
from expertrag_jax.retrieval.corpus import Passages, read_passages_tsv
from expertrag_jax.retrieval.splitting import sentences

Pair = tuple[int, int, str, str, str]  # id, row of the passage, sentence, title, text of the passage


@checked
def register_inverse_cloze(
    corpus: LocalPath,
    vocabularies: Vocabularies,
    name: str = "inverse_cloze",
    removal_rate: Fraction = 0.9,
    pairs_per_passage: Count = 2,
    fewest_words: Count = 5,
    seed: Seed = 0,
) -> seqio.Task:
    """Registers the task over a corpus in DPR's format.

    Args:
      corpus: the passages' TSV file.
      vocabularies: of reader and retriever; the retriever's is used on both sides.
      name: of the task.
      removal_rate: share of pairs whose sentence is taken out of its passage. The others teach that equal
        words matter (section 4 of the paper: .9).
      pairs_per_passage: sentences drawn from each passage, all of them where it has fewer.
      fewest_words: shorter sentences are no questions.
      seed: of the draws.

    Returns:
      The task, with one split "train". Reading it raises UserError for a bad corpus or one without sentences.
    """
    draw = functools.partial(
        draw_pairs, removal_rate=removal_rate, count=pairs_per_passage, fewest_words=fewest_words, seed=seed
    )
    source = seqio.FunctionDataSource(_Source(corpus, draw), splits=("train",))
    return register(retriever_task(name, source, vocabularies, TokeniseSentences(vocabularies.retriever)))


def retriever_task(
    name: str, source: seqio.DataSource, vocabularies: Vocabularies, tokenise_queries: Callable | None = None
) -> seqio.Task:
    """A task that trains the dual encoder.

    Args:
      name: of the task.
      source: of ``pair_record``s.
      vocabularies: of reader and retriever.
      tokenise_queries: chunks gain ``query``; None: ``TokeniseQuestions``, which refuses too long ones.

    Returns:
      A task with ``id``, ``query``, ``passages`` (the positive first), ``passage_relevance`` and ``passage_rows``.
    """
    steps = [
        preprocessors.normalise(lambda example: example),
        seqio.CacheDatasetPlaceholder(),
        preprocessors.in_chunks,
        tokenise_queries or preprocessors.TokeniseQuestions(vocabularies, targets=False),
        InlinePassages(vocabularies.retriever, with_question=False),
        preprocessors.single_examples,
    ]
    features = {
        "id": number(tf.int64),
        "query": seqio.Feature(vocabularies.retriever),
        "passages": seqio.Feature(vocabularies.retriever, rank=2),
        "passage_relevance": number(tf.float32, 1),
        "passage_rows": number(tf.int32, 1),
    }
    return seqio.Task(name, source, features, steps)


@dataclasses.dataclass
class TokeniseSentences:
    """Chunks gain ``query``: the sentence, cut where it is too long, for it is no question of a user.

    Attributes:
      vocabulary: of the retriever.
      sequence_length: SeqIO's lengths, filled in by the task.
    """

    vocabulary: seqio.Vocabulary
    sequence_length: Lengths | None = None

    def __call__(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of chunks to a dataset of chunks."""
        return ds.map(self._tokenise, num_parallel_calls=tf.data.AUTOTUNE)

    def _tokenise(self, chunk: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        tokens = tokenise(self.vocabulary, chunk["question"])
        return dict(chunk) | {"query": with_eos(tokens, length_limit(self.sequence_length, "query"))}


def pair_record(fields: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """A normalised example of ``id``, ``question`` and the passages' ``titles``, ``texts`` and ``rows`` [K]; the
    first passage is the relevant one."""
    relevance = tf.one_hot(0, tf.shape(fields["titles"])[0])
    return record(fields["question"], tf.constant([], tf.string), id=fields["id"]) | {
        "titles": fields["titles"],
        "texts": fields["texts"],
        "passage_relevance": relevance,
        "passage_rows": tf.cast(fields["rows"], tf.int32),
    }


def draw_pairs(
    passages: Passages, removal_rate: float, count: int, fewest_words: int, seed: int
) -> Iterator[Pair]:
    """Sentences and their passages, in the order of the passages; ids are ``row * count + place``.

    The only sentence of a passage stays in it. A passage's draws depend on its row and the seed alone.
    """
    for row, (title, text) in enumerate(zip(passages.titles, passages.texts)):
        draw = random.Random(f"{seed} {row}")
        parts = sentences(text)
        fit = [place for place, part in enumerate(parts) if len(part.split()) >= fewest_words]
        for number_, place in enumerate(draw.sample(fit, min(count, len(fit)))):
            removed = len(parts) > 1 and draw.random() < removal_rate
            rest = " ".join(parts[:place] + parts[place + 1 :]) if removed else text
            yield row * count + number_, row, parts[place], title, rest


class _Source:
    """``(split, shuffle_files, seed)`` -> dataset of pairs; the corpus is read once."""

    __name__ = "inverse_cloze"

    def __init__(self, corpus: str | os.PathLike, draw: Any):
        self._corpus, self._draw = corpus, draw
        self._pairs: list[Pair] | None = None

    def __call__(self, split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split; its order is the pipeline's business
        if self._pairs is None:
            self._pairs = list(self._draw(read_passages_tsv(self._corpus)))
        if not self._pairs:
            raise UserError(f"{self._corpus}: no passage has a sentence long enough for inverse cloze")
        ids, rows, questions, titles, texts = zip(*self._pairs)
        fields = {
            "id": np.array(ids, np.int64),
            "question": list(questions),
            "titles": [[title] for title in titles],
            "texts": [[text] for text in texts],
            "rows": np.array(rows, np.int32)[:, None],
        }
        return tf.data.Dataset.from_tensor_slices(fields).map(pair_record)
