"""Raw documents (text, Markdown, JSON lines) split into passages on sentence bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, json_lines, open_text

_TEXT, _MARKDOWN, _JSON = (".txt",), (".md", ".markdown"), (".jsonl", ".json")
# A sentence ends at . ! ? and closing quotes or brackets, before white space and what can begin the next.
_SENTENCE_END = re.compile(r"""(?<=[.!?。！？])["'”’)\]]*\s+(?=["'“‘(\[]*[^\W_a-z])""")
# These words end in a full stop inside sentences.
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Col|Lt|Sgt|Rev|Hon|Capt|Gov|Sen|Rep|No|Nos|Vol"
    r"|pp?|vs|etc|cf|ca|approx|e\.g|i\.e|U\.S|U\.K|U\.N|Inc|Ltd|Co|Corp|Fig|Eq|al)\.$"
)
_HEADING = re.compile(r"^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")


def sentences(text: str) -> list[str]:
    """Split running text into sentences; white space is normalised to single spaces.

    A full stop after an initial or a common English abbreviation does not end a sentence. The
    result joined by single spaces is the text.
    """
    text = " ".join(text.split())
    found, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        sentence = text[start : match.end()].rstrip()
        if _ABBREVIATION.search(sentence):
            continue
        found.append(sentence)
        start = match.end()
    if text[start:]:
        found.append(text[start:])
    return found


def split_text(text: str, max_words: int = 100) -> list[str]:
    """Passages of at most `max_words` words (by white space) of whole sentences, as many as fit.

    A sentence that alone is longer is cut at `max_words`.
    """
    if max_words < 1:
        raise UserError(f"max_words is {max_words}: a passage needs at least one word")
    passages: list[str] = []
    current: list[str] = []
    for sentence in sentences(text):
        words = sentence.split()
        if current and len(current) + len(words) > max_words:
            passages.append(" ".join(current))
            current = []
        current += words
        while len(current) > max_words:
            passages.append(" ".join(current[:max_words]))
            current = current[max_words:]
    if current:
        passages.append(" ".join(current))
    return passages


def markdown_sections(text: str, title: str = "") -> list[tuple[str, str]]:
    """(title, text) of each section: a heading is the title of what follows it.

    What precedes the first heading gets `title`. A heading inside a code fence is code.
    Sections without text are left out.
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
    return [(name, "\n".join(lines)) for name, lines in sections if "".join(lines).strip()]


def _records(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each document or section of a file."""
    suffix = path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()
    if suffix in _JSON:
        for line, record in json_lines(path):
            text, title = record.get("text", record.get("contents")), record.get("title") or ""
            if not isinstance(text, str) or not isinstance(title, str):
                raise UserError(
                    f"{path}:{line}: a document needs 'text' (and may have 'title' and 'id'), strings"
                )
            yield str(record.get("id", f"{name}:{line}")), title, text
        return
    with open_text(path) as file:
        text = file.read()
    stem = Path(name).name.split(".")[0]
    if suffix in _MARKDOWN:
        for number, (title, section) in enumerate(markdown_sections(text, stem)):
            yield f"{name}:{number}", title, section
    else:
        yield name, stem, text


def _files(path: Path) -> list[tuple[Path, str]]:
    """(file, its name inside the folder) of all documents at a path, sorted."""
    known = _TEXT + _MARKDOWN + _JSON
    known += tuple(suffix + ".gz" for suffix in known)
    if path.is_dir():
        files = [
            (file, file.relative_to(path).as_posix())
            for file in sorted(path.rglob("*"))
            if file.is_file() and file.name.lower().endswith(known)
        ]
        if not files:
            raise UserError(f"{path}: no document in the folder: it needs .txt, .md or .jsonl files")
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.name.lower().endswith(known):
        raise UserError(f"{path}: unknown kind of document: name a folder or a .txt, .md or .jsonl file")
    return [(path, path.name)]


def read_documents(path: str | Path, max_words: int = 100) -> Passages:
    """Read a document, or all documents of a folder, as passages.

    Titles are a Markdown section's heading, a JSON record's `title`, or the file's name without its suffix.
    Ids are the document's (a JSON record's `id`, else the file's name, with the section or line), `#`, and
    the number of the passage in it.

    Args:
      path: a folder (searched with all its sub-folders), or one .txt, .md or .jsonl file, plain or gzipped. A
        JSON record has `text` (or `contents`), optional `title` and `id`.
      max_words: the longest passage, in words.

    Raises:
      UserError: nothing to read, unreadable text, bad JSON (file and line), an id that occurs twice.
    """
    path = Path(path)
    ids: dict[str, Path] = {}
    titles, texts = [], []
    for file, name in _files(path):
        for document, title, text in _records(file, name):
            for number, passage in enumerate(split_text(text, max_words)):
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
    return Passages(list(ids), titles, texts)
