"""How time and memory of a RAG training step grow with the number of passages K.

    python benchmarks/rag.py --json rag.json
    python benchmarks/rag.py --shape base --batch 8 --inputs 256 --targets 32      # on a GPU

The trainer's own compiled step of ``RAG``'s phase on random tokens: K passages of ``--inputs`` tokens per question go
through the encoder in one batch, each with its own cross-attention keys and values; the decoder runs once per passage.
``temp`` is what the compiler reserves beside arguments and results, ``peak`` all three together (donated state once),
and ``logits`` what float32 logits of all passages and positions would take: they never exist as a whole, one position
is worked on at a time and again in the backward pass. ``--whole_logits`` measures that form too. The slopes
are of least squares on logarithms of time and memory over K: 1 is linear. Needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json

import jax
import numpy as np
from compiled_step import CompiledStep, medians
from train_step import SHAPES, Shape, make_batch

from expertrag_jax.batch import Batch
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems import marginals
from expertrag_jax.systems.rag import MARGINALS, RAG
from expertrag_jax.training import optimizer

WIDTH = 128  # of query and passage vectors


def rag_batch(shape: Shape, passages: int) -> Batch:
    """Random questions, K passages of the question's length each, and their vectors."""
    rng = np.random.default_rng(1)
    size = (shape.batch, passages)
    batch = make_batch(shape)
    return batch.replace(
        query_tokens=batch.encoder_input_tokens,
        passage_tokens=rng.integers(3, shape.config.vocab_size, (*size, shape.inputs)).astype(np.int32),
        passage_vectors=rng.normal(size=(*size, WIDTH)).astype(np.float32),
    )


def whole_logits(states, targets, output):
    """``marginals.token_scores`` from all logits at once, what the benchmark compares with."""
    logits = output(states)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    is_target = targets[..., None] == jax.numpy.arange(logits.shape[-1])
    return jax.numpy.where(is_target, logits, 0.0).sum(-1) - log_z, logits.mean(-1) - log_z, log_z


def compiled_step(shape: Shape, marginal: str, passages: int) -> CompiledStep:
    """The step of one number of passages."""
    retriever = DualEncoderConfig(vocab_size=shape.config.vocab_size, output_dim=WIDTH)
    system = RAG(shape.config, retriever, marginal, optimizer=lambda: optimizer.adafactor(1e-3))
    return CompiledStep(system, rag_batch(shape, passages))


def slope(values: list[int], figures: list[float]) -> float:
    """Of least squares on logarithms."""
    return float(np.polyfit(np.log(values), np.log(figures), 1)[0])


def measure(shape: Shape, marginal: str, form: str, options: argparse.Namespace) -> list[dict]:
    """A row per number of passages."""
    steps = {passages: compiled_step(shape, marginal, passages) for passages in options.passages}
    times = medians(steps, options.rounds, options.steps)
    rows = []
    for passages, step in steps.items():
        wall, cpu = times[passages]
        rows.append({
            "marginal": marginal, "form": form, "passages": passages, "batch": shape.batch, "inputs": shape.inputs,
            "targets": shape.targets, "vocabulary": shape.config.vocab_size,
            "device": jax.devices()[0].device_kind, "jax": jax.__version__,
            "ms_per_step": 1e3 * wall, "cpu_ms_per_step": 1e3 * cpu, "state_bytes": step.state_bytes,
            "temp_bytes": step.temp_bytes, "peak_bytes": step.peak_bytes,
            "logits_bytes": 4 * shape.batch * passages * shape.targets * shape.config.vocab_size,
        })  # fmt: skip
    return rows


def show(rows: list[dict]) -> dict:
    """The rows as a table; returns the slopes."""
    print(f"RAG-{rows[0]['marginal'].capitalize()}, {rows[0]['form']} logits")
    print(f"{'K':>4} {'ms/step':>9} {'cpu ms':>9} {'temp MB':>9} {'peak MB':>9} {'logits MB':>10}")
    for row in rows:
        print(
            f"{row['passages']:4} {row['ms_per_step']:9.1f} {row['cpu_ms_per_step']:9.1f} "
            f"{row['temp_bytes'] / 1e6:9.1f} {row['peak_bytes'] / 1e6:9.1f} {row['logits_bytes'] / 1e6:10.1f}"
        )
    values = [row["passages"] for row in rows]
    names = ("ms_per_step", "cpu_ms_per_step", "temp_bytes", "peak_bytes")
    found = {name: slope(values, [row[name] for row in rows]) for name in names} if len(rows) > 1 else {}
    print("slopes: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True)
    return {"marginal": rows[0]["marginal"], "form": rows[0]["form"], "slopes": found}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=64, help="tokens of a question, and of a question with a passage")
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--passages", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--marginals", nargs="*", choices=MARGINALS, default=list(MARGINALS))
    parser.add_argument("--whole_logits", action="store_true", help="also with all logits at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="per round")
    parser.add_argument("--json", help="also write rows and slopes here")
    options = parser.parse_args()
    base = SHAPES[options.shape]
    config = dataclasses.replace(base.config, vocab_size=options.vocabulary)
    shape = dataclasses.replace(
        base, config=config, batch=options.batch, inputs=options.inputs, targets=options.targets
    )
    rows, slopes, chunked = [], [], marginals.token_scores
    for form, scores in (("chunked", chunked), ("whole", whole_logits)):
        if form == "whole" and not options.whole_logits:
            continue
        marginals.token_scores = scores
        for marginal in options.marginals:
            found = measure(shape, marginal, form, options)
            slopes.append(show(found))
            rows += found
    marginals.token_scores = chunked
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"rows": rows, "slopes": slopes}, file, indent=1)


if __name__ == "__main__":
    main()
