"""What skipping retrieval saves: encoder tokens of packed batches at three retrieval rates, on real text.

    EXPERTRAG_DATA=... python benchmarks/packed_tokens.py [--json PATH]

Questions of SQuAD's new-Wikipedia dev set, a BM25 index of the 66 thousand Wikipedia passages, a vocabulary
trained on a sample of these. In decided mode the evidence of a question joins its input, so a question that
skips retrieval is a fraction as long, and packing turns that into fewer rows. Without packing every question
costs a full row whatever the policy decides. A row also ends when its targets are full: short ones want a
generous target length, or decoders bind before encoders do. About 20 CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from expertrag_jax.data.pipeline import Pipeline
from expertrag_jax.data.vocabularies import Vocabularies
from expertrag_jax.errors import UserError
from expertrag_jax.gate.policy import Random
from expertrag_jax.retrieval.corpus import read_passages_tsv
from expertrag_jax.retrieval.index import make_index, open_index, write_index
from expertrag_jax.retrieval.retriever import Retriever, tokenize_passages
from expertrag_jax.vocabulary import train_vocabulary
from tasks.questions import register_questions

RATES = (0.0, 0.5, 1.0)


def build_retriever(
    passages_path: Path, directory: Path, options: argparse.Namespace
) -> tuple[Retriever, str]:
    """A BM25 retriever over the passages, and the path of a vocabulary trained on a sample of them."""
    passages = read_passages_tsv(passages_path)
    sample = random.Random(0).sample(passages.texts, min(options.vocabulary_sample, len(passages)))
    vocabulary = train_vocabulary(
        sample, options.vocabulary_size, directory / "reader.model", byte_fallback=True
    )
    write_index(
        directory / "index",
        make_index("bm25").build(passages, None),
        passages,
        passage_tokens=tokenize_passages(passages, vocabulary.encode, options.passage_length),
        vocabulary_digests={"reader": vocabulary.digest},
    )
    return Retriever(open_index(directory / "index", verify=False)), vocabulary.path


def measure(
    rate: float, questions: Path, retriever: Retriever, vocabulary: str, options: argparse.Namespace
) -> dict:
    """Tokens of one pass over the questions when a random policy retrieves at ``rate``."""
    task = register_questions(
        f"packed_tokens_{int(rate * 100)}",
        questions,
        Vocabularies(vocabulary),
        mode="decided",
        retriever=retriever,
        num_passages=options.num_passages,
        policy=Random(rate),
    )
    lengths = {"inputs": options.length, "targets": options.target_length}
    one_pass = {"batch_size": 1, "repeat": False, "process_index": 0, "process_count": 1}
    start = time.perf_counter()
    padded = list(Pipeline(task, lengths, **one_pass)(0))
    seconds = time.perf_counter() - start
    packed = list(Pipeline(task, lengths, pack=True, **one_pass)(0))
    count = len(padded)
    real = sum(int((batch.encoder_input_tokens != 0).sum()) for batch in padded)
    kept = sum(int((batch.encoder_input_tokens != 0).sum()) for batch in packed)
    if kept != real:
        raise RuntimeError(f"packing changed the number of tokens: {real} before, {kept} after")
    return {
        "rate": rate,
        "retrieved": sum(int(batch.retrieve[0]) for batch in padded) / count,
        "questions": count,
        "real_tokens_per_question": real / count,
        "packed_rows": len(packed),
        "packed_tokens_per_question": len(packed) * options.length / count,
        "padded_tokens_per_question": options.length,
        "density": kept / (len(packed) * options.length),
        "seconds_first_pass": seconds,
    }


def table(rows: list[dict]) -> str:
    """The rows as text; savings are relative to the last one, which always retrieves."""
    always = rows[-1]["packed_tokens_per_question"]
    lines = [
        f"{'policy rate':>11} {'retrieved':>9} {'real tokens/q':>13} {'packed rows':>11} "
        f"{'packed tokens/q':>15} {'padded tokens/q':>15} {'density':>7} {'saved':>6}"
    ]
    for row in rows:
        lines.append(
            f"{row['rate']:>11.2f} {row['retrieved']:>9.3f} {row['real_tokens_per_question']:>13.1f} "
            f"{row['packed_rows']:>11d} {row['packed_tokens_per_question']:>15.1f} "
            f"{row['padded_tokens_per_question']:>15d} {row['density']:>7.3f} "
            f"{1 - row['packed_tokens_per_question'] / always:>6.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses flags, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--target_length", type=int, default=512, help="target tokens of a row")
    parser.add_argument("--num_passages", type=int, default=2)
    parser.add_argument("--passage_length", type=int, default=256)
    parser.add_argument("--vocabulary_size", type=int, default=8000)
    parser.add_argument("--vocabulary_sample", type=int, default=8000, help="passages to train it on")
    options = parser.parse_args()
    data = os.environ.get("EXPERTRAG_DATA")
    if not data:
        raise UserError("EXPERTRAG_DATA is not set: name the folder with wiki/passages.tsv.gz and qa/")
    with tempfile.TemporaryDirectory() as directory:
        retriever, vocabulary = build_retriever(Path(data) / "wiki/passages.tsv.gz", Path(directory), options)
        questions = Path(data) / "qa/squad_new_wiki_dev.jsonl.gz"
        rows = [measure(rate, questions, retriever, vocabulary, options) for rate in RATES]
    print(table(rows))
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
