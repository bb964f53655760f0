"""Parameters alone: written for export, read from a checkpoint for evaluation or as a run's starting
point."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from expertrag_jax.errors import UserError
from expertrag_jax.training import parameters
from expertrag_jax.training.integrity import (
    Damaged,
    check_arrays,
    check_plain,
    check_same,
    load_alone,
    shapes,
    together,
    unsealed,
)
from expertrag_jax.training.model_dir import CHECKPOINTS

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


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


class Stored:
    """Parameters in one Orbax directory; whatever reads them raises ``Damaged`` where they are not what was saved.

    Exported parameters, and checkpoints written before there were fingerprints, are taken as they are.

    Attributes:
      directory: ``checkpoints/<step>``, or what ``save_parameters`` wrote.
      metadata: its JSON: phase, seeds, vocabulary digests, configuration.
      shapes: tree of the parameters' shapes.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.shapes, self.metadata, self._whole_state = together(lambda: _described(directory))

    def restore(self, abstract_params: Any) -> Any:
        """All of it; UserError: it has other names or shapes."""
        check_same(self.shapes, abstract_params, str(self.directory))
        return self.load(abstract_params)

    def load(self, wanted: Any) -> Any:
        """A part of it, placed by its shardings; what has none goes to the first device."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = parameters.flatten(self.shapes)
        as_stored = {  # fingerprints are of the bits, so another dtype comes afterwards
            name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=getattr(x, "sharding", None) or here)
            for name, x in parameters.flatten(wanted).items()
        }
        tree = parameters.unflatten(as_stored)
        tree = {"params": tree} if self._whole_state else tree
        tree = together(lambda: load_alone(self.directory, tree, partial=True))
        if "arrays" in self.metadata:
            check_arrays(self.metadata["arrays"], tree)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), tree["params"] if self._whole_state else tree, wanted)


def read_whole(path: str | Path, read: Callable[[Stored], _T]) -> _T:
    """``read(stored)`` of the checkpoint that ``path`` means.

    Of a MODEL_DIR or its ``checkpoints`` that is the newest one for which nothing ``Damaged`` is met, or, after a
    training with early stopping, the one that it found best, if that was kept and is whole. A warning tells which
    damaged ones were passed over, and nothing is changed. Any other path means itself.

    Raises:
      UserError: there is no checkpoint, the one that is named is damaged, or all are.
    """
    path, damaged = Path(path).expanduser().absolute(), {}
    directories = _steps(path)
    for directory in _best_first(directories) or [path]:
        try:
            found = read(Stored(directory))
        except Damaged as error:
            damaged[directory] = error
            continue
        for other, error in damaged.items() if jax.process_index() == 0 else ():
            _LOG.warning("the checkpoint %s is damaged (%s): taking step %s", other, error, directory.name)
        return found
    told = "; ".join(f"{directory.name}: {error}" for directory, error in damaged.items())
    if directories:
        raise UserError(f"No checkpoint in {directories[0].parent} can be read ({told}): name another MODEL_DIR.")
    raise UserError(f"Checkpoint {path} is damaged ({damaged[path]}): name another one, or its MODEL_DIR.")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON in the checkpoint that ``path`` means: phase, seeds, vocabulary digests, configuration."""
    return read_whole(path, lambda stored: stored.metadata)


def restore_parameters(path: str | Path, abstract_params: Any) -> Any:
    """Parameters from a MODEL_DIR, a ``checkpoints/<step>`` or an exported parameter directory: see ``read_whole``.

    Args:
      abstract_params: tree of ShapeDtypeStructs (``Layout.abstract_params``); their shardings place the
        arrays, on the first device where there is none.
    Raises:
      UserError: no checkpoint there, a damaged one, or parameters of other names or shapes.
    """
    return read_whole(path, lambda stored: stored.restore(abstract_params))


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
        fill = functools.partial(_fill_subtree, params, subtree) if subtree else functools.partial(_fill_root, params)
        params = read_whole(path, fill)
    return params


def _fill_root(params: Any, stored: Stored) -> Any:
    shared = [name for name in params if name in stored.shapes]
    if not shared:
        raise UserError(
            f"Checkpoint {stored.directory} has {', '.join(stored.shapes)}: nothing of the model's {', '.join(params)}."
        )
    wanted = {name: params[name] for name in shared}
    check_same({name: stored.shapes[name] for name in shared}, wanted, str(stored.directory))
    fresh = [name for name in params if name not in stored.shapes]
    _LOG.info("%s: took %s; fresh: %s", stored.directory, ", ".join(shared), ", ".join(fresh) or "none")
    return dict(params) | stored.load(wanted)


def _fill_subtree(params: Any, subtree: str, stored: Stored) -> Any:
    flat = parameters.flatten(params)
    wanted = {name: value for name, value in flat.items() if name.startswith(f"{subtree}/")}
    if not wanted:
        raise UserError(f"INITIAL_CHECKPOINT_PATH names the subtree '{subtree}'; the model has {', '.join(params)}.")
    there = parameters.flatten(stored.shapes)
    whole = not any(name.startswith(f"{subtree}/") for name in there)
    names = {name: name.removeprefix(f"{subtree}/") if whole else name for name in wanted}
    tree = parameters.unflatten({names[name]: value for name, value in wanted.items()})
    have = {name: value for name, value in there.items() if whole or name.startswith(f"{subtree}/")}
    check_same(parameters.unflatten(have), tree, str(stored.directory))
    loaded = parameters.flatten(stored.load(tree))
    return parameters.unflatten(flat | {name: loaded[names[name]] for name in wanted})


def _described(directory: Path) -> tuple[Any, dict[str, Any], bool]:
    """(tree of parameters' shapes, metadata, whether they stand under ``params`` in a training checkpoint)."""
    check_plain(directory)
    found = ocp.metadata(directory)
    tree, metadata = found.metadata, dict(found.custom_metadata or {})
    if tree is None:  # Orbax has logged why
        raise Damaged("its arrays cannot be read")
    whole_state = "params" in tree and "phase_step" in tree
    if whole_state:
        tree, metadata = tree["params"], unsealed(metadata)
    described = metadata.get("arrays")
    if described and any(list(shape) != described[name]["shape"] for name, shape in shapes(tree).items()):
        raise Damaged("its shapes are not what was saved")
    return tree, metadata, whole_state


def _best_first(directories: list[Path]) -> list[Path]:
    """Steps, the newest first, with the one in front that the newest whole one calls best."""
    for newest in directories:
        try:
            best = Stored(newest).metadata.get("best_step")
        except Damaged:
            continue
        if best is None or str(best) == newest.name:
            break
        chosen = [directory for directory in directories if directory.name == str(best)]
        told = "taking it, and not step %s" if chosen else "it was not kept (see Retention.best): taking step %s"
        level = logging.INFO if chosen else logging.WARNING
        _LOG.log(level, f"%s: validation found step %s best; {told}, the newest", newest.parent, best, newest.name)
        return chosen + [directory for directory in directories if directory not in chosen]
    return directories


def _steps(path: Path) -> list[Path]:
    """The steps of a model or checkpoints directory, the newest first; none where ``path`` is itself one.

    Raises:
      UserError: there is no checkpoint.
    """
    for folder in (path / CHECKPOINTS, path):
        if folder.is_dir():
            steps = [entry for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir()]
            if steps:
                return sorted(steps, key=lambda entry: int(entry.name), reverse=True)
    if path.is_dir() and (path.name.isdigit() or (path / "_CHECKPOINT_METADATA").exists()):
        return []
    raise UserError(f"{path} holds no checkpoint: name a MODEL_DIR, a checkpoints/<step> or exported parameters.")
