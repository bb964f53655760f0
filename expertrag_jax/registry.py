"""Stable names for the classes that a checkpoint or an export may name: systems and their networks' configurations.

A class takes its name where it is defined::

    @registry.register("ClosedBook")
    @dataclasses.dataclass(frozen=True)
    class ClosedBook: ...

A file holds the name, never a path, so code may move, and reading a file imports nothing.
"""

from __future__ import annotations

from collections.abc import Callable

_CLASSES: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """A class decorator that gives the class its name; importing a module again replaces its classes.

    Raises:
      ValueError: another class has the name.
    """

    def decorate(cls: type) -> type:
        other = _CLASSES.setdefault(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"{name} is the name of {other.__module__}.{other.__qualname__}: choose another one")
        _CLASSES[name] = cls
        return cls

    return decorate


def class_named(name: str) -> type | None:
    """The class of that name among those that were imported; None if there is none."""
    return _CLASSES.get(name)


def name_of(cls: type) -> str:
    """The class's name; of one that has none its path, which ``class_named`` does not know."""
    return next((name for name, known in _CLASSES.items() if known is cls), f"{cls.__module__}:{cls.__qualname__}")
