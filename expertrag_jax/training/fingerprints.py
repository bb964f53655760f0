"""A number per array that tells whether a checkpoint gave back what was saved, on whichever mesh.

The fingerprint of an array is the sum, modulo 2^32, of a mixed word per element, the mixture depending on the
element's bits and place (the finalizer of MurmurHash3). Integer sums do not depend on their order, so each
device sums what it holds, and the result is the same for every sharding. A change in one element, or in one
bit, always changes the sum, because the mixture is a bijection of the bits; changes in several elements cancel
once in 2^32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from expertrag_jax.partitioning import path_name

_GOLDEN = 0x9E3779B1  # odd; its powers spread the places along the axes


def fingerprints(tree: Any) -> dict[str, int]:
    """``{"a/b/c": number}`` for a tree of arrays, the same in every process; a collective where there are several."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not leaves:
        return {}
    arrays = [leaf for _, leaf in leaves]
    meshes = [array.sharding.mesh for array in arrays if isinstance(getattr(array, "sharding", None), NamedSharding)]
    replicated = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = np.asarray(jax.jit(_sums, out_shardings=replicated)(arrays))
    return {path_name(path): int(total) for (path, _), total in zip(leaves, sums, strict=True)}


def first_difference(stored: Mapping[str, int], found: Mapping[str, int]) -> str | None:
    """The name of the first array whose fingerprint is another one or is missing; None: all agree."""
    return next((name for name in found if stored.get(name) != found[name]), None)


def _sums(arrays: Sequence[jax.Array]) -> jax.Array:
    """[n] uint32."""
    return jnp.stack([_sum(array) for array in arrays])


def _sum(array: jax.Array) -> jax.Array:
    words = _words(jnp.asarray(array))
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        factor = jnp.uint32(pow(_GOLDEN, axis + 1, 2**32))
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * factor
    return jnp.sum(_mix(words ^ _mix(place)), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The elements' bits as uint32; 64-bit elements are two words along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
    return lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mix(words: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer, a bijection of 32-bit words."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
