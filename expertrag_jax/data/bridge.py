"""Python functions inside tf.data graphs, and their errors brought back out.

A ``tf.numpy_function`` that raises turns its exception into a ``tf.errors.UnknownError`` whose text is a
traceback. Bad input must reach the user as one sentence, so a ``UserError`` raised inside is written between
two marks and ``user_errors`` lifts it out again where the dataset is iterated.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import tensorflow as tf

from expertrag_jax.errors import UserError

_OPEN, _CLOSE = "<<user error:", ":user error>>"
_MARKED = re.compile(re.escape(_OPEN) + "(.*?)" + re.escape(_CLOSE), re.DOTALL)

Spec = tf.TensorSpec
Chunk = Mapping[str, tf.Tensor]


def numpy_map(
    function: Callable[..., Sequence[np.ndarray]],
    inputs: Sequence[tf.Tensor],
    outputs: Sequence[Spec],
) -> list[tf.Tensor]:
    """Calls ``function`` on numpy values inside a graph.

    The op is stateless: a dataset with a stateful one can be neither checkpointed nor optimised.

    Args:
      function: takes one numpy array per input, returns one array per output.
      inputs: graph tensors.
      outputs: shape and dtype of each result.

    Returns:
      The results, with the static shapes of ``outputs``.
    """

    def call(*arrays):
        try:
            results = function(*arrays)
        except UserError as error:
            raise ValueError(f"{_OPEN}{error}{_CLOSE}") from error
        return [np.asarray(r, spec.dtype.as_numpy_dtype) for r, spec in zip(results, outputs, strict=True)]

    results = tf.numpy_function(call, list(inputs), [spec.dtype for spec in outputs], stateful=False)
    results = results if isinstance(results, (list, tuple)) else [results]
    return [tf.ensure_shape(result, spec.shape) for result, spec in zip(results, outputs, strict=True)]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a TensorFlow error that carries a ``UserError`` back into it; others pass unchanged."""
    try:
        yield
    except Exception as error:
        found = _MARKED.search(str(error)) if isinstance(error, tf.errors.OpError) else None
        if found is None:
            raise
        raise UserError(found.group(1)) from None


def texts(array: np.ndarray) -> list[str]:
    """The strings of a numpy array of bytes objects, as ``tf.numpy_function`` passes them."""
    return [value.decode("utf-8") for value in array.tolist()]
