"""What an index is: the questions it is asked, and the four things it does."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np

from expertrag_jax.errors import UserError
from expertrag_jax.mips import ABSENT_ROW, ABSENT_SCORE

if TYPE_CHECKING:
    from expertrag_jax.retrieval.corpus import Passages

__all__ = [
    "ABSENT_ROW", "ABSENT_SCORE", "REMEDY", "Index", "Queries", "require_texts", "require_vectors", "with_settings",
]  # fmt: skip

_T = TypeVar("_T")
REMEDY = "copy the whole directory again, or build the index again"
"""How a damaged index is mended, for messages."""


def with_settings(cls: type[_T], settings: Mapping[str, Any]) -> _T:
    """An object of an index's class, with settings that a user gave.

    Raises:
      UserError: the class has no such setting, or a value is outside its range.
    """
    known = list(inspect.signature(cls).parameters)
    for name in settings:
        if name not in known:
            raise UserError(f"the {cls.kind} index has no setting {name!r}: it has {', '.join(known)}.")
    return cls(**settings)


@dataclasses.dataclass(frozen=True)
class Queries:
    """A batch of questions; each kind of index takes what it needs.

    Attributes:
      texts: B strings, for lexical search; None where only vectors are known.
      vectors: [B, D] float32, for dense search; None where only texts are known.
    """

    texts: Sequence[str] | None = None
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts) if self.texts is not None else len(self.vectors)

    def take(self, places: Sequence[int]) -> Queries:
        """The questions at the given places, in that order."""
        return Queries(
            None if self.texts is None else [self.texts[place] for place in places],
            None if self.vectors is None else self.vectors[np.asarray(places, np.int64)],
        )


@runtime_checkable
class Index(Protocol):
    """An interchangeable way to find passages. Implementations are built empty, then built or loaded.

    Attributes:
      kind: the name that gin files and manifests use.
      metric: what a score means: "dot_product", "bm25", "hybrid".
      needs_texts, needs_vectors: what `search` asks of its Queries.
      settings: JSON-able parameters, recorded in the manifest.
    """

    kind: ClassVar[str]
    metric: ClassVar[str]
    needs_texts: ClassVar[bool]
    needs_vectors: ClassVar[bool]
    settings: dict

    def build(self, passages: Passages, vectors: np.ndarray | None) -> Index:
        """Index N passages with vectors [N, D] float32 (None for a lexical index). Returns self."""

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k best passages of each question.

        Returns:
          rows [B, k] int32 and scores [B, k] float32, best first. Where fewer than k passages are found, the
          rest is ABSENT_ROW (-1) with ABSENT_SCORE.
        """

    @property
    def count(self) -> int:
        """Number of passages that are indexed."""

    def verify(self) -> None:
        """Check every value that points somewhere, not only what a `search` reads; UserError if one points outside."""

    def save(self, directory: Path) -> None:
        """Write what `load` needs, other than the vectors, into an existing directory."""

    def load(self, directory: Path, vectors: np.ndarray | None) -> Index:
        """Read what `save` wrote; `vectors` are those given to `build`. Returns self."""


def require_vectors(queries: Queries, dimension: int, kind: str) -> np.ndarray:
    """The queries' vectors [B, D] float32; UserError if absent or of another width than the index."""
    if queries.vectors is None:
        raise UserError(f"the {kind} index searches by vectors: give the retriever a query encoder")
    vectors = np.asarray(queries.vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dimension:
        raise UserError(
            f"query vectors have shape {vectors.shape} but the {kind} index has dimension {dimension}: "
            "use the query encoder that was trained with the index's passage encoder"
        )
    return vectors


def require_texts(queries: Queries, kind: str) -> Sequence[str]:
    """The queries' texts; UserError if absent."""
    if queries.texts is None:
        raise UserError(f"the {kind} index searches by words: pass the questions' texts")
    return queries.texts


def absent(batch: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A result in which nothing was found: rows [batch, k] int32, scores [batch, k] float32."""
    return np.full((batch, k), ABSENT_ROW, np.int32), np.full((batch, k), ABSENT_SCORE, np.float32)
