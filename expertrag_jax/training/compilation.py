"""JAX's persistent compilation cache: a run that starts again loads its programs in place of compiling them."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from expertrag_jax.errors import UserError


def keep_programs(directory: str | Path) -> None:
    """From here on, every program that this process compiles is kept in ``directory``, and looked for there first.

    A program is found again by its code, shapes, compiler options, JAX's version and the kind and number of devices, so
    one folder may serve many runs, at the same time too; of several processes the first one writes. Nothing is ever
    removed from it.

    Raises:
      UserError: the folder cannot be made.
    """
    path = Path(directory).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"compilation_cache_dir {path} cannot be made: {error.strerror}; name another folder."
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # small programs too: there are hundreds
    compilation_cache.reset_cache()  # JAX looks at the folder's name only once
