"""setup.py names every package that the code imports, and constraints.txt pins every one it names."""

import ast
import pathlib
import re
import runpy
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
OURS = {"expertrag_jax", "tasks", "toy_job"} | SCRIPTS  # a script imports those beside it
UNPUBLISHED = {"flaxformer"}  # on no package index, and named by no extra: benchmarks/beside_t5x.py says so
# Distributions that are not called what is imported.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "gin": "gin-config",
    "orbax": "orbax-checkpoint",
    "Stemmer": "PyStemmer",
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow_text": "tensorflow-text",
}


def canonical(requirement: str) -> str:
    """The name under which package indexes compare: "PyStemmer>=3.0,<4" -> "pystemmer"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


@pytest.fixture(scope="module")
def requirements() -> dict[str, set[str]]:
    """Canonical names: of the installation, of its extras."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        # In place of setuptools, which an environment of Python 3.12 does not hold.
        setup = types.SimpleNamespace(setup=given.update, find_packages=lambda **_: [])
        patch.setitem(sys.modules, "setuptools", setup)
        runpy.run_path(str(ROOT / "setup.py"))
    named = {extra: set(map(canonical, names)) for extra, names in given["extras_require"].items()}
    return named | {"install": set(map(canonical, given["install_requires"]))}


def imported(*folders: str) -> dict[str, str]:
    """Packages that are not ours nor Python's, and a file that imports each."""
    found = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name not in OURS | UNPUBLISHED:
                    found[canonical(DISTRIBUTIONS.get(name, name))] = str(path.relative_to(ROOT))
    return found


def test_every_import_is_required(requirements):
    used = imported("expertrag_jax", "tasks")
    assert {"jax", "bm25s", "rich", "absl-py"} <= set(used)
    optional = requirements["t5x"] | requirements["beam"]
    missing = set(used) - requirements["install"] - optional
    assert not missing, {name: used[name] for name in missing}
    used = imported("tests", "benchmarks")
    missing = set(used) - requirements["install"] - requirements["test"] - optional
    assert not missing, {name: used[name] for name in missing}


def test_tensorflow_datasets_finds_what_it_imports(requirements):
    assert "importlib-resources" in requirements["install"]


def test_every_requirement_is_pinned(requirements):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if "==" in line and not line.startswith("#")}
    assert not (requirements["install"] | requirements["test"]) - pinned
