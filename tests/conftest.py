"""What every test relies on: a quiet, single-threaded environment and the real records, where present."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Callable[[str], Path]:
    """Ask for a folder of real records by name; the test is skipped where it is absent."""
    records = (ROOT / os.environ.get("CLOISTER_DATA", "../shared/data")).resolve()

    def folder(name: str) -> Path:
        found = records / name
        if not found.is_dir():
            pytest.skip(f"no records `{name}`: set CLOISTER_DATA to the folder that holds them")
        return found

    return folder
