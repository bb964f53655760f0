"""Every test sees eight virtual CPU devices, no accelerator and no display; set before JAX is imported."""

import gc
import importlib.util
import os
import pathlib
import sys

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Programs of tests run a few times on a few numbers: optimising them takes longer. A test of what the optimiser makes
# of a program asks for `optimised`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Tracing makes very many small objects that live: looking for garbage among them so often takes a tenth of the time.
gc.set_threshold(50_000, 20, 50)
# XLA's older emitters make a program in two thirds of the time, and one thread at a time needs less in all: two workers
# keep two cores busy anyway.
QUICK_COMPILATION = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_enable_concurrency_optimized_scheduler=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {QUICK_COMPILATION} --xla_force_host_platform_device_count=8"


SLOW_FILES = ("test_demo", "test_jobs", "test_text_path", "test_training", "test_restart", "test_command")


def pytest_collection_modifyitems(items):
    """Slow files first: of several workers none is left alone with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in SLOW_FILES)


@pytest.fixture
def told(caplog):
    """``told()``: what this package has logged in this test; JAX's readers may log an earlier test's failures late."""
    here = pathlib.Path(importlib.util.find_spec("expertrag_jax").origin).parent

    def ours(record):  # by the logger's name, or by file where it is absl's
        return record.name.startswith("expertrag_jax") or pathlib.Path(record.pathname).is_relative_to(here)

    return lambda: [record.getMessage() for record in caplog.records if ours(record)]


@pytest.fixture(scope="session")
def xla_flags():
    """``xla_flags(devices)``: of a process with so many CPU devices, each on one thread."""
    one_thread = f"{QUICK_COMPILATION} --xla_cpu_multi_thread_eigen=false"
    return lambda devices: f"{one_thread} --xla_force_host_platform_device_count={devices}"


@pytest.fixture(scope="session")
def tiny_model():
    """The module ``tiny_model.py``."""
    path = pathlib.Path(__file__).with_name("tiny_model.py")
    spec = importlib.util.spec_from_file_location("tiny_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny_model"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    """Folder of compiled programs, shared by all tests with `fast_compile`."""
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def fast_compile(compiled_programs):
    """Compiles each program once for all tests that ask for this."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": compiled_programs,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks at the folder's name only once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def optimised():
    """Compiles as users' programs are."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def tiny(tiny_model, tmp_path_factory):
    """A tiny model on disk: `tiny_model.Made`; copy what a test changes."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_export(tiny):
    """Its export, with the index in ``tiny.root``; copy what a test changes."""
    from expertrag_jax.interop.serving import write_export
    from expertrag_jax.trained_model import open_model

    model = open_model(tiny.model_dir, buckets=tiny.settings.buckets)
    write_export(tiny.root / "export", model, index_dir=tiny.index_dir)
    return tiny.root / "export"
