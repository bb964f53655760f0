"""Raw documents (text, Markdown, JSON lines) read as passages of whole sentences."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, json_lines, open_text, record_id
from expertrag_jax.retrieval.splitting import split_text

_LOG = logging.getLogger(__name__)
_TEXT, _MARKDOWN, _JSON = (".txt",), (".md", ".markdown"), (".jsonl", ".json")
_HEADING = re.compile(r"^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def markdown_sections(text: str, title: str = "") -> list[tuple[str, str]]:
    """(title, text) of each section: a heading is the title of what follows it.

    What precedes the first heading gets `title`, and is left out where it is blank. A heading inside a code fence is
    code. A heading that another one follows has a blank text.
    """
    sections: list[tuple[str, list[str]]] = [(title, [])]
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if mark and not fence:
            fence = mark.group(1)
        elif mark and mark.group(1).startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        heading = None if fence else _HEADING.match(line)
        if heading:
            sections.append(((heading.group(2) or "").strip() or title, []))
        else:
            sections[-1][1].append(line)
    if not "".join(sections[0][1]).strip():
        del sections[0]
    return [(name, "\n".join(lines)) for name, lines in sections]


def _records(path: Path, name: str, left_out: Counter[str]) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each document or section of a file; counts the Markdown headings without text."""
    stem, suffix = _stem_and_kind(Path(name).name)
    if suffix in _JSON:
        for line, record in json_lines(path):
            text, title = record.get("text", record.get("contents")), record.get("title") or ""
            if not isinstance(text, str) or not isinstance(title, str):
                raise UserError(
                    f"{path}:{line}: a document needs 'text' (and may have 'title' and 'id'), strings"
                )
            yield record_id(record, f"{name}:{line}", f"{path}:{line}"), title, text
        return
    with open_text(path) as file:
        text = file.read()
    if suffix in _MARKDOWN:
        sections = markdown_sections(text, stem)
        written = [(title, section) for title, section in sections if section.strip()]
        left_out["headings without text"] += len(sections) - len(written)
        left_out["documents without text"] += not sections
        for number, (title, section) in enumerate(written):
            yield f"{name}:{number}", title, section
    else:
        yield name, stem, text


def _stem_and_kind(name: str) -> tuple[str, str]:
    """("notes", ".md") of "notes.md" and of "notes.MD.gz"."""
    if name.lower().endswith(".gz"):
        name = name[: -len(".gz")]
    stem, dot, kind = name.rpartition(".")
    return stem, dot + kind.lower()


def _files(path: Path, left_out: Counter[str]) -> list[tuple[Path, str]]:
    """(file, its name inside the folder) of all documents at a path, sorted; counts what it leaves out."""
    known = _TEXT + _MARKDOWN + _JSON
    known += tuple(suffix + ".gz" for suffix in known)
    if path.is_dir():
        files = []
        for file in sorted(path.rglob("*")):
            _check_name(file)
            if file.is_dir():
                left_out["linked folders"] += file.is_symlink()
            elif not file.is_file():
                left_out["entries that are no files"] += 1
            elif file.name.lower().endswith(known):
                files.append((file, file.relative_to(path).as_posix()))
            else:
                left_out["files of other kinds"] += 1
        if not files:
            raise UserError(f"{path}: no document in the folder: it needs .txt, .md or .jsonl files")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.name.lower().endswith(known):
        raise UserError(f"{path}: unknown kind of document: name a folder or a .txt, .md or .jsonl file")
    return [(path, path.name)]


def _check_name(file: Path) -> None:
    """UserError for a name that is no text: it becomes the id of passages."""
    try:
        file.name.encode()
    except UnicodeEncodeError:
        raise UserError(f"the name of {str(file)!r} is no UTF-8 text: rename the file") from None


def read_documents(path: str | Path, max_words: int = 100) -> Passages:
    """Read a document, or all documents of a folder, as passages.

    Titles are a Markdown section's heading, a JSON record's `title`, or the file's name without its suffix.
    Ids are the document's (a JSON record's `id`, else the file's name, with the section or line), `#`, and
    the number of the passage in it. What is left out is counted in one warning: files of other kinds, linked folders,
    documents and headings without text.

    Args:
      path: a folder (searched with all its sub-folders), or one .txt, .md or .jsonl file, plain or gzipped. A
        JSON record has `text` (or `contents`), optional `title` and `id` (or `_id`).
      max_words: the longest passage, in words.

    Raises:
      UserError: nothing to read, unreadable text, bad JSON (file and line), an id that occurs twice.
    """
    path = Path(path)
    left_out: Counter[str] = Counter()
    ids: dict[str, Path] = {}
    titles, texts, files = [], [], _files(path, left_out)
    for file, name in files:
        for document, title, text in _records(file, name, left_out):
            parts = split_text(text, max_words)
            left_out["documents without text"] += not parts
            for number, passage in enumerate(parts):
                passage_id = f"{document}#{number}"
                if passage_id in ids:
                    raise UserError(
                        f"{file}: document id {document!r} occurs twice (first in {ids[passage_id]}): "
                        "ids must be distinct"
                    )
                ids[passage_id] = file
                titles.append(" ".join(title.split()))
                texts.append(passage)
    if not texts:
        raise UserError(f"{path}: the corpus is empty: no document holds any text")
    counts = ", ".join(f"{count} {kind}" for kind, count in left_out.items() if count)
    if counts:
        _LOG.warning("%s: %d files were read; left out: %s.", path, len(files), counts)
    return Passages(list(ids), titles, texts)
