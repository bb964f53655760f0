"""Answer questions on the terminal, and show the gate's decision and the passages behind each answer."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expertrag_jax import launch
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.infer import open_service
from expertrag_jax.ranges import checked
from expertrag_jax.retrieval.corpus import Question
from expertrag_jax.service import Service
from expertrag_jax.terminal import visible

FLAGS = {
    "question": ("question", "what to ask, each question in quotes"),
    "--export_dir": ("export_dir", "folder that `expertrag export` wrote, or"),
    "--model_dir": ("model_dir", "folder of the trained model"),
    "--index_dir": ("index_dir", "index to search, in place of the model's own"),
    "--retrieve": ("retrieve", "gate, always or never"),
}
MACROS = ()
EXAMPLE = 'expertrag answer --export_dir=runs/almanac/export "Where does Bela Korvath live?"'


@checked
def answer(
    question: Sequence[str] = (),
    export_dir: LocalPath | None = None,
    model_dir: LocalPath | None = None,
    index_dir: LocalPath | None = None,
    retrieve: str = "gate",
) -> list[dict[str, Any]]:
    """Prints answer, decision and passages of each question.

    Args:
      question: texts.
      export_dir or model_dir: one of them.
      index_dir: of the same encoder and vocabularies, such as a newer edition; None means the model's own.
      retrieve: ``gate``, ``always`` or ``never``.

    Returns:
      The records, see ``service.Service.predict``.

    Raises:
      UserError: no question, one that is too long, or files that are missing or do not belong together.
    """
    if not question:
        raise UserError('there is no question: write it in quotes, as in expertrag answer "who wrote it?".')
    service = open_service(model_dir, export_dir, index_dir=index_dir, retrieve=retrieve)
    records = service.predict([Question(str(place), text) for place, text in enumerate(question)])
    threshold = service.settings.threshold
    console = Console(highlight=False)
    for record in records:
        show(record, retrieve, threshold, console, texts_of_passages(service, record))
    return records


def texts_of_passages(service: Service, record: dict[str, Any]) -> list[str]:
    """The texts of a record's passages."""
    if not record["passages"]:
        return []
    corpus = service.answerer.retriever.loaded.passages
    row_of = corpus.row_of()
    return [corpus.texts[row_of[passage["id"]]] for passage in record["passages"]]


def show(record: dict[str, Any], retrieve: str, threshold: float, console: Console, texts: Sequence[str]) -> None:
    """Prints one record; ``texts`` are its passages', of which the beginnings are shown."""
    console.print(Text(visible(record["question"])), style="bold")
    console.print(Text(f"  answer    {visible(record['prediction']) or '(none)'}"))
    console.print(f"  log p     {record['score']:.3f} nats")
    done = "retrieved" if record["retrieve"] else "not retrieved"
    why = f"threshold {threshold:.3f}" if retrieve == "gate" else f"--retrieve={retrieve}"
    console.print(f"  p_ret     {record['p_ret']:.3f}, {done} ({why})")
    if record["passages"]:
        console.print(_passages(record["passages"], texts))
    console.print()


def _passages(passages: Sequence[dict[str, Any]], texts: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    table.add_column("id", overflow="fold")
    table.add_column("title")
    table.add_column("text", max_width=60)
    for rank, (passage, text) in enumerate(zip(passages, texts), 1):
        words = passage["id"], passage["title"], shorten(text, 160, placeholder=" ...")
        table.add_row(str(rank), f"{passage['score']:.4f}", *(Text(visible(part)) for part in words))
    return table


if __name__ == "__main__":
    launch.run("expertrag_jax.answer")
