"""Vocabularies: special ids, round trips, determinism, messages."""

from __future__ import annotations

import hashlib

import pytest
import sentencepiece

from expertrag_jax.errors import UserError
from expertrag_jax.vocabulary import EOS_ID, PAD_ID, UNK_ID, Vocabulary, embedding_rows, train_vocabulary

SENTENCES = [
    "Tavo Melkin plays the tuba.",
    "what instrument does Tavo Melkin play",
    "She lives in Oslo and keeps a parrot.",
] * 5


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Vocabulary:
    return train_vocabulary(SENTENCES, 70, tmp_path_factory.mktemp("v") / "reader.model", seed=3)


def test_round_trip_and_special_ids(vocabulary):
    for text in SENTENCES:
        ids = vocabulary.encode(text)
        assert not {PAD_ID, EOS_ID, UNK_ID} & set(ids)
        assert max(ids) < vocabulary.size == 70
        assert vocabulary.decode(ids) == text
    assert UNK_ID in vocabulary.encode("Żółw")
    assert vocabulary.encode("") == []


def test_decode_stops_at_eos_and_skips_padding(vocabulary):
    ids = vocabulary.encode("Tavo Melkin")
    assert vocabulary.decode([PAD_ID, *ids, EOS_ID, *vocabulary.encode("plays")]) == "Tavo Melkin"
    assert vocabulary.decode([EOS_ID]) == ""


def test_ids_beyond_the_pieces_are_unknown(vocabulary):
    ids = vocabulary.encode("the")
    beyond = [vocabulary.size, *ids, vocabulary.size + 99]
    assert vocabulary.decode(beyond) == vocabulary.decode([UNK_ID, *ids, UNK_ID])


def test_embedding_rows_round_up(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.model")
    assert embedding_rows(tmp_path / "v.model", multiple=1) == vocabulary.size
    assert embedding_rows(tmp_path / "v.model") == -(-vocabulary.size // 128) * 128


def test_encode_batch_equals_encode(vocabulary):
    assert vocabulary.encode_batch(SENTENCES) == [vocabulary.encode(text) for text in SENTENCES]


def test_digest_is_of_the_file_and_survives_saving(vocabulary, tmp_path):
    with open(vocabulary.path, "rb") as file:
        assert vocabulary.digest == hashlib.sha256(file.read()).hexdigest()
    vocabulary.save(tmp_path / "new" / "copy.model")
    copy = Vocabulary.from_file(tmp_path / "new" / "copy.model")
    assert (copy.digest, copy.size) == (vocabulary.digest, vocabulary.size)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.model"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_is_deterministic(model_type):
    first, second = (train_vocabulary(SENTENCES, 60, model_type=model_type, seed=1) for _ in range(2))
    assert first.digest == second.digest
    assert first.digest != train_vocabulary(SENTENCES[1:2], 60, model_type=model_type, seed=1).digest


def test_size_is_an_upper_bound_on_a_small_corpus():
    vocabulary = train_vocabulary(SENTENCES, 5000)
    assert 50 < vocabulary.size < 5000
    assert vocabulary.decode(vocabulary.encode(SENTENCES[0])) == SENTENCES[0]


def test_byte_fallback_spells_unknown_characters():
    vocabulary = train_vocabulary(SENTENCES, 330, byte_fallback=True)
    ids = vocabulary.encode("Żółw")
    assert UNK_ID not in ids and vocabulary.decode(ids) == "Żółw"


def test_messages(tmp_path):
    with pytest.raises(UserError, match="no sentences"):
        train_vocabulary(["", "  "], 100)
    with pytest.raises(UserError, match="cannot train 8 pieces"):
        train_vocabulary(SENTENCES, 8)
    with pytest.raises(UserError, match="absent.model"):
        Vocabulary.from_file(tmp_path / "absent.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(UserError, match="junk.model is not a SentencePiece model"):
        Vocabulary.from_file(tmp_path / "junk.model")


def test_other_special_ids_are_refused(tmp_path):
    prefix = str(tmp_path / "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=prefix, vocab_size=60, model_type="bpe", minloglevel=2
    )
    with pytest.raises(UserError, match=r"\(-1, 2, 0\)"):
        Vocabulary.from_file(prefix + ".model")
