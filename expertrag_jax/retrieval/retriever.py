"""The retriever: from questions to passages, over whichever index is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.evidence import SEPARATOR
from expertrag_jax.retrieval.cache import RetrievalCache
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import LoadedIndex
from expertrag_jax.retrieval.manifest import check_matches
from expertrag_jax.retrieval.protocol import ABSENT_ROW, Queries, absent

_LOG = logging.getLogger(__name__)


class Retrieved(NamedTuple):
    """What was found for B questions.

    Attributes:
      rows: [B, k] int32, best first; -1 where fewer than k passages were found.
      scores: [B, k] float32; ABSENT_SCORE there.
      passage_tokens: [B, k, S] int32, `title 1 text`, all zero there; None if the index stores no tokens.
    """

    rows: np.ndarray
    scores: np.ndarray
    passage_tokens: np.ndarray | None


class Retriever:
    """Encodes questions, asks the index, looks up the passages' tokens.

    The index can be swapped for a newer version at any time (`swap`); nothing else changes.

    Attributes:
      loaded: the open index.
      encode_query: query_tokens [B, Lq] int32 -> vectors [B, D]; None for a lexical index. It is called with
        B a power of two (rows of zeros fill up), so a jitted function compiles a few programs and no more.
      encoder_digest: of the query encoder's parameters, for the cache's key.
      cache: results of earlier calls, or None.
    """

    def __init__(
        self,
        loaded: LoadedIndex,
        encode_query: Callable[[np.ndarray], Any] | None = None,
        *,
        encoder_digest: str | None = None,
        cache: RetrievalCache | None = None,
        max_batch: int = 256,
    ):
        if loaded.index.needs_vectors and encode_query is None:
            raise UserError(
                f"the {loaded.manifest.kind} index at {loaded.directory} searches by vectors: give a query "
                "encoder"
            )
        if cache is not None and encode_query is not None and encoder_digest is None:
            raise ValueError(
                "a cache needs encoder_digest, or results of another query encoder would be served"
            )
        self.loaded = loaded
        self.encode_query = encode_query
        self.encoder_digest = encoder_digest
        self.cache = cache
        self.max_batch = max_batch

    def swap(self, loaded: LoadedIndex) -> LoadedIndex:
        """Serve another version of the index from now on; returns the previous one.

        Raises:
          UserError: it was built with another passage encoder, vocabulary or width, or searches otherwise.
        """
        old, new = self.loaded.manifest, loaded.manifest
        check_matches(
            new,
            vocabulary_digest=old.vocabulary_digests.get("reader"),
            retriever_vocabulary_digest=old.vocabulary_digests.get("retriever"),
            encoder_digest=old.encoder_digest,
            dimension=old.dimension,
        )
        if loaded.index.needs_vectors and self.encode_query is None:
            raise UserError(
                f"the {new.kind} index at {loaded.directory} searches by vectors: give a query encoder"
            )
        previous, self.loaded = self.loaded, loaded
        return previous

    def retrieve(self, texts: Sequence[str] | None, query_tokens: np.ndarray | None, k: int) -> Retrieved:
        """The k best passages of each question.

        Args:
          texts: B questions; needed by lexical search and by the cache.
          query_tokens: [B, Lq] int32 in the retriever's vocabulary; needed by dense search.
          k: passages per question; may exceed the corpus.
        """
        rows, scores = self.search(texts, query_tokens, k)
        return Retrieved(rows, scores, self.tokens_of(rows))

    def tokens_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Stored tokens [..., S] int32 of rows [...], zeros where absent; None if the index has none."""
        tokens = self.loaded.tokens
        if tokens is None:
            return None
        self._check_rows(rows)
        found = np.asarray(tokens[np.maximum(rows, 0)], np.int32)
        if found.size and found.min() < 0:
            raise UserError(f"{self.loaded.directory} is damaged (it stores negative tokens): build the index again.")
        found[rows == ABSENT_ROW] = 0
        return found

    def vectors_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Vectors [..., D] float32 of rows [...], zeros where absent; None if the index has none."""
        vectors = self.loaded.vectors
        if vectors is None:
            return None
        self._check_rows(rows)
        found = np.asarray(vectors[np.maximum(rows, 0)], np.float32)
        found[rows == ABSENT_ROW] = 0
        return found

    def search(
        self, texts: Sequence[str] | None, query_tokens: np.ndarray | None, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``retrieve`` without the passages' tokens: rows [B, k] int32 and scores [B, k] float32."""
        if self.cache is None or texts is None:
            rows, scores = self._search(texts, query_tokens, k)
            self._check_rows(rows)
            return rows, scores
        digest = self.loaded.manifest.digest
        known = self.cache.get(digest, self.encoder_digest, k, texts)
        rows, scores = absent(len(texts), k)
        new = [place for place, result in enumerate(known) if result is None]
        if new:
            tokens = None if query_tokens is None else np.asarray(query_tokens)[new]
            asked = [texts[place] for place in new]
            rows[new], scores[new] = self._search(asked, tokens, k)
            self.cache.put(digest, self.encoder_digest, asked, rows[new], scores[new])
        for place, result in enumerate(known):
            if result is not None:
                rows[place], scores[place] = result
        self._check_rows(rows)
        return rows, scores

    def _check_rows(self, rows: np.ndarray) -> None:
        """Raises UserError if a row points outside the corpus, as those of a manipulated index may."""
        if rows.size and not (ABSENT_ROW <= rows.min() and rows.max() < len(self.loaded)):
            raise UserError(
                f"{self.loaded.directory} is damaged (it finds passages that it does not hold): build the index again."
            )

    def _search(self, texts, query_tokens, k):
        vectors = None
        if self.loaded.index.needs_vectors:
            if query_tokens is None:
                raise UserError(
                    f"the {self.loaded.manifest.kind} index searches by vectors: pass the query tokens"
                )
            vectors = encode_batches(self.encode_query, np.asarray(query_tokens, np.int32), self.max_batch)
        return self.loaded.index.search(Queries(texts, vectors), k)


def stored_vectors(retriever: Retriever) -> Callable[[np.ndarray], np.ndarray]:
    """Rows [..., K] int32 -> vectors [..., K, D] float32 of the retriever's index, for training on its candidates.

    Raises:
      UserError: the index has no vectors.
    """
    if retriever.loaded.vectors is None:
        raise UserError(
            f"the {retriever.loaded.manifest.kind} index at {retriever.loaded.directory} has no vectors: build one "
            "with --retriever, the dual encoder that is to learn"
        )
    return retriever.vectors_of


def encode_batches(
    encode: Callable[[np.ndarray], Any],
    tokens: np.ndarray,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Run an encoder over rows of tokens in batches of static sizes.

    Full batches have `batch_size` rows; the last one is filled with rows of zeros to a power of two.

    Args:
      encode: [b, L] int32 -> [b, D].
      tokens: [N, L] int32, 0-padded (an array or a memory map).
      batch_size: rows per call.
      progress: called with (rows done, N) after each batch.
      out: [N, D] float32 to fill (such as a memory map); allocated if None.

    Returns:
      [N, D] float32.
    """
    total = len(tokens)
    if not total:
        raise ValueError("nothing to encode")
    for start in range(0, total, batch_size):
        part = np.asarray(tokens[start : start + batch_size], np.int32)
        size = len(part)
        filled = min(1 << (size - 1).bit_length(), batch_size)
        vectors = np.asarray(encode(np.pad(part, ((0, filled - size), (0, 0)))), np.float32)
        if out is None:
            out = np.empty((total, vectors.shape[1]), np.float32)
        out[start : start + size] = vectors[:size]
        if progress is not None:
            progress(start + size, total)
    return out


def encode_passages(
    encode_passage: Callable[[np.ndarray], Any],
    passage_tokens: np.ndarray,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Embed a corpus: passage_tokens [N, S] int32 (retriever's vocabulary) -> vectors [N, D] float32.

    See `encode_batches`; with `out` a memory map, nothing but one batch is held in memory.
    """
    return encode_batches(encode_passage, passage_tokens, batch_size, progress, out)


def tokenize_passages(
    passages: Passages,
    encode: Callable[[str], Sequence[int]],
    length: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Tokens that an index stores and a passage encoder reads: `title 1 text`, cut at `length`, 0-padded.

    How many passages were cut is logged.

    Args:
      passages: N passages.
      encode: text -> ids without EOS, such as `Vocabulary.encode`.
      length: S.
      progress: called with (rows done, N) every 4096 passages and at the end.

    Returns:
      [N, S] int32.
    """
    tokens = np.zeros((len(passages), length), np.int32)
    cut = 0
    for row, (title, text) in enumerate(zip(passages.titles, passages.texts)):
        ids = [*encode(title), SEPARATOR, *encode(text)]
        cut += len(ids) > length
        tokens[row, : min(len(ids), length)] = ids[:length]
        if progress is not None and ((row + 1) % 4096 == 0 or row + 1 == len(passages)):
            progress(row + 1, len(passages))
    if cut:
        _LOG.warning("%d of %d passages are longer than %d tokens and were cut", cut, len(passages), length)
    return tokens
