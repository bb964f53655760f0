"""Index directories: of every kind, moved, damaged, replaced; and what they refuse."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import md5

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.files import directories
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import Queries, check_writable, make_index, open_index, write_index
from expertrag_jax.retrieval.manifest import check_matches, parameters_digest, read_manifest

COUNT, WIDTH = 40, 8
WORDS = "amber birch cedar delta ember fjord grove heath islet jetty kelp lotus maple nectar olive pearl".split()


@pytest.fixture
def corpus():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=6)) for _ in range(COUNT)]
    passages = Passages([f"p{row}" for row in range(COUNT)], [f"Title {row}" for row in range(COUNT)], texts)
    vectors = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    tokens = rng.integers(1, 99, size=(COUNT, 5)).astype(np.int32)
    queries = Queries(texts[:3], rng.normal(size=(3, WIDTH)).astype(np.float32))
    return passages, vectors, tokens, queries


def write(directory, corpus, kind="exact", **settings):
    passages, vectors, tokens, _ = corpus
    index = make_index(kind).build(passages, vectors)
    return write_index(directory, index, passages, passage_tokens=tokens, vectors=vectors, **settings)


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25", "hybrid"])
def test_two_builds_are_equal_in_every_byte(tmp_path, kind):
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(WORDS, size=6)) for _ in range(1200)]  # ScaNN serves itself from 1,000 on
    passages = Passages([f"p{row}" for row in range(1200)], [""] * 1200, texts)
    vectors = rng.normal(size=(1200, WIDTH)).astype(np.float32)
    made = []
    for name in range(12):  # ScaNN's unseeded start, which this guards against, made half of the pairs equal
        folder = tmp_path / str(name)
        write_index(folder, make_index(kind).build(passages, vectors), passages, vectors=vectors)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        made.append([(str(path.relative_to(folder)), md5(path.read_bytes()).hexdigest()) for path in files])
    assert len(made[0]) > 3 and all(files == made[0] for files in made)


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25", "hybrid"])
def test_the_settings_of_an_index_make_another_one(tmp_path, corpus, kind):
    found = write(tmp_path / "index", corpus, kind).settings
    again = make_index(kind, **found)
    assert again.kind == kind and json.loads(json.dumps(again.settings)) == found


@pytest.mark.parametrize("kind", ["exact", "scann", "bm25", "hybrid"])
def test_an_index_is_the_same_after_a_move(tmp_path, corpus, kind):
    passages, vectors, tokens, queries = corpus
    built = make_index(kind).build(passages, vectors)
    manifest = write_index(
        tmp_path / "here" / "index",
        built,
        passages,
        passage_tokens=tokens,
        vectors=vectors,
        encoder_digest="e",
        vocabulary_digests={"reader": "v"},
    )
    (tmp_path / "there").mkdir()
    shutil.move(tmp_path / "here" / "index", tmp_path / "there" / "moved")
    assert os.listdir(tmp_path / "here") == []
    loaded = open_index(tmp_path / "there" / "moved")
    assert loaded.manifest == manifest and loaded.manifest.digest == manifest.digest
    assert (manifest.kind, manifest.count, manifest.dimension, manifest.token_length) == (
        kind,
        COUNT,
        WIDTH,
        5,
    )
    assert manifest.corpus_digest == passages.digest == loaded.passages.digest
    np.testing.assert_array_equal(loaded.tokens, tokens)
    np.testing.assert_array_equal(loaded.vectors, vectors)
    for wanted, found in zip(built.search(queries, 50), loaded.index.search(queries, 50)):
        np.testing.assert_array_equal(wanted, found)
    for path in (tmp_path / "there").rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()


def test_writing_twice_gives_equal_digests(tmp_path, corpus):
    assert write(tmp_path / "a", corpus).digest == write(tmp_path / "b", corpus).digest


def test_an_index_is_not_overwritten_unless_asked(tmp_path, corpus):
    first = write(tmp_path / "index", corpus)
    passages, vectors, tokens, queries = corpus
    changed = (passages, vectors + 1, tokens, queries)
    with pytest.raises(UserError, match="already holds an index"):
        write(tmp_path / "index", changed)
    assert read_manifest(tmp_path / "index").digest == first.digest
    held = open_index(tmp_path / "index")
    second = write(tmp_path / "index", changed, overwrite=True)
    assert read_manifest(tmp_path / "index").digest == second.digest != first.digest
    np.testing.assert_array_equal(held.vectors, vectors)  # a reader of the old version keeps it
    assert os.listdir(tmp_path) == ["index"]


def test_overwriting_works_without_an_atomic_exchange(tmp_path, corpus, monkeypatch):
    write(tmp_path / "index", corpus)
    monkeypatch.setattr(directories, "exchange", lambda new, old: False)
    passages, vectors, tokens, queries = corpus
    second = write(tmp_path / "index", (passages, vectors * 2, tokens, queries), overwrite=True)
    assert open_index(tmp_path / "index").manifest.digest == second.digest
    assert os.listdir(tmp_path) == ["index"]


def test_what_is_not_an_index_is_never_overwritten(tmp_path, corpus):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="is not an index: nothing was overwritten"):
        write(tmp_path / "index", corpus, overwrite=True)
    assert (tmp_path / "index" / "thesis.txt").read_text() == "dear"
    with pytest.raises(UserError, match="is not an index"):
        check_writable(tmp_path / "index" / "thesis.txt", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", corpus)


def test_a_failed_write_leaves_nothing(tmp_path, corpus, monkeypatch):
    first = write(tmp_path / "index", corpus)

    def fail(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(directories, "sync", fail)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / "index", corpus, overwrite=True)
    assert os.listdir(tmp_path) == ["index"] and open_index(tmp_path / "index").manifest.digest == first.digest


@pytest.mark.parametrize("name", ["vectors.npy", "passages.tsv.gz", "passage_tokens.npy"])
def test_a_damaged_or_missing_file_is_named(tmp_path, corpus, name):
    write(tmp_path / "index", corpus)
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        open_index(tmp_path / "index")
    open_index(tmp_path / "index", verify=False)  # equal in size
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        open_index(tmp_path / "index", verify=False)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        open_index(tmp_path / "index")


def test_other_directories_are_refused(tmp_path, corpus):
    with pytest.raises(UserError, match="no such index directory"):
        open_index(tmp_path / "none")
    with pytest.raises(UserError, match="is not an index"):
        open_index(tmp_path)
    write(tmp_path / "index", corpus)
    path = tmp_path / "index" / "manifest.json"
    fields = json.loads(path.read_text())
    for content, message in (
        ("{", "damaged"),
        ('{"format": "other"}', "not the manifest of an index"),
        (json.dumps({**fields, "format_version": 99}), "format version 99 but this release reads 1"),
        (json.dumps({key: value for key, value in fields.items() if key != "count"}), "damaged"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            open_index(tmp_path / "index")


def test_mismatches_name_both_sides(tmp_path, corpus):
    manifest = write(
        tmp_path / "index",
        corpus,
        encoder_digest="enc1",
        vocabulary_digests={"reader": "voc1", "retriever": "ret1"},
    )
    same = dict(
        vocabulary_digest="voc1",
        retriever_vocabulary_digest="ret1",
        encoder_digest="enc1",
        dimension=WIDTH,
        corpus_digest=corpus[0].digest,
    )
    check_matches(manifest, **same)
    for name, value, message in (
        ("vocabulary_digest", "voc2", "reader vocabulary voc1 but reader vocabulary voc2"),
        ("retriever_vocabulary_digest", "ret2", "ret1 .* ret2"),
        ("encoder_digest", "enc2", "passage encoder enc1 but passage encoder enc2"),
        ("dimension", 16, "dimension 8 but dimension 16"),
        ("corpus_digest", "c2", "corpus .* but corpus c2"),
    ):
        with pytest.raises(UserError, match=message):
            check_matches(manifest, **{**same, name: value})


def test_parts_that_do_not_fit_the_corpus_are_refused(tmp_path, corpus):
    passages, vectors, tokens, _ = corpus
    index = make_index("exact").build(passages, vectors)
    with pytest.raises(UserError, match=r"vectors has shape \(39, 8\) but the corpus has 40 passages"):
        write_index(tmp_path / "index", index, passages, vectors=vectors[1:])
    with pytest.raises(UserError, match="unknown kind of index 'faiss'"):
        make_index("faiss")
    with pytest.raises(UserError, match="shape .*9.* but the exact index has dimension 8"):
        index.search(Queries(vectors=np.zeros((1, 9), np.float32)), 1)
    with pytest.raises(UserError, match="searches by vectors"):
        index.search(Queries(["a"]), 1)
    with pytest.raises(UserError, match="searches by words"):
        make_index("bm25").build(passages).search(Queries(vectors=vectors[:1]), 1)


def test_parameters_digest_sees_names_types_and_values():
    tree = {"a": {"b": np.ones(2, np.float32)}, "c": np.zeros(1)}
    same = {"c": np.zeros(1), "a": {"b": np.ones(2, np.float32)}}
    others = [
        {"a": {"x": tree["a"]["b"]}, "c": tree["c"]},
        {**tree, "c": np.ones(1)},
        {**tree, "c": np.zeros(1, int)},
    ]
    assert parameters_digest(tree) == parameters_digest(same)
    assert len({parameters_digest(tree), *map(parameters_digest, others)}) == 4


def test_importing_retrieval_loads_no_search_library():
    code = (
        "import sys, importlib, pkgutil, expertrag_jax.retrieval as r\n"
        "for name in ('scann', 'tensorflow', 'bm25s', 'seqio', 'gin'): sys.modules[name] = None\n"
        "for module in pkgutil.iter_modules(r.__path__):\n"
        "    importlib.import_module(r.__name__ + '.' + module.name)\n"
        "import numpy as np\n"
        "index = r.index.make_index('scann').build(None, np.eye(1200, 8, dtype=np.float32))\n"
        "assert index.is_exact\n"
        "assert index.search(r.index.Queries(vectors=np.eye(1, 8, dtype=np.float32)), 1)[0] == 0"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
