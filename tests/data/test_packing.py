"""Packing against SeqIO's own packer and against a reading of the packed rows."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from expertrag_jax.data.packing import lengths_of, pack


def random_examples(rng, count, limits):
    lengths = {name: rng.integers(1, limit + 1, count) for name, limit in limits.items()}
    features = {}
    for name, limit in limits.items():
        tokens = rng.integers(1, 99, (count, limit)).astype(np.int32)
        tokens[np.arange(limit)[None] >= lengths[name][:, None]] = 0
        features[name] = tokens
    return features


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_open_row_equals_seqio(seed):
    limits = {"inputs": 24, "targets": 10}
    features = random_examples(np.random.default_rng(seed), 24, limits)  # SeqIO flushes after 24
    ds = tf.data.Dataset.from_tensor_slices(features)
    expected = list(seqio.utils.trim_and_pack_dataset(ds, limits).as_numpy_iterator())
    packed = pack(features, limits, open_rows=1)
    assert set(packed) == set(expected[0])
    for name, rows in packed.items():
        np.testing.assert_array_equal(rows, np.stack([row[name] for row in expected]), err_msg=name)


def unpacked(packed, name):
    """All examples in packed rows, as tuples of tokens, by walking every row."""
    found = []
    for tokens, segments, positions in zip(
        packed[name], packed[name + "_segment_ids"], packed[name + "_positions"], strict=True
    ):
        assert (tokens[segments == 0] == 0).all() and (positions[segments == 0] == 0).all()
        for segment in range(1, segments.max(initial=0) + 1):
            here = np.flatnonzero(segments == segment)
            assert (np.diff(here) == 1).all()
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            found.append(tuple(tokens[here]))
    return found


def test_more_open_rows_keep_every_example_and_need_fewer_rows():
    limits = {"inputs": 40, "targets": 12}
    features = random_examples(np.random.default_rng(3), 300, limits)
    one, many = pack(features, limits, open_rows=1), pack(features, limits, open_rows=16)
    examples = {name: sorted(tuple(row[row != 0]) for row in features[name]) for name in limits}
    for packed in (one, many):
        for name in limits:
            assert sorted(unpacked(packed, name)) == examples[name]
    assert len(many["inputs"]) < len(one["inputs"])
    # inputs and targets of one example meet again: same row, same segment
    pairs = {(tuple(a[a != 0]), tuple(b[b != 0])) for a, b in zip(features["inputs"], features["targets"])}
    row = {name: many[name][0] for name in many}
    for segment in range(1, row["inputs_segment_ids"].max() + 1):
        pair = tuple(tuple(row[name][row[name + "_segment_ids"] == segment]) for name in limits)
        assert pair in pairs


def test_a_zero_inside_an_example_is_kept():
    assert lengths_of(np.array([[5, 0, 7, 0], [0, 0, 0, 0], [1, 2, 3, 4]])).tolist() == [3, 0, 4]
    packed = pack({"inputs": np.array([[5, 0, 7, 0], [8, 0, 0, 0]])}, {"inputs": 4})
    assert packed["inputs"].tolist() == [[5, 0, 7, 8]]
    assert packed["inputs_segment_ids"].tolist() == [[1, 1, 1, 2]]
