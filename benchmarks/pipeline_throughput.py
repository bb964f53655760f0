"""Examples per CPU second of the data pipeline: first pass (TFDS, SeqIO, tokenisation) and every later one.

    python benchmarks/pipeline_throughput.py [--json PATH]

The almanac's closed-book and retriever tasks and its last reading lesson at demo size, batches of 256. CPU
seconds are those of the whole process, TensorFlow's threads included. About a CPU minute, of which a fifth
generates the world.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.vocabulary import train_vocabulary
from tasks.almanac import AlmanacConfig, World
from tasks.almanac_tasks import register_almanac

LENGTHS = {"inputs": 32, "targets": 8, "query": 32, "passages": 128}
BATCH = 256


def measure(task, materialise: bool, steps: int) -> dict:
    """Rates of the first pass (None when streaming) and of ``steps`` further batches."""
    pipeline = Pipeline(task, LENGTHS, BATCH, materialise=materialise, process_index=0, process_count=1)
    start = time.process_time()
    batches = pipeline(0)
    next(batches)
    first = time.process_time() - start
    start = time.process_time()
    for _ in range(steps):
        next(batches)
    seconds = time.process_time() - start
    return {
        "first_pass_per_cpu_second": pipeline.num_examples / first if materialise else None,
        "later_per_cpu_second": steps * BATCH / seconds,
    }


def main() -> None:
    """Parses flags, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    config = AlmanacConfig()
    with tempfile.TemporaryDirectory() as directory:
        texts = World(config).passages(0).texts
        vocabulary = train_vocabulary(texts, 2000, Path(directory) / "reader.model", byte_fallback=True)
        tasks = register_almanac(config, directory, Vocabularies(vocabulary))
        rows = []
        print(f"{'task':>18} {'mode':>12} {'first pass, ex/CPU s':>21} {'later, ex/CPU s':>16}")
        for kind in ("closed_book", f"open_book_{list(config.lessons)[-1]}", "retriever"):
            for materialise in (True, False):
                mode = "materialised" if materialise else "streamed"
                row = {"task": kind, "mode": mode} | measure(
                    tasks[kind], materialise, 1000 if materialise else 40
                )
                first = row["first_pass_per_cpu_second"]
                print(
                    f"{kind:>18} {mode:>12} {'-' if first is None else format(first, ',.0f'):>21} "
                    f"{row['later_per_cpu_second']:>16,.0f}"
                )
                rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"batch_size": BATCH, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
