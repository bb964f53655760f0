"""Packing: several short examples in one row, so that a short input costs only its own tokens.

A row holds examples one after another, told apart by segment ids (1, 2, ...; 0 on padding) and by positions
that restart at 0. All features of an example go to the same row with the same segment id (Raffel et al. 2020,
section 3.1.2; the layout is that of ``seqio.utils.trim_and_pack_dataset``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def lengths_of(tokens: np.ndarray) -> np.ndarray:
    """Number of tokens before the padding, per row.

    Args:
      tokens: [N, L] int, 0-padded on the right.

    Returns:
      [N] int64: one more than the position of the last token that is not 0.
    """
    used = tokens != 0
    return np.where(used.any(axis=1), tokens.shape[1] - np.argmax(used[:, ::-1], axis=1), 0)


def assign_rows(
    lengths: np.ndarray, limits: np.ndarray, open_rows: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """First fit over a window of open rows.

    Args:
      lengths: [N, F] tokens of each example in each of F features.
      limits: [F] tokens that a row holds per feature.
      open_rows: how many rows may still take examples; when none of them fits, the oldest is closed. With 1
        the assignment is SeqIO's.

    Returns:
      row [N] int64 and segment [N] int64 (from 1) of each example, and the number of rows.
    """
    limits = [int(limit) for limit in limits]
    rows = np.zeros(len(lengths), np.int64)
    segments = np.zeros(len(lengths), np.int64)
    window: list[list] = []  # [row, segments so far, room per feature ...], oldest first
    count = 0
    for example, needed in enumerate(lengths.tolist()):
        for entry in window:
            if all(room >= need for room, need in zip(entry[2:], needed)):
                break
        else:
            if len(window) == open_rows:
                window.pop(0)
            entry = [count, 0, *limits]
            window.append(entry)
            count += 1
        entry[1] += 1
        for feature, need in enumerate(needed):
            entry[2 + feature] -= need
        rows[example], segments[example] = entry[0], entry[1]
    return rows, segments, count


def pack(
    features: Mapping[str, np.ndarray], limits: Mapping[str, int], open_rows: int = 16
) -> dict[str, np.ndarray]:
    """Packs examples into rows.

    Args:
      features: name -> [N, L_name] int32, 0-padded on the right; a token 0 inside an example is kept.
      limits: name -> length of a packed row; longer examples are cut.
      open_rows: see ``assign_rows``.

    Returns:
      For every feature ``name`` [R, limit], ``name_segment_ids`` and ``name_positions`` alike, int32. Rows
      stand in the order in which they were opened.
    """
    names = list(limits)
    cut = {name: np.asarray(features[name])[:, : limits[name]] for name in names}
    lengths = np.stack([lengths_of(cut[name]) for name in names], axis=1)
    rows, segments, count = assign_rows(lengths, np.array([limits[n] for n in names]), open_rows)
    order = np.argsort(rows, kind="stable")  # examples of a row side by side, in the order of their segments
    packed = {}
    for column, name in enumerate(names):
        n = lengths[order, column]
        ends = np.cumsum(n)
        row_of_token = np.repeat(rows[order], n)
        position = np.arange(n.sum()) - np.repeat(ends - n, n)
        tokens_before_row = np.concatenate([[0], np.cumsum(np.bincount(row_of_token, minlength=count))[:-1]])
        slot = np.arange(n.sum()) - (tokens_before_row[row_of_token] if count else 0)
        source = cut[name][np.repeat(order, n), position]
        for suffix, values in (
            ("", source),
            ("_segment_ids", np.repeat(segments[order], n)),
            ("_positions", position),
        ):
            out = np.zeros((count, limits[name]), np.int32)
            out[row_of_token, slot] = values
            packed[name + suffix] = out
    return packed
