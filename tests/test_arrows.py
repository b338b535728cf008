"""The direction of imports and the one door per foreign library, as pyproject.toml states them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_import_contracts_hold():
    beside_python = Path(sys.executable).parent
    command = shutil.which("lint-imports", path=str(beside_python)) or shutil.which("lint-imports")
    if command is None:
        pytest.fail("lint-imports is missing: install the `dev` extra")
    done = subprocess.run(
        [command, "--config", "pyproject.toml", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"an import contract is broken:\n{done.stdout}{done.stderr}"
