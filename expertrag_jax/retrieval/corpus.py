"""Passages and questions as users have them: DPR's TSV and JSON lines."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from expertrag_jax.errors import UserError

_COLUMNS = ("id", "text", "title")
_FIELD_LIMIT = 1 << 27  # csv's own limit of 128 KiB per field is below one long document


@dataclasses.dataclass(frozen=True, eq=False)
class Passages:
    """A corpus in order of rows.

    Attributes:
      ids: N distinct strings.
      titles: N strings, empty where a passage has none.
      texts: N strings.
    """

    ids: list[str]
    titles: list[str]
    texts: list[str]

    def __post_init__(self):
        if not len(self.ids) == len(self.titles) == len(self.texts):
            raise ValueError("ids, titles and texts differ in length")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all ids, titles and texts in order, each with its length."""
        state = hashlib.sha256()
        for record in zip(self.ids, self.titles, self.texts):
            for field in record:
                data = field.encode("utf-8", "surrogatepass")
                state.update(len(data).to_bytes(8, "little"))
                state.update(data)
        return state.hexdigest()

    def row_of(self) -> dict[str, int]:
        """A map from id to row."""
        return {name: row for row, name in enumerate(self.ids)}


@dataclasses.dataclass(frozen=True)
class Question:
    """One line of a questions file.

    Attributes:
      id: unique in the file; the line number (from 0) where the file gives none.
      question: the text.
      answers: accepted answers; empty where the file may omit them.
      gold_passage_ids: ids of passages known to support the answer; may be empty.
      extra: the record's other fields.
    """

    id: str
    question: str
    answers: tuple[str, ...] = ()
    gold_passage_ids: tuple[str, ...] = ()
    extra: dict = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def open_text(path: str | Path, held: memoryview | None = None) -> Iterator[TextIO]:
    """Open a UTF-8 file, plain or gzipped (by content, not by name), for reading with line ends kept.

    Args:
      held: the file's bytes, where somebody holds them; ``path`` then names them in messages only.

    Raises:
      UserError: no file is named, or it is missing, is a folder, is damaged gzip, or is not UTF-8.
    """
    if path is None:  # a gin file's macro that nobody has set
        raise UserError("no file is named where one is read: set --gin.QUESTIONS, --gin.GATE_QUESTIONS or --gin.CORPUS")
    path = Path(path)
    try:
        with open(path, "rb") if held is None else io.BufferedReader(io.BytesIO(held)) as raw:
            gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            binary = gzip.GzipFile(fileobj=raw) if gzipped else raw
            with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
                yield text
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it to UTF-8") from None


def _header(row: list[str]) -> list[int] | None:
    """Places of id, text, title if the row is a header, else None."""
    names = [name.strip().lower() for name in row]
    if len(names) >= 3 and set(_COLUMNS) <= set(names) and len(names) == len(set(names)):
        return [names.index(name) for name in _COLUMNS]
    return None


def _tsv_records(path: Path, lines: TextIO) -> Iterator[tuple[int, str, str, str]]:
    """(first line number, id, text, title) of each record."""
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(lines, delimiter="\t")
    places, width, line = [0, 1, 2], 3, 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: {error}: quote fields as DPR's psgs_w100.tsv does") from None
        if row is None:
            return
        header = _header(row) if line == 1 else None
        if header:
            places, width = header, len(row)
        elif row:
            if len(row) != width:
                hint = ""
                if reader.line_num > line:
                    hint = f" (a double quote opened on line {line} is closed on line {reader.line_num})"
                raise UserError(
                    f"{path}:{line}: {len(row)} columns where {width} are expected (id, text, title, "
                    "separated by "
                    f"tabs){hint}: mend or remove the line"
                )
            yield line, row[places[0]], row[places[1]], row[places[2]]
        line = reader.line_num + 1


def read_passages_tsv(path: str | Path, held: memoryview | None = None) -> Passages:
    """Read passages in DPR's format: tab-separated id, text, title; CSV-quoted; plain or gzipped; header
    optional. ``held``: see ``open_text``.

    Raises:
      UserError: the file is missing, damaged or empty, a line has another number of columns (with its
        number), an id is empty or occurs twice.
    """
    seen: dict[str, int] = {}
    titles, texts = [], []
    with open_text(path, held) as lines:
        for line, name, text, title in _tsv_records(path, lines):
            if not name:
                raise UserError(f"{path}:{line}: the passage has an empty id: give each passage its own")
            if name in seen:
                raise UserError(
                    f"{path}:{line}: passage id {name!r} already stands on line {seen[name]}: ids must be "
                    "distinct"
                )
            seen[name] = line
            titles.append(title)
            texts.append(text)
    if not seen:
        raise UserError(f"{path}: the corpus is empty: it needs at least one line of id, text, title")
    return Passages(list(seen), titles, texts)


def write_passages_tsv(passages: Passages, path: str | Path) -> None:
    """Write passages so that `read_passages_tsv` returns them; gzipped, equal bytes for equal passages."""
    with (
        open(path, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=6) as packed,
    ):
        with io.TextIOWrapper(packed, encoding="utf-8", errors="replace", newline="") as text:
            # csv quotes fields that hold a character of the line end; so lone "\r" and "\n" are both safe
            writer = csv.writer(text, delimiter="\t", lineterminator="\r\n")
            writer.writerow(_COLUMNS)
            writer.writerows(zip(passages.ids, passages.texts, passages.titles))


def json_lines(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of each non-empty line of a JSON-lines file, plain or gzipped.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object (with its number).
    """
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: a JSON object is expected, not {type(record).__name__}")
            yield number, record


def _strings(record: dict, field: str, where: str) -> tuple[str, ...]:
    values = record.get(field, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: {field!r} must be a list of strings")
    return tuple(values)


def read_questions_jsonl(path: str | Path, require_answers: bool = True) -> list[Question]:
    """Read questions: JSON objects with `question`, `answers`, optional `id`, `gold_passage_ids` and others.

    Args:
      path: JSON lines, plain or gzipped.
      require_answers: refuse records without answers (training, evaluation); False for inference.

    Raises:
      UserError: unreadable file, bad JSON, a missing or ill-typed field (file and line), an id that occurs
        twice, or no question at all.
    """
    questions, seen = [], {}
    for line, record in json_lines(path):
        where = f"{path}:{line}"
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: the field 'question' is missing or empty")
        answers = _strings(record, "answers", where)
        if require_answers and not answers:
            raise UserError(
                f"{where}: the field 'answers' is missing or empty: give at least one accepted answer"
            )
        name = str(record.get("id", len(questions)))
        if name in seen:
            raise UserError(
                f"{where}: question id {name!r} already stands on line {seen[name]}: ids must be distinct"
            )
        seen[name] = line
        gold = _strings(record, "gold_passage_ids", where)
        extra = {
            key: value
            for key, value in record.items()
            if key not in ("id", "question", "answers", "gold_passage_ids")
        }
        questions.append(Question(name, text, answers, gold, extra))
    if not questions:
        raise UserError(f"{path}: no question in the file")
    return questions


def texts_of(questions: Sequence[Question]) -> list[str]:
    """The questions' texts, in order."""
    return [question.question for question in questions]
