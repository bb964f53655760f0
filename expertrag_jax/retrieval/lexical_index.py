"""The lexical index: BM25 over stemmed words (bm25s; Lù 2024, arXiv 2407.03618)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.protocol import Queries, absent, require_texts

_SETTINGS, _SEARCHER = "bm25.json", "bm25"


def _bm25s() -> Any:
    # Imported when first used: importing it runs a JAX operation, which would start the backend before
    # jax.distributed.initialize can. It also sets its logger to DEBUG, which floods a root handler.
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


class LexicalIndex:
    """BM25 in Lucene's form over the words of title and text.

        score(q, p) = sum over words w of q of  idf(w) tf(w, p) / (tf(w, p) + k1 (1 - b + b |p| / mean |p|))

    A passage that shares no word with the question is not found.

    Attributes:
      k1, b: BM25's saturation and length normalisation.
      language: of the stemmer (PyStemmer's names); None for no stemming.
      stopwords: language whose stop words are dropped; None to keep all.
    """

    kind: ClassVar[str] = "bm25"
    metric: ClassVar[str] = "bm25"
    needs_texts: ClassVar[bool] = True
    needs_vectors: ClassVar[bool] = False

    def __init__(
        self,
        k1: float = 1.5,
        b: float = 0.75,
        language: str | None = "english",
        stopwords: str | None = "english",
    ):
        self.settings: dict = {"k1": k1, "b": b, "language": language, "stopwords": stopwords}
        self._model: Any | None = None

    def _words(self, texts: Sequence[str], return_ids: bool) -> Any:
        stemmer = None
        if self.settings["language"] is not None:
            import Stemmer

            try:
                stemmer = Stemmer.Stemmer(self.settings["language"])
            except KeyError:
                raise UserError(
                    f"no stemmer for language {self.settings['language']!r}: choose one of "
                    f"{', '.join(Stemmer.algorithms())}"
                ) from None
        return _bm25s().tokenize(
            list(texts),
            stopwords=self.settings["stopwords"] or [],
            stemmer=stemmer,
            return_ids=return_ids,
            show_progress=False,
        )

    def build(self, passages: Passages, vectors: np.ndarray | None = None) -> LexicalIndex:
        """Index title and text of N passages; vectors are ignored. Returns self."""
        words = self._words(
            [f"{title} {text}" for title, text in zip(passages.titles, passages.texts)], return_ids=True
        )
        if not words.vocab or not any(words.ids):
            raise UserError("the corpus holds no words to index: lexical search needs texts or titles")
        self._model = _bm25s().BM25(k1=self.settings["k1"], b=self.settings["b"], method="lucene")
        self._model.index(words, show_progress=False)
        return self

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B, k] int32 and BM25 scores [B, k] float32, best first; see `Index.search`."""
        if self._model is None:
            raise ValueError("the bm25 index has not been built")
        texts = require_texts(queries, self.kind)
        rows, scores = absent(len(texts), k)
        if not len(texts):
            return rows, scores
        for place, words in enumerate(self._words(texts, return_ids=False)):
            ids = self._model.get_tokens_ids(words)
            if ids:
                found, values = _best(self._model.get_scores_from_ids(ids), k)
                rows[place, : len(found)], scores[place, : len(found)] = found, values
        return rows, scores

    def save(self, directory: Path) -> None:
        """Write settings, bm25s's arrays (npy) and its vocabulary (JSON)."""
        directory = Path(directory)
        (directory / _SETTINGS).write_text(json.dumps(self.settings))
        self._model.save(directory / _SEARCHER, allow_pickle=False, show_progress=False)

    def load(self, directory: Path, vectors: np.ndarray | None = None) -> LexicalIndex:
        """Read what `save` wrote, arrays memory-mapped. Returns self."""
        directory = Path(directory)
        self.settings = json.loads((directory / _SETTINGS).read_text())
        self._model = _bm25s().BM25.load(directory / _SEARCHER, mmap=True, allow_pickle=False)
        return self


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The at most k rows of positive score, best first, the lower row first among equals of those chosen."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        rows = rows[np.argpartition(-scores[rows], k - 1)[:k]]
    rows = rows[np.lexsort((rows, -scores[rows]))]
    return rows.astype(np.int32), scores[rows]
