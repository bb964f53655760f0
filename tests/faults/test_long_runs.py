"""What only long runs, several threads and several processes show."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import threading

import numpy as np
import pytest

from expertrag_jax.errors import UserError
from expertrag_jax.retrieval.cache import RetrievalCache
from expertrag_jax.training.log import read_lines

CHECKPOINTS = """
import resource, sys
import jax, numpy as np, optax
from expertrag_jax.training.checkpoint import Checkpoints
from expertrag_jax.training.state import TrainState
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
number = jax.numpy.zeros((), jax.numpy.int32)
state = TrainState(step=number, phase=number, phase_step=number, params={"w": jax.numpy.ones(3)}, optimizer_state=())
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    for step in range(1, int(sys.argv[2]) + 1):
        checkpoints.save(step, state, {"phase": "p"})
print(checkpoints.latest)
"""


def test_four_hundred_checkpoints_need_two_hundred_descriptors(tmp_path):
    command = [sys.executable, "-c", CHECKPOINTS, str(tmp_path / "checkpoints"), "400"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.stdout.strip() == "400", done.stderr[-2000:]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200


FILL = """
import sys
import numpy as np
from expertrag_jax.retrieval.cache import RetrievalCache
cache, first = RetrievalCache(sys.argv[1]), int(sys.argv[2])
for start in range(first, first + 400, 8):
    rows = np.arange(start, start + 8)[:, None] + np.arange(3)
    cache.put("m", "e", [f"q{n}" for n in range(start, start + 8)], rows, rows * 0.5)
"""


def fill(cache, first, count):
    for start in range(first, first + count, 8):
        names = [f"q{number}" for number in range(start, start + 8)]
        rows = np.arange(start, start + 8)[:, None] + np.arange(3)
        assert cache.get("m", "e", 3, names)[0] is None
        cache.put("m", "e", names, rows, rows * 0.5)


def holds(cache, count):
    found = cache.get("m", "e", 3, [f"q{number}" for number in range(count)])
    assert None not in found
    np.testing.assert_array_equal([rows[0] for rows, _ in found], np.arange(count))
    np.testing.assert_array_equal([scores[0] for _, scores in found], np.arange(count) * 0.5)
    assert len(cache) == count


def test_eight_threads_share_a_cold_cache(tmp_path):
    cache, errors = RetrievalCache(tmp_path / "c.sqlite"), []

    def work(first):
        try:
            fill(cache, first, 800)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(800 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    holds(cache, 6400)


def test_two_processes_share_a_cold_cache(tmp_path):
    path = tmp_path / "c.sqlite"
    others = [subprocess.Popen([sys.executable, "-c", FILL, str(path), str(first)]) for first in (0, 400)]
    assert [process.wait() for process in others] == [0, 0]
    holds(RetrievalCache(path), 800)


@pytest.mark.parametrize("column", ["rows", "scores", "checksum"])
def test_a_changed_result_is_refused(tmp_path, column):
    path = tmp_path / "c.sqlite"
    cache = RetrievalCache(path)
    fill(cache, 0, 8)
    with sqlite3.connect(path) as connection:
        (value,) = connection.execute(f"SELECT {column} FROM checked_results").fetchone()
        changed = bytes([value[0] ^ 1]) + value[1:]
        connection.execute(f"UPDATE checked_results SET {column} = ?", (changed,))
    with pytest.raises(UserError, match="c.sqlite is damaged .*: delete it"):
        cache.get("m", "e", 3, ["q0"])


def test_a_cut_cache_is_one_sentence(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = RetrievalCache(path)
    fill(cache, 0, 800)
    cache.close()
    path.write_bytes(path.read_bytes()[:8192] + b"x" * 4096)
    with pytest.raises(UserError, match="c.sqlite .*: delete it"):
        other = RetrievalCache(path)
        other.get("m", "e", 3, [f"q{number}" for number in range(800)])


@pytest.mark.parametrize(
    "line", ["{cut", '{"loss": 1}', "[1]", "\udcff", "[" * 200000, '{"step": "x"}', '{"step": 1e999}']
)
def test_a_damaged_log_is_read_without_its_damage(tmp_path, caplog, line):
    path = tmp_path / "metrics.jsonl"
    content = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert "1 of 3 lines are damaged" in caplog.text
