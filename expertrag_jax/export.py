"""Write a trained system for serving: parameters, programs for CPU, TPU and GPU, vocabularies, a manifest.

The directory answers questions without the system's Python code and without its gin files. It refers to the
index, which stays where it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from expertrag_jax import launch
from expertrag_jax.errors import UserError
from expertrag_jax.files.paths import LocalPath
from expertrag_jax.interop import export_directory, serving, stablehlo
from expertrag_jax.ranges import Count, checked
from expertrag_jax.trained_model import open_model

FLAGS = {
    "--model_dir": ("model_dir", "folder of the trained model"),
    "--export_dir": ("export_dir", "folder to write"),
    "--checkpoint_path": ("checkpoint_path", "one of the model's checkpoints, in place of the newest"),
    "--index_dir": ("index_dir", "index to refer to, in place of the training's"),
    "--num_passages": ("num_passages", "passages read per question that retrieves"),
    "--buckets": ("buckets", "batch size to compile for; repeatable"),
    "--platforms": ("platforms", "cpu, tpu, cuda or rocm; repeatable, in place of the first three"),
    "--overwrite": ("overwrite", "replace an export that is there"),
}
MACROS = ("MODEL_DIR", "MODEL_OUTPUT_DIR", "CHECKPOINT_PATH", "INDEX_DIR", "NUM_PASSAGES")
EXAMPLE = "expertrag export --model_dir=runs/qa --export_dir=runs/qa_export"

_LOG = logging.getLogger(__name__)


@checked
def export(
    model_dir: LocalPath,
    export_dir: LocalPath,
    checkpoint_path: LocalPath | None = None,
    index_dir: LocalPath | None = None,
    num_passages: Count | None = None,
    buckets: Sequence[Count] | None = None,
    platforms: Sequence[str] = stablehlo.PLATFORMS,
    overwrite: bool = False,
) -> export_directory.ExportManifest:
    """Exports a model; see ``interop.export_directory`` for what is written.

    Args:
      model_dir: written by training.
      export_dir: new, empty or, with ``overwrite``, an earlier export.
      checkpoint_path: None means the model's newest checkpoint.
      index_dir: None means the training's index, if it is still there.
      num_passages, buckets: sizes to compile, None for the training's K and 1, 8 and 64.
      platforms: every program runs on each of them.

    Returns:
      What the export says about itself.

    Raises:
      UserError: the model, the index or a platform is not there, something else is at ``export_dir``, the system weighs
        passages (RAG), or the training's index now holds other passages.
    """
    known = (*stablehlo.PLATFORMS, "rocm")
    if not platforms or not set(platforms) <= set(known):
        raise UserError(f"platforms are {', '.join(platforms) or 'none'}: choose among {', '.join(known)}.")
    export_directory.check_writable(export_dir, overwrite, inputs=[model_dir, index_dir])
    model = open_model(model_dir, checkpoint_path, num_passages=num_passages, buckets=buckets)
    if getattr(model.system, "weighs_passages", False):
        raise UserError(
            f"a {type(model.system).__name__} weighs its passages while it answers, which an export cannot yet: answer "
            "with `expertrag infer --model_dir`."
        )
    if index_dir is None and model.index_dir is not None:
        index_dir = model.index_dir if Path(model.index_dir).is_dir() else None
        if index_dir is None:
            _LOG.warning("the training's index %s is gone: the export refers to none", model.index_dir)
        elif not hasattr(model.system, "read"):
            _LOG.warning("the training put evidence into the questions; the export answers from questions alone")
        else:
            model.check_index()
    with tqdm(desc="programs", unit="", total=None) as bar:
        manifest = serving.write_export(
            export_dir,
            model,
            index_dir=index_dir,
            platforms=tuple(platforms),
            overwrite=overwrite,
            progress=lambda name: (bar.set_postfix_str(name), bar.update()),
        )
    size = sum(entry["bytes"] for entry in manifest.files.values())
    _LOG.info("%s: %d programs, %.1f MB", export_dir, len(manifest.programs), size / 1e6)
    return manifest


if __name__ == "__main__":
    launch.run("expertrag_jax.export")
