"""The retriever: padding, absent passages, hot swap, cache, embedding."""

from __future__ import annotations

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.evidence import SEPARATOR
from expertrag_jax.retrieval.cache import RetrievalCache
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.retrieval.retriever import Retriever, encode_passages, tokenize_passages

COUNT, WIDTH, LENGTH = 12, 6, 5
TABLE = np.random.default_rng(7).normal(size=(50, WIDTH)).astype(np.float32)


class Encoder:
    """Sums embeddings of tokens (0 embeds to 0) and remembers the batch sizes it saw."""

    def __init__(self):
        self.sizes = []

    def __call__(self, tokens):
        self.sizes.append(len(tokens))
        return (TABLE * (np.arange(50) > 0)[:, None])[tokens].sum(axis=1)


def directory(path, seed=0, kind="exact", **settings):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    passages = Passages(
        [f"p{row}" for row in range(COUNT)], ["t"] * COUNT, [f"word{row}" for row in range(COUNT)]
    )
    tokens = rng.integers(1, 50, size=(COUNT, LENGTH)).astype(np.int32)
    index = make_index(kind).build(passages, vectors)
    write_index(path, index, passages, passage_tokens=tokens, vectors=vectors, **settings)
    return open_index(path)


def questions(batch, seed=3):
    return np.random.default_rng(seed).integers(1, 50, size=(batch, 4)).astype(np.int32)


def test_retrieves_the_best_passages_in_padded_batches(tmp_path):
    loaded, encoder = directory(tmp_path / "index"), Encoder()
    retriever = Retriever(loaded, encoder, max_batch=4)
    tokens = questions(7)
    found = retriever.retrieve(None, tokens, 3)
    wanted = np.argsort(-(Encoder()(tokens) @ loaded.vectors.T), axis=1)[:, :3]
    np.testing.assert_array_equal(found.rows, wanted)
    np.testing.assert_array_equal(found.passage_tokens, loaded.tokens[wanted])
    np.testing.assert_array_equal(retriever.vectors_of(found.rows), loaded.vectors[wanted])
    assert found.passage_tokens.dtype == np.int32 and encoder.sizes == [4, 4]
    alone = retriever.retrieve(None, tokens[5:6], 3)
    np.testing.assert_array_equal(alone.rows, wanted[5:6])
    assert encoder.sizes == [4, 4, 1]


def test_absent_passages_have_no_tokens_and_no_vectors(tmp_path):
    loaded = directory(tmp_path / "index")
    retriever = Retriever(loaded, Encoder())
    found = retriever.retrieve(None, questions(2), COUNT + 2)
    assert np.all(found.rows[:, COUNT:] == -1) and np.all(found.rows[:, :COUNT] >= 0)
    assert not found.passage_tokens[:, COUNT:].any() and found.passage_tokens[:, :COUNT].all()
    assert not retriever.vectors_of(found.rows)[:, COUNT:].any()
    np.testing.assert_array_equal(np.load(tmp_path / "index" / "passage_tokens.npy"), loaded.tokens)


def test_a_lexical_index_needs_no_encoder(tmp_path):
    retriever = Retriever(directory(tmp_path / "index", kind="bm25"))
    found = retriever.retrieve(["word3", "word11 word2"], None, 2)
    assert found.rows[0].tolist() == [3, -1] and set(found.rows[1].tolist()) == {2, 11}
    with pytest.raises(UserError, match="give a query encoder"):
        Retriever(directory(tmp_path / "dense"))


def test_a_new_version_is_swapped_in(tmp_path):
    marks = {"encoder_digest": "e", "vocabulary_digests": {"reader": "v"}}
    old, new = directory(tmp_path / "0", **marks), directory(tmp_path / "1", seed=1, **marks)
    retriever, tokens = Retriever(old, Encoder()), questions(3)
    before = retriever.retrieve(None, tokens, 4)
    assert retriever.swap(new) is old
    after = retriever.retrieve(None, tokens, 4)
    np.testing.assert_array_equal(after.passage_tokens, new.tokens[after.rows])
    assert not np.array_equal(before.scores, after.scores)
    other = directory(tmp_path / "2", encoder_digest="f", vocabulary_digests={"reader": "v"})
    with pytest.raises(UserError, match="passage encoder f but passage encoder e"):
        retriever.swap(other)
    assert retriever.loaded is new


def test_the_cache_answers_for_one_index_and_encoder_only(tmp_path):
    loaded, encoder = directory(tmp_path / "index"), Encoder()
    plain = Retriever(loaded, Encoder()).retrieve(None, questions(5), 3)
    cache = RetrievalCache(tmp_path / "cache" / "results.sqlite")
    retriever = Retriever(loaded, encoder, encoder_digest="e", cache=cache)
    texts, tokens = [f"q{place}" for place in range(5)], questions(5)
    retriever.retrieve(texts[:2], tokens[:2], 3)
    found = retriever.retrieve(texts, tokens, 3)
    assert encoder.sizes == [2, 4] and len(cache) == 5  # the second call asks for the three new ones
    np.testing.assert_array_equal(found.rows, plain.rows)
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-6)
    cache.close()
    again = Retriever(
        loaded, encoder, encoder_digest="e", cache=RetrievalCache(tmp_path / "cache" / "results.sqlite")
    )
    np.testing.assert_array_equal(again.retrieve(texts, tokens, 3).passage_tokens, plain.passage_tokens)
    assert encoder.sizes == [2, 4]
    again.retrieve(texts[:1], tokens[:1], 2)  # another k
    again.encoder_digest = "f"
    again.retrieve(texts[:1], tokens[:1], 3)  # another encoder
    again.swap(directory(tmp_path / "other", seed=1))
    again.retrieve(texts[:1], tokens[:1], 3)  # another index
    assert encoder.sizes == [2, 4, 1, 1, 1]
    with pytest.raises(ValueError, match="needs encoder_digest"):
        Retriever(loaded, encoder, cache=cache)


def test_a_file_that_is_no_cache_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("these are notes, and by no means a database " * 9)
    with pytest.raises(UserError, match="cannot serve as a retrieval cache"):
        RetrievalCache(tmp_path / "notes.txt")


def test_embedding_streams_in_batches(tmp_path):
    tokens, encoder, seen = questions(11), Encoder(), []
    vectors = encode_passages(encoder, tokens, 4, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(vectors, Encoder()(tokens), rtol=1e-6)
    assert encoder.sizes == [4, 4, 4] and seen == [(4, 11), (8, 11), (11, 11)]
    out = np.lib.format.open_memmap(tmp_path / "v.npy", mode="w+", dtype=np.float32, shape=(11, WIDTH))
    assert encode_passages(Encoder(), tokens, 8, out=out) is out
    np.testing.assert_array_equal(out, vectors)


def test_passages_are_tokenised_as_evidence_expects():
    passages = Passages(["a", "b", "c"], ["ab", "", "abc"], ["c", "d", "defgh"])
    tokens = tokenize_passages(passages, lambda text: [ord(letter) for letter in text], 6)
    a, b, c, d, e = (ord(letter) for letter in "abcde")
    wanted = [[a, b, SEPARATOR, c, 0, 0], [SEPARATOR, d, 0, 0, 0, 0], [a, b, c, SEPARATOR, d, e]]
    np.testing.assert_array_equal(tokens, wanted)
