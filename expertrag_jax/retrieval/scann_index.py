"""The approximate index: ScaNN's quantised tree search (Guo et al. 2020, arXiv 1908.10396).

ScaNN is imported inside functions: its package imports TensorFlow, which takes seconds and has no place in
the core.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from expertrag_jax import native_output, ranges
from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import array, settings
from expertrag_jax.ranges import Count, Natural
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.mesh_index import ExactIndex
from expertrag_jax.retrieval.metrics import index_recall
from expertrag_jax.retrieval.protocol import ABSENT_ROW, ABSENT_SCORE, REMEDY, Queries, absent, require_vectors

_LOG = logging.getLogger(__name__)
_SETTINGS, _SEARCHER = "scann.json", "scann"
SMALLEST_CORPUS = 1000  # below it an exact search is faster, and a tree has too little to learn from
_TRAINING_SAMPLE = 250_000
_ROWS_AT_A_TIME = 65_536


def automatic_parameters(count: int) -> dict[str, int]:
    """Tree and reordering parameters by corpus size.

    sqrt(N) leaves balance the two scans, of centroids and of leaves. 200 leaves are searched (all of them
    below 40,000 passages); 400 candidates of the quantised scan are scored exactly. Measured on 66 thousand
    Wikipedia passages (TF-IDF projected to 128 dimensions, real questions) that finds .98 of the exact best
    20 and more where vectors have unit length. `ScannIndex.tune` raises the leaves to reach a recall.

    Args:
      count: N passages.

    Returns:
      num_leaves, leaves_to_search, reorder.
    """
    leaves = max(8, round(math.sqrt(count)))
    return {"num_leaves": leaves, "leaves_to_search": min(leaves, 200), "reorder": 400}


def _pybind() -> Any | None:
    """ScaNN's binding, or None where it cannot be imported (outside Linux x86-64, say)."""
    if importlib.util.find_spec("scann") is None:
        return None
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except (ImportError, OSError) as error:
        _LOG.warning("scann is installed but cannot be imported: %s", error)
        return None
    return scann_ops_pybind


@ranges.checked
class ScannIndex:
    """Tree, asymmetric hashing and exact reordering over float32 vectors, by inner product.

    Below 1,000 passages, or where ScaNN cannot be imported, an `ExactIndex` serves and one log line says so.

    Attributes:
      num_leaves: leaves of the tree; by `automatic_parameters` where None, as the next two.
      leaves_to_search: leaves scanned per question: recall against time.
      reorder: candidates that are scored exactly (at least 8 k).
      threads: that train the tree and the quantiser; 0 means all cores. On 66 thousand passages one and two threads
        took the same time and made equal files.
    """

    kind: ClassVar[str] = "scann"
    metric: ClassVar[str] = "dot_product"
    needs_texts: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = True

    def __init__(
        self,
        num_leaves: Count | None = None,
        leaves_to_search: Count | None = None,
        reorder: Count | None = None,
        threads: Natural = 1,
    ):
        self._asked = {"num_leaves": num_leaves, "leaves_to_search": leaves_to_search, "reorder": reorder}
        self.threads = threads
        self.settings: dict = dict(self._asked)
        self._searcher: Any | None = None
        self._vectors: np.ndarray | None = None  # the index's, and ScaNN's folder, once loaded
        self._folder: Path | None = None
        self._exact: ExactIndex | None = None
        self._count, self._dimension = 0, 0

    @property
    def is_exact(self) -> bool:
        """Whether the exact index serves in ScaNN's place."""
        return self._exact is not None

    def _serve_exactly(self, vectors: np.ndarray, why: str) -> ScannIndex:
        _LOG.info("%s: the exact index serves in place of ScaNN", why)
        self._exact = ExactIndex().build(None, vectors)
        return self

    def build(self, passages: Passages | None, vectors: np.ndarray | None) -> ScannIndex:
        """Train the tree and the quantiser on vectors [N, D] and index them. Returns self."""
        if vectors is None or vectors.ndim != 2 or not len(vectors):
            raise UserError("the scann index needs one vector per passage: embed the passages first")
        vectors = np.ascontiguousarray(vectors, np.float32)
        self._count, self._dimension = vectors.shape
        automatic = automatic_parameters(self._count)
        self.settings = {name: automatic[name] if value is None else value for name, value in self._asked.items()}
        self.settings["leaves_to_search"] = min(self.settings["leaves_to_search"], self.settings["num_leaves"])
        if self._count < SMALLEST_CORPUS:
            return self._serve_exactly(vectors, f"{self._count} passages are fewer than {SMALLEST_CORPUS}")
        pybind = _pybind()
        if pybind is None:
            return self._serve_exactly(vectors, "scann cannot be imported on this machine")
        builder = pybind.builder(vectors, 10, "dot_product")
        builder = builder.tree(
            num_leaves=self.settings["num_leaves"],
            num_leaves_to_search=self.settings["leaves_to_search"],
            training_sample_size=min(self._count, _TRAINING_SAMPLE),
            # ScaNN draws random centres without a seed, so two builds differ; k-means++ costs 10% more and repeats
            random_init=False,
        )
        # 0.2: errors along a vector cost more than errors across it, for they change large inner products
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(self.settings["reorder"])
        with native_output.held_back():  # ScaNN tells the terminal of every step of its clustering
            self._searcher = builder.set_n_training_threads(self.threads).build()
        return self

    def search(self, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B, k] int32 and exact inner products [B, k] float32 of the candidates; see `Index.search`."""
        if self._exact is not None:
            return self._exact.search(queries, k)
        if self._searcher is None:
            raise ValueError("the scann index has not been built")
        vectors = np.ascontiguousarray(require_vectors(queries, self._dimension, self.kind))
        rows, scores = absent(len(vectors), k)
        if not len(vectors):
            return rows, scores
        wanted = min(k, self._count)
        reorder = min(self._count, max(self.settings["reorder"], 8 * wanted))
        found, products = self._searcher.search_batched(vectors, wanted, reorder, self.settings["leaves_to_search"])
        missing = np.isnan(products)  # ScaNN fills up with NaN where the searched leaves hold too few
        rows[:, :wanted] = np.where(missing, ABSENT_ROW, found.astype(np.int64))
        scores[:, :wanted] = np.where(missing, ABSENT_SCORE, products)
        return rows, scores

    def tune(self, queries: Queries, vectors: np.ndarray, k: int = 20, recall: float = 0.95) -> float:
        """Search more leaves until the index finds enough of what an exact search finds.

        Args:
          queries: B questions of the kind to be asked, with vectors (a few hundred will do).
          vectors: [N, D], those given to `build`.
          k, recall: the target, recall@k against the exact search.

        Returns:
          The recall reached; below the target only if all leaves are searched.
        """
        if self._exact is not None:
            return 1.0
        exact_rows, _ = ExactIndex().build(None, vectors).search(queries, k)
        leaves = self.settings["num_leaves"]
        while True:
            reached = index_recall(self.search(queries, k)[0], exact_rows)
            searched = self.settings["leaves_to_search"]
            _LOG.info("ScaNN: recall@%d %.3f with %d of %d leaves searched", k, reached, searched, leaves)
            if reached >= recall or searched == leaves:
                return reached
            self.settings["leaves_to_search"] = min(leaves, math.ceil(1.5 * searched))

    def save(self, directory: Path) -> None:
        """Write settings and ScaNN's assets; their paths are relative, so the directory may move."""
        directory = Path(directory)
        state = {"settings": self.settings, "shape": [self._count, self._dimension]}
        (directory / _SETTINGS).write_text(json.dumps(state))
        if self._searcher is None:
            return
        folder = directory / _SEARCHER
        folder.mkdir()
        self._searcher.serialize(str(folder), relative_path=True)
        assets = folder / "scann_assets.pbtxt"
        # an absolute path would name the folder it was built in, gone after the rename that ends a write
        assets.write_text(assets.read_text().replace(f"{folder}/", ""))

    def load(self, directory: Path, vectors: np.ndarray | None) -> ScannIndex:
        """Read what `save` wrote; `vectors` serve where ScaNN cannot. Returns self."""
        directory = Path(directory)
        hints = {"settings": dict[str, Count | None], "shape": tuple[Count, Count]}
        state = settings(directory / _SETTINGS, hints, REMEDY)
        if state["settings"].keys() != self._asked.keys():
            raise UserError(f"{directory / _SETTINGS} is damaged (its settings are not ScaNN's): {REMEDY}.")
        self.settings = state["settings"]
        self._count, self._dimension = state["shape"]
        if vectors is None or vectors.shape != (self._count, self._dimension):
            raise UserError(f"{directory / _SETTINGS} is damaged (it is of vectors {tuple(state['shape'])}): {REMEDY}.")
        if not (directory / _SEARCHER).is_dir():
            return self._serve_exactly(vectors, f"{directory} was built without ScaNN")
        pybind = _pybind()
        if pybind is None:
            return self._serve_exactly(vectors, "scann cannot be imported on this machine")
        self._check_files(directory / _SEARCHER)
        self._vectors, self._folder = vectors, directory / _SEARCHER
        try:
            with native_output.held_back():
                self._searcher = pybind.load_searcher(str(self._folder))
        except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
            told = " ".join(str(error).split())[:120]
            raise UserError(f"{self._folder} is damaged (ScaNN says: {told}): {REMEDY}.") from None
        return self

    def _check_files(self, folder: Path) -> None:
        """Checks what ScaNN would believe: that it reads files of its folder, and arrays of the right shapes.

        Raises:
          UserError: a file elsewhere, or an array that does not fit.
        """
        try:
            assets = (folder / "scann_assets.pbtxt").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is damaged ({error}): {REMEDY}.") from None
        for name in re.findall(r'asset_path:\s*"([^"]*)"', assets):
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{folder} is damaged (it reads {ranges.shown(name)}): {REMEDY}.")
        array(folder / "dataset.npy", (self._count, self._dimension), "float32", REMEDY)
        array(folder / "hashed_dataset.npy", (self._count, -(-self._dimension // 2)), "uint8", REMEDY)
        leaves = array(folder / "datapoint_to_token.npy", (self._count,), "int32", REMEDY)
        if not (0 <= leaves.min() and leaves.max() < self.settings["num_leaves"]):
            raise UserError(f"{folder} is damaged (a passage is in a leaf that is not there): {REMEDY}.")

    @property
    def count(self) -> int:
        """Number of passages that are indexed."""
        return self._count

    def verify(self) -> None:
        """Checks that ScaNN scores the index's own vectors; UserError where it does not."""
        if self._exact is not None or self._folder is None:
            return
        held = np.load(self._folder / "dataset.npy", mmap_mode="r")
        for start in range(0, self._count, _ROWS_AT_A_TIME):
            rows = slice(start, start + _ROWS_AT_A_TIME)
            if not np.array_equal(held[rows], self._vectors[rows]):
                raise UserError(f"{self._folder} is damaged (it scores other vectors than the index's): {REMEDY}.")
