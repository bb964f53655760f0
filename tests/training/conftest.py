"""The toy system as a fixture, and runs of it in processes of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    """The same little programs are compiled once for all tests of this folder that run in this process."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def toy():
    """The module ``toy.py``."""
    spec = importlib.util.spec_from_file_location("training_toy", HERE / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_python(xla_flags):
    """``run_python(*arguments, devices=1)``: Python with the package on its path and so many CPU devices."""

    def run(*arguments, devices=1, timeout=120):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": xla_flags(devices),
        }
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)

    return run
