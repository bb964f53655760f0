"""DRO on two-hop questions, beside what it is made of.

    python benchmarks/dro.py --json dro.json

Every question needs two of eight passages (``tasks/almanac/two_hop.py``); persons of the test questions are in no
training question, and all values are drawn afresh. One warm-up per seed, then four ways to spend the same number of
steps on the same questions:

* retrieve top K: the generator trains on the K passages that share most words with the question, and reads them;
* selector frozen, generator frozen: EM, in which the one or the other stays as the warm-up left it;
* DRO: EM that trains both.

Prints exact match, and how often both needed passages are chosen: mean and 95% interval (Student's t) over seeds. Ends
with exit code 1 where DRO's interval of exact match does not lie above all others. The selector's warm-up is short: a
long one teaches this task by itself (docs/results/dro.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from expertrag_jax import decoding, evidence
from expertrag_jax.batch import Batch
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.systems.dro import DRO, GENERATOR, SELECTOR
from expertrag_jax.systems.system import Phase
from expertrag_jax.training import optimizer, parameters
from expertrag_jax.training.state import TrainState
from expertrag_jax.training.step import make_train_step
from tasks.almanac import AlmanacConfig, World, two_hop

CHOSEN, ANSWER, READER = 2, 3, 25  # K; tokens of an answer, and of a passage with its question
TOP_K = "retrieve top K"
ARMS = {TOP_K: (), "selector frozen": (GENERATOR,), "generator frozen": (SELECTOR,), "DRO": (GENERATOR, SELECTOR)}


class Data:
    """Batches of two-hop questions, one token per word."""

    def __init__(self, seed: int, held_out: int = 40):
        config = AlmanacConfig(num_entities=120, num_first_names=16, num_last_names=16, seed=seed)
        names = World(config).names
        self.train_names, self.test_names = names[held_out:], names[:held_out]
        self.ids = {word: 3 + i for i, word in enumerate(two_hop.words(names))}
        self.vocab_size = -(-(3 + len(self.ids) + two_hop.PASSAGES) // 16) * 16

    def batches(self, names: list[str], seed: int, size: int) -> Iterator[Batch]:
        """Batches without end."""
        examples = two_hop.two_hop_examples(names, np.random.default_rng(seed))
        while True:
            yield self._batch([next(examples) for _ in range(size)])

    def _tokens(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def _reader_input(self, question: str, passage: dict) -> np.ndarray:
        parts = [self._tokens(text) for text in (question, passage["title"], passage["text"])]
        assert sum(map(len, parts)) + len(parts) <= READER, "the employer stands last, and would be cut"
        return evidence.assemble(*parts, READER)

    def _batch(self, examples: list[dict]) -> Batch:
        passages = np.array([[self._reader_input(e["question"], p) for p in e["passages"]] for e in examples], np.int32)
        targets = np.array([[*self._tokens(e["answers"][0]), decoding.EOS] for e in examples], np.int32)
        return Batch(
            passage_tokens=passages,
            passage_relevance=np.array([[p["relevance"] for p in e["passages"]] for e in examples], np.float32),
            decoder_input_tokens=np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
            decoder_target_tokens=targets,
            decoder_loss_weights=np.ones(targets.shape, np.float32),
        )


class Trainer:
    """Runs phases of one system; a program is compiled once."""

    def __init__(self, system: DRO, seed: int, verbose: bool):
        self.system, self.seed, self.verbose = system, seed, verbose
        self._step = functools.cache(self._compile)

    def _compile(self, name: str, trainable: tuple[str, ...]):
        loss = getattr(self.system, name)
        return make_train_step(loss, self._optimizer(name), trainable, seed=self.seed)

    def _optimizer(self, name: str):
        return next(phase for phase in self.system.phases if phase.loss.__name__ == name).make_optimizer()

    def run(self, phase: Phase, params, batches: Iterator[Batch], number: int = 0):
        """The parameters after a phase; those given are used up."""
        name = phase.loss.__name__
        trainable, _ = parameters.split(params, phase.trainable)
        zero = jnp.zeros((), jnp.int32)
        start = jnp.asarray(1_000_000 * number, jnp.int32)  # of the random numbers, other ones in each iteration
        state = TrainState(start, zero, zero + 0, params, self._optimizer(name).init(trainable))
        step, started, totals = self._step(name, phase.trainable), time.perf_counter(), {}
        for place in range(phase.steps):
            state, metrics = step(state, next(batches))
            for key, (total, count) in metrics.items():
                if key in ("loss", "selector_loss", "generator_loss", "effective_sample_size", "sequence_accuracy"):
                    totals.setdefault(key, []).append(total / count)
            if self.verbose and ((place + 1) % 100 == 0 or place + 1 == phase.steps):
                told = ", ".join(f"{key} {np.mean(values):.3f}" for key, values in totals.items())
                seconds = (time.perf_counter() - started) / (place + 1)
                print(f"  {phase.name} {place + 1}: {told} ({seconds:.2f} s/step)", file=sys.stderr, flush=True)
                totals = {}
        return state.params


def evaluation(system: DRO, retrieved: bool):
    """``(params, batch) -> (answer right [B], both passages chosen [B])``."""

    def measure(params, batch):
        if retrieved:
            choices = jnp.broadcast_to(jnp.arange(CHOSEN), (batch.size, 1, CHOSEN))
        else:
            choices = system.select(params, batch.passage_tokens)
        memory, _ = system.read_choices(params, batch.passage_tokens, choices)
        first, cache = system.begin(params, memory)

        def step(tokens, cache):
            return system.decode_step(params, memory, cache, tokens)

        answers, _ = decoding.greedy(step, cache, first, ANSWER, jnp.ones(batch.size, bool))
        found = jnp.take_along_axis(batch.passage_relevance, choices[:, 0], axis=1).sum(-1)
        return (answers == batch.decoder_target_tokens).all(-1), found == CHOSEN

    return jax.jit(measure)


def run_seed(options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """{arm: {exact_match, both_chosen}} of one seed."""
    data = Data(seed)
    model = TransformerConfig(
        vocab_size=data.vocab_size, embed_dim=64, num_heads=8, head_dim=8, mlp_dim=128, num_encoder_layers=2,
        num_decoder_layers=2, logits_via_embedding=True,
    )  # fmt: skip
    system = DRO(
        model, num_candidates=two_hop.PASSAGES, num_selected=CHOSEN, num_samples=options.samples,
        iterations=options.iterations, max_target_length=ANSWER, warm_generator_steps=options.warm_generator_steps,
        warm_selector_steps=options.warm_selector_steps, iteration_steps=options.steps,
        warm_optimizer=lambda: optimizer.adafactor(options.learning_rate),
        optimizer=lambda: optimizer.adafactor(options.learning_rate),
    )  # fmt: skip
    trainer = Trainer(system, seed, options.verbose)
    batches = data.batches(data.train_names, seed, options.batch)
    warm_generator, warm_selector, *em = system.phases
    warm = trainer.run(warm_generator, jax.jit(system.init)(jax.random.key(seed)), batches)
    warm = trainer.run(warm_selector, warm, batches)
    test = next(data.batches(data.test_names, 10_000 + seed, options.test))
    rows = {}
    for arm in options.arms:
        params = jax.tree.map(jnp.copy, warm)
        batches = data.batches(data.train_names, 1000 + seed, options.batch)
        if arm == TOP_K:
            steps = options.iterations * options.steps
            params = trainer.run(dataclasses.replace(warm_generator, name=arm, steps=steps), params, batches, 1)
        else:
            for number, phase in enumerate(em, 1):
                if phase.name.startswith("maximization"):
                    phase = dataclasses.replace(phase, name=f"{arm}, {phase.name}", trainable=ARMS[arm])
                params = trainer.run(phase, params, batches, number)
        right, found = jax.device_get(evaluation(system, arm == TOP_K)(params, test))
        rows[arm] = {"exact_match": float(right.mean()), "both_chosen": float(found.mean())}
        print(f"seed {seed} {arm}: {rows[arm]}", file=sys.stderr, flush=True)
    return rows


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t."""
    spread = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * spread / len(values) ** 0.5)


def disjoint(table: list[dict]) -> bool:
    """Whether DRO's interval of exact match lies above every other arm's; says which ones it meets."""
    bounds = {row["arm"]: (row["exact_match_mean"], row["exact_match_half_width"]) for row in table}
    lowest = bounds["DRO"][0] - bounds["DRO"][1] if "DRO" in bounds else float("nan")
    meets = [arm for arm, (mean, half) in bounds.items() if arm != "DRO" and not mean + half < lowest]
    told = f"and meets {', '.join(meets)}" if meets else "above all others"
    print(f"DRO's interval of exact match begins at {lowest:.3f}, {told}")
    return not meets


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4, help="m")
    parser.add_argument("--iterations", type=int, default=4, help="N")
    parser.add_argument("--steps", type=int, default=200, help="of an iteration")
    parser.add_argument("--warm_generator_steps", type=int, default=1000)
    parser.add_argument("--warm_selector_steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=0.02, help="relative to a parameter's size")
    parser.add_argument("--test", type=int, default=1000, help="questions")
    parser.add_argument("--verbose", action="store_true", help="losses to standard error")
    parser.add_argument("--json", help="also write all figures here")
    options = parser.parse_args()
    started = time.perf_counter()
    seeds = {seed: run_seed(options, seed) for seed in options.seeds}
    table = []
    for arm in options.arms:
        row = {"arm": arm}
        for metric in ("exact_match", "both_chosen"):
            row[metric] = [seeds[seed][arm][metric] for seed in options.seeds]
            row[f"{metric}_mean"], row[f"{metric}_half_width"] = interval(row[metric])
        table.append(row)
    print(f"{'':18} {'exact match':>18} {'both chosen':>18}")
    for row in table:
        cells = [f"{row[m + '_mean']:.3f} +- {row[m + '_half_width']:.3f}" for m in ("exact_match", "both_chosen")]
        print(f"{row['arm']:18} {cells[0]:>18} {cells[1]:>18}")
    apart = disjoint(table)
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "verbose")}
        facts = {"settings": settings, "rows": table, "seconds": round(time.perf_counter() - started)}
        with open(options.json, "w") as file:
            json.dump(facts | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}, file, indent=1)
    raise SystemExit(0 if apart else 1)


if __name__ == "__main__":
    main()
