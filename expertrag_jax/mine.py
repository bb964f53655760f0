"""Mine hard negatives for training a retriever: passages that an index finds for a question and that do not answer it.

Writes the questions with the field hard_negative_passage_ids, which systems/dual_encoder.gin reads. Run on its own
output with another index (BM25 first, then the dense one) it adds to them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from expertrag_jax import launch
from expertrag_jax.encoders import load_encoder, open_retriever
from expertrag_jax.errors import UserError
from expertrag_jax.evaluation.answers import check_rule
from expertrag_jax.files.lock import one_writer
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.files.writing import check_output
from expertrag_jax.ranges import Count, checked
from expertrag_jax.retrieval.corpus import read_questions_jsonl, texts_of
from expertrag_jax.retrieval.hard_negatives import mine_hard_negatives, write_questions
from expertrag_jax.retrieval.metrics import gold_rows

FLAGS = {
    "--questions": ("questions", "JSON lines with question, answers and gold_passage_ids"),
    "--output": ("output", "file to write"),
    "--index_dir": ("index_dir", "index to search, of any kind"),
    "--retriever": ("retriever", "MODEL_DIR of the dual encoder, where the index searches by vectors"),
    "--num_negatives": ("num_negatives", "negatives per question"),
    "--candidates": ("candidates", "passages searched per question"),
    "--rule": ("rule", "how an answer is found in a passage: squad1 (its words), or regex"),
    "--overwrite": ("overwrite", "replace a file that is there"),
}
MACROS = ("INDEX_DIR",)
EXAMPLE = "expertrag mine --questions=train.jsonl --index_dir=runs/bm25 --output=train_with_negatives.jsonl"


@checked
@one_writer(lambda given: given["output"], "the output")
def mine(
    questions: LocalPath,
    output: LocalPath,
    index_dir: LocalPath,
    retriever: LocalPath | None = None,
    num_negatives: Count = 1,
    candidates: Count = 100,
    rule: str = "squad1",
    overwrite: bool = False,
) -> Path:
    """Mines negatives and writes them; see ``retrieval.hard_negatives.mine_hard_negatives``.

    Returns:
      The file.

    Raises:
      UserError: bad input, or a file that is there and no ``overwrite``.
    """
    place = Path(output)
    check_output(place, overwrite, inputs=[questions, index_dir, retriever])
    if candidates < num_negatives:
        raise UserError(f"--num_negatives={num_negatives} must be from 1 up to --candidates={candidates}.")
    asked = read_questions_jsonl(questions)
    check_rule(rule, (question.answers for question in asked))
    encoder = None if retriever is None else load_encoder(retriever)
    opened = open_retriever(index_dir, encoder)
    gold_rows(asked, opened.loaded.passages)  # refuses questions of another corpus
    tokens = encoder.tokenise(texts_of(asked)) if opened.loaded.index.needs_vectors else None
    rows = mine_hard_negatives(opened, asked, num_negatives, tokens, candidates, rule)
    names = [[opened.loaded.passages.ids[row] for row in found if row >= 0] for found in rows.tolist()]
    write_questions(place, asked, names)
    found = np.sum(rows >= 0) / len(asked)
    print(f"{found:.2f} hard negatives for each of {len(asked)} questions: {place}", flush=True)
    return place


if __name__ == "__main__":
    launch.run("expertrag_jax.mine")
