"""What values a parameter may have: stated once, in its annotation, and checked wherever the value comes from.

A function or dataclass that gin can bind is decorated::

    @checked
    def train(batch_size: Count, dropout_rate: Rate = 0.0, index_dir: LocalPath | None = None): ...

>>> @checked
... def half(steps: Count) -> float:
...     return steps / 2
>>> half(0)
Traceback (most recent call last):
expertrag_jax.errors.UserError: half.steps is 0: it must be a whole number from 1 to 2147483647.

The ranges are those of ``annotated_types``. What is called with a value outside of them raises UserError; the command
line checks all that gin binds before anything is read (``gin_ranges``).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

from annotated_types import Ge, Gt, Le, Lt

from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import IsPath, local

Count = Annotated[int, Ge(1), Le(2**31 - 1)]
"""A whole number from 1 on, that a device can count to."""
Natural = Annotated[int, Ge(0), Le(2**31 - 1)]
"""A whole number from 0 on, that a device can count to."""
Length = Annotated[int, Ge(1), Le(2**20)]
"""Tokens of a text."""
Layers = Annotated[int, Ge(0), Le(1000)]
"""Layers of a tower. To trace more of them would take hours."""
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""A whole number that seeds every generator in use."""
Fraction = Annotated[float, Ge(0), Le(1)]
"""From 0 to 1, both included."""
Rate = Annotated[float, Ge(0), Lt(1)]
"""From 0 to 1, without 1: a dropout rate, a smoothing."""
Share = Annotated[float, Gt(0), Le(1)]
"""Above 0 and up to 1."""
Positive = Annotated[float, Gt(0)]
"""A finite number above 0."""
Weight = Annotated[float, Ge(0)]
"""A finite number from 0 on."""
Number = Annotated[float, Gt(-math.inf)]
"""Any finite number."""

_T = TypeVar("_T", bound=Callable[..., Any])


def checked(target: _T) -> _T:
    """Decorates a function, or a class for its ``__init__``: arguments outside their ranges raise UserError.

    Arguments whose annotation is ``LocalPath`` arrive as absolute paths, strings (``files.paths.local``).
    """
    name = target.__name__
    function = target.__init__ if inspect.isclass(target) else target
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # which says what is missing
        hints = hints_of(target)
        for parameter, value in bound.arguments.items():
            if parameter in hints:
                check(f"{name}.{parameter}", value, hints[parameter])
                bound.arguments[parameter] = with_paths(value, hints[parameter])
        return function(*bound.args, **bound.kwargs)

    wrapped.__signature__ = signature  # gin does not look behind wrappers
    if inspect.isclass(target):
        target.__init__ = wrapped
        return target
    return wrapped


@functools.cache
def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Annotations of a function's parameters or a class's fields, with their ranges."""
    target = inspect.unwrap(target)
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        target = inspect.unwrap(target.__init__)
    hints = typing.get_type_hints(target, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return"}


def check(name: str, value: Any, hint: Any) -> None:
    """Raises UserError where a value is not of its annotation."""
    wanted = problem(value, hint)
    if wanted is not None:
        raise UserError(f"{name} is {shown(value)}: it must be {wanted}.")


def shown(value: Any) -> str:
    """A value in a message, at most 60 characters of it."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def problem(value: Any, hint: Any) -> str | None:
    """What the value must be, in words; None if it is, or if the annotation says nothing that can be checked."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        base, *marks = typing.get_args(hint)
        limits = [mark for mark in marks if isinstance(mark, Ge | Gt | Le | Lt)]
        unfit = problem(value, base)
        if not limits:
            return "a path" if unfit and any(isinstance(mark, IsPath) for mark in marks) else unfit
        fits = unfit is None and all(_within(value, limit) for limit in limits)
        return None if fits and (base is int or math.isfinite(value)) else _range(base, limits)
    if origin in (Union, types.UnionType):
        problems = [problem(value, option) for option in typing.get_args(hint)]
        return None if None in problems else " or ".join(dict.fromkeys(problems))
    if origin is Literal:
        options = typing.get_args(hint)
        return None if any(value == option for option in options) else " or ".join(map(repr, options))
    if origin in (tuple, list, collections.abc.Sequence, collections.abc.Iterable):
        return _problem_of_list(value, typing.get_args(hint))
    if origin in (dict, Mapping, collections.abc.Mapping):
        return _problem_of_map(value, typing.get_args(hint))
    return _problem_of_plain(value, hint)


def with_paths(value: Any, hint: Any) -> Any:
    """The value with every string that is annotated as a path made absolute."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and any(isinstance(mark, IsPath) for mark in arguments[1:]):
        return str(local(value))
    if origin in (Union, types.UnionType) and value is not None:
        fitting = [option for option in arguments if problem(value, option) is None]
        return with_paths(value, fitting[0]) if fitting else value
    if origin in (list, collections.abc.Sequence) and arguments:
        return [with_paths(item, arguments[0]) for item in value]
    if origin in (dict, Mapping, collections.abc.Mapping) and arguments:
        return {key: with_paths(item, arguments[1]) for key, item in value.items()}
    return value


def _problem_of_plain(value: Any, hint: Any) -> str | None:
    if hint is None or hint is type(None):
        return None if value is None else "None"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint is int:
        return None if isinstance(value, numbers.Integral) and not isinstance(value, bool) else "a whole number"
    if hint is float:
        return None if isinstance(value, numbers.Real) and not isinstance(value, bool) else "a number"
    if hint is str:
        return None if isinstance(value, str) else "a word"
    if hint is dict:
        return None if isinstance(value, dict) else "a map, as {'a': 1}"
    if hint is os.PathLike:
        return None if isinstance(value, os.PathLike) else "a path"
    return None


def _problem_of_list(value: Any, arguments: tuple) -> str | None:
    if isinstance(value, str | bytes) or not isinstance(value, collections.abc.Iterable):
        return "a list"
    if not isinstance(value, collections.abc.Sequence):
        return None
    options = [argument for argument in arguments if argument is not Ellipsis]
    if len(options) > 1 and len(options) != len(value):
        return f"a list of {len(options)}"
    hints = options if len(options) > 1 else (options or [Any]) * len(value)
    problems = [problem(item, hint) for item, hint in zip(value, hints)]
    return next((f"a list in which each is {wanted}" for wanted in problems if wanted), None)


def _problem_of_map(value: Any, arguments: tuple) -> str | None:
    if not isinstance(value, collections.abc.Mapping):
        return "a map, as {'a': 1}"
    if len(arguments) < 2:
        return None
    problems = [problem(item, arguments[1]) for item in value.values()]
    return next((f"a map in which each value is {wanted}" for wanted in problems if wanted), None)


def _within(value: float, limit: Ge | Gt | Le | Lt) -> bool:
    if isinstance(limit, Ge):
        return value >= limit.ge
    if isinstance(limit, Gt):
        return value > limit.gt
    return value <= limit.le if isinstance(limit, Le) else value < limit.lt


def _range(base: Any, limits: list) -> str:
    kind = "a whole number" if base is int else "a number"
    words = []
    for limit in limits:
        if isinstance(limit, Ge):
            words.append(f"from {limit.ge}")
        elif isinstance(limit, Gt) and limit.gt > -math.inf:
            words.append(f"above {limit.gt}")
        elif isinstance(limit, Le):
            words.append(f"to {limit.le}")
        elif isinstance(limit, Lt):
            words.append(f"below {limit.lt}")
    if len(words) == 1 and words[0].startswith("from"):
        words.append("on")
    return " ".join([kind if words else f"{kind} that is finite", *words])
