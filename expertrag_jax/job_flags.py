"""The flags of one job: T5X's, those of the job module itself, and gin bindings made of them.

A job module may define::

    FLAGS = {
        "--documents": ("documents", "folder or file of text"),      # a keyword of the job's function
        "--model_dir": ("MODEL_DIR", "folder of the trained model"),  # a macro
        "--k": ("retriever.Retriever.k", "passages per question"),    # another gin parameter
        "question": ("question", "the question"),                     # without dashes: a positional
    }
    EXAMPLE = "expertrag index --documents docs --index_dir runs/index"

A flag is a gin binding in short: it is applied after the gin files and ``--gin.X=V``, so it wins, and it is
in ``config.gin`` like any other value. A keyword's text is read by its annotation in the function's
signature: ``str`` (and paths) as it stands, ``int``, ``float``, ``bool`` (``--flag``, ``--flag=false``), and
``list``, ``tuple`` or ``Sequence`` of those (the flag may be repeated). The text for a macro or another
parameter is read like that of ``--gin.X=V``.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

from expertrag_jax.errors import UserError
from expertrag_jax.macros import MACROS
from expertrag_jax.processes import HEARTBEAT_SECONDS
from expertrag_jax.ranges import hints_of

_WORD = re.compile(r"""[^\[\](){}'"@%#\\=\s][^\[\](){}'"@%#\\]*""")
_NOT_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}
_LISTS = (list, tuple, Sequence, Iterable)
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _comma_list(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


_REPEATABLE = {"action": "append", "default": []}
_COMMAS = {"type": _comma_list, "default": [], "metavar": "DIRS"}
_HEARTBEAT = {"type": int, "metavar": "S", "default": HEARTBEAT_SECONDS}
_SWITCH = {"action": argparse.BooleanOptionalAction, "default": False}
# group: (flag, help, argparse's keywords)
_SHARED: dict[str, list[tuple[str, str, dict[str, Any]]]] = {
    "gin": [
        ("--gin_file", "gin file, here or installed; repeatable", {"metavar": "FILE"} | _REPEATABLE),
        ("--gin.NAME", "value of a macro or parameter; repeatable", {"metavar": "VALUE", "dest": "unnamed"}),
        ("--gin_bindings", "any line of gin; repeatable", {"metavar": "LINE"} | _REPEATABLE),
        ("--gin_search_paths", "folders of gin files, with commas", _COMMAS),
    ],
    "data": [
        ("--tfds_data_dir", "folder of prepared TFDS data, in place of every task's own", {"metavar": "DIR"}),
        ("--seqio_additional_cache_dirs", "more SeqIO caches, with commas", _COMMAS),
    ],
    "several processes": [
        ("--coordinator_address", "process 0, where no launcher says it", {"metavar": "HOST:PORT"}),
        ("--process_count", "processes in all; 1: look for no others", {"type": int, "metavar": "N"}),
        ("--process_index", "this process, from 0", {"type": int, "metavar": "I"}),
        ("--heartbeat_seconds", "in which a death ends the others (default %(default)s)", _HEARTBEAT),
    ],
    "how to run": [
        ("--dry_run", "print the configuration, start nothing", _SWITCH),
        ("--debug", "show tracebacks", _SWITCH),
    ],
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> None:
        """Raises UserError in place of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help.")


def make_parser(prog: str, job: ModuleType, function: Callable[..., Any]) -> Parser:
    """The parser of a job's command line, with the job's docstring, macros and an example in its help."""
    parser = Parser(
        prog=prog,
        description=inspect.cleandoc(job.__doc__ or function.__doc__ or ""),
        epilog=_epilog(prog, job),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own = parser.add_argument_group("this job") if getattr(job, "FLAGS", None) else None
    for flag, (target, text) in getattr(job, "FLAGS", {}).items():
        kind = _kind(flag, _annotation(function, target))
        own.add_argument(flag, help=text.replace("%", "%%"), default=None, **kind)
    _add_shared(parser)
    return parser


def _add_shared(parser: Parser) -> None:
    for group, flags in _SHARED.items():
        add = parser.add_argument_group(group).add_argument
        for flag, text, options in flags:
            add(flag, help=text, **options)


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses ``argv``, with ``--gin.X=V`` turned into bindings first; UserError where it does not parse."""
    options = parser.parse_args([_rewrite(argument, parser) for argument in argv])
    if options.unnamed is not None:
        raise UserError("--gin.NAME stands for a macro's or parameter's name, as in --gin.TRAIN_STEPS=100.")
    return options


def bindings(job: ModuleType, selector: str, options: argparse.Namespace) -> list[str]:
    """Lines of gin for the job's own flags that were given.

    Args:
      job: the job module.
      selector: gin's name of the job's function.
      options: what `parse` returned.
    """
    lines = []
    for flag, (target, _) in getattr(job, "FLAGS", {}).items():
        value = getattr(options, flag.lstrip("-").replace("-", "_"))
        if value is None or (value == [] and not flag.startswith("-")):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} is {value}: it must be a finite number.")
        if _is_keyword(target):
            lines.append(f"{selector}.{target} = {value!r}")
        else:
            lines.append(f"{target} = {gin_value(flag, value)}")
    return lines


def flags_by_keyword(job: ModuleType) -> dict[str, str]:
    """Keyword of the job's function to the flag that sets it."""
    return {target: flag for flag, (target, _) in getattr(job, "FLAGS", {}).items() if _is_keyword(target)}


def gin_value(name: str, text: str) -> str:
    """``text`` as gin reads it: a literal, reference or macro as it stands, another word or path as a string.

    So ``--gin.MODEL_DIR=runs/x`` needs no second pair of quotes.

    Raises:
      UserError: for true, false, none and null, which are no words of gin.
    """
    try:
        ast.literal_eval(text)
        return text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text.lower() in _NOT_WORDS:
        meant = _NOT_WORDS[text.lower()]
        raise UserError(f"{name}={text}: write {meant}, or \"'{text}'\" for the word.")
    return repr(text) if _WORD.fullmatch(text) else text


def _rewrite(argument: str, parser: Parser) -> str:
    if argument.startswith("--gin."):
        name, equals, value = argument.removeprefix("--gin.").partition("=")
        if not equals:
            raise UserError(f"{argument} has no value: write --gin.{name}=VALUE.")
        return f"--gin_bindings={name} = {gin_value(argument.partition('=')[0], value)}"
    flag, equals, value = argument.partition("=")
    action = parser._option_string_actions.get(flag) if equals else None
    if isinstance(action, argparse.BooleanOptionalAction):
        if value.lower() not in _BOOLEANS:
            raise UserError(f"{flag} is true or false, not {value}.")
        return flag if _BOOLEANS[value.lower()] else f"--no-{flag.removeprefix('--')}"
    return argument


def _is_keyword(target: str) -> bool:
    return target.isidentifier() and not target.isupper()


def _annotation(function: Callable[..., Any], target: str) -> Any:
    if not _is_keyword(target):
        return str
    if target not in inspect.signature(function).parameters:
        raise TypeError(f"FLAGS of {function.__module__}: {function.__name__} has no parameter {target}")
    return hints_of(function).get(target, str)


def _kind(flag: str, annotation: Any) -> Mapping[str, Any]:
    """Argparse's keywords for a flag, by the annotation of the parameter that it sets."""
    several = any(isinstance(part, type) and part in _LISTS for part in _parts(annotation))
    plain = [kind for kind in (str, bool, int, float) if kind in _parts(annotation)]
    convert: Callable[[str], Any] = plain[0] if plain else str
    if not flag.startswith("-"):
        return {"nargs": "*" if several else "?", "type": convert}
    if convert is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": convert, "metavar": flag.lstrip("-").upper(), **({"action": "append"} if several else {})}


def _parts(annotation: Any) -> list[Any]:
    """The annotation and everything inside of it: a union's options, a list's elements."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        inside = inside[:1]
    own = typing.get_origin(annotation) or annotation
    return [own, *(part for argument in inside for part in _parts(argument))]


def _epilog(prog: str, job: ModuleType) -> str:
    known = getattr(job, "MACROS", tuple(MACROS))
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {MACROS.get(name, '')}" for name in known]
    example = getattr(job, "EXAMPLE", f"{prog} --gin_file=runs/almanac.gin --gin.MODEL_DIR=runs/almanac")
    title = "macros (--gin.NAME=VALUE), where the gin files have them:"
    return "\n".join([title, *lines, "", "example:", f"  {example}"])
