"""A made-up evaluation for the report's tests: a gate that mostly knows, and relations that went stale."""

from __future__ import annotations

import numpy as np

from expertrag_jax.evaluation import cost, report

STRATA = ("head", "torso", "tail", "never", "volatile")
_KNOWN = (0.98, 0.8, 0.45, 0.02, 0.5)


def edition(seed: int = 0, questions: int = 800, volatile_known: float = 0.5) -> report.EditionResult:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 5, questions)
    known = np.array([*_KNOWN[:4], volatile_known])[kind]
    never, always = rng.random(questions) < known, rng.random(questions) < 0.94
    p_ret = np.clip(1 - known + rng.normal(0, 0.12, questions), 0.01, 0.99)
    needed = (~never & always).astype(float)
    p_ret = np.clip(0.6 * p_ret + 0.4 * needed * rng.random(questions), 0, 1)
    gate, chance = p_ret >= 0.35, rng.random(questions) < (p_ret >= 0.35).mean()
    decisions = {
        "never": np.zeros(questions, bool),
        "always": np.ones(questions, bool),
        "random": chance,
        "gate": gate,
        "oracle": needed > 0,
    }
    seconds = {"never": [2.0, 2.1, 1.9, 2.0, 2.2], "always": [7.9, 8.1, 8.0, 9.0, 8.0]}
    seconds["gate"] = [2.1 + 6 * gate.mean() + noise for noise in (0.1, 0.2, 0.0, 0.3, 0.1)]
    policies = {
        name: report.PolicyResult(
            correct=np.where(retrieve, always, never),
            retrieve=retrieve,
            encoder_tokens=12 + 310 * retrieve.mean(),
            padded_encoder_tokens=16 + 384 * min(1, retrieve.mean() * 1.08),
            questions_per_second=questions / (2 + 6 * retrieve.mean()) * 0.9,
            p50_ms=6 + 16 * (retrieve.mean() > 0.5),
            p95_ms=8 + 18 * (retrieve.mean() > 0.05),
        )
        for name, retrieve in decisions.items()
    }
    return report.EditionResult(
        policies=policies,
        p_ret=p_ret.astype(np.float32),
        facts=rng.integers(0, int(questions * 0.9), questions),
        strata=np.array(STRATA)[kind],
        weights=1 / (1 + rng.permutation(questions)),
        static=kind != 4,
        threshold=0.35,
        num_passages=4,
        retriever_recall=0.972,
        speed_up=cost.summarise_speed_up(seconds, gate.mean()),
        description="Half of the facts of one relation changed after the generator was trained.",
    )


def built(**options) -> dict:
    rng = np.random.default_rng(1)
    steps = np.arange(0, 600, 4)
    load = {f"{s} layer {i}": rng.dirichlet(np.full(8, 30)) for s in ("encoder", "decoder") for i in (1, 3)}
    defaults = {
        "title": "The almanac: a made-up example",
        "seed": 17,
        "stages": {
            "world and vocabulary": 12.3,
            "retriever": 58.0,
            "index": 9.1,
            "generator": 231.0,
            "gate": 28.4,
        },
        "losses": {
            "retriever": [(s, 3 * np.exp(-s / 90) + 0.2 + 0.1 * rng.random()) for s in steps],
            "generator": [(s, 5 * np.exp(-s / 200) + 0.4 + 0.3 * rng.random()) for s in steps],
        },
        "expert_load": load,
        "settings": {"entities": 2000, "command": "expertrag demo --gin.SIZE=2000"},
        "notes": ["Timings are medians of 5 interleaved runs.", "<script>alert('not run')</script>"],
        "replicates": 200,
    }
    editions = {"1": edition(0), "2": edition(1, volatile_known=0.3)}
    return report.build_report(editions, 571.4, **{**defaults, **options})
