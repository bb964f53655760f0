"""Answer a file of questions, or score the answers that it gives, with a trained model or an export.

Questions and results are JSON lines. A result has id, question, prediction and its log-probability (with
--mode=score: every given answer's), the gate's p_ret and decision, and the passages that were read. A job that was
stopped goes on where it was when the same command is started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from expertrag_jax import launch
from expertrag_jax.errors import UserError
from expertrag_jax.files.lock import only_writer
from expertrag_jax.files.paths import LocalPath, target
from expertrag_jax.files.reading import contents
from expertrag_jax.files.writing import check_output, whole
from expertrag_jax.interop.serving import service_from_export
from expertrag_jax.ranges import Count, checked
from expertrag_jax.retrieval.corpus import Question, read_questions_jsonl
from expertrag_jax.service import Service, service_from_model
from expertrag_jax.trained_model import open_model
from expertrag_jax.training.fingerprints import fingerprints

FLAGS = {
    "--model_dir": ("model_dir", "folder of the trained model, or"),
    "--export_dir": ("export_dir", "folder that `expertrag export` wrote"),
    "--questions": ("questions", "JSON lines with the field question, and answers with --mode=score"),
    "--output": ("output", "JSON lines to write, or"),
    "--output_dir": ("output_dir", "folder to write them to, as QUESTIONS-MODE.jsonl"),
    "--checkpoint_path": ("checkpoint_path", "one of the model's checkpoints, in place of the newest"),
    "--index_dir": ("index_dir", "index to search, in place of the model's own"),
    "--mode": ("mode", "predict, or score"),
    "--retrieve": ("retrieve", "gate, always or never"),
    "--num_passages": ("num_passages", "passages read per question that retrieves; fixed in an export"),
    "--buckets": ("buckets", "batch size to compile for; repeatable; fixed in an export"),
    "--overwrite": ("overwrite", "replace an output that is there"),
}
MACROS = ("MODEL_DIR", "INFER_OUTPUT_DIR", "CHECKPOINT_PATH", "INDEX_DIR", "NUM_PASSAGES")
EXAMPLE = "expertrag infer --model_dir=runs/qa --questions=test.jsonl --output=answers.jsonl"
MODES = ("predict", "score")
CHUNK = 1024  # questions whose results are written together

_LOG = logging.getLogger(__name__)


@checked
def infer(
    questions: LocalPath,
    output: LocalPath | None = None,
    model_dir: LocalPath | None = None,
    export_dir: LocalPath | None = None,
    checkpoint_path: LocalPath | None = None,
    index_dir: LocalPath | None = None,
    mode: str = "predict",
    retrieve: str = "gate",
    num_passages: Count | None = None,
    buckets: Sequence[Count] | None = None,
    overwrite: bool = False,
    output_dir: LocalPath | None = None,
) -> None:
    """Writes one record per question, in their order; see ``service.Service`` for the records.

    Args:
      questions: JSON lines, plain or gzipped.
      output: JSON lines. The file appears when it is complete. Until then the results are in a file ``.partial`` beside
        it, named after the model, the index and the questions.
      model_dir: folder of the trained model; give this or ``export_dir``.
      export_dir: folder of an export.
      checkpoint_path: one of the model's checkpoints; None means the newest. Not for an export.
      index_dir: an index of the same encoder and vocabularies; None means the model's own.
      mode: ``predict`` or ``score``.
      retrieve: ``gate``, ``always`` or ``never``.
      num_passages: passages per question that retrieves; None means as trained. Not for an export.
      buckets: batch sizes to compile for. Not for an export.
      overwrite: whether an output that exists is replaced.
      output_dir: in place of ``output``: results of ``test.jsonl.gz`` go to ``output_dir/test-predict.jsonl``.

    Raises:
      UserError: bad input; ``output`` is left as it was.
    """
    if mode not in MODES:
        raise UserError(f"--mode={mode} is unknown: choose one of {', '.join(MODES)}.")
    output = output or default_output(questions, output_dir, mode)
    check_output(output, overwrite, inputs=[questions, model_dir, index_dir, export_dir])
    content = contents(questions)
    asked = read_questions_jsonl(questions, require_answers=mode == "score", held=memoryview(content))
    service = open_service(
        model_dir,
        export_dir,
        checkpoint_path=checkpoint_path,
        index_dir=index_dir,
        retrieve=retrieve,
        num_passages=num_passages,
        buckets=buckets,
    )
    service.check(asked, answers=mode == "score")
    partial = partial_file(output, job_key(service, content, mode, retrieve))
    with only_writer(output, f"the output {output}"):
        check_output(output, overwrite)  # another job may have finished it meanwhile
        done = finished_questions(partial, asked)
        if done:
            _LOG.info("%s: resuming after %d of %d questions", partial, done, len(asked))
        run = service.predict if mode == "predict" else service.score
        bar = tqdm(total=len(asked), initial=done, unit="question")
        with bar, open(partial, "a", encoding="utf-8") as file:
            for start in range(done, len(asked), CHUNK):
                chunk = asked[start : start + CHUNK]
                file.writelines(as_line(record) for record in run(chunk))
                file.flush()
                bar.update(len(chunk))
            os.fsync(file.fileno())
        os.replace(partial, target(output))
    _LOG.info("%s: %d questions", output, len(asked))


def default_output(questions: str, output_dir: str | None, mode: str) -> str:
    """The file in ``output_dir`` for a file of questions; UserError without a folder."""
    if output_dir is None:
        raise UserError("infer writes to a file or to a folder: give --output or --output_dir (INFER_OUTPUT_DIR).")
    name = Path(questions).name.removesuffix(".gz").removesuffix(".jsonl")
    return str(Path(output_dir) / f"{name}-{mode}.jsonl")


def partial_file(output: str | Path, key: str) -> Path:
    """Where the results of an unfinished job are: beside the output."""
    place = target(output)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place.with_name(f"{place.name}.{key}.partial")


def job_key(service: Service, questions: bytes, *settings: Any) -> str:
    """Sixteen hex digits: equal for a job that is repeated, and no others; names and paths do not count.

    Args:
      service: its system, parameters, sizes, threshold, vocabularies and index count by their content.
      questions: the content of their file.
      settings: what else decides the answers.
    """
    retriever = service.answerer.retriever
    parts = [
        hashlib.sha256(questions).hexdigest(),
        dataclasses.asdict(service.settings),
        service.computation,
        fingerprints(service.answerer.programs.params),
        service.reader_vocabulary.digest,
        service.retriever_vocabulary.digest,
        None if retriever is None else retriever.loaded.manifest.digest,
        settings,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def finished_questions(partial: Path, asked: Sequence[Question]) -> int:
    """How many of the first questions, in whole chunks, have a record in ``partial``; the rest of it is cut off."""
    if not partial.exists():
        return 0
    kept = []
    lines = partial.read_bytes().splitlines(keepends=True)
    for line, question in zip(lines, asked):
        if not _is_record_of(line, question):
            break
        kept.append(line)
    kept = kept[: len(kept) // CHUNK * CHUNK]  # the same batches as without the stop, so the same rounding
    if len(kept) < len(lines):
        _LOG.info("%s: %d records of a chunk that was cut off are computed again", partial, len(lines) - len(kept))
    with whole(partial, "wb") as file:
        file.writelines(kept)
    return len(kept)


def _is_record_of(line: bytes, question: Question) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return line.endswith(b"}\n") and isinstance(record, dict) and record.get("id") == question.id


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


def write_records(output: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes JSON lines, whole or not at all."""
    with whole(output) as file:
        file.writelines(as_line(record) for record in records)


def as_line(record: dict[str, Any]) -> str:
    """A record as one JSON line."""
    return json.dumps(record, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    launch.run("expertrag_jax.infer")
