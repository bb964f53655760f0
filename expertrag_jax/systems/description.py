"""A system's configuration as JSON, so that a checkpoint says what it is a checkpoint of.

A system is a frozen dataclass of numbers, words and further dataclasses. Optimizers and other functions are
left out: whoever reads a checkpoint to answer, to export or to embed passages needs none. Classes go by their names in
the ``registry``. Earlier releases wrote ``module:Name``: the name is read, and the module is not imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from expertrag_jax import registry
from expertrag_jax.errors import UserError

_CLASS, _FIELDS = "class", "fields"


def describe(system: Any) -> dict[str, Any]:
    """``{"class": name, "fields": {...}}`` of a dataclass, nested ones alike; JSON-ready.

    Raises:
      TypeError: ``system`` is no dataclass.
    """
    fields = {}
    for field in dataclasses.fields(system):
        value = getattr(system, field.name)
        if not callable(value):
            fields[field.name] = describe(value) if dataclasses.is_dataclass(value) else value
    return {_CLASS: registry.name_of(type(system)), _FIELDS: fields}


def rebuild(description: Mapping[str, Any]) -> Any:
    """The dataclass that ``describe`` described; what it left out has its default.

    Raises:
      UserError: its class is not there, or has other fields: it is of another release.
    """
    # Here, and not above: who serves an export needs none of them.
    from expertrag_jax.systems import closed_book, distillation, dro, expert_rag, rag, retriever  # noqa: F401

    stored = str(description.get(_CLASS))
    name = stored.rpartition(":")[2] if stored.startswith("expertrag_jax.") else stored
    cls = registry.class_named(name)
    try:
        if cls is None:
            raise TypeError("nothing that was imported has this name")
        return cls(**{key: _value(value) for key, value in description[_FIELDS].items()})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint is of a system {stored} that this release cannot make ({error}): use the release it was "
            "trained with, or import the module that registers it"
        ) from error


NOT_ARCHITECTURE = (
    "dropout_rate", "train_expert_capacity_factor", "eval_expert_capacity_factor", "expert_group_size",
    "router_jitter", "dtype", "remat", "attention_init",
)  # fmt: skip
"""Fields of the networks' configurations that a run may change when it goes on."""


def other_architecture(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference between two descriptions' networks, as ``model.num_heads was 8 and is 4``; None where equal.

    A network is a nested dataclass (``model``, ``retriever``); a system's own numbers, such as steps and losses'
    factors, may differ.
    """
    for network, inner in now[_FIELDS].items():
        before = stored.get(_FIELDS, {}).get(network)
        if not isinstance(inner, Mapping) or not isinstance(before, Mapping):
            continue
        for name, value in inner[_FIELDS].items():
            old = before.get(_FIELDS, {}).get(name, value)
            value = list(value) if isinstance(value, tuple) else value
            if name not in NOT_ARCHITECTURE and old != value:
                return f"{network}.{name} was {old!r} and is {value!r}"
    return None


def _value(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {_CLASS, _FIELDS}:
        return rebuild(value)
    return tuple(_value(item) for item in value) if isinstance(value, list) else value
