"""Versions of an index: the current one is whole at every moment, and an open one stays what it was."""

import threading

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval import versions
from expertrag_jax.retrieval.corpus import Passages
from expertrag_jax.retrieval.index import make_index, open_index, write_index

COUNT = 4


def writer(number):
    """Writes an index whose every vector and text is ``number``."""
    vectors = np.full((COUNT, 2), number, np.float32)
    corpus = Passages([f"p{i}" for i in range(COUNT)], ["t"] * COUNT, [f"version {number}"] * COUNT)
    tokens = np.full((COUNT, 3), number, np.int32)

    def write(place):
        write_index(place, make_index("exact").build(corpus, vectors), corpus, passage_tokens=tokens, vectors=vectors)

    return write


def test_readers_never_see_a_half_or_a_mixture(tmp_path):
    root, seen, wrong, done = tmp_path / "root", set(), [], threading.Event()
    versions.publish(root, "v1", writer(1))

    def read():
        while not done.is_set():
            try:
                loaded = open_index(root / versions.CURRENT)
            except Exception as error:  # any error is a failure
                wrong.append(repr(error))
                return
            number = int(loaded.vectors[0, 0])
            if loaded.passages.texts[0] != f"version {number}" or (loaded.tokens != number).any():
                wrong.append(number)
            seen.add(number)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(2, 16):  # only the current one stays: a reader may lose the version that it is about to open
        versions.publish(root, f"v{number}", writer(number), keep=1)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong and seen
    assert versions.current(root) == root.resolve() / "v15"


def test_a_version_that_cannot_be_written_changes_nothing(tmp_path):
    versions.publish(tmp_path, "v1", writer(1))

    def broken(place):
        raise OSError("no space")

    with pytest.raises(OSError):
        versions.publish(tmp_path, "v2", broken)
    assert versions.current(tmp_path).name == "v1"
    open_index(tmp_path / versions.CURRENT)


def test_old_versions_are_removed_and_neither_the_current_one_nor_what_is_not_of_here(tmp_path):
    writer(0)(tmp_path / "mine")
    for number in range(1, 5):
        versions.publish(tmp_path, f"v{number}", writer(number), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [versions.PUBLISHED, "current", "mine", "v3", "v4"]
    versions.publish(tmp_path, "v3", lambda place: pytest.fail("it is there already"), keep=2)
    assert versions.current(tmp_path).name == "v3"
    with pytest.raises(UserError, match="no current version"):
        versions.current(tmp_path / "elsewhere")


def test_an_open_version_can_be_read_when_it_is_gone(tmp_path):
    """Also what is read late, the passages' texts."""
    versions.publish(tmp_path, "v1", writer(1))
    loaded = open_index(tmp_path / versions.CURRENT)
    for number in (2, 3):
        versions.publish(tmp_path, f"v{number}", writer(number))
    assert not loaded.directory.exists()
    assert loaded.passages.texts == ["version 1"] * COUNT
    np.testing.assert_array_equal(loaded.tokens, np.full((COUNT, 3), 1))
    np.testing.assert_array_equal(loaded.vectors, np.full((COUNT, 2), 1.0))
