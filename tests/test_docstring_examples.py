"""The examples in docstrings run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "expertrag_jax").rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


def test_there_are_examples():
    assert "expertrag_jax.systems.mark" in WITH_EXAMPLES
