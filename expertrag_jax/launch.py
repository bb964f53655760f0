"""Runs one job from the command line: flags, processes, gin files, then the job's function.

A job is a module with a function of the same name, ``expertrag_jax.train`` with ``train``, or with another
that is named after a colon, ``expertrag_jax.index:build_index``. ``expertrag train ...`` comes here, and so
does ``python -m expertrag_jax.train ...``, for the module ends with::

    if __name__ == "__main__":
        launch.run("expertrag_jax.train")

Its flags are described in `job_flags`, several processes in `processes`. Exit codes: 0 done; 2 bad input
(``error: <sentence>`` on standard error, a traceback only with ``--debug``); 3 done, but worse than the job promises
(``missed: <sentence>``); 75 hung, with ``hang_abort``; 130 interrupted; 1 a defect of the program, with its traceback.
Of several processes process 0 alone reports what all do; each reports its own errors.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import gin

from expertrag_jax import disk, gin_errors, gin_files, gin_ranges, job_flags, processes
from expertrag_jax.errors import QualityMissed, UserError
from expertrag_jax.terminal import visible

DEFECT, USER_ERROR, QUALITY_MISSED, INTERRUPTED = 1, 2, 3, 130

_started: dict[str, float] = {}


def run(job_name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Runs a job and exits the process where it did not succeed.

    Args:
      job_name: ``package.module`` or ``package.module:function``.
      argv: arguments without the program's name; None takes those of the process.
      prog: how the user called it, for the help text.

    Raises:
      SystemExit: with the code that the module docstring lists, unless the job succeeded.
    """
    began = processes.start_time() if argv is None else None
    code = execute(job_name, sys.argv[1:] if argv is None else argv, prog, began)
    if code:
        processes.leave(code)


def execute(job_name: str, argv: Sequence[str], prog: str | None = None, began: float | None = None) -> int:
    """Runs a job and returns the exit code; ``error: ...`` goes to standard error.

    ``began``: see ``started``; None: now.
    """
    _started[job_name] = time.monotonic() if began is None else began
    debug = any(argument in ("--debug", "--debug=true") for argument in argv)
    try:
        check_text(argv)
        return _execute(job_name, argv, prog or f"python -m {job_name.partition(':')[0]}")
    except KeyboardInterrupt:
        print(f"{processes.prefix()}interrupted", file=sys.stderr)
        return INTERRUPTED
    except QualityMissed as missed:
        print(f"{processes.prefix()}missed: {gin_errors.message(missed)}", file=sys.stderr)
        return QUALITY_MISSED
    except Exception as error:
        sentence = explain(error)
        if sentence is None and not processes.several():
            raise
        if sentence is None or debug:
            traceback.print_exc()
        # The sentence may hold names out of a file that somebody sent.
        print(f"{processes.prefix()}error: {visible(sentence or type(error).__name__)}", file=sys.stderr)
        return DEFECT if sentence is None else USER_ERROR
    finally:
        _started.pop(job_name, None)


def check_text(argv: Sequence[str]) -> None:
    """UserError for an argument that is no text: half a character, such as a cut UTF-8 sequence."""
    for number, argument in enumerate(argv, 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"argument {number} ({argument[:60]!r}) is no UTF-8 text: write it again.") from None


def started(job_name: str) -> float | None:
    """When the job that runs was started, in monotonic seconds: with its process, where that is the command; None
    where no such job runs, because its function was called from Python."""
    return _started.get(job_name)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the user can mend; None for a defect of the program."""
    unbound = gin_errors.unbound_parameters(error)
    text = " ".join(gin_errors.message(unbound or error).split())
    if unbound or isinstance(error, UserError):
        return text
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package not in ("expertrag_jax", "tasks"):
        return f"this needs the package {package}, which is not installed here."
    if isinstance(error, MemoryError):
        return f"There is not enough memory ({text or 'the system gave no more'}): lower the sizes that were asked for."
    if disk.is_full(error):
        return f"The disk is full ({text}): make room and run the same command again."
    if disk.of_environment(error):
        return text.partition("] ")[2] or text  # without "[Errno 2]"
    return None


def _execute(job_name: str, argv: Sequence[str], prog: str) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # a job may load TensorFlow, whose C++ log is no news
    job, function = load(job_name)
    parser = job_flags.make_parser(prog, job, function)
    try:
        options = job_flags.parse(parser, argv)
    except SystemExit as stop:  # argparse has printed the help
        return int(stop.code or 0)
    log_to_stderr(options.debug)
    if not options.dry_run:
        start_processes(job, options)
    configure(job, function, options)
    if options.dry_run:
        print(gin_files.describe(function))
        return 0
    set_data_folders(options)
    gin.get_configurable(function)()
    return 0


def load(job_name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The job's module and function.

    The function also becomes an attribute of ``__main__``, so that T5X's way to bind it, ``import __main__ as
    train_script``, means the same function whichever way the job was started.
    """
    module_name, _, function_name = job_name.partition(":")
    job = importlib.import_module(module_name)
    function = getattr(job, function_name or module_name.rpartition(".")[2])
    setattr(sys.modules["__main__"], function.__name__, function)
    return job, function


def configure(job: ModuleType, function: Callable[..., Any], options: argparse.Namespace) -> None:
    """Parses gin files, ``--gin.X=V`` and the job's flags, in this order; checks that nothing is missing."""
    selector = gin_files.register(function)
    bindings = [*options.gin_bindings, *job_flags.bindings(job, selector, options)]
    gin_files.parse(options.gin_file, bindings, options.gin_search_paths)
    flags = job_flags.flags_by_keyword(job)
    gin_files.check_required(function, flags)
    gin_ranges.check_bindings(function, flags)


def start_processes(job: ModuleType, options: argparse.Namespace) -> None:
    """Joins the other processes of this job; UserError: see ``processes.join``.

    Only a job whose module says ``SEVERAL_PROCESSES = True`` looks for others without being told to.
    """
    processes.join(
        options.coordinator_address,
        options.process_count,
        options.process_index,
        options.heartbeat_seconds,
        detect=getattr(job, "SEVERAL_PROCESSES", False),
    )
    if processes.several() and processes.index() > 0:  # process 0 tells what all do
        logging.getLogger("expertrag_jax").setLevel(logging.WARNING)


def set_data_folders(options: argparse.Namespace) -> None:
    """Hands TFDS's folder and SeqIO's caches on, where the flags name any; only then is SeqIO loaded."""
    if not (options.tfds_data_dir or options.seqio_additional_cache_dirs):
        return
    import seqio

    if options.tfds_data_dir:
        seqio.set_tfds_data_dir_override(options.tfds_data_dir)
    seqio.add_global_cache_dirs(options.seqio_additional_cache_dirs)


def log_to_stderr(debug: bool = False) -> None:
    """Our log from INFO on, that of libraries from WARNING on, on standard error.

    Errors that Orbax logs with a traceback and raises too are left out, unless it is to debug. So is what TensorStore
    prints about them, see ``_without_late_callbacks``.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    # gin reports each folder that lacks an included file as an error, though the next folder may hold it.
    handler.addFilter(lambda record: record.module != "resource_reader")
    handler.addFilter(lambda record: debug or record.name not in ("absl", "asyncio") or not record.exc_info)
    # TFDS warns of its own deprecated calls, and of every builder that is not in its catalogue.
    handler.addFilter(lambda record: debug or record.levelno >= logging.ERROR or not _is_of_tfds(record))
    root = logging.getLogger()
    for other in [each for each in root.handlers if type(each) is logging.StreamHandler]:
        root.removeHandler(other)  # importing Orbax leaves one there, so that basicConfig would do nothing
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("expertrag_jax").setLevel(logging.INFO)
    if not debug:
        sys.unraisablehook = _without_late_callbacks


def _is_of_tfds(record: logging.LogRecord) -> bool:
    return "tensorflow_datasets" in record.pathname


def _without_late_callbacks(told: sys.UnraisableHookArgs) -> None:
    """Leaves out what TensorStore prints after a failed read: it calls back into an event loop that has ended."""
    trace = told.exc_traceback
    if trace is None or not trace.tb_frame.f_code.co_name.endswith("call_soon_threadsafe"):
        sys.__unraisablehook__(told)
