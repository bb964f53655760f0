"""Two-part invented names ("Tavo Melkin") from generated syllables."""

from __future__ import annotations

import numpy as np

from tasks.almanac.config import AlmanacConfig, AlmanacError
from tasks.almanac.phrasing import own_words

_ONSETS = "b d f g h j k l m n p r s t v z br dr gr kr tr".split()
_VOWELS = "a e i o u".split()
_CODAS = "n l r s k m".split()
# Half of the 105 x 105 first parts: beyond it drawing distinct ones slows down.
_MOST_PARTS = 5_000


def name_inventories(config: AlmanacConfig) -> tuple[list[str], list[str]]:
    """First parts (two open syllables: "Tavo") and last parts (two closed ones: "Melkin").

    All parts are distinct, across both lists and from every word of the almanac's sentences. Raises
    AlmanacError when more parts are asked for than the syllables give.
    """
    num_first, num_last = config.inventory_sizes
    if max(num_first, num_last) > _MOST_PARTS:
        raise AlmanacError(
            f"AlmanacConfig: {num_first} first and {num_last} last names exceed the {_MOST_PARTS} that the "
            "syllables give; lower num_first_names and num_last_names."
        )
    rng = config.rng("name inventories")
    taken = own_words()
    first = _distinct_parts(rng, num_first, taken, closed=False)
    last = _distinct_parts(rng, num_last, taken, closed=True)
    return first, last


def _distinct_parts(rng: np.random.Generator, count: int, taken: set[str], closed: bool) -> list[str]:
    """``count`` capitalised parts that are not in ``taken``, to which they are added in lower case."""
    parts: list[str] = []
    while len(parts) < count:
        onsets, vowels, codas = (rng.integers(len(sounds), size=2) for sounds in (_ONSETS, _VOWELS, _CODAS))
        syllables = [
            _ONSETS[onset] + _VOWELS[vowel] + (_CODAS[coda] if closed else "")
            for onset, vowel, coda in zip(onsets, vowels, codas, strict=True)
        ]
        part = "".join(syllables)
        if part not in taken:
            taken.add(part)
            parts.append(part.capitalize())
    return parts


def draw_full_names(rng: np.random.Generator, inventory_sizes: tuple[int, int], count: int) -> np.ndarray:
    """``count`` distinct full names as int32 [count, 2]: index of the first and of the last part."""
    num_first, num_last = inventory_sizes
    pairs = rng.choice(num_first * num_last, size=count, replace=False)
    return np.stack(np.divmod(pairs, num_last), axis=1).astype(np.int32)


def draw_namesakes(
    rng: np.random.Generator, parts: np.ndarray, inventory_sizes: tuple[int, int], unrelated_share: float
) -> np.ndarray:
    """For each full name another one that shares its first or its last part; it need not be in the corpus.

    Args:
      rng: random stream.
      parts: int32 [..., 2].
      inventory_sizes: numbers of first and last parts.
      unrelated_share: probability that both parts differ instead.

    Returns:
      int32 [..., 2], never equal to ``parts`` in both columns.
    """
    sizes = np.asarray(inventory_sizes)
    others = (parts + rng.integers(1, sizes, size=parts.shape)) % sizes
    shared = rng.integers(2, size=parts.shape[:-1])
    keep = np.stack([shared == 0, shared == 1], axis=-1)
    keep &= (rng.random(parts.shape[:-1]) >= unrelated_share)[..., None]
    return np.where(keep, parts, others).astype(np.int32)
