"""Where every parameter of every model lies on every mesh, as text; ``make golden`` rewrites it.

One file per model of ``gin/models`` in ``tests/golden``: a line per parameter of ExpertRAG with that model, and a line
per array of Adafactor's state. Layers that are alike share a line (``layers_{0,2,4}``). A column per mesh holds the
mesh axes of each dimension: ``.`` is unsharded, ``data+fsdp`` several, an empty column a whole copy on every device.
Everything is worked out from shapes, on no devices.
"""

from __future__ import annotations

import pathlib
import re
import sys
from collections.abc import Iterator

import gin
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from expertrag_jax import gin_files, partitioning
from expertrag_jax.model.config import TransformerConfig
from expertrag_jax.model.dual_encoder import DualEncoderConfig
from expertrag_jax.systems.expert_rag import ExpertRAG
from expertrag_jax.training import optimizer
from expertrag_jax.training.state import Layout

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
COMMAND = "make golden"
MODELS = sorted(path.stem for path in (ROOT / "gin" / "models").glob("*.gin") if path.stem != "base")
VOCABULARY = 32128
DEVICES = {"data": 8, "fsdp": 8, "expert": 8, "data_expert_tensor": 32}  # gin/meshes
OTHER_MESHES = (
    partitioning.MeshConfig(data=2, expert=4),
    partitioning.MeshConfig(data=2, expert=2, tensor=2),
)


def meshes() -> dict[str, AbstractMesh]:
    """``"data=2 expert=4"`` -> mesh: those of gin/meshes, then others."""
    sizes = [_configured(f"meshes/{name}.gin", partitioning.MeshConfig).sizes(n) for name, n in DEVICES.items()]
    sizes += [config.sizes(8) for config in OTHER_MESHES]
    names = [" ".join(f"{axis}={n}" for axis, n in zip(partitioning.MESH_AXES, each) if n > 1) for each in sizes]
    return {name: AbstractMesh(each, partitioning.MESH_AXES) for name, each in zip(names, sizes)}


class Traced:
    """A system whose parameters' shapes and axes are worked out once, for all meshes."""

    def __init__(self, system: ExpertRAG):
        shapes, axes = jax.eval_shape(system.init, jax.random.key(0)), system.logical_axes()
        self.init = lambda rng: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        self.logical_axes = lambda: axes


def text(model: str) -> str:
    """The golden file of a model, ``moe_tiny``."""
    config = _configured(
        f"models/{model}.gin", TransformerConfig, "VOCABULARY = 'absent'",
        f"config.TransformerConfig.vocab_size = {VOCABULARY}",
    )  # fmt: skip
    query_encoder = DualEncoderConfig(vocab_size=VOCABULARY, embed_dim=256, num_layers=0, output_dim=256, shared=True)
    system = ExpertRAG(config, query_encoder, generator_optimizer=lambda: optimizer.adafactor(0.01))
    known = Traced(system)
    layouts = {name: Layout(known, mesh) for name, mesh in meshes().items()}
    states = [layout.abstract_state(system.phases[0]) for layout in layouts.values()]
    header = ["", "", *layouts]
    parameters = list(_rows([state.params for state in states]))
    moments = [row for row in _rows([state.optimizer_state for state in states]) if row[1] not in ("1", "scalar")]
    return (
        f"# Rewritten by `{COMMAND}`; tests/golden_shardings.py explains the columns.\n"
        + _table([["parameters", "shape", *header[2:]], *_alike(parameters)])
        + "\n"
        + _table([["Adafactor's state, phase generator", "shape", *header[2:]], *_alike(moments)])
    )


def _configured(file: str, made: type, *bindings: str):
    """What a gin file makes of a dataclass."""
    gin_files.parse([file], bindings, [str(ROOT / "gin")])
    found = gin.get_configurable(made)()
    with gin.unlock_config():
        gin.clear_config()
    return found


def _rows(trees: list) -> Iterator[list[str]]:
    """[name, shape, spec on each mesh] of each array of the same tree on several meshes."""
    for entries in zip(*map(jax.tree_util.tree_leaves_with_path, trees), strict=True):
        path, leaf = entries[0]
        yield [
            partitioning.path_name(path),
            "x".join(map(str, leaf.shape)) or "scalar",
            *(_spec(leaf.sharding, leaf.ndim) for _, leaf in entries),
        ]


def _spec(sharding: NamedSharding, rank: int) -> str:
    axes = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    told = ["." if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in axes]
    return "" if set(told) <= {"."} else " ".join(told)


def _alike(rows: list[list[str]]) -> list[list[str]]:
    """Rows that differ only in the number of their layer become one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        number = re.search(r"layers_(\d+)", name)
        pattern = re.sub(r"layers_\d+", "layers_{}", name)
        groups.setdefault((pattern, *rest), []).extend(number.groups() if number else [])
    found = []
    for (pattern, *rest), numbers in groups.items():
        layers = ",".join(sorted(numbers, key=int))
        found.append([pattern.replace("{}", layers if len(numbers) < 2 else "{" + layers + "}"), *rest])
    return sorted(found)


def _table(rows: list[list[str]]) -> str:
    """Columns of equal width, two blanks between them."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrites the golden files; those of models that are gone are removed."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        if path.stem not in MODELS:
            path.unlink()
    for model in MODELS:
        (GOLDEN / f"{model}.txt").write_text(text(model))
    print(f"{GOLDEN}: {', '.join(MODELS)}", file=sys.stderr)


if __name__ == "__main__":
    main()
