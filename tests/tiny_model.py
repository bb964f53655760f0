"""A tiny ExpertRAG with random parameters, its MODEL_DIR, its corpus and indexes, for the tests of serving.

Loaded by `importlib` from the tests that use it; everything is made from seeds.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from expertrag_jax.assembly import READER_VOCABULARY, RETRIEVER_VOCABULARY, AnswerSettings, encoder_digest
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, write_index
from expertrag_jax.retrieval.retriever import tokenize_passages
from expertrag_jax.systems.description import describe
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.systems.retriever import DualEncoder
from expertrag_jax.train import corpus_digest
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import TrainState
from expertrag_jax.vocabulary import Vocabulary, train_vocabulary

FIRST, LAST = ("Bela", "Doru", "Fenn", "Galo", "Hira"), ("Korv", "Lund", "Moss")
NAMES = [f"{first} {last}" for first in FIRST for last in LAST]
TOWNS = ["Arlen", "Brook", "Cassel", "Derry", "Elm"]
TRADES = ["baker", "miller", "potter", "smith"]
LENGTHS = {"inputs": 24, "targets": 8, "query": 24, "passages": 48}
NUM_PASSAGES, BUCKETS = 2, (2, 4)
QUESTIONS = [f"Where does {name} live?" for name in NAMES[:7]]
QUESTIONS += [f"What is the trade of {name}?" for name in NAMES[7:11]]


def passages(edition: int = 0) -> Passages:
    """One passage per name; another edition, other towns."""
    texts = [
        f"{name} lives in {TOWNS[(place + edition) % 5]}. {name} is a {TRADES[place % 4]}."
        for place, name in enumerate(NAMES)
    ]
    return Passages([f"e{place}" for place in range(len(NAMES))], list(NAMES), texts)


def vocabulary(path: Path, seed: int = 0) -> Vocabulary:
    """Trained on the corpus; another seed, another vocabulary."""
    texts = [*passages().texts, *QUESTIONS] + [f"word{seed}"] * seed
    return train_vocabulary(texts, 200, path)


def system(vocab_size: int, output_dim: int = 12) -> ExpertRAG:
    """One layer each, with experts; ``output_dim`` is the width of query vectors."""
    model = TransformerConfig(
        vocab_size=vocab_size, embed_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=1,
        num_decoder_layers=1, num_experts=4, expert_layer_period=1,
    )  # fmt: skip
    retriever = DualEncoderConfig(vocab_size=vocab_size, embed_dim=16, output_dim=output_dim)
    return ExpertRAG(model, retriever, max_target_length=LENGTHS["targets"], gate_hidden=4)


def parameters(made, seed: int = 0) -> dict:
    """Random ones, the output layer loud enough that no two tokens are nearly alike, the gate undecided."""
    params = jax.jit(made.init)(jax.random.PRNGKey(seed))
    params["decoder"]["logits_dense"]["kernel"] *= 8.0
    if "gate" in params:
        kernel = params["gate"]["output"]["kernel"]
        params["gate"]["output"]["kernel"] = jax.random.normal(jax.random.PRNGKey(seed + 1), kernel.shape)
    return params


def write_model_dir(path: Path, made, params, vocabularies, index_dir: Path | None, threshold=None):
    """What `expertrag train` and `expertrag calibrate` leave."""
    reader, retriever = vocabularies
    facts = {
        "system": describe(made),
        "task_feature_lengths": LENGTHS,
        "num_passages": NUM_PASSAGES,
        "index_dir": None if index_dir is None else str(index_dir),
        "digests": {
            "reader vocabulary": reader.digest, "retriever vocabulary": retriever.digest, **corpus_digest(index_dir),
        },
    }
    zero = jnp.zeros((), jnp.int32)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(3, TrainState(zero + 3, zero, zero + 3, params, {}), facts)
    reader.save(path / READER_VOCABULARY)
    retriever.save(path / RETRIEVER_VOCABULARY)
    if threshold is not None:
        (path / "gate.json").write_text(json.dumps({"threshold": threshold, "scale": 1.0, "bias": 0.0}))


def write_passage_index(path: Path, made, params, vocab: Vocabulary, edition: int = 0, **changes):
    """An exact index of an edition."""
    corpus = passages(edition)
    tokens = tokenize_passages(corpus, vocab.encode, 24)
    vectors = np.asarray(jax.jit(made.query_vectors)(params, tokens))
    digests = {"reader": vocab.digest, "retriever": vocab.digest}
    fields = {"encoder_digest": encoder_digest(params), "vocabulary_digests": digests} | changes
    index = make_index("exact").build(corpus, vectors)
    return write_index(path, index, corpus, passage_tokens=tokens, vectors=vectors, **fields)


def write_retriever(path: Path, made: Made) -> None:
    """The MODEL_DIR of a dual encoder with the query encoder of ``made``."""
    params = {"query_encoder": made.params["query_encoder"]}
    vocabularies = (made.vocabulary, made.vocabulary)
    write_model_dir(path, DualEncoder(made.system.retriever), params, vocabularies, None)


@dataclasses.dataclass
class Made:
    """Paths and values of one tiny model."""

    root: Path
    system: ExpertRAG
    params: dict
    vocabulary: Vocabulary
    settings: AnswerSettings
    threshold: float

    @property
    def model_dir(self) -> Path:
        return self.root / "model"

    @property
    def index_dir(self) -> Path:
        return self.root / "index"


def make(root: Path) -> Made:
    """Vocabulary, MODEL_DIR ``root/model``, index ``root/index``; the gate splits QUESTIONS in halves."""
    vocab = vocabulary(root / "vocabulary.model")
    made = system(vocab.size)
    params = parameters(made)
    tokens = np.zeros((len(QUESTIONS), LENGTHS["inputs"]), np.int32)
    for row, text in enumerate(QUESTIONS):
        ids = [*vocab.encode(text), 1]
        tokens[row, : len(ids)] = ids
    p_ret = np.sort(jax.jit(lambda: made.decide(params, made.encode_question(params, tokens)))())
    threshold = float(p_ret[len(p_ret) // 2 - 1 : len(p_ret) // 2 + 1].mean())
    write_passage_index(root / "index", made, params, vocab)
    write_model_dir(root / "model", made, params, (vocab, vocab), root / "index", threshold)
    settings = AnswerSettings(
        LENGTHS["inputs"], LENGTHS["query"], LENGTHS["passages"], LENGTHS["targets"], NUM_PASSAGES,
        buckets=BUCKETS, threshold=threshold,
    )  # fmt: skip
    return Made(root, made, params, vocab, settings, threshold)
