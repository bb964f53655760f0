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
from expertrag_jax.files.reading import opened

HARD_NEGATIVES = "hard_negative_passage_ids"
"""The field of a question's record that names passages which do not answer it."""

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
      id: unique in the file; the question's number in it (from 0) if the file gives none.
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
        with opened(path) if held is None else io.BufferedReader(io.BytesIO(held)) as raw:
            gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            binary = gzip.GzipFile(fileobj=raw) if gzipped else raw
            with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
                yield text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file ({error}): fetch it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): convert it to UTF-8") from None
    except OSError as error:
        if error.filename not in (None, str(path)):  # of a file that the caller writes meanwhile
            raise
        raise UserError(f"{path} cannot be read ({error.strerror or error}): mend that, or name another file") from None


def _header(row: list[str]) -> list[int] | None:
    """Places of id, text, title if the row is a header, else None."""
    names = [name.strip().lower() for name in row]
    if len(names) >= 3 and set(_COLUMNS) <= set(names) and len(names) == len(set(names)):
        return [names.index(name) for name in _COLUMNS]
    return None


def _tsv_records(path: Path, lines: TextIO, written_here: bool) -> Iterator[tuple[int, str, str, str]]:
    """(first line number, id, text, title) of each record."""
    csv.field_size_limit(_FIELD_LIMIT)
    raw: list[str] = []  # the lines of the record that is being read
    reader = csv.reader((raw.append(line) or line for line in lines), delimiter="\t")
    places, width, line = [0, 1, 2], 3, 1
    first: list[str] | None = None  # the header, which files that were put together repeat
    while True:
        raw.clear()
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{path}:{line}: {error}: quote fields as DPR's psgs_w100.tsv does") from None
        if row is None:
            return
        if row:
            row[0] = row[0].removeprefix("\ufeff")  # of a file that others were appended to
        header = _header(row) if line == 1 or row == first else None
        if row and not written_here:
            _check_quotes(path, line, raw, len(row) if header else width)
        if header:
            places, width, first = header, len(row), row
        elif row:
            if len(row) != width:
                raise UserError(
                    f"{path}:{line}: {len(row)} columns where {width} are expected (id, text, title, separated by "
                    "tabs): mend or remove the line"
                )
            yield line, row[places[0]], row[places[1]], row[places[2]]
        line = reader.line_num + 1


def _check_quotes(path: Path, line: int, raw: list[str], width: int) -> None:
    """Refuses a record whose quotes take in other rows or never close; ``raw`` are its lines, from ``line`` on."""
    opened = f"{path}:{line}: a double quote opened on line {line}"
    if len(raw) == 1 and raw[0].count('"') % 2 == 0:
        return
    if len(list(csv.reader([*raw, "\n"], delimiter="\t"))) == 1:  # another line would still be inside the quotes
        raise UserError(f"{opened} is never closed: close it, or write two for one that is text")
    if len(raw) == 1:
        return
    try:
        list(csv.reader(raw, delimiter="\t", strict=True))
        rows = _holds_rows([text.split("\t") for text in raw], width)
    except csv.Error:
        rows = True
    if rows:
        raise UserError(
            f"{opened} is closed on line {line + len(raw) - 1}, and what is between looks like other rows: close it on "
            "its line, or write two for one that is text"
        )


def _holds_rows(lines: list[list[str]], width: int) -> bool:
    """Whether the lines of one record, cut at every tab, look like rows of their own.

    The first one has all columns, and so has another; or the last column opened the quote, and a tab follows.
    """
    first, *others = lines
    most = max(map(len, others))
    return len(first) >= width and (most >= width or (len(first) == width and first[-1].startswith('"') and most > 1))


def read_passages_tsv(path: str | Path, held: memoryview | None = None, written_here: bool = False) -> Passages:
    """Read passages in DPR's format: tab-separated id, text, title; CSV-quoted; plain or gzipped; header optional.

    Args:
      path: of the file.
      held: see ``open_text``.
      written_here: whether `write_passages_tsv` wrote the file, so that every quoted field is what it seems. In other
        files a quoted field may hold line breaks and tabs, but not what looks like rows of the file.

    Raises:
      UserError: the file is missing, damaged or empty, a line has another number of columns (with its
        number), a quote takes in other rows, an id is empty or occurs twice.
    """
    seen: dict[str, int] = {}
    titles, texts = [], []
    with open_text(path, held) as lines:
        for line, name, text, title in _tsv_records(Path(path), lines, written_here):
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


def json_lines(path: str | Path, held: memoryview | None = None) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of each non-empty line of a JSON-lines file, plain or gzipped.

    ``held``: see ``open_text``.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON object (with its number).
    """
    with open_text(path, held) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, json_object(line, f"{path}:{number}")


def json_object(text: str, where: str) -> dict:
    """A JSON object that can be written again; ``where`` names its place in messages.

    Raises:
      UserError: it is not JSON, not an object, too deep, has an integer of too many digits, or half a surrogate pair.
    """
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{where}: the JSON is nested too deeply: use fewer brackets inside one another") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{where}: the JSON holds a number that is too long ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object is expected, not {type(record).__name__}")
    if "\\ud" in text.lower() and _half_pair(record):
        raise UserError(f"{where}: a string holds half a surrogate pair (\\ud800 to \\udfff): write both halves")
    return record


def _half_pair(record: dict) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def record_id(record: dict, default: str, where: str) -> str:
    """The record's ``id``, or ``_id`` as BEIR and MTEB have it, as a string; ``default`` if neither is given.

    Raises:
      UserError: it is neither a string nor a number.
    """
    for field in ("id", "_id"):
        value = record.get(field)
        if isinstance(value, bool | list | dict):
            raise UserError(f"{where}: {field!r} must be a string or a number, not {json.dumps(value)[:40]}")
        if value not in (None, ""):
            return str(value)
    return default


def _strings(record: dict, field: str, where: str) -> tuple[str, ...]:
    values = record.get(field, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UserError(f"{where}: {field!r} must be a list of strings")
    return tuple(values)


def read_questions_jsonl(
    path: str | Path, require_answers: bool = True, held: memoryview | None = None
) -> list[Question]:
    """Read questions: JSON objects with `question`, `answers`, optional `id` (or `_id`), `gold_passage_ids` and others.

    Args:
      path: JSON lines, plain or gzipped.
      require_answers: refuse records without answers (training, evaluation); False for inference.
      held: see ``open_text``.

    Raises:
      UserError: unreadable file, bad JSON, a missing or ill-typed field (file and line), an id that occurs
        twice, or no question at all.
    """
    questions, seen = [], {}
    for line, record in json_lines(path, held):
        where = f"{path}:{line}"
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: the field 'question' is missing or empty")
        answers = _strings(record, "answers", where)
        if require_answers and not answers:
            raise UserError(
                f"{where}: the field 'answers' is missing or empty: give at least one accepted answer"
            )
        name = record_id(record, str(len(questions)), where)
        if name in seen:
            raise UserError(
                f"{where}: question id {name!r} already stands on line {seen[name]}: ids must be distinct"
            )
        seen[name] = line
        gold = _strings(record, "gold_passage_ids", where)
        _strings(record, HARD_NEGATIVES, where)
        known = ("id", "_id", "question", "answers", "gold_passage_ids")
        extra = {key: value for key, value in record.items() if key not in known}
        questions.append(Question(name, text, answers, gold, extra))
    if not questions:
        raise UserError(f"{path}: no question in the file")
    return questions


def texts_of(questions: Sequence[Question]) -> list[str]:
    """The questions' texts, in order."""
    return [question.question for question in questions]
