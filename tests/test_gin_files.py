"""Every gin file parses with the commands that it belongs to, and docs/gin.md knows it and its macros."""

import pathlib
import re
import shlex

import gin
import pytest

from expertrag_jax import launch, main
from expertrag_jax.macros import MACROS

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT / "gin").as_posix() for path in (ROOT / "gin").rglob("*.gin"))
REFERENCE = ROOT / "docs" / "gin.md"

READER = "--gin.VOCABULARY=v --gin.QUESTIONS=q --gin.MODEL_DIR=m"
INDEX = "index --gin_file=runs/index.gin --gin.CORPUS=c --gin.INDEX_DIR=i"


def train(*files: str, macros: str = "") -> str:
    """A command that trains: runs/train.gin, the files, the macros that every reader needs, and others."""
    return " ".join(["train", *(f"--gin_file={name}" for name in ("runs/train.gin", *files)), READER, macros])


def closed_book(model: str = "models/t5_tiny.gin", *behind: str) -> str:
    return train(model, "systems/closed_book.gin", *behind)


def decided(gate: str, macros: str = "") -> str:
    return train("models/t5_tiny.gin", "systems/decided.gin", gate, macros=f"--gin.INDEX_DIR=i {macros}")


def rag(system: str) -> str:
    return train("models/t5_tiny.gin", system, macros="--gin.RETRIEVER=r --gin.INDEX_DIR=i")


# Commands, without `expertrag` and `--dry_run`, in which a file is read; those of its header comment are run too. A
# file whose header says them all has an empty entry.
COMMANDS: dict[str, tuple[str, ...]] = {
    "examples/almanac_rag.gin": (),
    "examples/open_domain.gin": (),
    "examples/raw_text.gin": (),
    "examples/two_hop.gin": (),
    "examples/wikipedia_qa.gin": (
        "index --gin_file=examples/wikipedia_qa.gin --gin.CORPUS=c --gin.TUNE_QUESTIONS=g",
        "train --gin_file=examples/wikipedia_qa.gin --gin.QUESTIONS=q --gin.GATE_QUESTIONS=g",
        *(f"{job} --gin_file=examples/wikipedia_qa.gin --questions=q" for job in ("calibrate", "evaluate", "infer")),
        "export --gin_file=examples/wikipedia_qa.gin",
    ),
    "examples/wikipedia_retriever.gin": (),
    "gates/always.gin": (decided("gates/always.gin"),),
    "gates/learned.gin": (decided("gates/learned.gin", "--gin.GATE_DIR=g"),),
    "gates/never.gin": (decided("gates/never.gin"),),
    "gates/oracle.gin": (decided("gates/oracle.gin"),),
    "gates/random.gin": (decided("gates/random.gin"),),
    "gates/threshold.gin": (decided("gates/threshold.gin", "--gin.policy.Threshold.threshold=0.5"),),
    "meshes/data.gin": (closed_book("models/t5_tiny.gin", "meshes/data.gin"),),
    "meshes/data_expert_tensor.gin": (closed_book("models/moe_small.gin", "meshes/data_expert_tensor.gin"),),
    "meshes/expert.gin": (closed_book("models/moe_tiny.gin", "meshes/expert.gin"),),
    "meshes/fsdp.gin": (closed_book("models/t5_base.gin", "meshes/fsdp.gin"),),
    "models/base.gin": (closed_book("models/base.gin"),),
    "models/moe_base_top2.gin": (closed_book("models/moe_base_top2.gin"),),
    "models/moe_small.gin": (closed_book("models/moe_small.gin"),),
    "models/moe_tiny.gin": (closed_book("models/moe_tiny.gin"),),
    "models/t5_base.gin": (closed_book("models/t5_base.gin"),),
    "models/t5_small.gin": (closed_book("models/t5_small.gin"),),
    "models/t5_tiny.gin": (closed_book(),),
    "retrieval/bm25.gin": (f"{INDEX} --gin_file=retrieval/bm25.gin",),
    "retrieval/exact.gin": (f"{INDEX} --gin_file=retrieval/exact.gin --gin.RETRIEVER=r",),
    "retrieval/hybrid.gin": (f"{INDEX} --gin_file=retrieval/hybrid.gin --gin.RETRIEVER=r --tune_questions=q",),
    "retrieval/scann.gin": (f"{INDEX} --gin_file=retrieval/scann.gin --gin.RETRIEVER=r",),
    "runs/almanac.gin": (),
    "runs/almanac_100k.gin": (),
    "runs/almanac_4k.gin": (),
    "runs/calibrate.gin": (),
    "runs/evaluate.gin": (),
    "runs/export.gin": (),
    "runs/index.gin": (),
    "runs/infer.gin": (),
    "runs/train.gin": (),
    "systems/closed_book.gin": (closed_book(),),
    "systems/decided.gin": (),
    "systems/distillation.gin": (),
    "systems/dro.gin": (),
    "systems/dual_encoder.gin": (train("systems/dual_encoder.gin", macros="--gin.CORPUS=c"),),
    "systems/expert_rag.gin": (
        train("models/moe_tiny.gin", "systems/expert_rag.gin", macros="--gin.GATE_QUESTIONS=g --gin.INDEX_DIR=i"),
    ),
    "systems/rag.gin": (rag("systems/rag.gin"),),
    "systems/rag_sequence.gin": (rag("systems/rag_sequence.gin"),),
    "systems/rag_token.gin": (rag("systems/rag_token.gin"),),
    "systems/span_corruption.gin": (),
}


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """Runs a command with --dry_run in an empty folder, which stays empty; returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(command: str) -> str:
        name, *arguments = shlex.split(command)
        code = launch.execute(main.COMMANDS[name][0], [*arguments, "--dry_run"], f"expertrag {name}")
        output = capsys.readouterr()
        assert code == 0, f"{command}: {output.err}"
        return output.out

    yield run
    gin.clear_config()  # what is bound would hold in the tests after this one
    assert not list(tmp_path.iterdir())


def header_commands(name: str) -> list[str]:
    """The commands with a gin file in a file's header comment, without `expertrag`, ``...`` filled in."""
    header = re.match(r"(#.*\n)*", (ROOT / "gin" / name).read_text())[0]
    text = re.sub(r"\\\n", "", re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    found = re.findall(r"^ +expertrag (.*--gin_file=.*)", text, re.MULTILINE)
    return [re.sub(r"=\.\.\.(?=\s|$)", "=x", command) for command in found]


def lines(name: str) -> list[str]:
    """The lines of a gin file without comments."""
    return re.sub(r"(^|\s)#.*", "", (ROOT / "gin" / name).read_text(), flags=re.MULTILINE).splitlines()


def macros(name: str) -> list[str]:
    """The macros that a gin file binds."""
    return [found[1] for line in lines(name) if (found := re.match(r"([A-Z][A-Z_0-9]*) *=", line))]


def parameters(name: str) -> list[str]:
    """The parameters that a gin file binds, as ``scope/Class.parameter``, without modules: these may have aliases."""
    found, block = [], None
    for line in lines(name):
        if start := re.match(r"((?:\w+/)*)(?:\w+\.)*?(\w+):$", line):
            block = start[1] + start[2]
        elif inside := re.match(r"  (\w+) *=", line):
            found.append(f"{block}.{inside[1]}")
        elif alone := re.match(r"((?:\w+/)*)(?:\w+\.)+?(\w+\.\w+) *=", line):
            found.append(alone[1] + alone[2])
    return found


def test_every_gin_file_has_an_entry_and_every_entry_a_file():
    assert sorted(COMMANDS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_gin_file_parses_with_its_commands(name, dry_run):
    commands = [*header_commands(name), *COMMANDS[name]]
    assert any(f"--gin_file={name} " in f"{command} " for command in commands), f"no command reads {name}"
    for command in commands:
        printed = dry_run(command)
        module, _, function = main.COMMANDS[command.split()[0]][0].partition(":")
        assert f"# would run {module}.{function or module.rpartition('.')[2]} with\n" in printed
        if f"--gin_file={name} " in f"{command} ":
            known = re.sub(r"^((?:\w+/)*)(?:\w+\.)*(\w+\.\w+) =", r"\1\2 =", printed, flags=re.MULTILINE).splitlines()
            bound = {line.partition(" =")[0] for line in known}
            assert not sorted({*macros(name), *parameters(name)} - bound)


def test_the_reference_names_every_macro_and_every_gin_file():
    named = set(re.findall(r"`([^`\n]+)`", REFERENCE.read_text()))
    bound = {macro for name in FILES for macro in macros(name)}
    assert not sorted(set(MACROS) - named)
    assert not sorted(bound - named)
    assert not sorted(set(FILES) - named)
    assert not sorted(name for name in named if re.fullmatch(r"\w+/\w+\.gin", name) and name not in FILES)
