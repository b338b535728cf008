"""Outsiders with the CA file alone, and one enrolled hospital that wants more than its own: what they get, as tests."""

from __future__ import annotations

from figures import Figure
from tests_passed import figure

LONGEST = 900.0


def figures() -> list[Figure]:
    return [
        figure("probe.link", ["tests/attacks/test_link_probe.py"], LONGEST),
        figure("probe.control", ["tests/server/test_control.py", "tests/server/test_admin.py"], LONGEST),
    ]
