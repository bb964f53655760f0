"""Inverse cloze pairs, and questions with gold passages and hard negatives."""

import json

import numpy as np
import pytest

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, Question, write_passages_tsv
from expertrag_jax.retrieval.index import make_index, write_index
from expertrag_jax.retrieval.splitting import sentences
from expertrag_jax.vocabulary import train_vocabulary
from tasks.inverse_cloze import draw_pairs, register_inverse_cloze
from tasks.relevant_passages import hard_negatives, register_relevant_passages

WORDS = ("river", "stone", "harbour", "castle", "market")
TEXTS = [
    f"The {word} lies east of town {i}. Nobody knows who built the {word} there. It burned down in 17{i:02}."
    for i, word in enumerate(WORDS * 8)
]
PASSAGES = Passages([f"p{i}" for i in range(40)], [f"Title {i}" for i in range(40)], TEXTS)
LENGTHS = {"query": 24, "passages": 48}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    train_vocabulary([*TEXTS, *PASSAGES.titles], 300, path)
    return Vocabularies(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "passages.tsv.gz"
    write_passages_tsv(PASSAGES, path)
    return path


def draw(passages=PASSAGES, rate=0.9, count=2, fewest=5, seed=0):
    return list(draw_pairs(passages, rate, count, fewest, seed))


def test_a_pair_is_a_sentence_and_the_rest_of_its_passage():
    for id_, row, sentence, title, rest in draw(rate=1.0):
        assert row == id_ // 2
        parts = sentences(TEXTS[row])
        assert sentence in parts and title == f"Title {row}"
        parts.remove(sentence)
        assert rest == " ".join(parts)
    assert all(rest == TEXTS[row] for _, row, _, _, rest in draw(rate=0.0))


def test_the_removal_rate_is_kept_and_pairs_are_distinct():
    pairs = draw(Passages(list(map(str, range(2000))), [""] * 2000, TEXTS * 50))
    removed = np.mean([sentence not in rest for _, _, sentence, _, rest in pairs])
    assert removed == pytest.approx(0.9, abs=0.02)
    assert len({id_ for id_, *_ in pairs}) == len(pairs) == 4000
    assert len({(row, sentence) for _, row, sentence, *_ in pairs}) == 4000


def test_draws_depend_on_seed_and_row_alone():
    assert draw() == draw() != draw(seed=1)
    first = Passages(PASSAGES.ids[:7], PASSAGES.titles[:7], TEXTS[:7])
    assert draw(first) == draw()[: len(draw(first))]


def test_the_only_sentence_stays_and_short_ones_are_no_queries():
    lone = Passages(["a", "b"], ["", ""], ["One sentence that stands alone here.", "Too short. Yes."])
    assert draw(lone, rate=1.0) == [(0, 0, lone.texts[0], "", lone.texts[0])]


def test_the_task_gives_queries_and_positives(vocabularies, corpus):
    task = register_inverse_cloze(corpus, vocabularies, removal_rate=1.0, pairs_per_passage=1)
    batch = next(Pipeline(task, LENGTHS, 8, shuffle=False, process_index=0, process_count=1)(0))
    decode = vocabularies.retriever.tokenizer.decode
    for row, (_, place, sentence, title, rest) in enumerate(draw(rate=1.0, count=1)[:8]):
        assert decode([int(t) for t in batch.query_tokens[row] if t > 1]) == sentence
        assert batch.passage_rows[row].tolist() == [place]
        tokens = batch.passage_tokens[row, 0].tolist()
        cut = tokens.index(1)
        assert decode(tokens[:cut]) == title and decode([t for t in tokens[cut + 1 :] if t]) == rest
    assert (batch.passage_relevance == 1).all()


def test_a_long_sentence_is_cut(vocabularies, corpus):
    task = register_inverse_cloze(corpus, vocabularies)
    lengths = LENGTHS | {"query": 5}
    batch = next(Pipeline(task, lengths, 8, process_index=0, process_count=1)(0))
    assert (batch.query_tokens[:, -1] == 1).all()


def test_a_corpus_without_sentences_is_refused(vocabularies, tmp_path):
    write_passages_tsv(Passages(["a"], [""], ["Too short."]), tmp_path / "short.tsv")
    task = register_inverse_cloze(tmp_path / "short.tsv", vocabularies)
    with pytest.raises(UserError, match="no passage has a sentence"):
        next(Pipeline(task, LENGTHS, 1, process_index=0, process_count=1)(0))


@pytest.fixture(scope="module")
def lexical(tmp_path_factory):
    place = tmp_path_factory.mktemp("index") / "bm25"
    write_index(place, make_index("bm25").build(PASSAGES), PASSAGES)
    return place


def test_hard_negatives_are_near_and_wrong(lexical):
    questions = [Question("0", "Who built the castle of town 3?", ("1703",), ("p3",))]
    rows = hard_negatives(questions, PASSAGES, lexical, 3)[0].tolist()
    assert len(set(rows)) == 3
    for row in rows:
        assert row % 5 == 3 and row != 3 and "1703" not in TEXTS[row]
    questions = [Question("0", "xyzzy", ("no",), ("p3",))]
    assert hard_negatives(questions, PASSAGES, lexical, 2).tolist() == [[-1, -1]]


def test_questions_come_with_their_gold_passage_first(vocabularies, corpus, lexical, tmp_path):
    path = tmp_path / "questions.jsonl"
    records = [
        {"question": "Who built the stone?", "answers": ["1701"], "gold_passage_ids": ["p1"]},
        {"question": "No gold passage?", "answers": ["x"]},
        {"question": "zzz?", "answers": ["x"], "gold_passage_ids": ["p9"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = register_relevant_passages(path, corpus, vocabularies, negatives_from=lexical)
    batch = next(Pipeline(task, LENGTHS, 2, shuffle=False, process_index=0, process_count=1)(0))
    assert batch.example_ids.tolist() == [0, 2] and batch.passage_tokens.shape == (2, 2, 48)
    assert batch.passage_relevance.tolist() == [[1, 0], [1, 0]]
    decode = vocabularies.retriever.tokenizer.decode
    titles = [[decode(row[: row.tolist().index(1)].tolist()) for row in rows] for rows in batch.passage_tokens]
    assert titles[0][0] == "Title 1" != titles[0][1]
    assert [[f"Title {row}" for row in rows] for rows in batch.passage_rows] == titles
    # Nothing was found for the last one: the positive stands in, which the loss leaves out.
    assert titles[1] == ["Title 9", "Title 9"]


def test_questions_without_gold_passages_are_refused(vocabularies, corpus, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "Who?", "answers": ["A"]}\n')
    task = register_relevant_passages(path, corpus, vocabularies)
    with pytest.raises(UserError, match="no question has gold_passage_ids"):
        next(Pipeline(task, LENGTHS, 1, process_index=0, process_count=1)(0))
