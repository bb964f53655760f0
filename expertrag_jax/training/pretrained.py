"""Parameters alone: written for export, read from a checkpoint for evaluation or as a run's starting
point."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from orbax.checkpoint import v1 as ocp

from expertrag_jax.errors import UserError
from expertrag_jax.training import parameters
from expertrag_jax.training.checkpoint import check_same
from expertrag_jax.training.model_dir import CHECKPOINTS


def save_parameters(path: str | Path, params: Any, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes an Orbax directory that holds the parameter tree and nothing else.

    Raises:
      UserError: ``path`` exists.
    """
    path = Path(path).absolute()
    if path.exists():
        raise UserError(f"{path} exists already: name a new directory for the parameters.")
    path.parent.mkdir(parents=True, exist_ok=True)
    ocp.save(path, params, custom_metadata=dict(metadata or {}))


def checkpoint_dir(path: str | Path) -> Path:
    """The Orbax directory that ``path`` means: itself, or the newest step of a model or checkpoints
    directory.

    Raises:
      UserError: there is no checkpoint.
    """
    path = Path(path).expanduser().absolute()
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir():
            steps = [entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
            if steps:
                return max(steps, key=lambda entry: int(entry.name))
    if (path / "_CHECKPOINT_METADATA").exists():
        return path
    raise UserError(
        f"{path} holds no checkpoint: name a MODEL_DIR, a checkpoints/<step> or exported parameters."
    )


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON in the checkpoint that ``path`` means: phase, seeds, vocabulary digests, configuration."""
    return dict(ocp.metadata(checkpoint_dir(path)).custom_metadata or {})


def restore_parameters(path: str | Path, abstract_params: Any) -> Any:
    """Parameters from a MODEL_DIR (newest step), a ``checkpoints/<step>`` or an exported parameter directory.

    Args:
      abstract_params: tree of ShapeDtypeStructs (``Layout.abstract_params``); their shardings place the
        arrays, on the first device where there is none.
    Raises:
      UserError: no checkpoint there, or parameters of other names or shapes.
    """
    directory = checkpoint_dir(path)
    stored, inside = _stored(directory)
    check_same(stored, abstract_params, str(directory))
    return _load(directory, abstract_params, inside)


def start_from(initial: str | Path | Mapping[str, str], params: Any) -> Any:
    """Replaces fresh parameters by trained ones: what INITIAL_CHECKPOINT_PATH says.

    A path: every top-level subtree that both trees have is taken and must agree in names and shapes; a
    subtree that
    only the model has (a new gate) keeps its fresh values, and one that only the checkpoint has is left out.
    A map from subtree to path: ``{"query_encoder": RETRIEVER_DIR, "": GENERATOR_DIR}``; the subtree is filled
    by the
    checkpoint's subtree of that name or, where it has none, by its whole tree. The key "" means as for a
    path.

    Raises:
      UserError: no such checkpoint or subtree, nothing in common, or names or shapes that differ.
    """
    sources = initial if isinstance(initial, Mapping) else {"": initial}
    for subtree, path in sources.items():
        params = _fill_subtree(params, subtree, path) if subtree else _fill_root(params, path)
    return params


def _fill_root(params: Any, path: str | Path) -> Any:
    directory = checkpoint_dir(path)
    stored, inside = _stored(directory)
    shared = [name for name in params if name in stored]
    if not shared:
        raise UserError(
            f"Checkpoint {directory} has {', '.join(stored)}: nothing of the model's {', '.join(params)}."
        )
    wanted = {name: params[name] for name in shared}
    check_same({name: stored[name] for name in shared}, wanted, str(directory))
    fresh = [name for name in params if name not in stored]
    logging.info("%s: took %s; fresh: %s", directory, ", ".join(shared), ", ".join(fresh) or "none")
    return dict(params) | _load(directory, wanted, inside)


def _fill_subtree(params: Any, subtree: str, path: str | Path) -> Any:
    flat = parameters.flatten(params)
    wanted = {name: value for name, value in flat.items() if name.startswith(f"{subtree}/")}
    if not wanted:
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH names the subtree '{subtree}'; the model has {', '.join(params)}."
        )
    directory = checkpoint_dir(path)
    stored, inside = _stored(directory)
    whole = not any(name.startswith(f"{subtree}/") for name in parameters.flatten(stored))
    names = {name: name.removeprefix(f"{subtree}/") if whole else name for name in wanted}
    tree = parameters.unflatten({names[name]: value for name, value in wanted.items()})
    have = {n: v for n, v in parameters.flatten(stored).items() if whole or n.startswith(f"{subtree}/")}
    check_same(parameters.unflatten(have), tree, str(directory))
    loaded = parameters.flatten(_load(directory, tree, inside))
    return parameters.unflatten(flat | {name: loaded[names[name]] for name in wanted})


def _stored(directory: Path) -> tuple[Any, bool]:
    """(parameter tree of shapes, whether it stands under ``params`` in a training checkpoint)."""
    tree = ocp.metadata(directory).metadata
    inside = "params" in tree and "phase_step" in tree
    return (tree["params"] if inside else tree), inside


def _load(directory: Path, wanted: Any, inside: bool) -> Any:
    """Reads ``wanted`` (a part of what is stored), placed by its shardings."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # for shapes that name no place
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or here),
        wanted,
    )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = ocp.load(directory, {"params": wanted} if inside else wanted)
    return loaded["params"] if inside else loaded
