"""Candidate passages of a batch, looked up on the host before its step: RAG's ``Phase.prepare``.

Two things are kept apart. *Which* passages a question has comes from the index, by the query encoder of the last
refresh (``snapshot``): asking the index for the same question again waits until the next one. *How much* each passage
weighs is computed in the step, from the query encoder as it is and the passages' vectors, which are added here.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from expertrag_jax import evidence, partitioning
from expertrag_jax.batch import Batch
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.model.dual_encoder import DualEncoderConfig, Tower
from expertrag_jax.ranges import Count, Fraction, Natural, checked
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.diversity import RetrievalCollapse
from expertrag_jax.retrieval.index import LoadedIndex, Queries, make_index, open_index, write_index
from expertrag_jax.retrieval.manifest import parameters_digest
from expertrag_jax.retrieval.retriever import Retriever, encode_batches
from expertrag_jax.systems.snapshot import SNAPSHOT

_LOG = logging.getLogger(__name__)


def with_vectors(batch: Batch, retriever: Retriever) -> Batch:
    """The batch with ``passage_vectors`` of its ``passage_rows``.

    Raises:
      UserError: the batch names no rows, or the index has no vectors.
    """
    if batch.passage_rows is None:
        raise UserError("RAG reads retrieved passages and the batch has no passage_rows: use a task with an index.")
    vectors = retriever.vectors_of(np.asarray(batch.passage_rows))
    if vectors is None:
        raise UserError(
            f"the {retriever.loaded.manifest.kind} index at {retriever.loaded.directory} stores no vectors, from which "
            "RAG's prior comes: name a dense index."
        )
    return batch.replace(passage_vectors=vectors)


@checked
@dataclasses.dataclass(eq=False)
class Candidates:
    """``(params, batch) -> batch``: fresh candidates where the system refreshes them, vectors always.

    Without ``candidate_encoder`` among the parameters (``RAG.refresh_period`` 0) the passages of the batch stay.

    Attributes:
      retriever: over an index with vectors and passage tokens.
      config: of the query encoder; needed to refresh.
      versions_dir: passages are embedded again at each refresh, by the same tower (``shared``), and the new index
        becomes the current one below this folder, which no other run shares (``retrieval.versions``); None: the index
        stays. keep_versions: so many stay; a checkpoint is answered from the version of its last refresh.
      collapse_window, collapse_least: see ``RetrievalCollapse``.
      remembered: questions whose candidates are kept until the next refresh.
    """

    retriever: Retriever
    config: DualEncoderConfig | None = None
    versions_dir: LocalPath | None = None
    keep_versions: Count = 2
    collapse_window: Count = 1000
    collapse_least: Fraction = 0.1
    remembered: Natural = 1_000_000

    def __post_init__(self):
        self._refreshes: float | None = None  # of the encoder below
        self._encode: Callable[[np.ndarray], Any] | None = None
        self._known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # query tokens -> rows, scores
        self._alarm = RetrievalCollapse(self.retriever.loaded.manifest.count, self.collapse_window, self.collapse_least)
        if self.versions_dir is not None and (self.config is None or not self.config.shared):
            raise UserError(
                "passages are embedded again by the query encoder's own tower: set Candidates.config to a "
                "DualEncoderConfig with shared = True, or versions_dir to None."
            )
        if self.versions_dir is not None:
            check_embeddable(self.retriever.loaded)

    def __call__(self, params: Any, batch: Batch) -> Batch:
        """Raises UserError: see ``with_vectors``; or the index cannot be searched by vectors alone."""
        if SNAPSHOT in params:
            self._renew(params)
            batch = self._searched(batch)
        batch = with_vectors(batch, self.retriever)
        asked = (np.asarray(batch.query_tokens) > 0).any(-1)  # the other rows are padding
        names = [row.tobytes() for row in np.asarray(batch.query_tokens)[asked]]
        warning = self._alarm.observe(names, np.asarray(batch.passage_rows)[asked])
        if warning:
            _LOG.warning(warning)
        return batch

    def before_checkpoint(self, params: Any) -> None:
        """A refresh that came with the last step renews the index too: the checkpoint is answered from that one."""
        if SNAPSHOT in params:
            self._renew(params)

    def _renew(self, params) -> None:
        """After a refresh: the new encoder, nothing remembered, and with ``versions_dir`` a new index."""
        refreshes = float(local_copy(params[SNAPSHOT]["refreshes"])[0])
        if refreshes == self._refreshes:
            return
        loaded = self.retriever.loaded
        if self.config is None:
            raise UserError("RAG.refresh_period is set and Candidates.config is not: bind the query encoder's config.")
        if loaded.index.needs_texts:
            raise UserError(
                f"the {loaded.manifest.kind} index at {loaded.directory} needs a question's words, which a batch does "
                "not have: refresh over an exact or scann index, or set RAG.refresh_period to 0."
            )
        # Before the first update the copy is not taken yet, and it would be of the query encoder itself.
        tower = params[SNAPSHOT]["encoder"] if refreshes else params["query_encoder"]
        tower = jax.tree.map(local_copy, dict(tower))
        self._encode = functools.partial(_encoder(self.config), tower)
        self._refreshes = refreshes
        self._known.clear()
        if self.versions_dir is not None:
            self._embed(parameters_digest(tower))

    def _embed(self, digest: str) -> None:
        """Goes over to the index whose passages are embedded by the tower of that digest; the first process writes it.

        The version's name is made of digests, so a run that was killed here finds it, or writes it again.
        """
        loaded = self.retriever.loaded
        if loaded.manifest.encoder_digest != digest:
            root, name = Path(self.versions_dir), versions.name_of(digest, loaded.manifest.corpus_digest)
            self._publish(root, name, digest)
            loaded = open_index(root / name, verify=False)
        self.retriever = Retriever(loaded, self._encode, max_batch=self.retriever.max_batch)

    def _publish(self, root: Path, name: str, digest: str) -> None:
        """The first process writes; what goes wrong there ends all of them."""
        problem, loaded = None, self.retriever.loaded
        if jax.process_index() == 0:
            try:
                write = functools.partial(reembed, loaded, self._encode, digest)
                versions.publish(root, name, write, self.keep_versions)
            except Exception as error:
                problem = error
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.int32(problem is not None))
            if failed and problem is None:
                raise UserError(f"process 0 could not write the index {root / name}: its own message says why.")
        if problem is not None:
            raise problem

    def _searched(self, batch: Batch) -> Batch:
        """The batch with the candidates of its questions."""
        queries = np.asarray(batch.query_tokens, np.int32)
        count, length = batch.passage_rows.shape[1], batch.passage_tokens.shape[2]
        names = [row.tobytes() for row in queries]
        if len(self._known) + len(names) > self.remembered:
            self._known.clear()
        new = [place for place, name in enumerate(names) if name not in self._known]
        if new:
            vectors = encode_batches(self._encode, queries[new], self.retriever.max_batch)
            found = self.retriever.loaded.index.search(Queries(None, vectors), count)
            for place, row, score in zip(new, *found):
                self._known[names[place]] = (row, score)
        rows, scores = (np.stack(part) for part in zip(*(self._known[name] for name in names)))
        tokens = self.retriever.tokens_of(rows)
        return batch.replace(
            passage_tokens=evidence.assemble_batch(np.asarray(batch.encoder_input_tokens), tokens, length),
            passage_rows=rows, passage_scores=scores, passage_relevance=None,
        )  # fmt: skip


def reembed(loaded: LoadedIndex, encode: Callable[[np.ndarray], Any], digest: str, place: Path) -> None:
    """Writes an index of the same passages, seen by another encoder.

    Args:
      encode: tokens [n, S] int32 -> vectors [n, D]. digest: of its parameters. place: where it shall lie.

    Raises:
      UserError: see ``check_embeddable``.
    """
    check_embeddable(loaded)
    vectors = encode_batches(encode, loaded.tokens, 256)
    index = make_index(loaded.manifest.kind, **loaded.manifest.settings).build(loaded.passages, vectors)
    write_index(
        place, index, loaded.passages, passage_tokens=np.asarray(loaded.tokens), vectors=vectors, encoder_digest=digest,
        vocabulary_digests=dict(loaded.manifest.vocabulary_digests), overwrite=True,
    )  # fmt: skip


def check_embeddable(loaded: LoadedIndex) -> None:
    """UserError where the index's tokens are not in the encoder's vocabulary."""
    digests = loaded.manifest.vocabulary_digests
    if loaded.tokens is None or digests.get("reader") != digests.get("retriever"):
        raise UserError(
            f"the index at {loaded.directory} keeps no passages in the retriever's vocabulary, so they cannot be "
            "embedded again: use one vocabulary for reader and retriever, or set versions_dir to None."
        )


def local_copy(array: Any) -> np.ndarray:
    """A parameter on the host, whole, on every process; all processes must call it together."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@functools.lru_cache
def _encoder(config: DualEncoderConfig):
    """(tower, tokens) -> vectors on one device of this process, whatever mesh the run is on."""
    program = jax.jit(lambda tower, tokens: Tower(config).apply({"params": tower}, tokens))
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.local_devices()[:1])

    def encode(tower, tokens):
        with jax.set_mesh(mesh):
            return np.asarray(program(tower, tokens))

    return encode
