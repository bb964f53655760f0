"""A retrieval cache on disk: what an index answered, so that the next epoch or run need not ask again."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from expertrag_jax.errors import UserError

_CHECKSUM = 8  # bytes


class RetrievalCache:
    """Rows and scores by (manifest digest, query-encoder digest, k, question), in one SQLite file.

    A result is found only under exactly the index and encoder that gave it, so one file may serve many. Threads of a
    data pipeline share an object, and several processes on one machine share a file: one of them writes at a time.
    Each result carries a checksum; one that was changed is refused. Results that earlier releases wrote have none and
    are not used.
    """

    def __init__(self, path: str | Path):
        """Open or create the file; UserError if it is something else."""
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()  # a connection of SQLite has one transaction, whichever thread begins it
        with self._explained("cannot serve as a retrieval cache"):
            self._connection = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
            with self._connection:
                self._connection.execute(
                    "CREATE TABLE IF NOT EXISTS checked_results "
                    "(key BLOB PRIMARY KEY, rows BLOB, scores BLOB, checksum BLOB) WITHOUT ROWID"
                )

    @staticmethod
    def _key(manifest_digest: str, encoder_digest: str | None, k: int, question: str) -> bytes:
        text = "\0".join((manifest_digest, encoder_digest or "", str(k), question))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    def get(
        self, manifest_digest: str, encoder_digest: str | None, k: int, questions: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """Per question: (rows [k] int32, scores [k] float32), or None where it is not in the cache.

        Raises:
          UserError: the file, or a result in it, is damaged.
        """
        return [self._get(self._key(manifest_digest, encoder_digest, k, question), k) for question in questions]

    def _get(self, key: bytes, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        with self._explained("cannot be read"), self._lock:
            found = self._connection.execute(
                "SELECT rows, scores, checksum FROM checked_results WHERE key = ?", (key,)
            ).fetchone()
        if found is None:
            return None
        rows, scores, checksum = found
        if checksum != _checksum(key, rows, scores) or not len(rows) == len(scores) == 4 * k:
            raise UserError(f"{self.path} is damaged (a result is not what was written): delete it, it is made again.")
        return np.frombuffer(rows, "<i4"), np.frombuffer(scores, "<f4")

    def put(
        self,
        manifest_digest: str,
        encoder_digest: str | None,
        questions: Sequence[str],
        rows: np.ndarray,
        scores: np.ndarray,
    ) -> None:
        """Store rows [B, k] and scores [B, k] of B questions; k is part of the key.

        Raises:
          UserError: the file cannot be written.
        """
        records = []
        for question, row, score in zip(questions, rows, scores, strict=True):
            key = self._key(manifest_digest, encoder_digest, rows.shape[1], question)
            stored = np.ascontiguousarray(row, "<i4").tobytes(), np.ascontiguousarray(score, "<f4").tobytes()
            records.append((key, *stored, _checksum(key, *stored)))
        with self._explained("cannot be written"), self._lock, self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO checked_results VALUES (?, ?, ?, ?)", records)

    def __len__(self) -> int:
        with self._explained("cannot be read"), self._lock:
            return self._connection.execute("SELECT COUNT(*) FROM checked_results").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if "full" in str(error):  # SQLite's word for a disk without room
                raise UserError(f"The disk is full: the retrieval cache {self.path} {what}. Make room.") from None
            raise UserError(f"{self.path} {what} ({error}): delete it, or name another file.") from None


def _checksum(key: bytes, rows: bytes, scores: bytes) -> bytes:
    return hashlib.sha256(key + rows + scores).digest()[:_CHECKSUM]
