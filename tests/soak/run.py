"""The run that ``soak.py`` kills: ``python run.py MODEL_DIR`` leaves its final state in ``logs/final.npz``."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import jax
import numpy as np

from expertrag_jax import partitioning
from expertrag_jax.training import loop

SECONDS_PER_STEP = 0.02  # so that steps, not starts, take most of the time


def main(model_dir: Path) -> None:
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).parents[1] / "training" / "toy.py")
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)

    def data(position):
        for rows in toy.data(position):
            time.sleep(SECONDS_PER_STEP)
            yield rows

    state = loop.train(
        toy.Toy(width=64, steps=(150, 250)),
        {"body": data, "head": data},
        model_dir,
        mesh=partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=2)),
        microbatches=2,
        checkpoint_period=10,
        log_period=10,
    )
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    np.savez(model_dir / "logs" / "final.npz", **{jax.tree_util.keystr(path): value for path, value in leaves})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
