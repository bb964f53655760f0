"""The lexical index: BM25 over stemmed words (bm25s; Lù 2024, arXiv 2407.03618); ``words`` says what a word is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import check_fields, parsed, settings
from expertrag_jax.ranges import Count, Fraction, Weight, checked
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.protocol import REMEDY, Queries, absent, require_texts
from expertrag_jax.retrieval.words import RULE, without_accents, words_of

_SETTINGS, _SEARCHER = "bm25.json", "bm25"
StopWords = Literal[
    "english", "english_plus", "german", "dutch", "french", "spanish", "portuguese", "italian", "russian", "swedish",
    "norwegian", "chinese", "turkish", "korean", "danish",
]  # fmt: skip
"""Languages whose stop words bm25s knows."""
_HINTS = {
    "k1": Weight, "b": Fraction, "language": str | None, "stopwords": StopWords | None,
    "word_rule": Literal[1, 2, 3] | None,
}  # fmt: skip
_PARAMETERS = {
    "k1": Weight, "b": Fraction, "method": Literal["lucene"], "idf_method": Literal["lucene"],
    "dtype": Literal["float32"], "int_dtype": Literal["int32"], "num_docs": Count, "backend": Literal["numpy"],
}  # fmt: skip
"""What bm25s may find in its own file of parameters, which decides what it imports and allocates."""


def _bm25s() -> Any:
    # Imported when first used: importing it runs a JAX operation, which would start the backend before
    # jax.distributed.initialize can. It also sets its logger to DEBUG, which floods a root handler.
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


@checked
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
        k1: Weight = 1.5,
        b: Fraction = 0.75,
        language: str | None = "english",
        stopwords: StopWords | None = "english",
    ):
        if language is not None:
            _stemmer(language)
        self.settings: dict = {"k1": k1, "b": b, "language": language, "stopwords": stopwords}
        self._model: Any | None = None
        self._word_rule = RULE

    def _words(self, texts: Sequence[str]) -> Any:
        """bm25s's ``Tokenized``: per text the ids of its stems, and the id of each stem, in the order they occur in."""
        language = self.settings["language"]
        stem = None if language is None else _stemmer(language)
        # Stemmers of other languages than English, and their stop words, are written with accents.
        accents = language not in (None, "english")
        options = {"stopwords": self.settings["stopwords"] or [], "stemmer": None, "show_progress": False}
        if self._word_rule > 1:
            texts = ["\n".join(words_of(text, accents, self._word_rule)) for text in texts]
            options |= {"lower": False, "token_pattern": r"[^\n]+"}
        words = _bm25s().tokenize(list(texts), **options)
        if stem is None:
            return words
        stems = stem(list(words.vocab))
        if accents and self._word_rule > 1:
            stems = [without_accents(word, self._word_rule) for word in stems]
        id_of = {word: number for number, word in enumerate(dict.fromkeys(stems))}
        new_id = [id_of[word] for word in stems]
        return type(words)(ids=[[new_id[old] for old in ids] for ids in words.ids], vocab=id_of)

    def build(self, passages: Passages, vectors: np.ndarray | None = None) -> LexicalIndex:
        """Index title and text of N passages; vectors are ignored. Returns self."""
        words = self._words([f"{title} {text}" for title, text in zip(passages.titles, passages.texts)])
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
        words = self._words(texts)
        word_of = list(words.vocab)
        for place, numbers in enumerate(words.ids):
            ids = self._model.get_tokens_ids([word_of[number] for number in numbers])
            if ids:
                self._check_postings(ids)
                found, values = _best(self._model.get_scores_from_ids(ids), k)
                rows[place, : len(found)], scores[place, : len(found)] = found, values
        return rows, scores

    def save(self, directory: Path) -> None:
        """Write settings, bm25s's arrays (npy) and its vocabulary (JSON)."""
        directory = Path(directory)
        (directory / _SETTINGS).write_text(json.dumps(self.settings | {"word_rule": self._word_rule}))
        self._model.save(directory / _SEARCHER, allow_pickle=False, show_progress=False)

    def load(self, directory: Path, vectors: np.ndarray | None = None) -> LexicalIndex:
        """Read what `save` wrote, arrays memory-mapped. Returns self."""
        directory = Path(directory)
        self.settings = settings(directory / _SETTINGS, _HINTS, REMEDY)
        self._word_rule = self.settings.pop("word_rule", None) or 1
        parameters = directory / _SEARCHER / "params.index.json"
        check_fields(parsed(parameters, REMEDY), _PARAMETERS, parameters, REMEDY)
        try:
            self._model = _bm25s().BM25.load(directory / _SEARCHER, mmap=True, allow_pickle=False)
            self._check_arrays()
        except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, RecursionError) as error:
            raise UserError(f"{directory} is damaged ({' '.join(str(error).split())[:120]}): {REMEDY}.") from None
        return self

    @property
    def count(self) -> int:
        """Number of passages that are indexed."""
        return 0 if self._model is None else int(self._model.scores["num_docs"])

    def _check_arrays(self) -> None:
        """ValueError where the arrays of a compressed sparse matrix do not belong together."""
        scores = self._model.scores
        kinds = {"data": "float32", "indices": "int32", "indptr": "int64"}
        if any(scores[name].ndim != 1 or scores[name].dtype != dtype for name, dtype in kinds.items()):
            raise ValueError("its arrays are of other types")
        ends = scores["indptr"]
        if len(scores["data"]) != len(scores["indices"]) or not len(ends) or ends[-1] != len(scores["data"]):
            raise ValueError("its arrays differ in length")
        numbers = self._model.vocab_dict.values()
        if not numbers or not all(type(number) is int and 0 <= number < len(ends) for number in numbers):
            raise ValueError("its words have no places")
        if len(set(numbers)) < len(numbers):
            raise ValueError("two of its words share a place")

    def _check_postings(self, ids: Sequence[int]) -> None:
        """UserError where the words' places in the arrays, or the passages there, are outside of them."""
        scores = self._model.scores
        ends, last = scores["indptr"], len(scores["indptr"]) - 1
        for number in ids:
            start, end = int(ends[min(number, last)]), int(ends[min(number + 1, last)])
            rows = scores["indices"][start:end] if 0 <= start <= end <= len(scores["indices"]) else None
            if rows is None or (len(rows) and not (0 <= rows.min() and rows.max() < self.count)):
                raise UserError(f"the bm25 index is damaged (a word points to passages it does not hold): {REMEDY}.")
            weights = scores["data"][start:end]
            if not (np.isfinite(weights).all() and (weights >= 0).all()):
                raise UserError(f"the bm25 index is damaged (a word's weights are no weights): {REMEDY}.")

    def verify(self) -> None:
        """Checks every word's passages; UserError as ``search``."""
        self._check_postings(range(len(self._model.scores["indptr"]) - 1))


def _stemmer(language: str) -> Callable[[list[str]], list[str]]:
    """Stems of words; UserError for a language that has no stemmer."""
    import Stemmer

    try:
        return Stemmer.Stemmer(language).stemWords
    except KeyError:
        known = ", ".join(Stemmer.algorithms())
        raise UserError(f"no stemmer for language {language!r}: choose one of {known}") from None


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The at most k rows of positive score, best first, the lower row first among equals of those chosen."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        rows = rows[np.argpartition(-scores[rows], k - 1)[:k]]
    rows = rows[np.lexsort((rows, -scores[rows]))]
    return rows.astype(np.int32), scores[rows]
