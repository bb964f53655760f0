"""Vocabularies of reader and retriever: SentencePiece models, without TensorFlow.

Ids: 0 padding, 1 end of sequence, 2 unknown.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Iterable, Sequence

import sentencepiece

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.files.reading import contents
from expertrag_jax.files.writing import whole
from expertrag_jax.ranges import Count, Natural, checked

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
_SENTENCE_BYTES = 4192  # SentencePiece's default of max_sentence_length
_UNK_CHARACTER = "\u2585"
_LOG = logging.getLogger(__name__)


class Vocabulary:
    """A SentencePiece model.

    Attributes:
      path: the model file, or None for one that is only in memory.
      size: number of pieces, ids 0 ... size - 1.
      digest: SHA-256 of the model file in hex; checkpoints, indexes and exports carry it.
    """

    def __init__(self, model: bytes, path: str | None = None):
        """Wraps a serialised model; raises UserError where it is no SentencePiece model or has other ids."""
        where = path or "the vocabulary"
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception as error:
            raise UserError(
                f"{where} is not a SentencePiece model; name a file that was trained as one."
            ) from error
        special = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if special != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"{where} has ids {special} for padding, end and unknown where (0, 1, 2) is needed; "
                "train it with pad_id=0, eos_id=1, unk_id=2."
            )
        self._model = model
        self.path = path
        self.size: int = self._processor.vocab_size()
        self.digest: str = hashlib.sha256(model).hexdigest()

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Vocabulary:
        """Loads a model file; raises UserError where it is missing or no SentencePiece model."""
        path = os.fspath(path)
        try:
            model = contents(path)
        except UserError as error:
            raise UserError(f"cannot read the vocabulary: {error}; give the path of a .model file.") from None
        return cls(model, path)

    def encode(self, text: str) -> list[int]:
        """The text's ids, without EOS."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text."""
        return self._processor.encode(list(texts))

    def writes(self, text: str) -> bool:
        """Whether the vocabulary has pieces for all of a text."""
        return UNK_ID not in self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the first EOS; padding is skipped.

        An id beyond the pieces (a model may have more embeddings than the vocabulary has pieces) is UNK.
        """
        kept = []
        for token in ids:
            if token == EOS_ID:
                break
            if token != PAD_ID:
                kept.append(int(token) if token < self.size else UNK_ID)
        return self._processor.decode(kept)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model file, whole or not at all."""
        with whole(path, "wb") as file:
            file.write(self._model)


@checked
def embedding_rows(path: LocalPath, multiple: Count = 128, sentinels: Natural = 0) -> int:
    """Rows of an embedding for the vocabulary in a file: its size rounded up, so that meshes divide it.

    Args:
      path: of the SentencePiece model.
      multiple: of which the rows are.
      sentinels: ids behind the pieces, for span corruption (``data.span_corruption``); T5 has 100.
    Raises:
      UserError: see ``Vocabulary.from_file``.
    """
    return -(-(Vocabulary.from_file(path).size + sentinels) // multiple) * multiple


def train_vocabulary(
    sentences: Iterable[str],
    size: int,
    path: str | os.PathLike | None = None,
    seed: int = 0,
    *,
    model_type: str = "bpe",
    byte_fallback: bool = False,
    max_sentences: int = 1_000_000,
) -> Vocabulary:
    """Trains a SentencePiece model; the same sentences, size and seed give the same bytes.

    Args:
      sentences: training texts; empty ones are skipped.
      size: most pieces the model may have; a small corpus may give fewer (see ``Vocabulary.size``).
      path: where the model file is written, if given.
      seed: draws the sample of sentences when there are more than ``max_sentences``.
      model_type: "bpe" (fills the size, gives frequent words a piece each) or "unigram" (T5's).
      byte_fallback: spell unknown characters in bytes (takes 256 pieces) instead of mapping them to UNK.
      max_sentences: most sentences to train on.

    Returns:
      The vocabulary.

    Raises:
      UserError: no sentences, or a size that cannot hold the characters.
    """
    # SentencePiece drops sentences of more bytes than max_sentence_length, and those that hold the character of <unk>.
    texts = [text.replace(_UNK_CHARACTER, " ") for text in sentences if text.strip()]
    if not texts:
        raise UserError("there are no sentences to train a vocabulary on; give a corpus that is not empty.")
    if len(texts) > max_sentences:
        _LOG.warning("the vocabulary is trained on a sample of %d of %d texts", max_sentences, len(texts))
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            bos_id=-1,
            character_coverage=1.0 if not byte_fallback else 0.9995,
            byte_fallback=byte_fallback,
            hard_vocab_limit=False,
            input_sentence_size=max_sentences,
            shuffle_input_sentence=len(texts) > max_sentences,
            num_threads=1,  # the order of floating-point sums, hence the model, depends on it
            max_sentence_length=max(_SENTENCE_BYTES, max(len(text.encode()) for text in texts)),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"SentencePiece cannot train {size} pieces on {len(texts)} sentences ({error}); "
            "choose another size."
        ) from error
    vocabulary = Vocabulary(model.getvalue(), os.fspath(path) if path is not None else None)
    if path is not None:
        vocabulary.save(path)
    return vocabulary
