"""Build a passage index, a directory that can be moved, from passages in DPR's format or from documents.

Without a retriever the index is lexical (BM25); with one it is dense or, by default, both (hybrid). Without a
vocabulary one is trained on the passages.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from expertrag_jax import launch
from expertrag_jax.encoders import TrainedEncoder, load_encoder
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.ranges import Count, Seed, checked
from expertrag_jax.retrieval.corpus import Passages, Question, read_passages_tsv, read_questions_jsonl
from expertrag_jax.retrieval.documents import read_documents
from expertrag_jax.retrieval.index import KINDS, check_writable, make_index, verify_index, write_index
from expertrag_jax.retrieval.manifest import Manifest
from expertrag_jax.retrieval.metrics import gold_rows
from expertrag_jax.retrieval.protocol import Index, Queries
from expertrag_jax.retrieval.retriever import encode_passages, tokenize_passages
from expertrag_jax.vocabulary import Vocabulary, train_vocabulary

FLAGS = {
    "--corpus": ("corpus", "passages in DPR's format: a TSV file of id, text, title, plain or gzipped"),
    "--documents": ("documents", "folder or file of text, Markdown or JSON lines, in place of --corpus"),
    "--index_dir": ("index_dir", "folder of the index"),
    "--vocabulary": ("vocabulary", "the reader's SentencePiece model; trained on the passages if not there"),
    "--vocabulary_size": ("vocabulary_size", "pieces of a vocabulary that is trained"),
    "--kind": ("kind", "bm25, exact, scann or hybrid; by default hybrid with a retriever and bm25 without"),
    "--retriever": ("retriever", "MODEL_DIR of the trained dual encoder, for all kinds but bm25"),
    "--tune_questions": ("tune_questions", "questions with gold passages that tune ScaNN and the hybrid"),
    "--passage_length": ("passage_length", "tokens kept of a passage"),
    "--verify": ("verify", "build nothing: check every value of the index that is there"),
    "--overwrite": ("overwrite", "replace an index that is there"),
}
MACROS = ("INDEX_DIR", "CORPUS", "VOCABULARY")
EXAMPLE = "expertrag index --documents=notes/ --index_dir=runs/notes/index"
DENSE_KINDS = tuple(kind for kind in KINDS if kind != "bm25")

_LOG = logging.getLogger(__name__)
_SENTENCES = 200_000  # passages that a vocabulary is trained on, at most


@checked
def build_index(
    index_dir: LocalPath,
    corpus: LocalPath | None = None,
    documents: LocalPath | None = None,
    vocabulary: LocalPath | None = None,
    vocabulary_size: Count = 16384,
    kind: str | None = None,
    retriever: LocalPath | None = None,
    tune_questions: LocalPath | None = None,
    passage_length: Count = 160,
    max_words: Count = 100,
    batch_size: Count = 256,
    settings: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    overwrite: bool = False,
    verify: bool = False,
) -> Manifest:
    """Builds an index directory; it appears whole or not at all.

    Args:
      index_dir: new, or an index if ``overwrite``.
      corpus, documents: one of them; see ``retrieval.corpus.read_passages_tsv`` and
        ``retrieval.documents.read_documents``.
      vocabulary: model file of the reader, in which the index stores its passages. None: the retriever's, or
        ``vocabulary.model`` beside ``index_dir``. A file that is not there is trained and written.
      vocabulary_size: pieces, where it is trained.
      kind: of index; None: "hybrid" with a retriever, "bm25" without.
      retriever: checkpoint of the dual encoder; needed for all kinds but "bm25".
      tune_questions: JSON lines with gold passages, best of all questions that the retriever was not trained
        on: ScaNN searches as many leaves as recall@20 of .95 takes, the hybrid gets its weight.
      passage_length: S, tokens kept of ``title 1 text``. max_words: of a passage that is cut from documents.
      batch_size: passages embedded at a time. settings: of the kind's class. seed: of the vocabulary.
      overwrite: replace an index that is there, in one step.
      verify: build nothing, and check every value of the index that is there.

    Raises:
      UserError: bad files, a kind that does not fit, or a place that is taken; nothing is overwritten.
    """
    start = time.monotonic()
    if verify:
        loaded = verify_index(index_dir)
        print(f"{index_dir} is whole: a {loaded.manifest.kind} index of {len(loaded)} passages", flush=True)
        return loaded.manifest
    inputs = [corpus, documents, vocabulary, retriever, tune_questions]
    check_writable(index_dir, overwrite, inputs)
    kind = choose_kind(kind, retriever)
    index = make_index(kind, **(settings or {}))
    encoder = None if retriever is None or kind == "bm25" else load_encoder(retriever)
    passages = read_corpus(corpus, documents, max_words)
    print(f"{len(passages)} passages from {corpus or documents}", flush=True)
    words = find_vocabulary(vocabulary, index_dir, encoder, passages, vocabulary_size, seed)
    questions = None if tune_questions is None else read_tuning_questions(tune_questions, passages)
    tokens = tokenise(passages, words, passage_length)
    vectors = None if encoder is None else embed(passages, encoder, batch_size)
    index.build(passages, vectors)
    if questions is not None:
        tune(index, *questions, encoder, vectors)
    digests = {"reader": words.digest} | ({"retriever": encoder.vocabulary.digest} if encoder else {})
    manifest = write_index(
        index_dir, index, passages, passage_tokens=tokens, vectors=vectors, overwrite=overwrite,
        encoder_digest=encoder and encoder.digest,
        vocabulary_digests=digests,
    )  # fmt: skip
    seconds = time.monotonic() - start
    print(f"{kind} index of {manifest.count} passages in {seconds:.0f} s: {index_dir}", flush=True)
    return manifest


def choose_kind(kind: str | None, retriever: str | None) -> str:
    """The kind asked for, or the one that fits; UserError where it needs a retriever and there is none."""
    kind = kind or ("bm25" if retriever is None else "hybrid")
    if kind in DENSE_KINDS and retriever is None:
        raise UserError(f"a {kind} index needs vectors: give --retriever, a dual encoder's MODEL_DIR, or --kind=bm25.")
    return kind


def read_corpus(corpus: str | None, documents: str | None, max_words: int) -> Passages:
    """The passages; UserError unless exactly one of the two places is given."""
    if (corpus is None) == (documents is None):
        raise UserError("give either --corpus, a TSV file of passages, or --documents, a folder of text.")
    return read_passages_tsv(corpus) if documents is None else read_documents(documents, max_words)


def find_vocabulary(
    path: str | None, index_dir: str, encoder: TrainedEncoder | None, passages: Passages, size: int, seed: int
) -> Vocabulary:
    """The reader's vocabulary: the file, the retriever's, or a new one that is trained and written."""
    if path is None and encoder is not None:
        return encoder.vocabulary
    place = Path(path) if path is not None else Path(index_dir).absolute().parent / "vocabulary.model"
    if place.exists():
        found = Vocabulary.from_file(place)
        print(f"vocabulary {place}: {found.size} pieces", flush=True)
        return found
    _LOG.info("training a vocabulary of %d pieces on the passages", size)
    texts = itertools.chain.from_iterable(zip(passages.titles, passages.texts))
    found = train_vocabulary(texts, size, place, seed, byte_fallback=True, max_sentences=_SENTENCES)
    print(f"vocabulary {place}: {found.size} pieces, trained on the passages", flush=True)
    return found


def read_tuning_questions(path: str, passages: Passages) -> tuple[list[Question], list[set[int]]]:
    """Questions with gold passages and the rows of these; UserError where there are none."""
    questions = [question for question in read_questions_jsonl(path, False) if question.gold_passage_ids]
    if not questions:
        raise UserError(f"{path}: no question has gold_passage_ids, which --tune_questions needs.")
    return questions, gold_rows(questions, passages)


def tokenise(passages: Passages, vocabulary: Vocabulary, length: int) -> np.ndarray:
    """Stored tokens [N, S] int32; see ``retrieval.retriever.tokenize_passages``."""
    with _bar(len(passages), "tokenise") as progress:
        return tokenize_passages(passages, vocabulary.encode, length, progress)


def embed(passages: Passages, encoder: TrainedEncoder, batch_size: int) -> np.ndarray:
    """Vectors [N, D] float32; UserError where the checkpoint has no passage tower."""
    if encoder.encode_passages is None:
        raise UserError("the retriever's checkpoint has no passage tower: name the dual encoder's MODEL_DIR.")
    tokens = tokenise(passages, encoder.vocabulary, encoder.passage_length)
    with _bar(len(passages), "embed") as progress:
        return encode_passages(encoder.encode_passages, tokens, batch_size, progress)


def tune(
    index: Index,
    questions: list[Question],
    gold: list[set[int]],
    encoder: TrainedEncoder | None,
    vectors: np.ndarray | None,
) -> None:
    """Sets ScaNN's leaves and the hybrid's weight by questions with known answers, and prints both."""
    if encoder is None:
        return
    texts = [question.question for question in questions]
    queries = Queries(texts, np.asarray(encoder.encode_queries(encoder.tokenise(texts))))
    dense = getattr(index, "dense", index)
    if hasattr(dense, "tune"):
        reached = dense.tune(queries, vectors)
        print(f"ScaNN finds {reached:.3f} of the exact search's best 20", flush=True)
    if hasattr(index, "fit_weight"):
        recalls = index.fit_weight(queries, gold, never_below=(1, 5, 20, 100))
        print(f"hybrid: weight {index.weight:.2f} of the dense score, R@20 {recalls[index.weight]:.3f}", flush=True)


class _bar:
    """A progress bar that takes (done, total)."""

    def __init__(self, total: int, title: str):
        self._bar = tqdm(total=total, desc=title, unit="passage", unit_scale=True, leave=False)

    def __enter__(self):
        return lambda done, total: self._bar.update(done - self._bar.n)

    def __exit__(self, *_):
        self._bar.close()


if __name__ == "__main__":
    launch.run("expertrag_jax.index:build_index")
