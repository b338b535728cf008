"""The fault matrix, as tests: each process killed in each stage, the network, the disk, the clock, the certificate."""

from __future__ import annotations

from figures import Figure
from tests_passed import figure

LONGEST = 3600.0


def figures() -> list[Figure]:
    return [figure("faults.matrix", ["tests/deployment/test_faults.py"], LONGEST)]
