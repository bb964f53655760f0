"""Indexes, exports and gates that somebody sends are data: what was changed, or points elsewhere, is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil

import numpy as np
import pytest

from expertrag_jax import launch
from expertrag_jax.errors import UserError
from expertrag_jax.files.directories import MANIFEST_NAME
from expertrag_jax.files.sealed import sealed
from expertrag_jax.interop import export_directory
from expertrag_jax.interop.serving import service_from_export
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.retrieval.manifest import file_entry, read_manifest
from expertrag_jax.retrieval.protocol import Queries
from expertrag_jax.trained_model import _calibration, open_model
from expertrag_jax.training import integrity

COUNT, WIDTH = 12, 4


@pytest.fixture(params=["bm25", "exact"])
def directory(request, tmp_path):
    words = [f"word{number} common" for number in range(COUNT)]
    passages = Passages([str(number) for number in range(COUNT)], [""] * COUNT, words)
    vectors = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)
    vectors = vectors if request.param == "exact" else None
    index = make_index(request.param).build(passages, vectors)
    tokens = np.ones((COUNT, 3), np.int32)
    write_index(tmp_path / "index", index, passages, passage_tokens=tokens, vectors=vectors)
    return tmp_path / "index"


def change(directory, **fields):
    """A sender's manifest: other fields, and a checksum that agrees."""
    path = directory / MANIFEST_NAME
    stored = json.loads(path.read_text())
    del stored["checksum"]
    path.write_text(sealed(stored | fields))


def replace(directory, name, content):
    """A sender's file, with a manifest that agrees."""
    if isinstance(content, np.ndarray):
        np.save(directory / name, content)
    else:
        (directory / name).write_bytes(content)
    files = {**read_manifest(directory).files, name: file_entry(directory / name)}
    change(directory, files=files)


def accepted_flips(path, bits, read, right):
    """(place, bit) of the one-bit changes of a file after which ``read`` returns another value than ``right``."""
    whole, accepted = path.read_bytes(), []
    for place in range(len(whole)):
        for bit in bits(place):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            try:
                if read() != right:
                    accepted.append((place, bit))
            except UserError:
                continue
    return accepted


def test_every_flipped_bit_of_a_manifest_is_refused(directory):
    path, right = directory / MANIFEST_NAME, read_manifest(directory)
    assert accepted_flips(path, lambda at: (at % 8, (at + 3) % 8), lambda: read_manifest(directory), right) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"count": COUNT + 1},
        {"count": 0},
        {"count": -1},
        {"count": "12"},
        {"count": 10**30},
        {"count": True},
        {"dimension": 7},
        {"token_length": 9},
        {"token_length": None},
        {"kind": "hybrid"},
        {"kind": "os:system"},
        {"kind": ["bm25"]},
        {"kind": "scann"},
        {"settings": []},
        {"files": []},
        {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"/proc/kmsg": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"a/../../x": {"bytes": 1, "sha256": "0" * 64}}},
        {"files": {"manifest.json": {"bytes": -1, "sha256": "0" * 64}}},
        {"files": {"x": {"bytes": 1, "sha256": "zz"}}},
        {"files": {"x": [1, 2]}},
        {"versions": 3},
        {"corpus_digest": None},
        {"unknown": 1},
        {"format": "expertrag_jax.export"},
        {"format_version": 99},
        {"format_version": None},
        {"format_version": [1]},
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit_is_one_sentence(directory, fields):
    change(directory, **fields)
    with pytest.raises(UserError) as refused:
        open_index(directory, verify=False)
    told = str(refused.value)
    assert "\n" not in told and (str(directory) in told or "kind of index" in told)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200000, b'{"count": NaN}', b'{"a": ' + b"9" * 5000 + b"}"],
    ids=range(8),
)
def test_a_manifest_that_is_no_json_object_is_one_sentence(directory, content):
    (directory / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(UserError, match="manifest.json (is damaged|is not the manifest)"):
        open_index(directory)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((COUNT + 1, 3), np.int32),
        np.ones((COUNT, 2), np.int32),
        np.ones((COUNT, 3), np.float64),
        np.ones(COUNT * 3, np.int32),
        b"",
        b"\x93NUMPY\x01\x00",
        pickle.dumps(np.ones(3)),
    ],
    ids=lambda array: type(array).__name__,
)
def test_arrays_that_are_not_the_manifests_are_refused(directory, array):
    replace(directory, "passage_tokens.npy", array)
    with pytest.raises(UserError, match="passage_tokens.npy is damaged"):
        open_index(directory)


def test_a_header_that_claims_terabytes_allocates_nothing(directory):
    header = np.lib.format.header_data_from_array_1_0(np.ones((1, 3), np.int32)) | {"shape": (10**11, 3)}
    with open(directory / "huge", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
    content = (directory / "huge").read_bytes()
    os.remove(directory / "huge")
    replace(directory, "passage_tokens.npy", content + b"\0" * 36)
    with pytest.raises(UserError, match="passage_tokens.npy is damaged"):
        open_index(directory)


def test_object_arrays_run_nothing(directory, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    array = np.array([[Evil()] * 3] * COUNT, object)
    with open(directory / "passage_tokens.npy", "wb") as file:
        np.save(file, array, allow_pickle=True)
    replace(directory, "passage_tokens.npy", (directory / "passage_tokens.npy").read_bytes())
    with pytest.raises(UserError, match="passage_tokens.npy is damaged"):
        open_index(directory)
    assert not (tmp_path / "ran").exists()


def test_a_link_out_of_the_directory_is_refused(directory, tmp_path):
    (tmp_path / "elsewhere").write_bytes((directory / "passage_tokens.npy").read_bytes())
    (directory / "passage_tokens.npy").unlink()
    (directory / "passage_tokens.npy").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link to another place"):
        open_index(directory)


def test_a_pipe_in_the_place_of_a_file_hangs_nobody(directory):
    (directory / "passage_tokens.npy").unlink()
    os.mkfifo(directory / "passage_tokens.npy")
    with pytest.raises(UserError, match="is missing from the index"):
        open_index(directory)


@pytest.mark.parametrize("name, value", [("indices", COUNT), ("indices", -1), ("indptr", 10**12)])
def test_words_that_point_outside_are_refused_when_they_are_read(directory, name, value):
    if read_manifest(directory).kind != "bm25":
        pytest.skip("bm25 alone has words")
    place = f"searcher/bm25/{name}.csc.index.npy"
    array = np.load(directory / place)
    array[-2 if name == "indptr" else slice(None)] = value
    replace(directory, place, array)
    index = open_index(directory).index
    with pytest.raises(UserError, match="is damaged"):
        index.verify()
    with pytest.raises(UserError, match="is damaged"):
        index.search(Queries([f"word{number}" for number in range(COUNT)]), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_weights_that_are_none_are_refused_when_they_are_read(directory, value):
    if read_manifest(directory).kind != "bm25":
        pytest.skip("bm25 alone has weights")
    place = "searcher/bm25/data.csc.index.npy"
    replace(directory, place, np.full_like(np.load(directory / place), value))
    index = open_index(directory).index
    for look in (index.verify, lambda: index.search(Queries(["word1"]), 3)):
        with pytest.raises(UserError, match="weights are no weights"):
            look()


@pytest.mark.parametrize(
    "name, field, value",
    [
        *[("params.index", field, value) for field, value in (
            ("backend", "numba"), ("num_docs", 12.0), ("num_docs", "12"), ("dtype", "S10"), ("int_dtype", "object"),
            ("method", "bm25+"), ("num_docs", None),
        )],
        *[("vocab.index", "word1", value) for value in (True, 10**9, "3", 0)],
        ("vocab.index", None, []), ("vocab.index", None, {}),
        ("../bm25", "stopwords", "klingon"), ("../bm25", "k1", -1), ("../bm25", "language", "klingon"),
    ],
)  # fmt: skip
def test_what_bm25s_would_believe_is_checked(directory, name, field, value):
    if read_manifest(directory).kind != "bm25":
        pytest.skip("bm25's files")
    place = os.path.normpath(f"searcher/bm25/{name}.json")
    fields = json.loads((directory / place).read_text())
    if field == "word1":  # the place of another word for 0
        value = next(number for word, number in fields.items() if word != "word1") if value == 0 else value
    replace(directory, place, json.dumps(value if field is None else fields | {field: value}).encode())
    with pytest.raises(UserError):
        open_index(directory).index.search(Queries(["word1 common"]), 3)


@pytest.fixture(scope="module")
def scann_index(tmp_path_factory):
    place = tmp_path_factory.mktemp("scann") / "index"
    vectors = np.random.default_rng(0).normal(size=(1000, WIDTH)).astype(np.float32)
    passages = Passages([str(number) for number in range(1000)], [""] * 1000, ["text"] * 1000)
    write_index(place, make_index("scann").build(passages, vectors), passages, vectors=vectors)
    return place


@pytest.mark.parametrize("name", ["scann_config.pb", "ah_codebook.pb", "serialized_partitioner.pb"])
@pytest.mark.parametrize("kept", [0, 9])
def test_files_that_scann_cannot_read_are_one_sentence(scann_index, tmp_path, name, kept):
    directory = shutil.copytree(scann_index, tmp_path / "index")
    place = f"searcher/scann/{name}"
    replace(directory, place, (directory / place).read_bytes()[:kept])
    with pytest.raises(UserError, match="is damaged"):
        open_index(directory)


def test_what_scann_scores_are_the_vectors_of_the_index(scann_index, tmp_path):
    directory = shutil.copytree(scann_index, tmp_path / "index")
    open_index(directory).index.verify()
    held = np.load(directory / "searcher/scann/dataset.npy")
    held[500, 0] = np.nan
    replace(directory, "searcher/scann/dataset.npy", held)
    with pytest.raises(UserError, match="scores other vectors"):
        open_index(directory).index.verify()
    replace(directory, "searcher/scann/hashed_dataset.npy", np.zeros((10, 2), np.uint8))
    with pytest.raises(UserError, match="is damaged"):
        open_index(directory)


def test_a_manifest_with_another_score_is_refused(directory):
    change(directory, metric="foo")
    with pytest.raises(UserError, match="index scores by"):
        open_index(directory)


def test_escape_sequences_of_others_are_shown(directory, capsys):
    change(directory, files={"\x1b]0;title\x07": {"bytes": 3, "sha256": "0"}})
    assert launch.execute("expertrag_jax.index:build_index", [f"--index_dir={directory}", "--verify"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\\x1b]0;title" in told


@pytest.mark.parametrize(
    "name, place, value, message",
    [("vectors.npy", 3, np.nan, "no numbers"), ("passage_tokens.npy", 3, -5, "negative tokens")],
)
def test_verify_checks_every_value(directory, name, place, value, message, capsys):
    assert launch.execute("expertrag_jax.index:build_index", [f"--index_dir={directory}", "--verify"]) == 0
    assert f"index of {COUNT} passages" in capsys.readouterr().out
    if not (directory / name).exists():
        return
    array = np.load(directory / name)
    array[place] = value
    replace(directory, name, array)
    open_index(directory)
    assert launch.execute("expertrag_jax.index:build_index", [f"--index_dir={directory}", "--verify"]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_without_checksums_opens_with_one_warning(directory, caplog):
    path = directory / MANIFEST_NAME
    stored = json.loads(path.read_text())
    del stored["checksum"]
    path.write_text(json.dumps(stored))
    assert len(open_index(directory)) == COUNT
    assert len([line for line in caplog.messages if "has no checksum" in line]) == 1


EXPORT = export_directory.ExportManifest(
    settings={"threshold": 0.749, "buckets": [1, 8]},
    system={"class": "ExpertRAG", "fields": {}},
    vocabularies={"reader": "a", "retriever": "b"},
    query_encoder=None,
    index={"path": "../index", "digest": "c"},
    programs={"question_b1": {"arguments": [], "results": []}},
    platforms=["cpu"],
    versions={"jax": "0.10.2"},
    files={"programs/question_b1.jaxexport": {"bytes": 3, "sha256": "0" * 64}},
)


def test_every_flipped_bit_of_an_exports_manifest_is_refused(tmp_path):
    path = tmp_path / MANIFEST_NAME
    path.write_text(sealed({"format": export_directory.FORMAT, **dataclasses.asdict(EXPORT)}))
    read = lambda: export_directory.read_manifest(tmp_path)  # noqa: E731
    assert accepted_flips(path, lambda at: range(8), read, EXPORT) == []


GATE = {
    "scale": 1.1, "bias": -3.1, "threshold": 0.07, "retrieval_rate": 0.5, "accuracy": 0.9, "accuracy_always": 0.9,
    "accuracy_never": 0.7, "questions": 1200, "checkpoint": "800",
}  # fmt: skip


def test_every_flipped_bit_of_a_gate_is_refused(tmp_path):
    path = tmp_path / "gate.json"
    path.write_text(sealed(GATE))
    wanted = {name: GATE[name] for name in ("threshold", "scale", "bias")}
    read = lambda: _calibration(tmp_path, tmp_path / "800")  # noqa: E731
    assert accepted_flips(path, lambda at: range(8), read, wanted) == []


@pytest.mark.parametrize(
    "fields",
    [{"scale": -1}, {"scale": 0}, {"scale": "1"}, {"threshold": -0.5}, {"threshold": None}, {"bias": True}],
    ids=str,
)
def test_a_gate_outside_its_ranges_is_refused(tmp_path, fields):
    (tmp_path / "gate.json").write_text(sealed(GATE | fields))
    with pytest.raises(UserError, match="gate.json is damaged .*expertrag calibrate"):
        _calibration(tmp_path, tmp_path / "800")
    (tmp_path / "gate.json").write_text(json.dumps(GATE | {"scale": float("inf")}))
    with pytest.raises(UserError, match="gate.json is damaged .*Infinity"):
        _calibration(tmp_path, tmp_path / "800")


@pytest.mark.parametrize("place", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)], ids=range(3))
def test_a_gate_that_is_no_file_is_refused(tmp_path, place):
    assert _calibration(tmp_path, tmp_path / "800") == {}
    place(tmp_path / "gate.json")
    with pytest.raises(UserError, match="gate.json is missing or no file: run `expertrag calibrate --overwrite`"):
        _calibration(tmp_path, tmp_path / "800")


def test_a_model_without_calibration_says_so(tiny, tmp_path, told):
    shutil.copytree(tiny.model_dir, tmp_path / "model")
    open_model(tmp_path / "model")
    assert not any("retrieves from 0.5 on" in message for message in told())
    (tmp_path / "model" / "gate.json").unlink()
    assert open_model(tmp_path / "model").settings.threshold == 0.5
    assert any("has no gate.json, so its gate retrieves from 0.5 on" in message for message in told())


def edited(value, path, new):
    """A copy of nested dicts with another value at a path."""
    first, *rest = path
    return value | {first: edited(value[first], rest, new) if rest else new}


MODEL = ("system", "fields", "model")


@pytest.mark.parametrize(
    "path, value",
    [
        *[(("task_feature_lengths",), value) for value in ([1], "x", {"query": 3}, {"inputs": None}, {"inputs": "x"})],
        *[(("task_feature_lengths", "query"), value) for value in (12.7, 0, 10**9)],
        *[(("num_passages",), value) for value in ("two", [1], 10**9, 0)],
        *[(("digests",), value) for value in ([1], {"reader vocabulary": 5}, {"reader vocabulary": "other"})],
        *[(("index_dir",), value) for value in (7, ["a"])],
        *[(("system",), value) for value in ("ExpertRAG", ["ExpertRAG"], {"class": 7}, {"class": "ExpertRAG"})],
        *[(MODEL, value) for value in (None, "x", {"class": "DualEncoderConfig", "fields": {}})],
        ((*MODEL, "fields", "num_encoder_layers"), 10**7),
        ((*MODEL, "fields", "vocab_size"), 10**9),
        (("system", "fields", "retriever", "fields", "dtype"), "zz"),
        (("system", "fields", "max_target_length"), 10**9),
    ],
)
def test_metadata_of_a_checkpoint_that_do_not_fit_are_one_sentence(tiny, tmp_path, path, value):
    model_dir = shutil.copytree(tiny.model_dir, tmp_path / "model")
    (place,) = model_dir.glob("checkpoints/*/_CHECKPOINT_METADATA")
    stored = json.loads(place.read_text())
    facts = {name: fact for name, fact in stored["custom_metadata"].items() if name != "checksum"}
    stored["custom_metadata"] = integrity.sealed(edited(facts, path, value))
    place.write_text(json.dumps(stored))
    with pytest.raises(UserError):
        open_model(model_dir)


@pytest.mark.parametrize(
    "path, value",
    [
        *[(("settings", "question_length"), value) for value in (12, 10**9)],
        *[(("settings", "answer_length"), value) for value in (9, 10**9)],
        (("settings", "reader_length"), 64),
        (("settings", "num_passages"), 3),
        *[(("settings", "fusion"), value) for value in ("zz", "augment", "concatenate")],
        (("programs",), {}),
        (("programs", "../x_b1"), {}),
        (("index",), {"path": "../index"}),
        (("vocabularies",), {}),
        (("vocabularies", "reader"), "other"),
        (("files",), {}),
        (("system",), {"class": 7}),
    ],
)
def test_a_manifest_of_an_export_that_does_not_fit_is_one_sentence(tiny, tiny_export, tmp_path, path, value):
    directory = shutil.copytree(tiny_export, tmp_path / "export")
    fields = json.loads((directory / MANIFEST_NAME).read_text())
    change(directory, **{path[0]: edited(fields, path, value)[path[0]]})
    with pytest.raises(UserError):
        service_from_export(directory, "always", tiny.index_dir)
