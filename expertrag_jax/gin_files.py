"""Gin's files and bindings: where they are found, how they are parsed, and what they bind.

Gin stays at the edge of this code: library modules have no decorators. A gin file begins with
``from __gin__ import dynamic_registration``, imports what it binds, and binds it, as in T5X.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gin
import gin.config

from expertrag_jax.errors import UserError
from expertrag_jax.gin_errors import Source, nearest

_PACKAGE = pathlib.Path(__file__).resolve().parent


def installed_folder(package: pathlib.Path = _PACKAGE) -> str | None:
    """The folder of expertrag_jax's own gin files: inside an installed package, beside it in a checkout."""
    for folder in (package / "gin", package.parent / "gin"):
        if any(folder.glob("*/*.gin")):
            return str(folder)
    return None


def search_paths(given: Iterable[str] = ()) -> list[str]:
    """Where a relative gin file is looked for: the given folders, the current one, the installed one."""
    return list(dict.fromkeys([*given, os.getcwd(), *filter(None, [installed_folder()])]))


def parse(files: Sequence[str], bindings: Sequence[str] = (), given_search_paths: Sequence[str] = ()) -> None:
    """Parses files, then bindings, each overriding what came before, and locks gin's configuration.

    Args:
      files: gin files, absolute or relative to `search_paths`.
      bindings: lines of gin (``NAME = value`` or ``module.function.parameter = value``).
      given_search_paths: folders to search before the current one.

    Raises:
      UserError: a file is missing, a line cannot be read, or a name is unknown; it names the file, the line
        and the nearest known name.
    """
    paths = search_paths(given_search_paths)
    gin.clear_config()
    # gin can only append to its search paths; a second parse in one process must not search the first's.
    gin.config._LOCATION_PREFIXES[:] = [*paths, ""]
    source = Source(paths, [_find(file, paths) for file in files], bindings)
    with source.explained():
        for file in source.files:
            gin.parse_config_file(file)
    source.refuse_unknown_macros()
    with source.explained():
        gin.parse_config(list(bindings))
        gin.finalize()


def register(function: Callable[..., Any]) -> str:
    """Makes ``function`` configurable under its import path, unless it is; returns that path."""
    selector = f"{function.__module__}.{function.__name__}"
    with contextlib.suppress(ValueError):
        gin.get_configurable(function)
        return selector
    with gin.unlock_config():  # a job before this one in the same process has locked it
        gin.register(function, module=function.__module__)
    return selector


def check_required(function: Callable[..., Any], flags: dict[str, str]) -> None:
    """Raises UserError when a parameter of ``function`` without a default has no binding.

    Args:
      function: a registered function.
      flags: parameter to the command-line flag that sets it, for the message.
    """
    bound = gin.get_bindings(function, resolve_references=False)
    missing = [
        flags.get(name, f"{function.__name__}.{name}")
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default in (parameter.empty, gin.REQUIRED)
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in bound
    ]
    if missing:
        names = ", ".join(missing)
        raise UserError(
            f"{function.__name__} has no value for {names}: give it as a flag or in a --gin_file."
        )


def describe(function: Callable[..., Any]) -> str:
    """What calling ``function`` would do, as a gin file: its parameters in comments, then what is bound."""
    bound = gin.get_bindings(function, resolve_references=False)
    lines = [f"# would run {function.__module__}.{function.__name__} with"]
    for name, parameter in inspect.signature(function).parameters.items():
        if name in bound:
            lines.append(f"#   {name} = {bound[name]!r}")
        elif parameter.default is not parameter.empty:
            lines.append(f"#   {name} = {parameter.default!r} (default)")
    return "\n".join([*lines, "", gin.config_str(max_line_length=110)])


def _find(file: str, paths: Sequence[str]) -> str:
    for path in paths:
        candidate = os.path.join(path, file)  # an absolute file stays as it is
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    # Only one level of folders is listed: the current folder may be a large tree.
    known = [
        str(found.relative_to(path))
        for path in map(pathlib.Path, paths)
        for found in [*path.glob("*.gin"), *path.glob("*/*.gin")]
    ]
    raise UserError(f"gin file {file} is not in {', '.join(paths)}{nearest(file, known) or '.'}")
