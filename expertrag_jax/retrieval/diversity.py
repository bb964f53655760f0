"""An alarm for collapsed retrieval: the same passages for every question.

RAG may fall into it while its loss still falls (arXiv 2005.11401, appendix H): the generator learns to ignore the
passages, so the query encoder gets no gradient that would bring them back.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence

import numpy as np

ADVICE = (
    "start the query encoder from a trained retriever, lower the learning rate, warm the generator up on gold "
    "passages, or raise RAG.temperature"
)


class RetrievalCollapse:
    """Watches which passages are retrieved, over the last ``window`` different questions.

    Diversity is 0 where all questions get the same K passages and 1 where none shares any: with H the entropy of the
    passages over the window, (H - log K) / (log(min(N, K * questions)) - log K).
    """

    def __init__(self, passages: int, window: int = 1000, least: float = 0.1):
        """passages: N of the index. window: questions. least: diversity below which it is a collapse."""
        self._passages, self._window, self._least = passages, window, least
        self._found: collections.OrderedDict[Hashable, np.ndarray] = collections.OrderedDict()
        self._collapsed, self._since = False, 0

    def observe(self, questions: Sequence[Hashable], rows: np.ndarray) -> str | None:
        """Takes the passages of a batch, and gives a warning when retrieval has collapsed, once until it recovers.

        Args:
          questions: B names, equal for equal questions. rows: [B, K] int32, -1 where there is none.
        """
        for question, row in zip(questions, rows):
            self._found[question] = np.asarray(row)
            self._found.move_to_end(question)
        while len(self._found) > self._window:
            self._found.popitem(last=False)
        self._since += len(questions)
        if self._since < max(1, self._window // 4):  # the figure is over all of the window: not after every batch
            return None
        self._since = 0
        diversity = self.diversity()
        was, self._collapsed = self._collapsed, diversity is not None and diversity < self._least
        if was or not self._collapsed:
            return None
        return (
            f"Retrieval collapses: the last {len(self._found)} different questions got nearly the same passages "
            f"(diversity {diversity:.3f}, alarm below {self._least}); {ADVICE}."
        )

    def diversity(self) -> float | None:
        """In [0, 1]; None where too little has been seen or there is nothing to choose from."""
        if len(self._found) < 2:
            return None
        rows = np.concatenate(list(self._found.values()))
        counts = np.unique(rows[rows >= 0], return_counts=True)[1]
        per_question = max(len(row) for row in self._found.values())
        possible = min(self._passages, per_question * len(self._found))
        if not len(counts) or possible <= per_question:
            return None
        share = counts / counts.sum()
        entropy = -(share * np.log(share)).sum()
        lowest = np.log(per_question)
        return float(np.clip((entropy - lowest) / (np.log(possible) - lowest), 0.0, 1.0))
