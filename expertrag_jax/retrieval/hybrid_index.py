"""The hybrid index: a dense and a lexical index, their scores normalised per question and added."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import settings
from expertrag_jax.ranges import Count, Fraction, checked
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.lexical_index import LexicalIndex
from expertrag_jax.retrieval.mesh_index import ExactIndex
from expertrag_jax.retrieval.metrics import first_ranks
from expertrag_jax.retrieval.protocol import ABSENT_ROW, ABSENT_SCORE, REMEDY, Queries, absent, with_settings
from expertrag_jax.retrieval.scann_index import ScannIndex

_LOG = logging.getLogger(__name__)
_SETTINGS = "hybrid.json"
_DENSE = {"scann": ScannIndex, "exact": ExactIndex}


def normalise(scores: np.ndarray) -> np.ndarray:
    """Min-max normalisation of one question's candidates, per index.

        n_i = (s_i - min s) / (max s - min s)

    over the candidates found; 1 where all are equal, 0 where absent. So the best candidate of either index
    counts 1, its last one 0, as does a passage that is not among its candidates.

    Args:
      scores: [B, C] float32, ABSENT_SCORE where absent.

    Returns:
      [B, C] float32 in [0, 1].
    """
    found = scores > ABSENT_SCORE
    highest = np.max(scores, axis=1, keepdims=True, initial=ABSENT_SCORE)
    lowest = np.min(np.where(found, scores, np.inf), axis=1, keepdims=True, initial=np.inf)
    span = np.where(np.isfinite(lowest), highest - lowest, 0.0)
    safe = np.where(span > 0, span, 1.0)
    values = np.where(span > 0, (scores - np.where(np.isfinite(lowest), lowest, 0.0)) / safe, 1.0)
    return np.where(found, values, 0.0).astype(np.float32)


def combine(
    dense: tuple[np.ndarray, np.ndarray], lexical: tuple[np.ndarray, np.ndarray], weight: float, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sum of normalised scores over the union of candidates.

        score(p) = weight * n_dense(p) + (1 - weight) * n_lexical(p)

    Args:
      dense, lexical: (rows [B, C] int32, scores [B, C] float32) of each index.
      weight: of the dense index, in [0, 1].
      k: how many to return.

    Returns:
      rows [B, k] int32, scores [B, k] float32, best first; dense candidates first among equals.
    """
    rows, scores = absent(len(dense[0]), k)
    dense_scores = np.float32(weight) * normalise(dense[1])
    lexical_scores = np.float32(1 - weight) * normalise(lexical[1])
    for place in range(len(rows)):
        sums: dict[int, float] = {}
        for row, score in zip(dense[0][place].tolist(), dense_scores[place].tolist()):
            sums[row] = score
        for row, score in zip(lexical[0][place].tolist(), lexical_scores[place].tolist()):
            sums[row] = sums.get(row, 0.0) + score
        sums.pop(ABSENT_ROW, None)
        best = sorted(sums.items(), key=lambda item: -item[1])[:k]
        for rank, (row, score) in enumerate(best):
            rows[place, rank], scores[place, rank] = row, score
    return rows, scores


def sureness(ranks: np.ndarray, lexical_ranks: np.ndarray, cuts: Sequence[int]) -> float:
    """Mean gain over BM25 in standard errors.

    Args:
      ranks, lexical_ranks: [n], see `first_ranks`. cuts: cut-offs.

    Returns:
      (mean over questions and cut-offs) / (its standard error over questions); minus infinity where one of the
      cut-offs loses, 0 where nothing changes, infinity where every question gains the same.
    """
    gains = np.stack([(ranks < cut) * 1.0 - (lexical_ranks < cut) for cut in cuts])
    if (gains.mean(1) < 0).any():
        return -np.inf
    each = gains.mean(0)
    if not each.std():
        return np.inf if each.any() else 0.0
    return float(each.mean() / each.std() * len(each) ** 0.5)


@checked
class HybridIndex:
    """A dense and a lexical index searched side by side; see `normalise` and `combine` for the score.

    Attributes:
      dense: the dense index, "scann" or "exact" in the settings.
      lexical: the BM25 index.
      weight: of the dense score, in [0, 1]; `fit_weight` chooses it.
      candidates: taken from each index (at least 2 k).
    """

    kind: ClassVar[str] = "hybrid"
    metric: ClassVar[str] = "hybrid"
    needs_texts: ClassVar[bool] = True
    needs_vectors: ClassVar[bool] = True

    def __init__(
        self,
        dense: Literal["scann", "exact"] = "scann",
        weight: Fraction = 0.5,
        candidates: Count = 200,
        dense_settings: dict | None = None,
        lexical_settings: dict | None = None,
    ):
        self.weight = weight
        self.candidates = candidates
        self._dense_settings = dict(dense_settings or {})
        self.dense = with_settings(_DENSE[dense], self._dense_settings)
        self.lexical = with_settings(LexicalIndex, lexical_settings or {})

    @property
    def settings(self) -> dict:
        return {
            "weight": self.weight,
            "candidates": self.candidates,
            "dense": self.dense.kind,
            "dense_settings": self.dense.settings,
            "lexical_settings": self.lexical.settings,
        }

    def build(self, passages: Passages, vectors: np.ndarray | None) -> HybridIndex:
        """Build both indexes. Returns self."""
        self.dense.build(passages, vectors)
        self.lexical.build(passages)
        return self

    def search_both(self, queries: Queries, k: int) -> tuple[tuple, tuple]:
        """(rows, scores) [B, C] of the dense and of the lexical index, C = max(candidates, 2 k)."""
        wanted = max(self.candidates, 2 * k)
        return self.dense.search(queries, wanted), self.lexical.search(queries, wanted)

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B, k] int32 and combined scores [B, k] float32 in [0, 1]; see `Index.search`."""
        return combine(*self.search_both(queries, k), self.weight, k)

    def fit_weight(
        self,
        queries: Queries,
        gold_rows: Sequence[set[int]],
        k: int = 20,
        weights: Sequence[float] = tuple(np.linspace(0, 1, 21).tolist()),
        never_below: Sequence[int] = (),
    ) -> dict[float, float]:
        """Set `weight` to the one with the best recall@k on training questions, or, with `never_below`, to the surest.

        Among equals the middle one is taken, for the edge of a plateau is next to a fall; of the equally sure ones the
        smallest.

        Args:
          queries: B training questions, texts and vectors.
          gold_rows: B sets of rows that answer them.
          k: cut-off of the recall.
          weights: to try; 0 and 1 rank by one index, the other's candidates only fill up.
          never_below: cut-offs, none above half of `candidates`, at which the hybrid shall not lose to BM25 on other
            questions either. Then the weight is taken whose gain over weight 0 is surest: of those that lose at none
            of the cut-offs the one with the largest (mean gain over questions and cut-offs) / (its standard error
            over questions); 0 if none gains.

        Returns:
          recall@k by weight.
        """
        longest = max(k, *never_below, 0)
        both = self.search_both(queries, longest)
        ranks = {w: first_ranks(combine(*both, w, longest)[0], gold_rows) for w in sorted({0.0, *weights})}
        recalls = {weight: float(np.mean(ranks[weight] < k)) for weight in weights}
        if never_below:
            surest = {weight: sureness(found, ranks[0.0], never_below) for weight, found in ranks.items()}
            self.weight = float(max(surest, key=surest.get))
        else:
            best = [weight for weight in weights if recalls[weight] == max(recalls.values())]
            self.weight = float(best[len(best) // 2])
        _LOG.info(
            "hybrid weight %.2f: recall@%d %.4f on %d questions",
            self.weight,
            k,
            np.mean(ranks[self.weight] < k),
            len(queries),
        )
        return recalls

    def save(self, directory: Path) -> None:
        """Write the weight, and each index into its own folder."""
        directory = Path(directory)
        (directory / _SETTINGS).write_text(
            json.dumps({"weight": self.weight, "candidates": self.candidates, "dense": self.dense.kind})
        )
        for name, index in (("dense", self.dense), ("lexical", self.lexical)):
            (directory / name).mkdir()
            index.save(directory / name)

    def load(self, directory: Path, vectors: np.ndarray | None) -> HybridIndex:
        """Read what `save` wrote. Returns self."""
        directory = Path(directory)
        hints = {"weight": Fraction, "candidates": Count, "dense": Literal["scann", "exact"]}
        state = settings(directory / _SETTINGS, hints, REMEDY)
        self.weight, self.candidates = state["weight"], state["candidates"]
        if state["dense"] != self.dense.kind:
            self.dense = _DENSE[state["dense"]](**self._dense_settings)
        self.dense.load(directory / "dense", vectors)
        self.lexical.load(directory / "lexical")
        if self.dense.count != self.lexical.count:
            counts = f"{self.dense.count} passages by vectors and {self.lexical.count} by words"
            raise UserError(f"{directory} is damaged (it indexes {counts}): {REMEDY}.")
        return self

    @property
    def count(self) -> int:
        """Number of passages that are indexed."""
        return self.lexical.count

    def verify(self) -> None:
        """Checks both indexes."""
        self.dense.verify()
        self.lexical.verify()
