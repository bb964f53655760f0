"""A trained system, read from its MODEL_DIR alone: the checkpoint says what it is a checkpoint of."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
from annotated_types import Ge, Le

from expertrag_jax.assembly import (
    READER_VOCABULARY,
    RETRIEVER_VOCABULARY,
    AnswerSettings,
    check_answers,
    refreshed_encoder_digest,
)
from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import check_fields, unsealed
from expertrag_jax.gate.network import with_calibration
from expertrag_jax.ranges import Length, Number, Positive, Weight
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.manifest import read_manifest
from expertrag_jax.systems.description import rebuild
from expertrag_jax.training import pretrained
from expertrag_jax.vocabulary import Vocabulary

GATE_FILE = "gate.json"
_LOG = logging.getLogger(__name__)
_REMEDY = "copy the checkpoint again, or name another one"
_FACTS = {
    "task_feature_lengths": dict[str, Length], "num_passages": Annotated[int, Ge(1), Le(2**16)] | None,
    "digests": dict[str, str] | None, "index_dir": str | None, "versions_dir": str | None,
}  # fmt: skip
"""What a checkpoint's metadata say of it, beside the system."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained system as its MODEL_DIR describes it.

    Attributes:
      system: the dataclass (see ``systems``).
      params: its parameters.
      source: the checkpoint's directory.
      reader_vocabulary: as trained.
      retriever_vocabulary: as trained.
      settings: as trained, with the gate's calibrated threshold.
      index_dir: of the training, or None. If the training embedded its passages again, the version that these
        parameters read.
      corpus_digest: of the passages in that index during training; None if the checkpoint does not say.
    """

    system: Any
    params: Any
    source: Path
    reader_vocabulary: Vocabulary
    retriever_vocabulary: Vocabulary
    settings: AnswerSettings
    index_dir: str | None
    corpus_digest: str | None = None

    def calibrated(self, threshold: float, scale: float, bias: float) -> Model:
        """The model with these in place of its gate's threshold and of its logit's scale and bias."""
        params = dict(self.params) | {"gate": with_calibration(self.params["gate"], scale, bias)}
        return dataclasses.replace(
            self, params=params, settings=dataclasses.replace(self.settings, threshold=threshold)
        )

    def check_index(self) -> None:
        """UserError where the training's index is gone or now holds other passages, which nobody asked for by name."""
        if self.index_dir is not None and not Path(self.index_dir).is_dir():
            raise UserError(
                f"{self.source} reads the index {self.index_dir}, which is not there: name another one with "
                f"--index_dir, such as one by `expertrag index --retriever={self.source}`, or another checkpoint."
            )
        if None not in (self.index_dir, self.corpus_digest):
            if read_manifest(self.index_dir).corpus_digest != self.corpus_digest:
                raise UserError(
                    f"the index at {self.index_dir} is of another corpus than the one of the training: name it with "
                    "--index_dir to search it all the same."
                )


def open_model(
    model_dir: str | Path, checkpoint_path: str | Path | None = None, *, calibrated: bool = True, **changes: Any
) -> Model:
    """Reads a MODEL_DIR.

    Args:
      model_dir: written by training.
      checkpoint_path: of one of its checkpoints; None: see ``pretrained.read_whole``.
      calibrated: with ``gate.json``, if there is one; else the gate is as it was trained, its threshold 0.5.
      changes: fields of ``AnswerSettings`` other than those of the training; None leaves a field as it was.

    Raises:
      UserError: the directory, a checkpoint or a vocabulary is missing, damaged or of another model.
    """
    model_dir = Path(model_dir).expanduser()
    if not model_dir.is_dir():
        raise UserError(f"MODEL_DIR {model_dir} does not exist: name the directory of a training.")
    source, facts, system, params = pretrained.read_whole(checkpoint_path or model_dir, _read)
    gate = _calibration(model_dir, source) if calibrated else {}
    if calibrated and not gate and "gate" in params:
        _LOG.warning("%s has no %s, so its gate retrieves from 0.5 on: run `expertrag calibrate`", model_dir, GATE_FILE)
    settings = _trained_settings(system, facts)
    changes = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(settings, **changes)
    reader, retriever = (
        _vocabulary(model_dir / path, name, facts)
        for path, name in ((READER_VOCABULARY, "reader"), (RETRIEVER_VOCABULARY, "retriever"))
    )
    corpus = (facts.get("digests") or {}).get("corpus")
    model = Model(system, params, source, reader, retriever, settings, _trained_index(facts, params), corpus)
    return model.calibrated(**gate) if gate else model


def _read(stored: pretrained.Stored) -> tuple[Path, dict[str, Any], Any, Any]:
    """(its directory, its metadata, the system, the parameters)."""
    missing = [name for name in ("system", "task_feature_lengths") if not stored.metadata.get(name)]
    if missing:
        raise UserError(
            f"checkpoint {stored.directory} does not say its {' and '.join(missing)}: name a MODEL_DIR that `expertrag "
            "train` wrote."
        )
    check_fields(stored.metadata, _FACTS, stored.directory, _REMEDY)
    try:
        system = rebuild(stored.metadata["system"])
        check_answers(system)
        shapes = jax.eval_shape(system.init, jax.random.PRNGKey(0))
    except UserError:
        raise
    except Exception as error:  # a description that was edited by hand can fail anywhere
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{stored.directory} is damaged (no such system can be made: {told}): {_REMEDY}.") from error
    if "inputs" not in stored.metadata["task_feature_lengths"]:
        raise UserError(f"{stored.directory} is damaged (it does not say how long its inputs are): {_REMEDY}.")
    params = stored.restore(shapes)
    return stored.directory, stored.metadata, system, params


def _trained_index(facts: Mapping[str, Any], params: Any) -> str | None:
    """The index of the training, or the version of it that was embedded by the encoder of the last refresh."""
    index_dir, root, embedded_by = facts.get("index_dir"), facts.get("versions_dir"), refreshed_encoder_digest(params)
    if None in (index_dir, root, embedded_by):
        return index_dir
    place = Path(root) / versions.name_of(embedded_by, facts["digests"]["corpus"])
    if not place.is_dir() and Path(index_dir).is_dir() and read_manifest(index_dir).encoder_digest == embedded_by:
        return index_dir  # nothing was trained between its making and the last refresh
    return str(place)


def _trained_settings(system: Any, facts: Mapping[str, Any]) -> AnswerSettings:
    lengths = facts["task_feature_lengths"]
    question_length = lengths["inputs"]
    return AnswerSettings(
        question_length=question_length,
        query_length=lengths.get("query") or question_length,
        reader_length=lengths.get("passages") or question_length,
        answer_length=system.max_target_length,
        num_passages=facts.get("num_passages") or 1,
        fusion=getattr(system, "fusion", "per_passage"),
    )


def _calibration(model_dir: Path, source: Path) -> dict[str, float]:
    """Threshold, scale and bias in ``gate.json``; empty where the gate was not calibrated.

    Raises:
      UserError: the file is damaged, or of another checkpoint than ``source``.
    """
    path = model_dir / GATE_FILE
    if not os.path.lexists(path):  # a folder or a dangling link is no calibration, and is refused below
        return {}
    remedy = "run `expertrag calibrate --overwrite`"
    stored = unsealed(path, remedy)
    check_fields(stored, {"threshold": Weight, "scale": Positive, "bias": Number}, path, remedy)
    found = {name: float(stored[name]) for name in ("threshold", "scale", "bias")}
    if stored.get("checkpoint", source.name) != source.name:
        raise UserError(
            f"{path} calibrates the gate of checkpoint {stored['checkpoint']} and this is {source.name}: run "
            "`expertrag calibrate --overwrite`, or move the file away."
        )
    return found


def _vocabulary(path: Path, name: str, facts: Mapping[str, Any]) -> Vocabulary:
    vocabulary = Vocabulary.from_file(path)
    trained = (facts.get("digests") or {}).get(f"{name} vocabulary")
    if trained is not None and trained != vocabulary.digest:
        raise UserError(
            f"{path} has digest {vocabulary.digest[:12]} but the model was trained with the {name} "
            f"vocabulary {trained[:12]}: restore that file."
        )
    return vocabulary
