"""Algorithm 1 of ExpertRAG (arXiv 2504.08744): gate, split the batch, retrieve for those that need it, generate.

Questions arrive in batches. ``question`` runs for all rows of a batch: it encodes, takes the closed-book decoder's
first step, and gives p_ret. Rows that skip continue from that step. Rows that retrieve wait until a bucket is full (or
the stream ends); then they are searched, read and decoded together. All shapes are those of the buckets, so nothing
compiles after ``warm_up``, and a question's cost is really lower when it skips.

Shapes: N questions in all, B rows of a bucket, L question, Lq query, K passages, P reader input, T answer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from expertrag_jax import decoding, evidence
from expertrag_jax.errors import UserError
from expertrag_jax.gate.policy import Never, Policy, PolicyInputs

SEARCH_BEFORE_DECIDING = "passage_scores"


class Programs(Protocol):
    """The compiled functions of a system; a fresh system and an export both give them."""

    def question(self, question_tokens: np.ndarray) -> tuple[Any, jax.Array]:
        """[B, L] int32 -> (state of the closed-book arm behind its first step, p_ret [B] float32)."""

    def read(self, question_tokens: np.ndarray, passage_tokens: np.ndarray) -> Any:
        """[B, L], [B, K, P] int32 -> state of the open-book arm behind its first step."""

    def chosen(self, state: Any) -> jax.Array | None:
        """Which of the passages given to ``read`` were read, [B, k] int32 in their order; None: all of them."""

    def generate(self, state: Any, active: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """State and [B] bool -> (answer tokens [B, T] int32, sum of log-probabilities [B] float32)."""

    def score(self, state: Any, targets: np.ndarray) -> jax.Array:
        """State and [B, T] int32 answers -> log-probability [B] float32."""


class SystemPrograms:
    """``Programs`` of a system and its parameters, jitted here.

    Args:
      system: has encode_question, decide, read, begin, decode_step (see ``systems.expert_rag``). One that weighs
        passages by their vectors (``weighs_passages``) reads those too, and one that has ``generate`` searches for
        answers in its own way; see ``systems.rag``.
      params: its parameters. length: T.

    Attributes:
      weighs_passages: whether ``read_weighed`` takes the place of ``read``.
    """

    def __init__(self, system, params, length: int | None = None):
        self.params = params
        self._length = length or system.max_target_length
        self._question = jax.jit(functools.partial(question_program, system))
        self.weighs_passages = getattr(system, "weighs_passages", False)
        read = weighed_read_program if self.weighs_passages else read_program
        self._read = jax.jit(functools.partial(read, system))
        generate = functools.partial(generate_program, system.decode_step)
        if hasattr(system, "generate"):
            generate = functools.partial(own_generate_program, system)
        self._generate = jax.jit(functools.partial(generate, length=self._length))
        self._score = jax.jit(functools.partial(score_program, system.decode_step))
        self._query = jax.jit(system.query_vectors) if getattr(system, "retriever", None) is not None else None

    def question(self, question_tokens):
        """See ``Programs``."""
        return self._question(self.params, question_tokens)

    def read(self, question_tokens, passage_tokens):
        """See ``Programs``."""
        return self._read(self.params, question_tokens, passage_tokens)

    def read_weighed(self, question_tokens, query_tokens, passage_tokens, passage_vectors):
        """``read`` with queries [B, Lq] int32 and passage vectors [B, K, D] float32."""
        return self._read(self.params, question_tokens, query_tokens, passage_tokens, passage_vectors)

    def chosen(self, state):
        """See ``Programs``."""
        return choices_of(state[0])

    def generate(self, state, active):
        """See ``Programs``."""
        return self._generate(self.params, state, active)

    def score(self, state, targets):
        """See ``Programs``."""
        return self._score(self.params, state, targets)

    def query_vectors(self, query_tokens):
        """[B, Lq] int32 -> [B, D] float32, for the retriever."""
        return self._query(self.params, query_tokens)


def question_program(system, params, question_tokens):
    """The pure function behind ``Programs.question``: state is (memory, first_log_probs, cache)."""
    question = system.encode_question(params, question_tokens)
    return (question.memory, question.first_log_probs, question.cache), system.decide(params, question)


def read_program(system, params, question_tokens, passage_tokens):
    """The pure function behind ``Programs.read``."""
    memory = system.read(params, passage_tokens, question_tokens)
    first, cache = system.begin(params, memory)
    return memory, first, cache


def choices_of(memory: Any) -> jax.Array | None:
    """Which passages a memory of ``read_program`` holds, [B, k] int32; None where the system reads all it is given."""
    return getattr(memory, "choices", None)


def weighed_read_program(system, params, *inputs):
    """The pure function behind ``SystemPrograms.read_weighed``."""
    memory = system.read(params, *inputs)
    return memory, *system.begin(params, memory)


def own_generate_program(system, params, state, active, *, length: int):
    """``generate_program`` of a system that searches in its own way."""
    return system.generate(params, *state, length, active)


def generate_program(decode_step, params, state, active, *, length: int):
    """The pure function behind ``Programs.generate``: greedy search from the first step on."""
    memory, first, cache = state

    def step(tokens, cache):
        return decode_step(params, memory, cache, tokens)

    return decoding.greedy(step, cache, first, length, active)


def score_program(decode_step, params, state, targets):
    """The pure function behind ``Programs.score``."""
    memory, first, cache = state

    def step(tokens, cache):
        return decode_step(params, memory, cache, tokens)

    return decoding.score_targets(step, cache, first, targets)


@dataclasses.dataclass(frozen=True)
class Questions:
    """N questions to answer.

    Attributes:
      ids: [N] int64. texts: N strings, for lexical search. question_tokens: [N, L] int32. query_tokens: [N, Lq] int32.
      retrieval_needed: [N] float32 or None, for the policy ``oracle`` only.
    """

    ids: np.ndarray
    texts: Sequence[str]
    question_tokens: np.ndarray
    query_tokens: np.ndarray
    retrieval_needed: np.ndarray | None = None

    def __len__(self):
        return len(self.ids)

    def rows(self, index: np.ndarray) -> Questions:
        """The questions at ``index``."""
        needed = None if self.retrieval_needed is None else self.retrieval_needed[index]
        texts = [self.texts[i] for i in index]
        return Questions(self.ids[index], texts, self.question_tokens[index], self.query_tokens[index], needed)


@dataclasses.dataclass
class Answers:
    """What was answered, in the order of the questions.

    Attributes:
      tokens: [N, T] int32. scores: [N] float32, log-probability of the answer. p_ret: [N] float32.
      retrieve: [N] bool. passage_rows: [N, K] int32 of what was read, in the order of reading; -1 where that is less.
      passage_scores: [N, K] float32, the retriever's; NaN there.
      encoder_tokens: [N] int32, real encoder tokens. padded_encoder_tokens: computed ones, padding included, in all.
    """

    tokens: np.ndarray
    scores: np.ndarray
    p_ret: np.ndarray
    retrieve: np.ndarray
    passage_rows: np.ndarray
    passage_scores: np.ndarray
    encoder_tokens: np.ndarray
    padded_encoder_tokens: int = 0


class Answerer:
    """Answers streams of questions.

    Args:
      programs: see ``Programs``.
      retriever: ``retrieval.retriever.Retriever`` (None: only policies that never retrieve).
      policy: who decides; may be changed between calls. num_passages: K. reader_length: P.
      answer_length: T. buckets: batch sizes that are compiled; the largest is the batch size of a stream.
      fusion: ``concatenate`` puts all passages into one reader input; the others encode them one by one.
    """

    def __init__(
        self, programs: Programs, retriever, policy: Policy, *, num_passages: int, reader_length: int,
        answer_length: int, buckets: Sequence[int] = (1, 8, 64), fusion: str = "per_passage",
    ):
        self.programs, self.retriever, self.policy = programs, retriever, policy
        self.num_passages, self.reader_length, self.answer_length = num_passages, reader_length, answer_length
        self.buckets = tuple(sorted(buckets))
        self._fusion = fusion

    def answer(
        self, questions: Questions, targets: np.ndarray | None = None, progress: Callable[[int], None] | None = None
    ) -> Answers:
        """Answers all questions, or scores ``targets`` [N, T] as their answers.

        Args:
          progress: called with the number of questions finished since the last call.
        Raises:
          UserError: a row retrieves and there is no retriever.
        """
        answers = self._empty(len(questions))
        waiting: list[int] = []
        batch = self.buckets[-1]
        for start in range(0, len(questions), batch):
            index = np.arange(start, min(start + batch, len(questions)))
            retrieve = self._question_stage(questions, index, answers, targets)
            waiting.extend(index[retrieve].tolist())
            while len(waiting) >= batch:
                self._read_stage(questions, np.array(waiting[:batch]), answers, targets)
                del waiting[:batch]
            if progress is not None:
                progress(len(index))
        if waiting:
            self._read_stage(questions, np.array(waiting), answers, targets)
        return answers

    def warm_up(self, questions: Questions) -> None:
        """Compiles every bucket of both arms on a few of ``questions``."""
        policy, self.policy = self.policy, Never()
        for bucket in self.buckets:
            index = np.arange(min(bucket, len(questions)))
            if len(index) < bucket:
                index = np.resize(index, bucket)
            scratch = self._empty(len(questions))
            self._question_stage(questions, index, scratch, None)
            if self.retriever is not None:
                self._read_stage(questions, index, scratch, None)
        self.policy = policy

    def padded_tokens(self, retrieving: int, questions: Questions) -> int:
        """Encoder tokens that ``answer`` computes, padding included, when that many of the questions retrieve."""
        batch, length = self.buckets[-1], questions.question_tokens.shape[1]
        asked, read = len(questions), retrieving
        passages = 1 if self._fusion == "concatenate" else self.num_passages

        def rows(count):
            return count // batch * batch + (self._bucket(count % batch) if count % batch else 0)

        return rows(asked) * length + rows(read) * passages * self.reader_length

    def _empty(self, count: int) -> Answers:
        passages = (count, self.num_passages)
        return Answers(
            np.zeros((count, self.answer_length), np.int32), np.zeros(count, np.float32), np.zeros(count, np.float32),
            np.zeros(count, bool), np.full(passages, -1, np.int32), np.full(passages, np.nan, np.float32),
            np.zeros(count, np.int32),
        )

    def _bucket(self, rows: int) -> int:
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def _question_stage(self, questions, index, answers, targets) -> np.ndarray:
        """Runs the closed-book arm on rows ``index`` and finishes those that skip; returns [len(index)] bool."""
        bucket = self._bucket(len(index))
        tokens = pad_rows(questions.question_tokens[index], bucket)
        state, p_ret = self.programs.question(tokens)
        inputs = self._policy_inputs(questions.rows(index), np.asarray(p_ret)[: len(index)])
        retrieve = np.asarray(self.policy.decide(inputs), bool)
        answers.p_ret[index], answers.retrieve[index] = inputs.p_ret, retrieve
        answers.encoder_tokens[index] += (tokens[: len(index)] > 0).sum(-1)
        answers.padded_encoder_tokens += tokens.size
        if not retrieve.all():
            active = pad_rows(~retrieve, bucket)
            self._finish(state, active, index, bucket, answers, targets)
        return retrieve

    def _policy_inputs(self, questions: Questions, p_ret: np.ndarray) -> PolicyInputs:
        scores = None
        if SEARCH_BEFORE_DECIDING in self.policy.needs:
            scores = self.search(questions).scores
        return PolicyInputs(
            example_ids=questions.ids, p_ret=p_ret, passage_scores=scores, retrieval_needed=questions.retrieval_needed
        )

    def search(self, questions: Questions):
        """Passages for at most a bucket of questions: ``Retrieved`` of bucket size, the rows behind them repeat.

        Raises:
          UserError: there is no retriever.
        """
        if self.retriever is None:
            raise UserError("A question retrieves but there is no index: give --index_dir, or --retrieve=never.")
        bucket = self._bucket(len(questions))
        texts = list(questions.texts) + [questions.texts[-1]] * (bucket - len(questions))
        return self.retriever.retrieve(texts, pad_rows(questions.query_tokens, bucket), self.num_passages)

    def _read_stage(self, questions, index, answers, targets) -> None:
        """Searches, reads and decodes rows ``index`` with evidence."""
        asked = questions.rows(index)
        bucket = self._bucket(len(index))
        found = self.search(asked)
        tokens = pad_rows(asked.question_tokens, bucket)
        passages = self.assemble(tokens, found.passage_tokens)
        if getattr(self.programs, "weighs_passages", False):
            state = self.programs.read_weighed(
                tokens, pad_rows(asked.query_tokens, bucket), passages, self._vectors(found.rows)
            )
        else:
            state = self.programs.read(tokens, passages)
        read, chosen = (found.rows, found.scores), self.programs.chosen(state)
        if chosen is not None:
            read = tuple(np.take_along_axis(each, np.asarray(chosen), axis=1) for each in read)
        for kept, each in zip((answers.passage_rows, answers.passage_scores), read):
            kept[index, : each.shape[1]] = each[: len(index)]
        answers.encoder_tokens[index] += (passages[: len(index)] > 0).sum((1, 2))
        answers.padded_encoder_tokens += passages.size
        self._finish(state, np.arange(bucket) < len(index), index, bucket, answers, targets)

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        vectors = self.retriever.vectors_of(rows)
        if vectors is None:
            raise UserError(
                f"this system weighs passages by their vectors and the index at {self.retriever.loaded.directory} has "
                "none: name a dense index."
            )
        return vectors

    def assemble(self, question_tokens: np.ndarray, passage_tokens: np.ndarray) -> np.ndarray:
        """Reader inputs [B, K, P] int32 (``concatenate``: [B, 1, P]) of questions [B, L] and passages [B, K, S]."""
        if self._fusion == "concatenate":
            passage_tokens = evidence.joined(passage_tokens)
        return evidence.assemble_batch(question_tokens, passage_tokens, self.reader_length)

    def _finish(self, state, active, index, bucket, answers, targets) -> None:
        rows = active[: len(index)]
        if targets is None:
            tokens, scores = self.programs.generate(state, active)
            answers.tokens[index[rows]] = np.asarray(tokens)[: len(index)][rows]
        else:
            scores = self.programs.score(state, pad_rows(targets[index], bucket))
            answers.tokens[index[rows]] = targets[index[rows]]
        answers.scores[index[rows]] = np.asarray(scores)[: len(index)][rows]


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """Zero rows behind [n, ...] -> [count, ...]."""
    return np.pad(rows, ((0, count - len(rows)),) + ((0, 0),) * (rows.ndim - 1))
