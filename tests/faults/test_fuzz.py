"""The fuzz of ``make fuzz``: every kind of file and every command has its share, and its judge sees each fault."""

from __future__ import annotations

import collections
import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
import fuzz  # noqa: E402
import kinds  # noqa: E402
import mutations  # noqa: E402
from command import Ended  # noqa: E402
from judge import judge  # noqa: E402

from expertrag_jax.main import COMMANDS  # noqa: E402

FILE = Path("questions.jsonl")


def ended(code, printed="", after=None, before=None):
    return Ended(code, printed, before or {"questions.jsonl": "a"}, after or {"questions.jsonl": "a"}, 1.0)


RIGHT = ended(0, "2 questions\n", {"questions.jsonl": "a", "answers.jsonl": "b"})
OTHER = {"questions.jsonl": "a", "answers.jsonl": "c"}


@pytest.mark.parametrize(
    "case, verdict",
    [
        (ended(2, "12:00:00 I reading\nerror: questions.jsonl:3: not JSON\n"), "refused"),
        (ended(2, "usage: x\nexpertrag infer: error: unknown flag --q\n"), "FAULT"),  # of a damaged file
        (ended(2, "error: it went wrong\n"), "FAULT"),
        (ended(2, "error: questions.jsonl is bad\nand more\n"), "FAULT"),
        (ended(2, "error: questions.jsonl is bad\nerror: questions.jsonl is bad\n"), "FAULT"),
        (ended(2, "Traceback (most recent call last):\n\nerror: questions.jsonl is bad\n"), "FAULT"),
        (ended(2, "error: questions.jsonl is bad\n", {"questions.jsonl": "z"}), "FAULT"),
        (ended(1, ""), "FAULT"),
        (ended(-11, ""), "FAULT"),
        (ended(None, ""), "FAULT"),
        (RIGHT, "unchanged"),
        (ended(0, "2 questions\n", RIGHT.after, before={"questions.jsonl": "z"}), "unchanged"),  # mended
        (ended(0, "12:00:00 W 1 record was left out\n", OTHER), "warned"),
        (ended(0, "2 questions\n", OTHER), "FAULT"),
    ],
)
def test_the_judge_sees_each_fault(case, verdict):
    assert judge("mine bm25", case, RIGHT, FILE, free=False)[0] == verdict


def test_other_content_may_be_right():
    assert judge("mine bm25", ended(0, "2 questions\n", OTHER), RIGHT, FILE, free=True)[0] == "accepted"


@pytest.fixture
def bench(tmp_path):
    """Empty files with the names of the bench's."""
    for kind in kinds.KINDS:
        for pattern in kind.files:
            path = tmp_path / pattern.replace("[!m]*", "x").replace("*", "x")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path


def test_kinds_and_commands_have_twenty_cases_each(bench):
    cases = [fuzz.draw(number, 0, bench) for number in range(1000)]
    for name, wanted in (
        (lambda case: case.kind, {kind.name for kind in kinds.KINDS} | {"arguments", "gin values"}),
        (lambda case: case.arguments[0], set(COMMANDS)),
    ):
        counts = collections.Counter(map(name, cases))
        assert set(counts) == wanted and min(counts.values()) >= 20, counts
    assert fuzz.draw(7, 0, bench) == fuzz.draw(7, 0, bench) != fuzz.draw(7, 1, bench)


@pytest.mark.parametrize("mutation", {*mutations.TABLE, *mutations.OBJECT}, ids=lambda mutation: mutation.__name__)
def test_a_mutation_changes_bytes_and_depends_on_its_seed_alone(mutation):
    data = b"".join(b'{"question": "Who?", "answers": ["A%d", "B"]}\n' % number for number in range(9))
    made = [mutation(random.Random(seed), data) for seed in range(20)]
    assert made == [mutation(random.Random(seed), data) for seed in range(20)]
    assert sum(changed != data for changed in made) >= 10


def test_a_changed_value_of_json_is_json_but_for_raw_ones():
    record = {"a": [1, {"b": "x"}], "c": None}
    texts = {mutations.changed_json(random.Random(seed), json.dumps(record)) for seed in range(300)}
    assert len(texts) > 100

    def parses(text):
        try:
            return json.loads(text) != record
        except (ValueError, RecursionError):
            return False

    assert 100 < sum(map(parses, texts)) < len(texts)
