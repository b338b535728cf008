"""What every test relies on: a quiet, single-threaded environment and the real records, where present."""

import importlib
import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

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


@pytest.fixture(scope="session")
def plain() -> Generator[ModuleType, None, None]:
    """Hospitals that are Flower's own client and nothing else, and rounds served by a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "simulations" / "benchmarks"))
        yield importlib.import_module("plain_hospital")


@pytest.fixture(scope="module")
def rounds(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[SimpleNamespace, None, None]:
    """A consortium whose rounds are served; ``enrol()`` is another hospital of it."""
    from cloister_server.link import open_link

    folder = plain.found_consortium(tmp_path_factory.mktemp("consortium"))
    port, enrolled = plain.free_port(), list[Any]()
    with plain.serving(folder, port) as process:
        link = open_link(folder / "link")

        def enrol(**lifetime: Any) -> Any:
            enrolled.append(hospital := plain.PlainHospital(folder, f"Hospital {len(enrolled)}", port, **lifetime))
            link.register(hospital.public_key)
            hospital.activate()
            return hospital

        yield SimpleNamespace(folder=folder, port=port, link=link, process=process, enrol=enrol)
        for hospital in enrolled:
            hospital.close()
