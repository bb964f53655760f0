"""A retrieval cache on disk: what an index answered, so that the next epoch or run need not ask again."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertrag_jax.errors import UserError


class RetrievalCache:
    """Rows and scores by (manifest digest, query-encoder digest, k, question), in one SQLite file.

    A result is found only under exactly the index and encoder that gave it, so one file may serve many.
    Several processes on one machine may share it.
    """

    def __init__(self, path: str | Path):
        """Open or create the file; UserError if it is something else."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # threads of a data pipeline may call in turn; SQLite itself serialises them
            self._connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS results (key BLOB PRIMARY KEY, rows BLOB, scores BLOB) "
                    "WITHOUT ROWID"
                )
        except sqlite3.Error as error:
            raise UserError(
                f"{self.path} cannot serve as a retrieval cache ({error}): name another file"
            ) from None

    @staticmethod
    def _key(manifest_digest: str, encoder_digest: str | None, k: int, question: str) -> bytes:
        text = "\0".join((manifest_digest, encoder_digest or "", str(k), question))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    def get(
        self, manifest_digest: str, encoder_digest: str | None, k: int, questions: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Per question: (rows [k] int32, scores [k] float32), or None where it is not in the cache."""
        results = []
        for question in questions:
            key = self._key(manifest_digest, encoder_digest, k, question)
            found = self._connection.execute(
                "SELECT rows, scores FROM results WHERE key = ?", (key,)
            ).fetchone()
            results.append(
                None if found is None else (np.frombuffer(found[0], "<i4"), np.frombuffer(found[1], "<f4"))
            )
        return results

    def put(
        self,
        manifest_digest: str,
        encoder_digest: str | None,
        questions: Sequence[str],
        rows: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Store rows [B, k] and scores [B, k] of B questions; k is part of the key."""
        k = rows.shape[1]
        records = [
            (
                self._key(manifest_digest, encoder_digest, k, question),
                np.ascontiguousarray(row, "<i4").tobytes(),
                np.ascontiguousarray(score, "<f4").tobytes(),
            )
            for question, row, score in zip(questions, rows, scores, strict=True)
        ]
        with self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", records)

    def __len__(self) -> int:
        return self._connection.execute("SELECT COUNT(*) FROM results").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
