"""The reader's and the retriever's vocabulary as SeqIO sees them.

``expertrag_jax.vocabulary.Vocabulary`` (no TensorFlow) and ``seqio.SentencePieceVocabulary`` read the same
model file and give the same ids: pad 0, EOS 1, UNK 2.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import seqio

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import local

PAD, EOS = 0, 1


def seqio_vocabulary(vocabulary: Any) -> seqio.Vocabulary:
    """The SeqIO form of a vocabulary.

    Args:
      vocabulary: a SeqIO vocabulary (returned as it is), the path of a SentencePiece model file, or an object
        with such a ``path`` (``expertrag_jax.vocabulary.Vocabulary``).

    Returns:
      A vocabulary whose pad id is 0 and whose EOS id is 1.

    Raises:
      UserError: the file does not exist, or pad and EOS have other ids.
    """
    if isinstance(vocabulary, seqio.Vocabulary):
        return vocabulary
    path = str(local(getattr(vocabulary, "path", vocabulary)))
    if not os.path.exists(path):
        raise UserError(f"the vocabulary {path} does not exist; give the path of a SentencePiece model file")
    loaded = seqio.SentencePieceVocabulary(path)
    if (loaded.tokenizer.pad_id(), loaded.eos_id) != (PAD, EOS):
        raise UserError(
            f"the vocabulary {path} has pad id {loaded.tokenizer.pad_id()} and EOS id {loaded.eos_id}, but 0 "
            "and 1 are needed; train it with pad_id=0, eos_id=1, unk_id=2"
        )
    return loaded


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """The two vocabularies of a system.

    Attributes:
      reader: the generator's: questions, evidence and answers. Anything that ``seqio_vocabulary`` takes.
      retriever: the dual encoder's, for ``query_tokens``; None means the reader's.
    """

    reader: Any
    retriever: Any = None

    def __post_init__(self):
        reader = seqio_vocabulary(self.reader)
        retriever = reader if self.retriever is None else seqio_vocabulary(self.retriever)
        object.__setattr__(self, "reader", reader)
        object.__setattr__(self, "retriever", retriever)

    @property
    def shared(self) -> bool:
        """Whether reader and retriever use one vocabulary."""
        return self.reader == self.retriever
