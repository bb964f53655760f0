"""The jobs export, infer and answer on the command line: both routes agree; a mistake is one sentence."""

import json
import shutil

import pytest

from expertrag_jax import infer
from expertrag_jax.main import main
from expertrag_jax.service import Service
from expertrag_jax.training.pretrained import read_metadata, restore_parameters

pytestmark = pytest.mark.usefixtures("fast_compile")
BUCKETS = ("--buckets=2", "--buckets=4")


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with exit code 2, one line of error and nothing written."""

    def check(*arguments, writes=()):
        before = [path.exists() for path in writes]
        capsys.readouterr()
        assert run(*arguments) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert printed[-1].startswith("error: ") and "Traceback" not in "".join(printed)
        assert [path.exists() for path in writes] == before
        return printed[-1]

    return check


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def export_dir(tiny, folder):
    """Written by the command."""
    out = folder / "export"
    assert run("export", "--model_dir", tiny.model_dir, "--export_dir", out, *BUCKETS) == 0
    return out


@pytest.fixture(scope="module")
def questions(tiny_model, folder):
    path = folder / "questions.jsonl"
    records = [
        {"id": f"q{place}", "question": text, "answers": [tiny_model.TOWNS[place % 5], "a baker"]}
        for place, text in enumerate(tiny_model.QUESTIONS)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def predictions(tiny, export_dir, questions, folder):
    """(of the model, of the export)"""
    common = ("--questions", questions)
    model, exported = folder / "model.jsonl", folder / "exported.jsonl"
    assert run("infer", "--model_dir", tiny.model_dir, "--output", model, *common, *BUCKETS) == 0
    assert run("infer", "--export_dir", export_dir, "--output", exported, *common) == 0
    return lines(model), lines(exported)


def test_both_routes_give_equal_answers(predictions, tiny_model):
    of_model, of_export = predictions
    assert of_export == of_model
    assert [record["question"] for record in of_model] == tiny_model.QUESTIONS
    assert {bool(record["passages"]) for record in of_model} == {True, False}
    for record in of_model:
        assert list(record) == ["id", "question", "prediction", "score", "p_ret", "retrieve", "passages"]
        assert bool(record["passages"]) == record["retrieve"]


def test_both_routes_give_equal_scores(tiny, export_dir, questions, predictions, folder):
    out = [folder / f"{questions.stem}-score.jsonl", folder / "exported_scores.jsonl"]
    common = ("--questions", questions, "--mode=score")
    place = (f"--gin.MODEL_DIR={tiny.model_dir}", f"--gin.INFER_OUTPUT_DIR={folder}")
    assert run("infer", "--gin_file=runs/infer.gin", *place, *common, *BUCKETS) == 0
    assert run("infer", "--export_dir", export_dir, "--output", out[1], *common) == 0
    scores, others = map(lines, out)
    assert [[a["answer"] for a in r["answers"]] for r in scores] == [r["answers"] for r in lines(questions)]
    for record, other, predicted in zip(scores, others, predictions[0]):
        for mine, its in zip(record.pop("answers"), other.pop("answers")):
            assert mine["answer"] == its["answer"] and mine["score"] < 0
            assert mine["score"] == pytest.approx(its["score"], rel=1e-5)
        assert record == other
        # The gate decides as for a prediction, up to the rounding of batches that hold other rows.
        assert record.pop("p_ret") == pytest.approx(predicted["p_ret"], rel=1e-5)
        assert record == {name: predicted[name] for name in record}


def test_a_stopped_job_goes_on(tiny_export, questions, predictions, folder, monkeypatch):
    out, calls = folder / "resumed.jsonl", []
    predict = Service.predict

    def stopping(service, asked):
        calls.append([question.id for question in asked])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(service, asked)

    monkeypatch.setattr(infer, "CHUNK", 1)
    monkeypatch.setattr(Service, "predict", stopping)
    command = ("infer", "--export_dir", tiny_export, "--questions", questions, "--output", out)
    assert run(*command) == 130
    assert not out.exists()
    (partial,) = folder.glob("resumed.jsonl.*.partial")
    partial.write_text(partial.read_text() + '{"id": "q2", "quest')  # killed while it wrote
    assert run(*command) == 0
    for mine, its in zip(lines(out), predictions[1], strict=True):
        assert mine["prediction"] == its["prediction"] and mine["passages"] == its["passages"]
        assert mine["score"] == pytest.approx(its["score"], rel=1e-5)  # other batches, other rounding
    assert calls[2:4] == [["q2"], ["q2"]], "what was finished is not answered again"
    assert not list(folder.glob("*.partial"))


def test_the_export_holds_an_orbax_directory(tiny, export_dir):
    import jax
    import numpy as np

    loaded = restore_parameters(export_dir / "parameters", jax.eval_shape(lambda: tiny.params))
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny.params)
    assert read_metadata(export_dir / "parameters")["system"]["class"] == "ExpertRAG"


def test_another_editions_index_is_swapped_in(tiny, tiny_model, export_dir, questions, predictions, folder):
    """Edition 1's passages carry the same ids, other towns; nothing is trained or exported again."""
    edition = folder / "edition_1"
    tiny_model.write_passage_index(edition, tiny.system, tiny.params, tiny.vocabulary, edition=1)
    out = folder / "swapped.jsonl"
    common = ("--export_dir", export_dir, "--questions", questions)
    assert run("infer", *common, "--index_dir", edition, "--output", out) == 0
    before, after = predictions[1], lines(out)
    assert [r["p_ret"] for r in after] == [r["p_ret"] for r in before]
    for old, new in zip(before, after):
        assert (old == new) == (not old["retrieve"])


def test_export_and_index_move_together(tiny_export, tiny, questions, tmp_path, fails):
    for name in ("export", "index"):
        shutil.copytree(tiny.root / name, tmp_path / "there" / name)
    out = tmp_path / "out.jsonl"
    where = ("infer", "--export_dir", tmp_path / "there/export", "--questions", questions, "--output", out)
    assert run(*where) == 0
    shutil.rmtree(tmp_path / "there/index")
    assert "no such index directory" in fails(*where, "--overwrite")
    assert run(*where, "--overwrite", "--retrieve=never") == 0
    assert not any(record["retrieve"] for record in lines(out))


def test_answer_shows_decision_and_passages(tiny_export, capsys, monkeypatch, predictions):
    monkeypatch.setenv("COLUMNS", "100")
    skipped = next(record for record in predictions[0] if not record["retrieve"])
    read = next(record for record in predictions[0] if record["retrieve"])
    capsys.readouterr()
    assert run("answer", "--export_dir", tiny_export, skipped["question"], read["question"]) == 0
    first, second = capsys.readouterr().out.split(read["question"])
    assert f"answer    {skipped['prediction']}" in first and "not retrieved (threshold" in first
    assert f"p_ret     {read['p_ret']:.3f}, retrieved (threshold" in second
    assert all(p["title"] in second and p["id"] in second for p in read["passages"])
    assert not any(p["title"] in first.replace(skipped["question"], "") for p in read["passages"])


# Mistakes


def test_export_refuses(tiny, export_dir, tmp_path, fails):
    model, new = ("--model_dir", tiny.model_dir), ("--export_dir", tmp_path / "new")
    written = [tmp_path / "new"]
    before = (export_dir / "manifest.json").read_bytes()
    assert "nothing was overwritten" in fails("export", *model, "--export_dir", export_dir)
    assert (export_dir / "manifest.json").read_bytes() == before
    assert "is read by this command" in fails("export", *model, "--export_dir", tiny.model_dir, "--overwrite")
    assert "does not exist" in fails("export", "--model_dir", tmp_path / "no", *new, writes=written)
    assert "cpu, tpu, cuda" in fails("export", *model, *new, "--platforms=abacus", writes=written)
    assert "no such index" in fails("export", *model, *new, "--index_dir", tmp_path / "no", writes=written)
    assert "--model_dir" in fails("export", *new, writes=written)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_is_not_exported(tiny, tmp_path, fails):
    model, new = tmp_path / "damaged", tmp_path / "new"
    shutil.copytree(tiny.model_dir, model)
    for path in (model / "checkpoints" / "3" / "state").rglob("d/*"):
        path.write_bytes(bytes(byte ^ 0xFF for byte in path.read_bytes()))
    assert "can be read (3: " in fails("export", "--model_dir", model, "--export_dir", new, writes=(new,))


def test_an_interrupted_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    from expertrag_jax.interop import stablehlo

    def stop(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(stablehlo, "lower", stop)
    assert run("export", "--model_dir", tiny.model_dir, "--export_dir", tmp_path / "new") == 130
    assert list(tmp_path.iterdir()) == []


def test_infer_refuses_its_arguments(tiny, tiny_export, questions, tmp_path, fails):
    out = tmp_path / "out.jsonl"
    common = ("--questions", questions, "--output", out)
    export = ("--export_dir", tiny_export)
    assert "give --output or --output_dir" in fails("infer", *common[:2], *export)
    written = [out, out.with_name("out.jsonl.partial")]
    assert "either --model_dir or --export_dir" in fails("infer", *common, writes=written)
    assert "either" in fails("infer", *common, *export, "--model_dir", tiny.model_dir, writes=written)
    assert "no such export" in fails("infer", *common, "--export_dir", tmp_path / "no", writes=written)
    assert "choose one of predict, score" in fails("infer", *common, *export, "--mode=guess", writes=written)
    assert "--retrieve=maybe" in fails("infer", *common, *export, "--retrieve=maybe", writes=written)
    assert "--num_passages cannot be changed" in fails("infer", *common, *export, "--num_passages=1")
    out.write_text("mine")
    assert "nothing was overwritten" in fails("infer", *common, *export)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    "line, mode, words",
    [
        ('{"question": "Where', "predict", "questions.jsonl:2: not JSON"),
        ('{"query": "Where?"}', "predict", "questions.jsonl:2: the field 'question'"),
        (json.dumps({"question": "Where does Bela Korv live? " * 5}), "predict", "question_length is 24"),
        ('{"question": "Where?"}', "score", "questions.jsonl:2: the field 'answers'"),
        ('{"question": "W", "answers": ["in Cassel or Derry or Brook"]}', "score", "answer_length is 8"),
    ],
)
def test_infer_refuses_questions(tiny_export, tmp_path, fails, line, mode, words):
    path, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"question": "Where does Bela Korv live?", "answers": ["Elm"]}\n' + line + "\n")
    command = ("infer", "--export_dir", tiny_export, "--questions", path, "--output", out, f"--mode={mode}")
    assert words in fails(*command, writes=[out])


def test_an_index_of_another_model_is_refused(tiny, tiny_model, tiny_export, questions, tmp_path, fails):
    out = tmp_path / "out.jsonl"
    command = ("infer", "--export_dir", tiny_export, "--questions", questions, "--output", out)

    def refused(name, vocab=tiny.vocabulary, system=tiny.system, params=tiny.params, **changes):
        tiny_model.write_passage_index(tmp_path / name, system, params, vocab, **changes)
        return fails(*command, "--index_dir", tmp_path / name, writes=[out])

    other = tiny_model.vocabulary(tmp_path / "other.model", seed=4)
    assert "built with reader vocabulary" in refused("vocabulary", vocab=other)
    assert "built with passage encoder" in refused("encoder", encoder_digest="0" * 64)
    assert "is not an index" in fails(*command, "--index_dir", tmp_path)
    wide = tiny.params["query_encoder"]["projection"]["kernel"].repeat(2, 1)
    wide = {**tiny.params["query_encoder"], "projection": {"kernel": wide}}
    from expertrag_jax.assembly import encoder_digest

    system = tiny_model.system(tiny.vocabulary.size, output_dim=24)
    digest = encoder_digest(tiny.params)
    params = tiny.params | {"query_encoder": wide}
    assert "built with dimension 24" in refused("width", system=system, params=params, encoder_digest=digest)


def test_an_index_that_changed_is_refused(tiny, tiny_model, tiny_export, questions, tmp_path, fails):
    shutil.copytree(tiny_export, tmp_path / "export")
    tiny_model.write_passage_index(tmp_path / "index", tiny.system, tiny.params, tiny.vocabulary, edition=2)
    command = ("infer", "--export_dir", tmp_path / "export", "--questions", questions)
    assert "has changed since" in fails(*command, "--output", tmp_path / "out.jsonl")


def test_answer_refuses(tiny_export, tmp_path, fails):
    assert "there is no question" in fails("answer", "--export_dir", tiny_export)
    assert "no such export" in fails("answer", "--export_dir", tmp_path / "no", "Where?")
    assert "question_length is 24" in fails("answer", "--export_dir", tiny_export, "Where is Elm " * 20)
    path = tmp_path / "export"
    shutil.copytree(tiny_export, path)
    (path / "programs/read_b2.jaxexport").unlink()
    assert "read_b2.jaxexport is missing" in fails("answer", "--export_dir", path, "Where?")
