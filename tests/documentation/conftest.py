"""Walks through a page of the documentation: runs its commands, one after the other, in a folder of its own."""

import functools
import gzip
import importlib.util
import json
import pathlib
import shutil
import sys
import time

import pytest

from expertrag_jax.retrieval.corpus import Passages, write_passages_tsv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def load(name: str):
    """A module beside this file."""
    spec = importlib.util.spec_from_file_location(f"documentation_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


_pages, _small, _runner = (load(name) for name in ("pages", "small", "runner"))


def pytest_generate_tests(metafunc):
    """A test of ``demo_page`` or ``file_page`` runs for each of these pages."""
    for name, table in (("demo_page", _small.DEMO_PAGES), ("file_page", _small.FILE_PAGES)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(table))


@pytest.fixture(scope="session")
def pages():
    """The module ``pages.py``."""
    return _pages


@pytest.fixture(scope="session")
def small():
    """The module ``small.py``."""
    return _small


@pytest.fixture(scope="session")
def documentation():
    """The text of each page."""
    return _pages.documentation(ROOT)


@pytest.fixture(scope="session")
def runner(xla_flags, compiled_programs):
    """Runs commands as on a machine with one CPU device."""
    programs = {"JAX_COMPILATION_CACHE_DIR": compiled_programs, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    made = _runner.Runner({"XLA_FLAGS": xla_flags(1), **programs})
    yield made
    made.close()


def corpus(tiny_model) -> Passages:
    """The tiny model's passages, and as many more as ScaNN needs, which answer no question."""
    names, more = tiny_model.passages(), range(1000)
    texts = [f"The {tiny_model.TRADES[i % 4]} of {tiny_model.TOWNS[i % 5]} met {i} people." for i in more]
    ids, titles = [f"n{i}" for i in more], [f"Note {i}" for i in more]
    return Passages([*names.ids, *ids], [*names.titles, *titles], [*names.texts, *texts])


def questions(tiny_model, places) -> list[dict]:
    """Two questions on each of the places in the corpus, with their gold passages, each in an article of its own."""
    records = []
    for place in places:
        name = tiny_model.NAMES[place]
        answers = {
            f"Where does {name} live?": tiny_model.TOWNS[place % 5],
            f"What is {name}'s trade?": tiny_model.TRADES[place % 4],
        }
        records += [
            {"question": asked, "answers": [answer], "gold_passage_ids": [f"e{place}"], "article": asked}
            for asked, answer in answers.items()
        ]
    return records


def write_given(folder: pathlib.Path, name: str, tiny_model) -> None:
    """Writes a file or folder that a page takes from its reader."""
    path = folder / name
    if name == "notes":
        path.mkdir()
        for title, text in zip(tiny_model.NAMES, tiny_model.passages().texts):
            (path / f"{title}.txt").write_text(text)
    elif ".tsv" in name:
        write_passages_tsv(corpus(tiny_model), path)
    else:
        places = {"train": range(9), "gate": range(9, 13), "validation": range(9, 13), "test": range(13, 15)}
        records = questions(tiny_model, places.get(name.partition(".")[0], range(13)))
        with gzip.open(path, "wt") if name.endswith(".gz") else path.open("w") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture(scope="session")
def walk(documentation, runner, tiny_model, tmp_path_factory):
    """``walk(page)``: the folder in which all commands of a page have run; each page is walked through once."""

    def execute(folder, command, entry):
        began = time.monotonic()
        if command.language == "python":
            runner.run_python(folder, command.text)
        elif isinstance(entry, _small.Apart):
            runner.run(folder, command.text, entry.more, apart=True, codes=entry.codes)
        else:
            runner.run(folder, command.text, entry)
        print(f"{time.monotonic() - began:.1f} s: {command}")

    def entries(page):
        return _pages.covered(_pages.commands(page, documentation[page]), _small.PAGES[page])[0]

    @functools.cache
    def demo():
        """A folder in which `make demo` has run, for all pages that begin with it."""
        folder = tmp_path_factory.mktemp("demo")
        execute(folder, *next(pair for pair in entries("docs/rag.md") if pair[0].words == "make demo"))
        return folder

    def walk_through(page):
        folder = tmp_path_factory.mktemp(page.replace("/", "_").removesuffix(".md"))
        for name in _small.GIVEN.get(page, ()):
            write_given(folder, name, tiny_model)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
        for command, entry in entries(page):
            if command.words == "make demo":
                shutil.copytree(demo() / "runs", folder / "runs", ignore=shutil.ignore_patterns("compilation_cache"))
            else:
                execute(folder, command, entry)
        return folder

    walked = {}

    def walk(page):
        if page not in walked:
            walked[page] = None
            walked[page] = walk_through(page)
        if walked[page] is None:
            pytest.fail(f"A command of {page} has failed in an earlier test.")
        return walked[page]

    return walk
