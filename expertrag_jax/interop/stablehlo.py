"""Serving a system without its Python code: `jax.export` programs (StableHLO), parameters and vocabularies.

Per bucket of B rows there are five programs, each with the parameters as its first argument; a memory and a
cache are flat tuples of arrays::

    question      (params, tokens [B, L])                     -> memory, first [B, V], cache, p_ret [B]
    read          (params, tokens [B, L], passages [B, K, P]) -> memory, first [B, V], cache; where the system chooses
                  among the passages, also its choice [B, k]
    decode_closed (params, memory, cache, tokens [B])         -> log-probabilities [B, V], cache
    decode_open   the same over the memory of `read`
    query         (params, query tokens [B, Lq])              -> vectors [B, D]

``first`` are the log-probabilities of an answer's first token. `ExportedPrograms` runs the same search over
them as over a fresh system's decode step, compiled into one program.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from expertrag_jax import decoding
from expertrag_jax.answering import choices_of, question_program, read_program
from expertrag_jax.assembly import AnswerSettings
from expertrag_jax.errors import UserError
from expertrag_jax.files import sealed
from expertrag_jax.interop import export_directory
from expertrag_jax.interop.export_directory import PARAMETERS, PROGRAMS
from expertrag_jax.training import pretrained

PLATFORMS = ("cpu", "tpu", "cuda")
CLOSED, OPEN = "decode_closed", "decode_open"
Array = jax.Array


# Writing


def lower(
    system: Any,
    params: Any,
    settings: AnswerSettings,
    platforms: tuple[str, ...] = PLATFORMS,
    progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, export.Exported]]:
    """Lowers every program in every bucket; yields (name, program), the name ending in ``_b<bucket>``."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    for bucket in settings.buckets:
        for name, (function, arguments) in _programs(system, shapes, settings, bucket).items():
            if progress is not None:
                progress(f"{name}_b{bucket}")
            lowered = export.export(jax.jit(function), platforms=platforms)(shapes, *arguments)
            yield f"{name}_b{bucket}", lowered


def _programs(system: Any, params: Any, settings: AnswerSettings, bucket: int) -> dict[str, tuple]:
    """{name: (function of params and plain trees, shapes of its arguments behind the parameters)}."""

    def tokens(*shape):
        return jax.ShapeDtypeStruct((bucket, *shape), jnp.int32)

    def question(params, tokens):
        (memory, first, cache), p_ret = question_program(system, params, tokens)
        return _flat(memory), first, _flat(cache), p_ret

    def read(params, tokens, passages):
        memory, first, cache = read_program(system, params, tokens, passages)
        chosen = choices_of(memory)
        return _flat(memory), first, _flat(cache), *(() if chosen is None else (chosen,))

    asked = tokens(settings.question_length)
    programs = {"question": (question, (asked,))}
    states = {CLOSED: jax.eval_shape(lambda *given: question_program(system, *given)[0], params, asked)}
    if hasattr(system, "read"):
        passages = tokens(*settings.read_shape)
        programs["read"] = (read, (asked, passages))
        states[OPEN] = jax.eval_shape(lambda *given: read_program(system, *given), params, asked, passages)
    for name, state in states.items():
        programs[name] = _decode_program(system, state, tokens())
    if query_dimension(system) is not None:
        programs["query"] = (system.query_vectors, (tokens(settings.query_length),))
    return programs


def _decode_program(system: Any, state: Any, tokens: Any) -> tuple:
    """The decode step between flat tuples, for the shapes of one arm's state."""
    memory, _, cache = state
    memory_tree, cache_tree = jax.tree.structure(memory), jax.tree.structure(cache)

    def decode(params, memory, cache, tokens):
        trees = jax.tree.unflatten(memory_tree, memory), jax.tree.unflatten(cache_tree, cache)
        log_probs, new = system.decode_step(params, *trees, tokens)
        return log_probs, _flat(new)

    return decode, (_flat(memory), _flat(cache), tokens)


def _flat(tree: Any) -> tuple:
    return tuple(jax.tree.leaves(tree))


def query_dimension(system: Any) -> int | None:
    """D of the system's query vectors; None where it has no query encoder."""
    config = getattr(system, "retriever", None)
    return None if config is None else config.output_dim


def interface(exported: export.Exported) -> dict[str, Any]:
    """Shapes and dtypes of a program's arguments behind the parameters, and of its results, in flat order."""
    (_, *arguments), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)

    def listed(values):
        return [{"shape": list(value.shape), "dtype": str(value.dtype)} for value in jax.tree.leaves(values)]

    return {"arguments": listed(arguments), "results": listed(exported.out_avals)}


# Reading


class State(NamedTuple):
    """An arm behind its first step: which decode program continues it, and that program's arrays."""

    arm: str
    memory: tuple[Array, ...]
    first: Array
    cache: tuple[Array, ...]
    choices: Array | None = None


class ExportedPrograms:
    """``answering.Programs`` of an export directory; runs without the system's Python code.

    Attributes:
      directory, manifest, settings: of the export. params: on this process' first device.
    """

    def __init__(self, directory: str | Path, verify: bool = True):
        """Opens an export.

        Args:
          verify: compare every file's SHA-256 with the manifest.

        Raises:
          UserError: no export there, a damaged one, or programs for other platforms than this one.
        """
        self.directory = Path(os.path.abspath(directory))
        self.manifest = export_directory.read_manifest(self.directory)
        if verify:
            export_directory.check_files(self.directory, self.manifest)
        self._check_platform()
        manifest_path = self.directory / export_directory.MANIFEST_NAME
        self.settings = sealed.build(
            AnswerSettings, self.manifest.settings, manifest_path, export_directory.REMEDY
        )
        self._exported = {name: self._deserialise(name) for name in self.manifest.programs}
        self._check_programs()  # whose shapes are known to be the manifest's
        self.params = self._restore()
        self._compiled: dict[tuple, Callable] = {}

    def question(self, question_tokens: np.ndarray) -> tuple[State, Array]:
        """See ``answering.Programs``."""
        memory, first, cache, p_ret = self._call("question", question_tokens)
        return State(CLOSED, memory, first, cache), p_ret

    def read(self, question_tokens: np.ndarray, passage_tokens: np.ndarray) -> State:
        """See ``answering.Programs``."""
        return State(OPEN, *self._call("read", question_tokens, passage_tokens))

    def chosen(self, state: State) -> Array | None:
        """See ``answering.Programs``."""
        return state.choices

    def generate(self, state: State, active: np.ndarray) -> tuple[Array, Array]:
        """See ``answering.Programs``."""
        return self._search(state, self._greedy)(self.params, *state[1:4], active)

    def score(self, state: State, targets: np.ndarray) -> Array:
        """See ``answering.Programs``."""
        return self._search(state, self._score)(self.params, *state[1:4], targets)

    def query_vectors(self, query_tokens: np.ndarray) -> Array:
        """[N, Lq] int32 -> [N, D] float32, for any N: rows are cut and padded to the buckets."""
        largest, vectors = self.settings.buckets[-1], []
        for start in range(0, len(query_tokens), largest):
            part = query_tokens[start : start + largest]
            bucket = next(size for size in self.settings.buckets if size >= len(part))
            padded = np.pad(part, ((0, bucket - len(part)), (0, 0)))
            vectors.append(self._call("query", padded)[: len(part)])
        return jnp.concatenate(vectors)

    def _call(self, name: str, *arguments: np.ndarray):
        program = f"{name}_b{len(arguments[0])}"
        if program not in self._compiled:
            if program not in self._exported:
                raise UserError(f"the export {self.directory} has no program {program}: export again.")
            self._compiled[program] = jax.jit(self._exported[program].call)
        return self._compiled[program](self.params, *arguments)

    def _search(self, state: State, search: Callable) -> Callable:
        """One compiled program around the decode steps of the state's arm and bucket."""
        key = search.__name__, state.arm, len(state.first)
        if key not in self._compiled:
            step = self._exported[f"{state.arm}_b{len(state.first)}"].call

            def run(params, memory, first, cache, given):
                return search(lambda tokens, cache: step(params, memory, cache, tokens), cache, first, given)

            self._compiled[key] = jax.jit(run)
        return self._compiled[key]

    def _greedy(self, step, cache, first, active):
        return decoding.greedy(step, cache, first, self.settings.answer_length, active)

    def _score(self, step, cache, first, targets):
        return decoding.score_targets(step, cache, first, targets)

    def _check_platform(self) -> None:
        here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
        if here not in self.manifest.platforms:
            raise UserError(
                f"the export {self.directory} is for {', '.join(self.manifest.platforms)}, not for {here}: "
                f"export the model with --platforms={here}."
            )

    def _check_programs(self) -> None:
        """UserError where the manifest's programs are not those of its settings."""
        settings, programs = self.settings, self.manifest.programs
        reads = any(name.startswith("read_b") for name in programs)
        for bucket in settings.buckets:
            question = [bucket, settings.question_length]
            wanted = {"question": [question], "decode_closed": None}
            if reads:
                wanted |= {"read": [question, [bucket, *settings.read_shape]], "decode_open": None}
            if self.manifest.query_encoder is not None:
                wanted["query"] = [[bucket, settings.query_length]]
            for name, shapes in wanted.items():
                told = programs.get(f"{name}_b{bucket}", {}).get("arguments", [])
                if shapes is None:  # a decoding step, whose caches are as long as the answer
                    fits = settings.answer_length in _cache_lengths(told)
                else:
                    fits = [argument["shape"] for argument in told] == shapes
                if not fits:
                    raise UserError(
                        f"{self.directory} is damaged (its program {name}_b{bucket} is not of its settings): "
                        f"{export_directory.REMEDY}."
                    )

    def _deserialise(self, name: str) -> export.Exported:
        path = self.directory / PROGRAMS / f"{name}.jaxexport"
        try:
            program = export.deserialize(bytearray(path.read_bytes()))
            shapes = interface(program)
        except Exception as error:  # flatbuffers and JAX raise whatever the bytes lead them to
            written = self.manifest.versions.get("jax")
            raise UserError(
                f"{path} cannot be read by jax {jax.__version__} (written by {written}: {error}): export the "
                "model again."
            ) from error
        if shapes != self.manifest.programs[name]:
            raise UserError(
                f"{path} is another program than the manifest says (its shapes differ): {export_directory.REMEDY}."
            )
        return program

    def _restore(self) -> Any:
        exported = next(iter(self._exported.values()))
        (params, *_), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        return pretrained.restore_parameters(self.directory / PARAMETERS, shapes)


def _cache_lengths(arguments: Sequence[Mapping[str, Any]]) -> list[int]:
    """The lengths T of the decoder's caches [.., B, T, H, D]; among a step's arguments they follow the mask."""
    mask = next((place for place, argument in enumerate(arguments) if argument["dtype"] == "bool"), len(arguments))
    return [argument["shape"][-3] for argument in arguments[mask + 1 :] if len(argument["shape"]) >= 4]
