"""The exact index: every vector scored, on whatever mesh there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import settings
from expertrag_jax.mips import DEFAULT_BLOCK_SIZE, sharded_topk
from expertrag_jax.ranges import Count, Share, checked
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.protocol import REMEDY, Queries, absent, require_vectors

_SETTINGS = "exact.json"


def _bucket(size: int) -> int:
    """The next power of two: a few compiled shapes serve every batch size and k."""
    return 1 << max(0, size - 1).bit_length()


@checked
class ExactIndex:
    """Exact (or `approx_max_k`) maximum inner product search over vectors that are split over a mesh.

    Attributes:
      mesh: devices that hold the vectors; one device of this process by default.
      axis: mesh axis, or axes, over which the vectors are split; all axes by default.
      block_size: rows scored at a time per device.
      recall_target: None for exact search; else the recall that `lax.approx_max_k` aims at (fast on TPUs).
      max_batch: queries per call of the compiled program; larger batches are cut.
    """

    kind: ClassVar[str] = "exact"
    metric: ClassVar[str] = "dot_product"
    needs_texts: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = True

    def __init__(
        self,
        mesh: Mesh | None = None,
        axis: str | tuple[str, ...] | None = None,
        block_size: Count = DEFAULT_BLOCK_SIZE,
        recall_target: Share | None = None,
        max_batch: Count = 256,
    ):
        if mesh is None:
            mesh = jax.make_mesh((1,), ("passages",), (AxisType.Auto,), devices=jax.local_devices()[:1])
        axis = tuple(mesh.axis_names) if axis is None else axis
        self.mesh = mesh
        self.axis = (axis,) if isinstance(axis, str) else tuple(axis)
        self.block_size = block_size
        self.recall_target = recall_target
        self.max_batch = max_batch
        self._count = 0
        self._vectors: jax.Array | None = None
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._search = jax.jit(self._topk, static_argnames="k", out_shardings=self._replicated)

    @property
    def settings(self) -> dict:
        return {"block_size": self.block_size, "recall_target": self.recall_target}

    def _topk(self, queries, vectors, count, k):
        return sharded_topk(
            queries,
            vectors,
            k,
            mesh=self.mesh,
            axis=self.axis,
            count=count,
            block_size=self.block_size,
            recall_target=self.recall_target,
        )

    def build(self, passages: Passages | None, vectors: np.ndarray | None) -> ExactIndex:
        """Put vectors [N, D] on the mesh, padded with zero rows to a multiple of the shards. Returns self."""
        if vectors is None or vectors.ndim != 2 or not len(vectors):
            raise UserError("the exact index needs one vector per passage: embed the passages first")
        shards = int(np.prod([self.mesh.shape[name] for name in self.axis]))
        count, dimension = vectors.shape
        padded = -(-count // shards) * shards

        def part(where):
            # each process reads only the rows that its devices hold (vectors may be a memory map)
            start, stop, _ = where[0].indices(padded)
            rows = np.asarray(vectors[start : min(stop, count)], np.float32)
            return np.pad(rows, ((0, stop - start - len(rows)), (0, 0)))

        sharding = NamedSharding(self.mesh, PartitionSpec(self.axis))
        self._vectors = jax.make_array_from_callback((padded, dimension), sharding, part)
        self._count = count
        return self

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B, k] int32 and inner products [B, k] float32, best first; see `Index.search`."""
        if self._vectors is None:
            raise ValueError("the exact index has not been built")
        vectors = require_vectors(queries, self._vectors.shape[1], self.kind)
        rows, scores = absent(len(vectors), k)
        for start in range(0, len(vectors), self.max_batch):
            part = vectors[start : start + self.max_batch]
            size = len(part)
            part = np.pad(part, ((0, min(_bucket(size), self.max_batch) - size), (0, 0)))
            with jax.set_mesh(self.mesh):  # a training run that asks has a mesh of its own around it
                found = self._search(part, self._vectors, np.int32(self._count), k=_bucket(k))
            rows[start : start + size], scores[start : start + size] = (
                np.asarray(array)[:size, :k] for array in found
            )
        return rows, scores

    @property
    def count(self) -> int:
        """Number of passages that are indexed."""
        return self._count

    def verify(self) -> None:
        """Nothing to check: there are only vectors."""

    def save(self, directory: Path) -> None:
        """Settings only: the vectors are the index directory's own."""
        (Path(directory) / _SETTINGS).write_text(json.dumps(self.settings))

    def load(self, directory: Path, vectors: np.ndarray | None) -> ExactIndex:
        """Read what `save` wrote and put the vectors on the mesh. Returns self."""
        path = Path(directory) / _SETTINGS
        if path.is_file():
            hints = {"block_size": Count, "recall_target": Share | None}
            saved = settings(path, hints, REMEDY)
            self.block_size, self.recall_target = saved["block_size"], saved["recall_target"]
        return self.build(None, vectors)
