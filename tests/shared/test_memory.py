"""Memory that a process frees is kept, and handed back when it is asked for."""

import subprocess
import sys

PROGRAM = """
from pathlib import Path
from cloister_shared import memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

{keep}
before = resident()
pieces = [b"x" * 5 * 2**20 for _ in range(20)]
last = bytearray(1)  # above them, so that the heap cannot shrink by itself
del pieces
kept = resident() - before
memory.give_back()
print(kept > 80e6, resident() - before < 20e6)
"""


def run(keep: str) -> list[str]:
    command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_what_is_freed_stays_until_it_is_given_back():
    assert run("memory.keep()") == ["True", "True"]


def test_without_it_what_is_freed_goes_at_once():
    assert run("") == ["False", "True"]
