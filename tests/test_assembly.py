"""From files to a service: tokens of questions, parameters, checks of an index, what a MODEL_DIR says."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from expertrag_jax import assembly
from expertrag_jax.assembly import AnswerSettings, load_params, tokenise_questions
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.retrieval.index import open_index
from expertrag_jax.service import service_from_model
from expertrag_jax.systems.closed_book import ClosedBook
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.trained_model import open_model
from expertrag_jax.training.pretrained import save_parameters

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def model(tiny):
    return open_model(tiny.model_dir, buckets=tiny.settings.buckets)


@pytest.fixture(scope="module")
def service(model):
    return service_from_model(model)


@pytest.fixture(scope="module")
def records(tiny_model):
    return [Question(f"q{place}", text) for place, text in enumerate(tiny_model.QUESTIONS)]


# Questions


def test_questions_end_in_eos_and_are_padded(tiny):
    vocabulary, texts = tiny.vocabulary, ["Where does Bela Korv live?", "Fenn Moss?"]
    asked = tokenise_questions(texts, vocabulary, None, 24, 30)
    assert asked.question_tokens.shape == (2, 24) and asked.query_tokens.shape == (2, 30)
    for row, text in enumerate(texts):
        ids = [*vocabulary.encode(text), 1]
        for tokens in (asked.question_tokens[row], asked.query_tokens[row]):
            assert tokens[: len(ids)].tolist() == ids and not tokens[len(ids) :].any()
    assert asked.ids.tolist() == [0, 1] and asked.texts == texts
    assert tokenise_questions(texts, vocabulary, None, 24, 24, ids=[7, 5]).ids.tolist() == [7, 5]


def test_the_retriever_has_its_own_vocabulary(tiny, tiny_model, tmp_path):
    other = tiny_model.vocabulary(tmp_path / "other.model", seed=3)
    asked = tokenise_questions(["Where is Elm?"], tiny.vocabulary, other, 24, 24)
    ids = other.encode("Where is Elm?")
    assert asked.query_tokens[0, : len(ids)].tolist() == ids
    assert asked.question_tokens.tolist() != asked.query_tokens.tolist()


def test_a_question_that_is_too_long_is_named(tiny):
    fits = len(tiny.vocabulary.encode("Where is Elm?")) + 1
    tokenise_questions(["Where is Elm?"], tiny.vocabulary, None, fits, fits)
    words = rf"question q9 \('Where is Elm\?'\) has {fits} tokens but question_length"
    with pytest.raises(UserError, match=words):
        tokenise_questions([Question("q9", "Where is Elm?")], tiny.vocabulary, None, fits - 1, fits)
    with pytest.raises(UserError, match="query_length"):
        tokenise_questions(["Where is Elm?"], tiny.vocabulary, None, fits, fits - 1)
    with pytest.raises(UserError, match="has no words"):
        tokenise_questions([" "], tiny.vocabulary, None, 8, 8)


def test_settings_that_cannot_work_are_refused():
    fine = AnswerSettings(8, 8, 16, 4, 2, buckets=[4, 1, 4])
    assert fine.buckets == (1, 4) and fine.read_shape == (2, 16)
    assert dataclasses.replace(fine, fusion="concatenate").read_shape == (1, 16)
    with pytest.raises(UserError, match="cannot hold a question"):
        AnswerSettings(8, 8, 7, 4, 2)
    with pytest.raises(UserError, match="num_passages is 0"):
        AnswerSettings(8, 8, 16, 4, 0)
    with pytest.raises(UserError, match="buckets"):
        AnswerSettings(8, 8, 16, 4, 2, buckets=())


# Parameters and MODEL_DIR


def test_parameters_from_every_kind_of_directory(tiny, tmp_path):
    save_parameters(tmp_path / "exported", tiny.params)
    for path in (tiny.model_dir, tiny.model_dir / "checkpoints/3", tmp_path / "exported"):
        jax.tree.map(np.testing.assert_array_equal, load_params(tiny.system, path), tiny.params)


def test_parameters_of_another_shape_are_refused(tiny):
    other = dataclasses.replace(tiny.system, gate_hidden=5)
    with pytest.raises(UserError, match="of another shape: gate/hidden"):
        load_params(other, tiny.model_dir)


def test_a_model_dir_says_what_it_is(tiny, model):
    assert model.settings == tiny.settings
    assert model.index_dir == str(tiny.index_dir)
    assert model.reader_vocabulary.digest == tiny.vocabulary.digest
    # gate.json's line is the identity, so these are the checkpoint's parameters
    jax.tree.map(np.testing.assert_array_equal, dict(model.params), tiny.params)
    assert open_model(tiny.model_dir, num_passages=1).settings.num_passages == 1


def test_damaged_model_dirs(tiny, tiny_model, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_model(tmp_path / "empty")
    copy = tmp_path / "copy"
    shutil.copytree(tiny.model_dir, copy)
    tiny_model.vocabulary(copy / "vocabulary/reader.model", seed=5)
    with pytest.raises(UserError, match="trained with the reader vocabulary"):
        open_model(copy)
    shutil.copy(tiny.model_dir / "vocabulary/reader.model", copy / "vocabulary")
    (copy / "gate.json").write_text("{")
    with pytest.raises(UserError, match="gate.json is damaged"):
        open_model(copy)


def test_a_dual_encoder_does_not_answer(tiny):
    with pytest.raises(UserError, match="a DualEncoder does not answer"):
        assembly.check_answers(DualEncoder(tiny.system.retriever))


# The index


def test_an_index_of_another_model_is_refused(tiny, tiny_model, tmp_path):
    def check(**changes):
        fields = {"encoder_digest": assembly.encoder_digest(tiny.params)} | changes
        digest = tiny.vocabulary.digest
        manifest = open_index(tiny.index_dir).manifest
        vocabularies = {"reader_vocabulary": digest, "retriever_vocabulary": digest}
        assembly.check_index(manifest, **(vocabularies | {"dimension": 12} | fields))

    check()
    for field, words in {
        "reader_vocabulary": "reader vocabulary",
        "retriever_vocabulary": "retriever vocabulary",
        "encoder_digest": "passage encoder",
    }.items():
        with pytest.raises(UserError, match=f"built with {words}"):
            check(**{field: "0" * 64})
    with pytest.raises(UserError, match="built with dimension 12 but dimension 13"):
        check(dimension=13)
    with pytest.raises(UserError, match="has no query encoder"):
        check(dimension=None)


def test_the_encoder_digest_follows_the_parameters(tiny):
    tower = tiny.params["query_encoder"]
    other = {"query_encoder": {**tower, "token_weight": tower["token_weight"] + 1}}
    assert assembly.encoder_digest(other) != assembly.encoder_digest(tiny.params)
    assert assembly.encoder_digest({"encoder": {}}) is None


def test_retrieval_needs_an_index(model):
    bare = dataclasses.replace(model, index_dir=None)
    with pytest.raises(UserError, match="names no index"):
        service_from_model(bare)
    assert service_from_model(bare, "never").answerer.retriever is None
    with pytest.raises(UserError, match="--retrieve=maybe is unknown"):
        service_from_model(model, "maybe")


def test_a_closed_book_model_never_retrieves(tiny, model, tiny_model):
    closed = ClosedBook(tiny.system.model, max_target_length=8)
    params = {name: tiny.params[name] for name in ("token_embedder", "encoder", "decoder")}
    closed = dataclasses.replace(model, system=closed, params=params, index_dir=None)
    with pytest.raises(UserError, match="closed-book"):
        service_from_model(closed, "always")
    service = service_from_model(closed)
    assert service.answerer.retriever is None
    record = service.predict([Question("a", tiny_model.QUESTIONS[0])])[0]
    # the same closed-book arm as ExpertRAG's
    expected = service_from_model(model, "never").predict([Question("a", tiny_model.QUESTIONS[0])])[0]
    assert {**record, "p_ret": 0} == {**expected, "p_ret": 0}


def test_a_model_that_was_trained_on_evidence_does_not_silently_go_without(tiny, model):
    closed = ClosedBook(tiny.system.model, max_target_length=8)
    params = {name: tiny.params[name] for name in ("token_embedder", "encoder", "decoder")}
    decided = dataclasses.replace(model, system=closed, params=params)
    with pytest.raises(UserError, match="trained on questions with evidence in them.*--retrieve=never"):
        service_from_model(decided)
    assert service_from_model(decided, "never").answerer.retriever is None


def test_the_models_own_index_is_of_the_trainings_passages(tiny, model, tiny_model, tmp_path):
    edition = str(tmp_path / "edition_1")
    tiny_model.write_passage_index(edition, tiny.system, tiny.params, tiny.vocabulary, edition=1)
    changed = dataclasses.replace(model, index_dir=edition)  # as if the folder had been written anew
    with pytest.raises(UserError, match="edition_1 is of another corpus than the one of the training"):
        service_from_model(changed)
    for given in (changed, model):
        assert str(service_from_model(given, index_dir=edition).answerer.retriever.loaded.directory) == edition


# The service


def test_predictions_read_what_exact_search_finds(tiny, service, records):
    found = service.predict(records)
    assert [record["id"] for record in found] == [record.id for record in records]
    assert [record["retrieve"] for record in found] == [r["p_ret"] >= tiny.threshold for r in found]
    assert 0 < sum(record["retrieve"] for record in found) < len(found)
    loaded = open_index(tiny.index_dir)
    tokens = service.tokenise(records).query_tokens
    scores = np.asarray(jax.jit(tiny.system.query_vectors)(tiny.params, tokens)) @ loaded.vectors.T
    for row, record in enumerate(found):
        best = np.argsort(-scores[row])[:2] if record["retrieve"] else []
        assert [passage["id"] for passage in record["passages"]] == [f"e{place}" for place in best]
        titles = [loaded.passages.titles[place] for place in best]
        assert [passage["title"] for passage in record["passages"]] == titles
        np.testing.assert_allclose([p["score"] for p in record["passages"]], scores[row][best], rtol=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_scores_are_those_of_the_decoder(service, records):
    """The score of the tokens that greedy search chose is the score that it reports."""
    asked = service.tokenise(records)
    chosen = service.answerer.answer(asked)
    scored = service.answerer.answer(asked, targets=chosen.tokens)
    # random parameters may emit padding inside an answer, which a target cannot hold
    whole = (chosen.tokens > 0).sum(1) == np.where(chosen.tokens > 0, np.arange(1, 9), 0).max(1)
    whole &= (chosen.tokens[:, -1] > 0) | (chosen.tokens == 1).any(1)
    assert whole.sum() > len(records) / 2
    np.testing.assert_allclose(scored.scores[whole], chosen.scores[whole], rtol=1e-4)


def test_every_given_answer_is_scored_in_its_place(service, tiny_model):
    texts = tiny_model.QUESTIONS[:3]
    answers = [("Arlen", "Elm", "a baker"), ("Brook",), ("Elm", "Arlen")]
    together = service.score([Question(str(i), t, a) for i, (t, a) in enumerate(zip(texts, answers))])
    alone = service.score([Question("x", texts[2], ("Arlen",))])[0]
    assert [[a["answer"] for a in record["answers"]] for record in together] == [list(a) for a in answers]
    assert together[2]["answers"][1]["score"] == pytest.approx(alone["answers"][0]["score"], rel=1e-4)
    assert len({a["score"] for record in together for a in record["answers"]}) == 6
    with pytest.raises(UserError, match="question 7 has no answers"):
        service.score([Question("7", texts[0])])
    with pytest.raises(UserError, match="answer 0 .* answer_length is 8"):
        service.score([Question("7", texts[0], ("Where does Bela Korv live in Cassel?",))])
