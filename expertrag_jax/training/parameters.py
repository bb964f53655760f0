"""Parameters by path: the flat view of a nested tree, and its split into trainable and frozen parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax import traverse_util

from expertrag_jax.errors import UserError

Flat = dict[str, Any]


def flatten(params: Mapping[str, Any]) -> Flat:
    """Nested dict -> {"a/b/c": leaf}, sorted by path."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def unflatten(flat: Flat) -> dict[str, Any]:
    """The inverse of ``flatten``."""
    return traverse_util.unflatten_dict(flat, sep="/")


def trainable_names(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[str, ...]:
    """Paths that one of the patterns matches as a whole, sorted.

    Raises:
      UserError: a pattern that is no regular expression, or that matches no parameter.
    """
    names = list(flatten(params))
    chosen = set()
    for pattern in patterns:
        try:
            matching = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"Trainable pattern '{pattern}' is not a regular expression: {error}.") from error
        if not matching:
            raise UserError(
                f"Trainable pattern '{pattern}' matches no parameter; paths look like {', '.join(names[:3])}."
            )
        chosen.update(matching)
    return tuple(sorted(chosen))


def split(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[Flat, Flat]:
    """(trainable, frozen) parts as flat dicts; see ``trainable_names`` for the errors."""
    flat = flatten(params)
    chosen = set(trainable_names(params, patterns))
    trainable = {name: value for name, value in flat.items() if name in chosen}
    return trainable, {name: value for name, value in flat.items() if name not in chosen}


def join(trainable: Flat, frozen: Flat) -> dict[str, Any]:
    """The nested tree of both parts."""
    return unflatten(trainable | frozen)
