"""SeqIO's vocabulary and ours read one model file and give the same ids."""

import numpy as np
import pytest
import sentencepiece
import tensorflow as tf

from expertrag_jax.data.preprocessors import tokenise
from expertrag_jax.data.vocabularies import Vocabularies, seqio_vocabulary
from expertrag_jax.errors import UserError


def test_ids_are_equal(vocabulary, vocabularies):
    texts = ["red stone river", "", "  Amber   lamp? ", "ångström 42 é zebra", "north\tsouth"]
    tokens = tokenise(vocabularies.reader, tf.constant(texts)).to_list()
    assert tokens == [vocabulary.encode(text) for text in texts]
    assert any(2 in ids for ids in tokens)  # an unknown character is id 2 in both
    assert vocabularies.reader.eos_id == 1 and vocabularies.reader.pad_id == 0
    assert vocabularies.shared and seqio_vocabulary(vocabulary.path) == vocabularies.reader


def test_bad_vocabularies_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        Vocabularies(tmp_path / "none.model")
    words = [" ".join(np.random.default_rng(i).choice(list("abcdef"), 5)) for i in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(tmp_path / "other"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="pad_id=0"):
        Vocabularies(tmp_path / "other.model")
