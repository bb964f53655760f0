"""T5's span corruption (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4): fill the gaps of a text.

Text   thank you for inviting me to your party last week
Input  thank you <X> me to your party <Y> week 1
Target <X> for inviting <Y> last 1

Sentinels <X>, <Y>, ... are T5's: ids behind the vocabulary's own, ``pieces + sentinels - 1`` and downwards. Here is how
a sequence of tokens is cut into windows and corrupted, in numpy; ``tasks.span_corruption`` makes a SeqIO task of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data.bridge import numpy_map
from expertrag_jax.data.preprocessors import Lengths, length_limit, tokenise
from expertrag_jax.data.vocabularies import EOS
from expertrag_jax.errors import UserError

GROUP = 256  # passages joined before they are cut into windows
_PER_GROUP = 1 << 24  # ids that a group of passages may use


def num_noise(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens masked, spans) in a window of ``length`` tokens, at least 2; at least one of each, and never all."""
    tokens = min(max(round(length * density), 1), length - 1)
    return tokens, min(max(round(tokens / mean_span), 1), length - tokens)


def corrupted_lengths(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Lengths of input and target, EOS included, of a window of ``length`` tokens."""
    tokens, spans = num_noise(length, density, mean_span)
    return length - tokens + spans + 1, tokens + spans + 1


def window_length(inputs: int, density: float, mean_span: float) -> int:
    """The longest window whose corrupted input, EOS included, has at most ``inputs`` tokens.

    Raises:
      UserError: there is none.
    """
    if corrupted_lengths(2, density, mean_span)[0] > inputs:
        raise UserError(f"span corruption needs inputs of at least 3 tokens, not {inputs}: set TASK_FEATURE_LENGTHS")
    length = 2
    while corrupted_lengths(length + 1, density, mean_span)[0] <= inputs:
        length += 1
    return length


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> np.ndarray:
    """Which tokens are masked, [length] bool: spans of random lengths at random distances, the first token never.

    T5's ``random_spans_noise_mask``: both the masked and the other tokens are cut into as many parts at random, and the
    parts alternate.
    """
    tokens, spans = num_noise(length, density, mean_span)
    parts = np.stack([_partition(length - tokens, spans, rng), _partition(tokens, spans, rng)], axis=1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts.reshape(-1))


def _partition(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes of ``parts`` non-empty parts of ``items``, all ways equally likely: [parts] int64."""
    cuts = np.sort(rng.permutation(items - 1)[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [items]]))


def corrupt(tokens: np.ndarray, mask: np.ndarray, first_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """Input and target of a window, EOS last.

    Args:
      tokens: [W] int32. mask: [W] bool. first_sentinel: id of <X>; <Y> is one less, and so on.
    Returns:
      The tokens with each masked span replaced by its sentinel, and the masked spans, each behind its sentinel.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    sentinels = first_sentinel + 1 - np.cumsum(starts)
    inputs = np.where(starts, sentinels, tokens)[starts | ~mask]
    spans = np.flatnonzero(mask)
    before = np.cumsum(starts)[spans]  # in front of a masked token stand so many sentinels
    targets = np.empty(len(spans) + starts.sum(), np.int32)
    targets[np.arange(len(spans)) + before] = tokens[spans]
    targets[np.flatnonzero(starts[spans]) + np.arange(starts.sum())] = sentinels[starts]
    return np.append(inputs, EOS).astype(np.int32), np.append(targets, EOS).astype(np.int32)


@dataclasses.dataclass
class CorruptSpans:
    """Passages of ``title`` and ``text`` become examples of ``id``, ``query``, ``inputs`` and ``targets``.

    The passages' tokens, ``title 1 text 1`` one after the other, are cut into windows that fill ``inputs`` exactly once
    they are corrupted; the last window of a group is shorter. An example's spans depend on seed and id alone.

    Attributes:
      vocabulary: of the reader.
      sentinels: ids behind the vocabulary's. density: share of tokens masked. mean_span: tokens of a masked span.
      copies: examples made of each window, each with other spans.
      seed: of the spans.
      sequence_length: SeqIO's lengths, filled in by the task.
    """

    vocabulary: seqio.Vocabulary
    sentinels: int = 100
    density: float = 0.15
    mean_span: float = 3.0
    copies: int = 1
    seed: int = 0
    sequence_length: Lengths | None = None

    def __call__(self, ds: tf.data.Dataset) -> tf.data.Dataset:
        """A dataset of passages to a dataset of examples."""
        sizes = self.sizes()
        grouped = ds.batch(GROUP).enumerate()
        return grouped.map(lambda n, group: self._corrupt(n, group, *sizes), tf.data.AUTOTUNE).unbatch()

    def sizes(self) -> tuple[int, int, int]:
        """(tokens of a window, length of inputs, length of targets).

        Raises:
          UserError: lengths that are missing or too small, or too few sentinels.
        """
        limits = [length_limit(self.sequence_length, name) for name in ("inputs", "targets")]
        if None in limits:
            raise UserError("span corruption needs lengths for 'inputs' and 'targets': set TASK_FEATURE_LENGTHS")
        window = window_length(limits[0], self.density, self.mean_span)
        _, needed = corrupted_lengths(window, self.density, self.mean_span)
        if needed > limits[1]:
            raise UserError(
                f"inputs of {limits[0]} tokens hide {needed - 1} tokens and sentinels, but targets hold {limits[1]}: "
                f"raise TASK_FEATURE_LENGTHS['targets'] to {needed}"
            )
        _, spans = num_noise(window, self.density, self.mean_span)
        if spans > self.sentinels:
            raise UserError(
                f"inputs of {limits[0]} tokens have {spans} gaps, but there are {self.sentinels} sentinels: raise "
                "SENTINELS or shorten TASK_FEATURE_LENGTHS['inputs']"
            )
        return window, limits[0], limits[1]

    def _corrupt(self, number: tf.Tensor, group: Mapping[str, tf.Tensor], window: int, inputs: int, targets: int):
        parts = []
        for name in ("title", "text"):
            tokens = tokenise(self.vocabulary, group[name])
            parts += [tokens, tf.fill([tokens.nrows(), 1], tf.constant(EOS, tf.int32))]
        flat = tf.concat(parts, axis=1).flat_values
        specs = [tf.TensorSpec([None], tf.int64), *(tf.TensorSpec([None, n], tf.int32) for n in (1, inputs, targets))]
        made = numpy_map(
            lambda number, tokens: self.examples(int(number), tokens, window, inputs, targets), [number, flat], specs
        )
        return dict(zip(("id", "query", "inputs", "targets"), made))

    def examples(self, number: int, tokens: np.ndarray, window: int, inputs: int, targets: int) -> list[np.ndarray]:
        """Group ``number`` of passages, [N] int32, as ids [n], queries [n, 1] (EOS), inputs [n, L], targets [n, T]."""
        first_sentinel = self.vocabulary.vocab_size + self.sentinels - 1
        starts = [start for start in range(0, len(tokens), window) if len(tokens) - start > 1]
        rows = [(start, copy) for start in starts for copy in range(self.copies)]
        ids = number * _PER_GROUP + np.arange(len(rows), dtype=np.int64)
        out = np.zeros((len(rows), inputs), np.int32), np.zeros((len(rows), targets), np.int32)
        for row, (start, _) in enumerate(rows):
            part = tokens[start : start + window]
            mask = noise_mask(len(part), self.density, self.mean_span, np.random.default_rng([self.seed, ids[row]]))
            for side, found in zip(out, corrupt(part, mask, first_sentinel)):
                side[row, : len(found)] = found
        return [ids, np.full((len(rows), 1), EOS, np.int32), *out]
