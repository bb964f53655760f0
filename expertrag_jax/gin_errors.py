"""What gin raises, as one sentence: the file and line, what is wrong there, and the nearest known name."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import os
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin.config

from expertrag_jax.errors import UserError
from expertrag_jax.macros import MACROS

# What a gin file's text can make gin raise; anything else comes from the code that the file imports.
_PARSE_ERRORS = (
    NameError,
    AttributeError,
    ValueError,
    KeyError,
    SyntaxError,
    ImportError,
    OSError,
    TypeError,
    RuntimeError,
    tokenize.TokenError,
)
_LOCATION = re.compile(
    r'\n  In (?:file "(?P<file>.+?)",|bindings string) line (?P<line>\d+)\n    (?P<text>.*)'
)
_MACRO_BINDING = re.compile(r"^([A-Za-z_]\w*)\s*=(?!=)", re.MULTILINE)
_MACRO_USE = re.compile(r"%([A-Za-z_]\w*)(?![\w.])")
_COMMAND_LINE = "command line"
_MISSPELT = 0.85  # likeness of two names, from 0 to 1


def message(error: BaseException) -> str:
    """An error's text without what gin appends to it on the way up ("In call to configurable ...")."""
    return str(error).split("\n  In call to configurable")[0].split("\n  No values supplied by Gin")[0]


def unbound_parameters(error: BaseException) -> UserError | None:
    """The UserError for a configurable that was called without a value it needs; None for other errors."""
    text = message(error)
    if isinstance(error, RuntimeError) and text.startswith("Required bindings for"):
        return UserError(f"gin binds no value to {text.partition('config: ')[2]} of {_quoted(text)[0]}.")
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    # Raised by gin's own call, not inside the function: nobody gave the argument.
    callers = ("gin_wrapper", "meta_call_wrapper")
    if isinstance(error, TypeError) and trace is not None and trace.tb_frame.f_code.co_name in callers:
        missing = re.match(r"(.+?)(?:\.__init__)?\(\) missing \d+ required .+?: (.+)", text)
        if missing:
            return UserError(f"gin binds no value to {missing[2]} of {missing[1]}.")
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """The words "; did you mean 'x'?" for the known name nearest to ``name``; empty where none is near."""
    matches = difflib.get_close_matches(name, sorted(set(known)), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


@dataclasses.dataclass
class Source:
    """The gin text of one parse, in which errors are placed and names looked up.

    Attributes:
      paths: folders that an included file is looked for in.
      files: the gin files of the command line, in order, as absolute paths.
      bindings: the command line's own lines of gin.
    """

    paths: Sequence[str]
    files: Sequence[str]
    bindings: Sequence[str]

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what gin raises into a UserError of one sentence."""
        try:
            yield
        except UserError:
            raise
        except _PARSE_ERRORS as error:
            raise UserError(self.explain(error)) from error

    def refuse_unknown_macros(self) -> None:
        """Raises UserError for a macro that the command line sets and nothing uses: gin would ignore it."""
        bindings = "\n".join(self.bindings)
        known = self.macros(in_bindings=False)
        for name in _MACRO_BINDING.findall(bindings):
            if name not in known and name not in _MACRO_USE.findall(bindings):
                files = ", ".join(map(os.path.relpath, self.files)) or "no --gin_file is given"
                near = nearest(name, known) or "."
                raise UserError(f"no gin file binds or uses the macro {name} ({files}){near}")
        self._refuse_misspelt_macros()

    def _refuse_misspelt_macros(self) -> None:
        """UserError for a macro in a file that nothing uses, and whose name is nearly that of one that is used."""
        lines = list(self.lines())
        text = "\n".join(line for _, line in lines)
        used = set(_MACRO_USE.findall(text))
        set_elsewhere = used & set(_MACRO_BINDING.findall(text))  # of others gin says that they lack a value
        for place, line in lines:
            bound = _MACRO_BINDING.match(line)
            if bound is None or bound[1] in used or bound[1] in MACROS:
                continue
            near = difflib.get_close_matches(bound[1], sorted(set_elsewhere), n=1, cutoff=_MISSPELT)
            if near and not _is_variant(bound[1], near[0]):
                raise UserError(f"{place}: nothing uses the macro {bound[1]}; did you mean '{near[0]}'?")

    def explain(self, error: BaseException) -> str:
        """One sentence: where, what, and the nearest known name."""
        if isinstance(error, tokenize.TokenError):
            return f"{self._unclosed()}: gin reached the end inside a bracket or string that is not closed."
        if isinstance(error, SyntaxError):
            reason = " ".join((error.msg or "").split()).rstrip(".")
            place = _place(error.filename, error.lineno)
            return f"{place}: gin cannot read `{(error.text or '').strip()}`: {reason}."
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        location = _LOCATION.search(text)
        if location is None:
            return f"gin: {self._explain_name(text)}"
        place, line = _place(location["file"], location["line"]), location["text"].strip()
        text = text[: location.start()]
        if line.startswith("include"):
            return f"{place}: `{line}`: no such gin file in {', '.join(self.paths)}."
        if isinstance(error, ImportError):
            return f"{place}: `{line}` fails: {text}."
        return f"{place}: {self._explain_name(text)}"

    def macros(self, in_bindings: bool) -> set[str]:
        """Names bound or used as macros, in the files alone or in the bindings too."""
        text = "\n".join(line for place, line in self.lines() if in_bindings or place != _COMMAND_LINE)
        return {*_MACRO_BINDING.findall(text), *_MACRO_USE.findall(text)}

    def lines(self) -> Iterator[tuple[str, str]]:
        """Every line as (place, text without its comment), an included file's where it is included."""
        seen: set[str] = set()

        def read(file: str) -> Iterator[tuple[str, str]]:
            seen.add(file)
            for number, line in enumerate(_read(file).splitlines(), 1):
                yield _place(file, number), re.sub(r"(^|\s)#.*", "", line)
                included = re.match(r"""include\s+['"](.+?)['"]""", line)
                candidates = [os.path.join(path, included[1]) for path in self.paths] if included else []
                found = next(filter(os.path.isfile, candidates), None)
                if found and found not in seen:
                    yield from read(found)

        for file in self.files:
            yield from read(file)
        for line in self.bindings:
            yield _COMMAND_LINE, line

    def _where(self, pattern: str) -> str:
        return next((f" ({place})" for place, line in self.lines() if re.search(pattern, line)), "")

    def _unclosed(self) -> str:
        files = dict.fromkeys(place.rpartition(":")[0] for place, _ in self.lines() if place != _COMMAND_LINE)
        return next((file for file in files if not _tokenizes(_read(file))), _COMMAND_LINE)

    def _explain_name(self, text: str) -> str:
        """What is wrong with a name, from gin's own words for it."""
        if "was not provided by an import" in text:
            name = _quoted(text)[0]
            lines = "\n".join(line for _, line in self.lines())
            imported = re.findall(r"^(?:from .+ |)import (?:.+ as )?(\w+)", lines, re.MULTILINE)
            return f"this gin file does not import '{name}'{nearest(name, imported) or ': add the import.'}"
        if "Couldn't resolve selector" in text:
            return _explain_attribute(text)
        if "doesn't have a parameter named" in text:
            return _explain_parameter(*_quoted(text.replace("doesn't", "has not"))[:2])
        if "No configurable matching" in text:
            name = _quoted(text)[0].lstrip("@").removesuffix("()")
            near = nearest(name, _known_selectors()) or ": a gin file must import it first."
            return f"gin knows no function or class '{name}'{near}"
        if "set to `%gin.REQUIRED`" in text:
            name = re.sub(r"/(gin\.)?macro\.value$", "", text.split(" set to")[0].strip())
            where = self._where(r"(^|[\s.])" + re.escape(name) + r"\s*=")
            return f"{name} must be set{where}: add --gin.{name}=VALUE."
        if "No bindings specified for" in text:
            name = _quoted(text)[0].removesuffix("/gin.macro")
            near = nearest(name, self.macros(in_bindings=True) - {name}) or "."
            where = self._where("%" + re.escape(name) + r"\b")
            return f"the macro %{name} is used{where} but never set: add --gin.{name}=VALUE{near}"
        return " ".join(text.split())


def _explain_attribute(text: str) -> str:
    attribute = text.rstrip(".").rpartition(" ")[2]
    module = re.search(r"<module '([\w.]+)'", text)
    owner = module[1] if module else text.partition("; ")[2].partition(" has no")[0]
    known = vars(sys.modules[owner]) if owner in sys.modules else ()
    return f"{owner} has nothing called '{attribute}'{nearest(attribute, known) or '.'}"


def _explain_parameter(selector: str, parameter: str) -> str:
    owners = [found for full, found in _registry().items() if f".{full}".endswith(f".{selector}")]
    known = list(inspect.signature(owners[0]).parameters) if len(owners) == 1 else []
    listed = f" (it has {', '.join(known)})" if known else ""
    return f"{selector} has no parameter '{parameter}'{listed}{nearest(parameter, known) or '.'}"


def _registry() -> dict[str, Callable[..., Any]]:
    """Every registered path with its function or class; gin has no public list of them."""
    found = {full: entry.wrapped for full, entry in gin.config._REGISTRY.items()}
    return {full: wrapped for full, wrapped in found.items() if not full.startswith("gin.")}


def _known_selectors() -> list[str]:
    """Every registered path, and the last two parts of each, which suffice on the command line."""
    return [*_registry(), *(".".join(full.split(".")[-2:]) for full in _registry())]


def _is_variant(name: str, other: str) -> bool:
    """Whether one name is the other with whole words before or after it, as EVAL_QUESTIONS and QUESTIONS."""
    return f"_{other}_" in f"_{name}_" or f"_{name}_" in f"_{other}_"


def _quoted(text: str) -> list[str]:
    return re.findall(r"[`'](.+?)[`']", text)


def _place(file: str | None, line: int | str | None) -> str:
    return f"{os.path.relpath(file)}:{line}" if file else _COMMAND_LINE


def _read(file: str) -> str:
    return pathlib.Path(file).read_text(errors="replace")


def _tokenizes(text: str) -> bool:
    lines = iter(text.splitlines(keepends=True))
    try:
        for _ in tokenize.generate_tokens(lambda: next(lines, "")):
            pass
    except (tokenize.TokenError, SyntaxError):
        return False
    return True
