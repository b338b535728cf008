"""Tests as figures: how many of some files pass, out of all; a file that is not there is a figure missed."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from figures import Figure, missed, progress
from processes import said_by

ROOT = Path(__file__).resolve().parents[2]
FAILED = (0, 1)
"""What pytest ends with when it has run the tests."""


def figure(name: str, files: Sequence[str], seconds: float, root: Path = ROOT) -> Figure:
    """The tests in these files of the repository, run now, one after the other. What fails is told on the way.

    Raises:
        Fault: they cannot be run, or not in so many seconds.
    """
    if absent := [file for file in files if not (root / file).exists()]:
        return missed(name, f"there is no {Path(absent[0]).name}")
    progress(f"{name}: {', '.join(files)}")
    with TemporaryDirectory(prefix="cloister-") as scratch:
        report = Path(scratch) / "report.xml"
        chosen = [str(root / file) for file in files]
        said_by(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *chosen],
            seconds,
            FAILED,
        )
        return counted(name, report)


def counted(name: str, report: Path) -> Figure:
    """What pytest reported. A test that was skipped has not passed."""
    passed, cases = 0, list(ET.parse(report).iter("testcase"))
    for case in cases:
        if wrong := [outcome.tag for outcome in case if outcome.tag in ("failure", "error", "skipped")]:
            progress(f"{name}: {case.get('name')}: {wrong[0]}")
        else:
            passed += 1
    return Figure(name, f"{passed} of {len(cases)} tests", passed / max(len(cases), 1), "all", 0 < len(cases) == passed)
