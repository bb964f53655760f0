"""BM25 against its formula, and against known figures on real questions."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.corpus import Passages, read_passages_tsv, read_questions_jsonl, texts_of
from expertrag_jax.retrieval.index import Queries, make_index
from expertrag_jax.retrieval.lexical_index import LexicalIndex
from expertrag_jax.retrieval.metrics import gold_rows, recall_at_k

WORDS = [f"w{number}" for number in range(30)]


def bm25(documents, words, k1, b):
    """Lucene's BM25 by its formula: [N] float64."""
    mean = np.mean([len(document) for document in documents])
    scores = np.zeros(len(documents))
    for word in words:
        frequency = sum(word in document for document in documents)
        if not frequency:
            continue
        idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
        for row, document in enumerate(documents):
            count = document.count(word)
            scores[row] += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
    return scores


def test_scores_equal_the_formula():
    rng = np.random.default_rng(0)
    documents = [rng.choice(WORDS, size=rng.integers(1, 12)).tolist() for _ in range(40)]
    passages = Passages(
        [str(row) for row in range(40)],
        [words[0] for words in documents],
        [" ".join(words[1:]) for words in documents],
    )
    index = LexicalIndex(k1=1.2, b=0.6, language=None, stopwords=None).build(passages)
    questions = [rng.choice(WORDS, size=4, replace=False).tolist() for _ in range(6)]
    rows, scores = index.search(Queries([" ".join(words) for words in questions]), 50)
    assert rows.shape == (6, 50) and rows.dtype == np.int32 and scores.dtype == np.float32
    for place, words in enumerate(questions):
        wanted = bm25(documents, words, 1.2, 0.6)
        found = rows[place][rows[place] >= 0]
        assert set(found) == set(np.flatnonzero(wanted))  # all that share a word, and no other
        np.testing.assert_allclose(scores[place][: len(found)], wanted[found], rtol=1e-5)
        assert np.all(np.diff(scores[place]) <= 0)
        best = index.search(Queries([" ".join(words)]), 3)
        np.testing.assert_allclose(best[1][0], np.sort(wanted)[::-1][:3], rtol=1e-5)


def test_stems_and_stop_words():
    passages = Passages(["a", "b", "c"], ["", "", ""], ["The runners were running", "A river", "the of and"])
    index = make_index("bm25").build(passages)
    rows, scores = index.search(Queries(["run", "RIVERS!", "the of", "", "unseen word"]), 2)
    np.testing.assert_array_equal(rows, [[0, -1], [1, -1], [-1, -1], [-1, -1], [-1, -1]])
    assert np.all(scores[rows == -1] == np.float32(-1e30))
    assert index.search(Queries([]), 2)[0].shape == (0, 2)


def test_what_cannot_be_indexed_is_refused():
    with pytest.raises(UserError, match="no words to index"):
        LexicalIndex().build(Passages(["a"], [""], ["..."]))
    with pytest.raises(UserError, match="no stemmer for language 'klingon'"):
        LexicalIndex(language="klingon").build(Passages(["a"], [""], ["word"]))


@pytest.mark.skipif(not os.environ.get("EXPERTRAG_DATA"), reason="EXPERTRAG_DATA is not set")
def test_recall_on_wikipedia():
    data = os.environ["EXPERTRAG_DATA"]
    passages = read_passages_tsv(os.path.join(data, "wiki", "passages.tsv.gz"))
    index = make_index("bm25").build(passages)
    for name, wanted in (("squad_new_wiki_dev", (0.694, 0.877, 0.945)), ("nq_gold_dev", (0.581, 0.791, 0.890))):
        questions = read_questions_jsonl(os.path.join(data, "qa", f"{name}.jsonl.gz"))
        rows, _ = index.search(Queries(texts_of(questions)), 20)
        recall = recall_at_k(rows, gold_rows(questions, passages), (1, 5, 20))
        np.testing.assert_allclose(list(recall.values()), wanted, atol=0.005)
