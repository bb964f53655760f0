"""The house keeps its walls: the core loads without TensorFlow and gin, and imports run downwards only."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "expertrag_jax"

# Above these names the edge begins: what they import is theirs. Everything else in expertrag_jax is the core.
ENTRY_POINTS = (
    "main __main__ launch job_flags processes gin_files gin_errors gin_ranges macros "
    "train evaluate infer index mine answer calibrate export plan demo"
).split()
OUTSIDE_THE_CORE = ("data", "interop", "retrieval.scann_index", *ENTRY_POINTS)
BLOCKED = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "scann", "gin")

# The rooms from the roof down. A room may import those below it; files of one room may import each other, but
# not in a circle.
HOUSE = (
    ("entry points", tuple(ENTRY_POINTS)),
    ("interop", ("interop",)),
    ("what jobs share", ("encoders", "trained_gate", "gate_training", "comparison", "stages", "demo_folder")),
    ("from files to answers", ("assembly", "trained_model", "service")),
    ("answering", ("answering",)),
    ("training", ("training",)),
    ("tasks", ("tasks",)),
    ("data", ("data",)),
    ("systems", ("systems",)),
    ("retrieval", ("retrieval",)),
    ("gate", ("gate",)),
    ("model", ("model",)),
    ("moe", ("moe",)),
    ("evaluation", ("evaluation",)),
    ("evidence", ("evidence",)),
    ("vocabulary", ("vocabulary",)),
    ("mips", ("mips",)),
    ("decoding", ("decoding",)),
    ("batch", ("batch",)),
    ("partitioning", ("partitioning",)),
    ("native output", ("native_output",)),
    ("disk", ("disk",)),
    ("terminal", ("terminal",)),
    ("files, and what they may say", ("files", "ranges")),
    ("scripts", ("scripts",)),
    ("registry", ("registry",)),
    ("errors", ("errors",)),
)


def modules() -> dict[str, pathlib.Path]:
    """Every module of expertrag_jax and tasks, by name; a package by its own name."""
    found = {}
    for folder in (PACKAGE, ROOT / "tasks"):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def core() -> list[str]:
    outside = tuple(f"expertrag_jax.{name}" for name in OUTSIDE_THE_CORE)
    return [
        name
        for name in modules()
        if name.startswith("expertrag_jax") and not any(f"{name}.".startswith(f"{edge}.") for edge in outside)
    ]


def room(name: str) -> str | None:
    """The room of a module: 'expertrag_jax.gate.policy' is in 'gate'; None for the bare package."""
    parts = name.split(".")
    if parts[0] == "tasks":
        return "tasks"
    return parts[1] if len(parts) > 1 else None


def imports(name: str, path: pathlib.Path) -> set[str]:
    """The project's modules that a module imports anywhere in its text, functions included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {each if each in known else base for each in full}
    return (found & set(known)) - {name}


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("path", sorted({path.parent for path in modules().values()}), ids=lambda p: p.name)
def test_every_folder_of_modules_is_a_package(path):
    assert (path / "__init__.py").exists()  # else setup.py leaves it out


def test_gin_folder_does_not_hide_gin_config():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_core_loads_without_tensorflow_and_gin():
    names = core()
    assert len(names) > 20 and "expertrag_jax.retrieval" in names
    assert not any("scann" in name or "launch" in name for name in names)
    result = run(
        "import importlib, sys\n"
        f"for name in {BLOCKED!r}: sys.modules[name] = None\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ImportError as error:\n"
        "        print(f'{name}: {error}')\n"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == ""


def test_core_never_names_tensorflow_even_inside_a_function():
    forbidden = {*BLOCKED, "clu", "tensorflow_hub"}
    wrong = []
    for name in core():
        for node in ast.walk(ast.parse(modules()[name].read_text())):
            if isinstance(node, ast.Import):
                roots = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots = {(node.module or "").partition(".")[0]}
            else:
                continue
            wrong += [f"{name}:{node.lineno} imports {root}" for root in roots & forbidden]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["expertrag_jax.retrieval", "expertrag_jax.main", "expertrag_jax.launch"])
def test_import_stays_light(name):
    result = run(
        f"import sys, {name}; print([m for m in ('tensorflow', 'scann', 'seqio') if m in sys.modules])"
    )
    assert result.stdout.strip() == "[]", result.stderr[-2000:]


def test_imports_run_downwards():
    height = {name: -floor for floor, (_, names) in enumerate(HOUSE) for name in names}
    wrong = []
    for name, path in modules().items():
        here = room(name)
        if here is None:
            continue
        assert here in height, f"{name}: room {here} is not in the house; give it its place in HOUSE"
        for other in imports(name, path):
            there = room(other)
            if there is not None and there != here and height[there] > height[here]:
                wrong.append(f"{name} imports {other}, which stands above it")
    assert not wrong, "\n".join(wrong)


def test_imports_have_no_circles():
    graph = {name: imports(name, path) for name, path in modules().items()}
    done, circles = set(), []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert not circles, "\n".join(circles)


def test_the_wall_is_noticed(tmp_path):
    """The readers of imports above see what they must: relative, nested and plain ones."""
    path = tmp_path / "policy.py"
    path.write_text(
        "import jax\nfrom . import network\ndef f():\n    from expertrag_jax.training import loop\n"
    )
    found = imports("expertrag_jax.gate.policy", path)
    assert "expertrag_jax.gate.network" in found
    assert {name for name in found if name.startswith("expertrag_jax.training")}
