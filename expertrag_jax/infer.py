"""Answer a file of questions, or score the answers that it gives, with a trained model or an export.

Questions and results are JSON lines. A result has id, question, prediction and its log-probability (with
--mode=score: every given answer's), the gate's p_ret and decision, and the passages that were read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from expertrag_jax import launch
from expertrag_jax.errors import UserError
from expertrag_jax.interop.serving import service_from_export
from expertrag_jax.retrieval.corpus import read_questions_jsonl
from expertrag_jax.service import Service, service_from_model
from expertrag_jax.trained_model import open_model

FLAGS = {
    "--model_dir": ("model_dir", "folder of the trained model, or"),
    "--export_dir": ("export_dir", "folder that `expertrag export` wrote"),
    "--questions": ("questions", "JSON lines with the field question, and answers with --mode=score"),
    "--output": ("output", "JSON lines to write"),
    "--checkpoint_path": ("checkpoint_path", "one of the model's checkpoints, in place of the newest"),
    "--index_dir": ("index_dir", "index to search, in place of the model's own"),
    "--mode": ("mode", "predict, or score"),
    "--retrieve": ("retrieve", "gate, always or never"),
    "--num_passages": ("num_passages", "passages read per question that retrieves; fixed in an export"),
    "--buckets": ("buckets", "batch size to compile for; repeatable; fixed in an export"),
    "--overwrite": ("overwrite", "replace an output that is there"),
}
MACROS = ("MODEL_DIR", "CHECKPOINT_PATH", "INDEX_DIR", "NUM_PASSAGES")
EXAMPLE = "expertrag infer --model_dir=runs/qa --questions=test.jsonl --output=answers.jsonl"
MODES = ("predict", "score")

_LOG = logging.getLogger(__name__)


def infer(
    questions: str,
    output: str,
    model_dir: str | None = None,
    export_dir: str | None = None,
    checkpoint_path: str | None = None,
    index_dir: str | None = None,
    mode: str = "predict",
    retrieve: str = "gate",
    num_passages: int | None = None,
    buckets: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes one record per question, in their order; see ``service.Service`` for the records.

    Args:
      questions: JSON lines, plain or gzipped. output: JSON lines; appears when it is complete.
      model_dir or export_dir: one of them.
      checkpoint_path, num_passages, buckets: of a model only.
      index_dir: of the same encoder and vocabularies; None means the model's own.
      mode: ``predict`` or ``score``. retrieve: ``gate``, ``always`` or ``never``.

    Raises:
      UserError: bad input; ``output`` is left as it was.
    """
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown: choose one of {', '.join(MODES)}.")
    check_output(output, overwrite)
    asked = read_questions_jsonl(questions, require_answers=mode == "score")
    service = open_service(
        model_dir,
        export_dir,
        checkpoint_path=checkpoint_path,
        index_dir=index_dir,
        retrieve=retrieve,
        num_passages=num_passages,
        buckets=buckets,
    )
    rows = len(asked) if mode == "predict" else sum(len(question.answers) for question in asked)
    with tqdm(total=rows, unit="question" if mode == "predict" else "answer") as bar:
        run = service.predict if mode == "predict" else service.score
        records = run(asked, lambda count: bar.update(count))
    write_records(output, records)
    retrieved = sum(record["retrieve"] for record in records)
    _LOG.info("%s: %d questions, %d of them retrieved", output, len(records), retrieved)


def open_service(
    model_dir: str | None = None,
    export_dir: str | None = None,
    *,
    checkpoint_path: str | None = None,
    index_dir: str | None = None,
    retrieve: str = "gate",
    num_passages: int | None = None,
    buckets: Sequence[int] | None = None,
) -> Service:
    """A service from a MODEL_DIR or from an export; arguments as in `infer`."""
    if (model_dir is None) == (export_dir is None):
        raise UserError("name one model: give either --model_dir or --export_dir.")
    if model_dir is not None:
        model = open_model(model_dir, checkpoint_path, num_passages=num_passages, buckets=buckets)
        return service_from_model(model, retrieve, index_dir)
    fixed = {"checkpoint_path": checkpoint_path, "num_passages": num_passages, "buckets": buckets}
    given = [f"--{name}" for name, value in fixed.items() if value is not None]
    if given:
        names = " and ".join(given)
        raise UserError(f"{names} cannot be changed in an export: use --model_dir, or export again.")
    return service_from_export(export_dir, retrieve, index_dir)


def check_output(output: str | Path, overwrite: bool) -> None:
    """Raises UserError for an output that is a folder, or is there and is not to be replaced."""
    output = Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder: name a file to write.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: nothing was overwritten; name another file or add --overwrite.")


def write_records(output: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    os.replace(partial, output)


if __name__ == "__main__":
    launch.run("expertrag_jax.infer")
