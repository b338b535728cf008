"""The malformed plans and tables of ``tests/vectors``: how many, and whether each is refused as expected."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from figures import Figure, at_least, missed, progress

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "vectors"
LEAST = 30


def figures() -> list[Figure]:
    files = [path for kind in ("plan", "table") for path in sorted((VECTORS / kind).glob("*")) if path.is_file()]
    return [at_least("vectors.malformed", len(files), LEAST, "{:.0f} plans and tables"), _refused()]


def _refused() -> Figure:
    """The vectors' own tests, in a process of their own."""
    progress("vectors: the tests of every malformed plan and table")
    tests = [str(path) for path in sorted((ROOT / "tests").rglob("test_*vectors*.py"))]
    if not tests:
        return missed("vectors.refused", "there is no test of them")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
    passed, ran = counts.get("passed", 0), sum(counts.values())
    if not ran:
        return missed("vectors.refused", "the tests did not run")
    return Figure(
        "vectors.refused",
        f"{passed} of {ran} tests pass",
        passed / ran,
        "all",
        done.returncode == 0 and passed == ran,
    )
