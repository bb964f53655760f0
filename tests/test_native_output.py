"""Output of C++ libraries, here of a child process that writes to file descriptor 2."""

import subprocess
import sys

SCRIPT = """
import os
from expertrag_jax.native_output import held_back
os.write(2, b"before ")
{body}
os.write(2, b"after")
"""


def stderr_of(body):
    script = SCRIPT.format(body=body)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr


def test_output_is_held_back():
    assert stderr_of("with held_back():\n    os.write(2, b'inside ')") == "before after"


def test_output_is_shown_where_the_block_raises():
    body = """
try:
    with held_back():
        os.write(2, b'inside ')
        raise ValueError
except ValueError:
    pass
"""
    assert stderr_of(body) == "before inside after"
