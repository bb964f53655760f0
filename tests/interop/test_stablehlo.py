"""Exported programs: equal to a fresh system's, for three platforms, without its code, never damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export

from expertrag_jax.answering import SystemPrograms
from expertrag_jax.assembly import tokenise_questions
from expertrag_jax.errors import UserError
from expertrag_jax.files.sealed import sealed
from expertrag_jax.interop.export_directory import check_files, check_writable, read_manifest
from expertrag_jax.interop.serving import service_from_export
from expertrag_jax.interop.stablehlo import ExportedPrograms
from expertrag_jax.retrieval.corpus import Question

pytestmark = pytest.mark.usefixtures("fast_compile")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def programs(tiny, tiny_export):
    """(a fresh system's, the export's)"""
    return SystemPrograms(tiny.system, tiny.params), ExportedPrograms(tiny_export)


@pytest.fixture(scope="module")
def inputs(tiny, tiny_model):
    """Four questions, [4, 24], and reader inputs [4, 2, 48]; the last row's second passage is absent."""
    asked = tokenise_questions(tiny_model.QUESTIONS[3:7], tiny.vocabulary, None, 24, 24)
    passages = np.random.default_rng(0).integers(2, tiny.vocabulary.size, (4, 2, 48)).astype(np.int32)
    passages[3, 1] = 0
    return asked.question_tokens, passages


def test_question_and_read_equal_the_systems(programs, inputs):
    fresh, exported = programs
    tokens, passages = inputs
    (state, p_ret), (exported_state, exported_p_ret) = fresh.question(tokens), exported.question(tokens)
    np.testing.assert_allclose(exported_p_ret, p_ret, rtol=1e-6)
    pairs = [(state, exported_state), (fresh.read(tokens, passages), exported.read(tokens, passages))]
    for mine, its in pairs:
        leaves = jax.tree.leaves(tuple(its)[1:])
        assert len(leaves) == len(jax.tree.leaves(mine))
        for a, b in zip(jax.tree.leaves(mine), leaves):
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("arm", ["closed", "open"])
def test_search_and_scores_equal_the_systems(programs, inputs, arm):
    tokens, passages = inputs
    active = np.array([True, False, True, True])
    targets = np.array([[5, 9, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]] * 2, np.int32)
    results = []
    for each in programs:
        state = each.question(tokens)[0] if arm == "closed" else each.read(tokens, passages)
        results.append([*each.generate(state, active), each.score(state, targets)])
    (chosen, chosen_score, given_score), (its_chosen, its_chosen_score, its_given_score) = results
    np.testing.assert_array_equal(its_chosen, chosen)
    np.testing.assert_allclose(its_chosen_score, chosen_score, rtol=1e-5)
    np.testing.assert_allclose(its_given_score, given_score, rtol=1e-5)
    assert not np.asarray(chosen)[1].any() and np.asarray(chosen)[0].any()


def test_queries_of_any_number(programs, inputs):
    fresh, exported = programs
    tokens = np.concatenate([inputs[0], inputs[0][::-1], inputs[0][:1]])
    expected = np.asarray(fresh.query_vectors(tokens))
    for count in (1, 3, 9):
        np.testing.assert_allclose(exported.query_vectors(tokens[:count]), expected[:count], atol=1e-6)


def test_parameters_are_arguments(programs, inputs):
    """The programs hold no weights: with others they answer otherwise."""
    _, exported = programs
    call = exported._exported["question_b4"].call
    gate = jax.tree.map(np.asarray, exported.params["gate"])
    flat = gate | {"output": jax.tree.map(np.zeros_like, gate["output"])}
    assert np.ptp(np.asarray(exported.question(inputs[0])[1])) > 0
    np.testing.assert_array_equal(jax.jit(call)(exported.params | {"gate": flat}, inputs[0])[-1], 0.5)


def test_every_program_is_for_three_platforms(tiny, tiny_export):
    manifest = read_manifest(tiny_export)
    names = ("question", "read", "decode_closed", "decode_open", "query")
    assert sorted(manifest.programs) == sorted(f"{name}_b{b}" for name in names for b in (2, 4))
    for name, interface in manifest.programs.items():
        program = export.deserialize(bytearray((tiny_export / f"programs/{name}.jaxexport").read_bytes()))
        assert program.platforms == ("cpu", "tpu", "cuda")
        shapes = [list(result.shape) for result in program.out_avals]
        assert [entry["shape"] for entry in interface["results"]] == shapes
    assert manifest.programs["read_b4"]["arguments"] == [
        {"shape": [4, 24], "dtype": "int32"}, {"shape": [4, 2, 48], "dtype": "int32"},
    ]  # fmt: skip
    assert manifest.settings["threshold"] == tiny.threshold
    assert manifest.vocabularies["reader"] == tiny.vocabulary.digest
    assert manifest.index["path"] == "../index"


def test_answers_without_the_systems_code(tiny_export, compiled_programs):
    """Another process, to which the model's Python modules do not exist."""
    question = "Where does Bela Lund live?"
    code = f"""
import sys
for name in ("model", "moe", "systems.expert_rag", "systems.closed_book", "systems.generator"):
    sys.modules["expertrag_jax." + name] = None
from expertrag_jax.main import main
sys.exit(main(["answer", "--export_dir", {str(tiny_export)!r}, "--retrieve=always", {question!r}]))
"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "COLUMNS": "100", "JAX_COMPILATION_CACHE_DIR": compiled_programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = service_from_export(tiny_export, "always").predict([Question("0", question)])[0]
    assert question in done.stdout and record["prediction"] in done.stdout
    assert f"p_ret     {record['p_ret']:.3f}, retrieved (--retrieve=always)" in done.stdout
    for passage in record["passages"]:
        assert passage["id"] in done.stdout and f"{passage['score']:.4f}" in done.stdout
    assert len(record["passages"]) == 2


# What goes wrong


@pytest.fixture
def copy(tiny_export, tmp_path):
    """An export to damage, without its index."""
    return Path(shutil.copytree(tiny_export, tmp_path / "copy"))


def edit(directory, **changes):
    path = directory / "manifest.json"
    fields = json.loads(path.read_text()) | changes
    del fields["checksum"]
    path.write_text(sealed(fields))


def test_every_damaged_file_is_named(copy):
    for name in sorted(read_manifest(copy).files):
        path = copy / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if data else b"x")
        with pytest.raises(UserError, match=f"{path.name} is damaged"):
            check_files(copy, read_manifest(copy))
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name} is missing"):
            check_files(copy, read_manifest(copy))
        path.write_bytes(data)
    check_files(copy, read_manifest(copy))
    (copy / "programs/question_b2.jaxexport").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is damaged"):
        ExportedPrograms(copy)
    with pytest.raises(UserError, match="question_b2.jaxexport cannot be read"):
        ExportedPrograms(copy, verify=False)


def test_manifests_that_are_none(copy, tiny, tmp_path):
    with pytest.raises(UserError, match="no such export directory"):
        ExportedPrograms(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not the manifest of an export"):
        ExportedPrograms(tiny.index_dir)
    with pytest.raises(UserError, match="is not an export"):
        ExportedPrograms(tiny.model_dir)
    edit(copy, format_version=99)
    with pytest.raises(UserError, match="format version 99"):
        ExportedPrograms(copy)
    edit(copy, format_version=1, surplus=1)
    with pytest.raises(UserError, match="is damaged"):
        ExportedPrograms(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        ExportedPrograms(copy)


def test_another_platform_is_named(copy):
    edit(copy, platforms=["tpu"])
    with pytest.raises(UserError, match="is for tpu, not for cpu"):
        ExportedPrograms(copy)


def test_a_bucket_that_was_not_exported(programs, inputs):
    with pytest.raises(UserError, match="no program question_b3"):
        programs[1].question(inputs[0][:3])


def test_what_is_not_an_export_is_never_overwritten(copy, tiny, tmp_path):
    check_writable(tmp_path / "new")
    check_writable(copy, overwrite=True)
    with pytest.raises(UserError, match="already holds an export: nothing was overwritten"):
        check_writable(copy)
    for other in (tiny.model_dir, tiny.index_dir):
        with pytest.raises(UserError, match="not an export|not the manifest of an export"):
            check_writable(other, overwrite=True)


@pytest.mark.parametrize(
    "change",
    [
        {"question_length": 0},
        {"buckets": []},
        {"buckets": "12"},
        {"unknown": 1},
        {"threshold": None},
        {"num_passages": 10**30},
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(copy, change):
    edit(copy, settings=read_manifest(copy).settings | change)
    with pytest.raises(UserError):
        ExportedPrograms(copy, verify=False)


def test_a_program_of_other_shapes_is_refused(copy):
    manifest = read_manifest(copy)
    name = next(iter(manifest.programs))
    described = manifest.programs[name] | {"arguments": []}
    edit(copy, programs=manifest.programs | {name: described})
    with pytest.raises(UserError, match="another program than the manifest says"):
        ExportedPrograms(copy, verify=False)
