"""Whether what gin binds is in range: checked when the configuration is complete, before anything is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gin.config

from expertrag_jax import ranges
from expertrag_jax.errors import UserError

_OURS = ("expertrag_jax", "tasks")


def check_bindings(job: Callable[..., Any], flags: Mapping[str, str]) -> None:
    """Checks every value that is bound to a parameter of this package's functions and classes.

    Args:
      job: the function that the command runs.
      flags: its parameters to the flags that set them, for messages.

    Raises:
      UserError: names the macro (or the parameter), its value and its range; or a path that cannot be one.
    """
    for target, parameter, name, value in bound_values():
        hint = ranges.hints_of(target).get(parameter)
        if hint is None or value is None:  # None: not given, which the function itself may refuse
            continue
        wanted = ranges.problem(value, hint)
        if wanted is not None:
            owner = f"{target.__name__}.{parameter}"
            where = owner if name == owner else f"{name}, the {owner},"
            if name == owner and inspect.unwrap(target) is inspect.unwrap(job) and parameter in flags:
                where = flags[parameter]
            raise UserError(f"{where} is {ranges.shown(value)}: it must be {wanted}.")
        try:
            ranges.with_paths(value, hint)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None


def bound_values() -> Iterator[tuple[Any, str, str, Any]]:
    """(function or class, parameter, name of its macro or its own, value) of what is bound to plain values."""
    for (_, selector), parameters in gin.config._CONFIG.items():
        entry = gin.config._REGISTRY[selector] if selector in gin.config._REGISTRY else None
        target = None if entry is None else entry.wrapped
        if target is None or not target.__module__.startswith(_OURS):
            continue
        for parameter, bound in parameters.items():
            name, value = _value(bound, f"{target.__name__}.{parameter}")
            if _is_plain(value):
                yield target, parameter, name, value


def _value(bound: Any, name: str) -> tuple[str, Any]:
    """The value behind macros, and the name of the last one."""
    seen = set()
    while isinstance(bound, gin.config.ConfigurableReference) and bound.selector.endswith("macro"):
        macro = bound.scoped_selector.rpartition("/")[0]
        if macro in seen:
            break
        seen.add(macro)
        name, bound = macro, gin.config._CONFIG.get((macro, "gin.macro"), {}).get("value", bound)
    return name, bound


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers, words and collections alone: gin calls nothing to get it."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)
