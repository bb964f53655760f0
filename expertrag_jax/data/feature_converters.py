"""Feature converters: the examples of a SeqIO task become rows of a ``Batch``.

A converter works on chunks of examples rather than one at a time: padding, shifting and packing are array
operations, and tf.data's cost per element (some microseconds per ``map``) is paid once per chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from expertrag_jax.data.bridge import numpy_map
from expertrag_jax.data.packing import pack as pack_rows
from expertrag_jax.errors import UserError

FeatureSpec = seqio.FeatureConverter.FeatureSpec

CHUNK = 1024  # examples per vectorised conversion
PACKING_CHUNK = 4096  # examples packed together; open rows are closed at its end

TOKEN_FEATURES = ("inputs", "targets", "query", "passages")  # their last axis gets the length asked for

_TOKENS = FeatureSpec(dtype=tf.int32)
_SCALARS = {
    "id": FeatureSpec(dtype=tf.int64, rank=0),
    "retrieve": FeatureSpec(dtype=tf.bool, rank=0),
    "retrieval_needed": FeatureSpec(dtype=tf.float32, rank=0),
}
_PASSAGES = {
    "passages": FeatureSpec(dtype=tf.int32, rank=2, sequence_dim=1),
    "passage_rows": FeatureSpec(dtype=tf.int32),
    "passage_scores": FeatureSpec(dtype=tf.float32),
    "passage_relevance": FeatureSpec(dtype=tf.float32),
}
_DECODER = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")

# Names of task features -> names of Batch fields. ``targets`` becomes the three decoder fields.
FIELD_OF_FEATURE = {
    "id": "example_ids",
    "inputs": "encoder_input_tokens",
    "query": "query_tokens",
    "passages": "passage_tokens",
    "passage_rows": "passage_rows",
    "passage_scores": "passage_scores",
    "passage_relevance": "passage_relevance",
    "retrieve": "retrieve",
    "retrieval_needed": "retrieval_needed",
}


def fit(tokens: tf.Tensor, length: int) -> tf.Tensor:
    """Cuts or 0-pads the last axis to ``length``."""
    tokens = tokens[..., :length]
    missing = length - tf.shape(tokens)[-1]
    padded = tf.pad(tokens, [[0, 0]] * (tokens.shape.rank - 1) + [[0, missing]])
    padded.set_shape([*tokens.shape[:-1], length])
    return padded


def shift_right(targets: tf.Tensor, segment_ids: tf.Tensor | None = None) -> tf.Tensor:
    """Decoder inputs: targets one place to the right, 0 first in every segment.

    Args:
      targets: [N, T] int32.
      segment_ids: [N, T] int32 of packed rows, or None.

    Returns:
      [N, T] int32.
    """
    shifted = tf.pad(targets, [[0, 0], [1, 0]])[:, :-1]
    if segment_ids is None:
        return shifted
    same_segment = tf.equal(segment_ids, tf.pad(segment_ids, [[0, 0], [1, 0]])[:, :-1])
    return tf.where(same_segment, shifted, 0)


class BatchFeatureConverter(seqio.FeatureConverter):
    """Pads or packs the features of a task into ``Batch`` fields.

    Subclasses name the task features they take; ``FIELD_OF_FEATURE`` names the fields that these become.
    Packing keeps ``inputs`` and ``targets`` alone: a packed row has no single id or decision.

    Attributes:
      TASK_FEATURES: name -> dtype and rank. Token features are cut and padded to ``task_feature_lengths``;
        features of rank 0 and features [K] appear there with any number.
    """

    TASK_FEATURES: Mapping[str, FeatureSpec] = {}
    MODEL_FEATURES: Mapping[str, FeatureSpec] = {}
    PACKING_FEATURE_DTYPES = {
        "encoder_segment_ids": tf.int32,
        "encoder_positions": tf.int32,
        "decoder_segment_ids": tf.int32,
        "decoder_positions": tf.int32,
    }

    def __init__(self, pack: bool = False, apply_length_check: bool = False, **options):
        """Makes a converter.

        Args:
          pack: whether several examples share a row.
          apply_length_check: SeqIO's check of every example's length; off because chunks are cut to length
            anyway, and the check costs two passes over the data.
          **options: further options of ``seqio.FeatureConverter``.
        """
        if pack:
            self.TASK_FEATURES = {k: self.TASK_FEATURES[k] for k in ("inputs", "targets")}
        self.MODEL_FEATURES = {
            FIELD_OF_FEATURE[name]: spec for name, spec in self.TASK_FEATURES.items() if name != "targets"
        }
        if "targets" in self.TASK_FEATURES:
            float_tokens = FeatureSpec(dtype=tf.float32)
            self.MODEL_FEATURES |= dict(zip(_DECODER, (_TOKENS, _TOKENS, float_tokens)))
        super().__init__(pack=pack, apply_length_check=apply_length_check, **options)

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        """Lengths of the fields: those of the task features that they come from."""
        lengths = {FIELD_OF_FEATURE[k]: n for k, n in task_feature_lengths.items() if k != "targets"}
        if "targets" in task_feature_lengths:
            lengths |= {name: task_feature_lengths["targets"] for name in _DECODER}
        if self.pack:
            for name in self.PACKING_FEATURE_DTYPES:
                lengths[name] = task_feature_lengths["inputs" if name.startswith("encoder") else "targets"]
        return lengths

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        """Chunks, converts each chunk at once, and unchunks."""
        ds = ds.map(lambda example: {name: example[name] for name in self.TASK_FEATURES})
        ds = ds.padded_batch(PACKING_CHUNK if self.pack else CHUNK)
        ds = ds.map(lambda chunk: self._convert_chunk(chunk, task_feature_lengths))
        return ds.unbatch()

    def _convert_chunk(
        self, chunk: Mapping[str, tf.Tensor], lengths: Mapping[str, int]
    ) -> dict[str, tf.Tensor]:
        """The fields of [n, ...] padded task features."""
        chunk = {k: fit(v, int(lengths[k])) if k in TOKEN_FEATURES else v for k, v in chunk.items()}
        if self.pack:
            chunk = _pack_chunk(chunk, {name: int(lengths[name]) for name in ("inputs", "targets")})
        fields = {FIELD_OF_FEATURE[k]: v for k, v in chunk.items() if k in FIELD_OF_FEATURE}
        if "targets" in chunk:
            targets = chunk["targets"]
            fields["decoder_target_tokens"] = targets
            fields["decoder_input_tokens"] = shift_right(targets, chunk.get("targets_segment_ids"))
            fields["decoder_loss_weights"] = tf.cast(tf.not_equal(targets, 0), tf.float32)
        if self.pack:
            for side, name in (("encoder", "inputs"), ("decoder", "targets")):
                fields[f"{side}_segment_ids"] = chunk[f"{name}_segment_ids"]
                fields[f"{side}_positions"] = chunk[f"{name}_positions"]
        return fields


def _pack_chunk(chunk: Mapping[str, tf.Tensor], limits: Mapping[str, int]) -> dict[str, tf.Tensor]:
    names = [name + suffix for name in limits for suffix in ("", "_segment_ids", "_positions")]

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        packed = pack_rows(dict(zip(limits, arrays)), limits)
        return [packed[name] for name in names]

    specs = [tf.TensorSpec([None, limits[name.split("_")[0]]], tf.int32) for name in names]
    return dict(zip(names, numpy_map(call, [chunk[name] for name in limits], specs)))


class DecidedFeatureConverter(BatchFeatureConverter):
    """Decided mode: the gate policy has spoken, evidence (if any) stands in ``inputs``."""

    TASK_FEATURES = {"inputs": _TOKENS, "targets": _TOKENS} | {k: _SCALARS[k] for k in ("id", "retrieve")}


class QuestionFeatureConverter(BatchFeatureConverter):
    """Questions with their query tokens and no passages: closed-book training, gate data, evaluation."""

    TASK_FEATURES = {"inputs": _TOKENS, "targets": _TOKENS, "query": _TOKENS} | {"id": _SCALARS["id"]}


class BothArmsFeatureConverter(BatchFeatureConverter):
    """Both-arms mode: the question alone, and passages for every row."""

    TASK_FEATURES = (
        {"inputs": _TOKENS, "targets": _TOKENS, "query": _TOKENS}
        | _PASSAGES
        | {k: _SCALARS[k] for k in ("id", "retrieval_needed")}
    )


class OpenBookFeatureConverter(BatchFeatureConverter):
    """Reading: passages that come with the example, so without rows and scores."""

    TASK_FEATURES = {"inputs": _TOKENS, "targets": _TOKENS, "query": _TOKENS, "id": _SCALARS["id"]} | {
        k: _PASSAGES[k] for k in ("passages", "passage_relevance")
    }


class RetrieverFeatureConverter(BatchFeatureConverter):
    """Training the dual encoder: a query, and passages of which the relevant ones are marked."""

    TASK_FEATURES = {"query": _TOKENS, "id": _SCALARS["id"]} | {
        k: _PASSAGES[k] for k in ("passages", "passage_relevance")
    }


class CorpusRetrieverFeatureConverter(RetrieverFeatureConverter):
    """The same where passages are of a corpus, whose rows tell which of them are one."""

    TASK_FEATURES = RetrieverFeatureConverter.TASK_FEATURES | {"passage_rows": _PASSAGES["passage_rows"]}


CONVERTERS = (
    DecidedFeatureConverter,
    BothArmsFeatureConverter,
    OpenBookFeatureConverter,
    QuestionFeatureConverter,
    CorpusRetrieverFeatureConverter,
    RetrieverFeatureConverter,
)


def converter_for(features: Mapping[str, seqio.Feature], pack: bool = False) -> BatchFeatureConverter:
    """The first converter of ``CONVERTERS`` whose features a task has.

    Args:
      features: ``output_features`` of a task or mixture.
      pack: whether several examples share a row; needs ``inputs`` and ``targets``.

    Raises:
      UserError: no converter fits.
    """
    for converter in CONVERTERS:
        if set(converter.TASK_FEATURES) <= set(features):
            if pack and not {"inputs", "targets"} <= set(features):
                break
            return converter(pack=pack)
    raise UserError(
        f"no feature converter takes the features {sorted(features)} (pack={pack}): name one as feature_converter, as "
        "seqio.EncDecFeatureConverter()."
    )
