"""The ``expertrag`` command: ``expertrag <command> --gin_file=... --gin.X=V``.

Each command is a job module of its own, loaded when it is called; ``expertrag <command> --help`` shows its
flags.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from expertrag_jax import __version__, launch, processes
from expertrag_jax.gin_errors import nearest

# command: (its job, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "index": ("expertrag_jax.index:build_index", "build a passage index from a corpus or from documents"),
    "mine": ("expertrag_jax.mine", "find hard negatives for a retriever's training"),
    "train": ("expertrag_jax.train", "train a system: retriever, generator or gate"),
    "evaluate": ("expertrag_jax.evaluate", "score a trained system and its gate"),
    "infer": ("expertrag_jax.infer", "answer, or score answers to, a file of questions"),
    "answer": ("expertrag_jax.answer", "answer one question and show the gate's decision and the passages"),
    "calibrate": ("expertrag_jax.calibrate", "calibrate the gate and choose its threshold"),
    "export": ("expertrag_jax.export", "write a trained system for serving"),
    "demo": ("expertrag_jax.demo", "the almanac, from nothing to a report"),
}


def available() -> dict[str, tuple[str, str]]:
    """The commands whose job module is installed."""
    return {
        name: command
        for name, command in COMMANDS.items()
        if importlib.util.find_spec(command[0].partition(":")[0]) is not None
    }


def usage() -> str:
    """The list of commands, one line each."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in available().items()]
    return "\n".join([
        "usage: expertrag <command> [--gin_file=FILE ...] [--gin.NAME=VALUE ...]",
        "",
        "Sharded training of retrieval-augmented mixture-of-experts models in JAX.",
        "",
        "commands:",
        *lines,
        "",
        "`expertrag <command> --help` shows a command's flags, macros and an example.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code (see `launch`)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"expertrag_jax {__version__}")
        return 0
    commands = available()
    if command not in commands:
        near = nearest(command, commands) or f": choose one of {', '.join(commands)}."
        print(f"error: expertrag has no command '{command}'{near}", file=sys.stderr)
        return launch.USER_ERROR
    began = processes.start_time() if argv is None else None
    return launch.execute(commands[command][0], arguments[1:], f"expertrag {command}", began)


if __name__ == "__main__":
    sys.exit(main())
