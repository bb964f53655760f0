"""Ways to damage a file: its place, its bytes, its lines, its JSON. Each draws from a generator of random numbers.

A mutation takes (random, bytes) and returns bytes; those of a place take (random, path) and change what is there.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_DEEP = "[" * 100_000 + "]" * 100_000


class Raw(str):
    """JSON that ``json.dumps`` would not write."""


VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**9, 2**63, 10**30, 1.5, -0.0, 1e308, "", " ", "0", "x", "null", "../x", "/dev/null",
    "a" * 5000, "\x1b[31mred", "\0", "naïve", "苍鹭", "\u202e", "\ufeff", [], {}, [[]], [None], [1], ["x"], {"x": 1},
    Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("9" * 5000), Raw("1e999"), Raw('"\\ud800"'),
    Raw('["\\udc00"]'), Raw(_DEEP), Raw("01"), Raw("'x'"), Raw('"a\tb"'),
]  # fmt: skip
"""Values that replace a valid one of JSON."""


# bytes


def truncated(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))] if data else b""


def flipped(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    size = min(rng.choice([1, 4, 64, 4096]), len(data) - start)
    block = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
    return data[:start] + block + data[start + size :]


def inserted(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    block = rng.choice([b"\0", b"\xff", b"\xe9", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b'"', rng.randbytes(9)])
    return data[:start] + block + data[start:]


def cut_out(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 1 + len(data) // 3) :]


def repeated(rng: random.Random, data: bytes) -> bytes:
    return data + rng.choice([data, data[: len(data) // 2], b"\0" * 100, rng.randbytes(100), b"}"])


def replaced(rng: random.Random, data: bytes) -> bytes:
    junk = [b"", b"\0", b"\n", b"\xff\xfe", b"{}", b"[]", b"null", b"\x1f\x8b", b"PK\x03\x04", b"\x93NUMPY", b"<html>"]
    return rng.choice([*junk, rng.randbytes(2000), data[::-1], gzip.compress(data)[:-5], _DEEP.encode()])


BYTES: list[Mutation] = [truncated, flipped, overwritten, inserted, cut_out, repeated, replaced]


# text


def _lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True) or [b""]


def line_dropped(rng: random.Random, data: bytes) -> bytes:
    lines = _lines(data)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def line_doubled(rng: random.Random, data: bytes) -> bytes:
    lines = _lines(data)
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"".join(lines)


def lines_swapped(rng: random.Random, data: bytes) -> bytes:
    lines = _lines(data)
    rng.shuffle(lines)
    return b"".join(lines)


def blank_lines(rng: random.Random, data: bytes) -> bytes:
    return b"".join(line + rng.choice([b"", b"\n", b"  \n"]) for line in _lines(data))


def other_ends(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b"\n", rng.choice([b"\r\n", b"\r"]))


def no_last_end(rng: random.Random, data: bytes) -> bytes:
    return data.rstrip(b"\n")


def encoded(rng: random.Random, data: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice([text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("utf-32"), gzip.compress(data)])


def column_changed(rng: random.Random, data: bytes) -> bytes:
    lines = _lines(data)
    row = rng.randrange(len(lines))
    fields = lines[row].split(b"\t")
    change = rng.randrange(5)
    if change == 0:
        fields.insert(rng.randrange(len(fields) + 1), b"x")
    elif change == 1:
        del fields[rng.randrange(len(fields))]
    else:
        end = b"\n" if lines[row].endswith(b"\n") else b""
        new = [b"", b'"', b'"a', b'a"b', b"\0", b"\x1b[2J", b"z" * 300_000, "é".encode(), b"\xe9"]
        fields = [field.rstrip(b"\n") for field in fields]
        fields[rng.randrange(len(fields))] = rng.choice(new)
        fields[-1] += end
    lines[row] = b"\t".join(fields)
    return b"".join(lines)


TEXT: list[Mutation] = [
    truncated, flipped, overwritten, inserted, cut_out, replaced, line_dropped, line_doubled, lines_swapped,
    blank_lines, other_ends, no_last_end, encoded,
]  # fmt: skip
TABLE: list[Mutation] = [*TEXT, column_changed, column_changed, column_changed]


# JSON


def value_changed(rng: random.Random, data: bytes) -> bytes:
    """One value, key or whole record of a JSON file or of a line of JSON lines."""
    lines = data.decode().splitlines() if data.count(b"\n{") else [data.decode()]
    row = rng.randrange(len(lines))
    lines[row] = changed_json(rng, lines[row])
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def changed_json(rng: random.Random, text: str) -> str:
    """The text of a JSON value with one change at a random place."""
    try:
        record = json.loads(text)
    except ValueError:
        return text
    places = list(_places(record))
    if not places or rng.random() < 0.08:
        return _written(rng.choice(VALUES))
    holder, key = rng.choice(places)
    change = rng.random()
    if change < 0.15:
        del holder[key]
    elif change < 0.25 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "_id", "id", "../x", key.upper(), "a" * 3000])] = holder.pop(key)
    elif change < 0.35 and isinstance(holder, dict):
        holder["unknown"] = rng.choice(VALUES)
    elif change < 0.4 and isinstance(holder, list):
        holder.extend(holder)
    else:
        holder[key] = rng.choice(VALUES)
    return _written(record)


def _places(value: Any):
    """(dict or list, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _written(value: Any) -> str:
    raws: list[Raw] = []

    def marked(inner: Any) -> Any:
        if isinstance(inner, Raw):
            raws.append(inner)
            return f"@raw{len(raws) - 1}@"
        if isinstance(inner, dict):
            return {key: marked(item) for key, item in inner.items()}
        return [marked(item) for item in inner] if isinstance(inner, list) else inner

    text = json.dumps(marked(value), ensure_ascii=False)
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text


LINES: list[Mutation] = [*TEXT, *[value_changed] * 12]
OBJECT: list[Mutation] = [*BYTES, *[value_changed] * 7]


# places


def missing(rng: random.Random, path: Path) -> None:
    path.unlink()


def folder(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(rng: random.Random, path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop_of_links(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def link_to_nothing(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def device(rng: random.Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/dev/null", "/dev/zero", "/proc/self/mem"]))


def link_elsewhere(rng: random.Random, path: Path) -> None:
    moved = path.parent / f"{path.name}.moved"
    shutil.move(path, moved)
    path.symlink_to(moved.name)


PLACE = [missing, folder, pipe, loop_of_links, link_to_nothing, device, link_elsewhere]
