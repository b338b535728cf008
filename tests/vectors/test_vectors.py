"""Each file in ``plan/`` and ``table/`` holds one mistake, and is refused in the words that it promises.

A header, then the content after a line ``---``. A table's content is a site.yaml, ``---`` and the CSV, read
against ``table/plan.yaml``. ``expect`` is the error's class, or ``accepted``; every ``says`` stands in the
message and no ``secret`` does.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_shared import errors
from cloister_shared.plan_file import read_plan

HERE = Path(__file__).parent
PLANS, TABLES = sorted((HERE / "plan").glob("*.yaml.txt")), sorted((HERE / "table").glob("*.txt"))


def read_vector(path: Path) -> tuple[dict[str, list[str]], str]:
    # Not read_text, which would turn "\r\n" into "\n".
    head, _, content = path.read_bytes().decode().partition("---\n")
    header: dict[str, list[str]] = {"says": [], "secret": []}
    for line in head.splitlines():
        key, _, value = line.partition(": ")
        header.setdefault(key, []).append(value)
    return header, content


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A vector that would run for ever fails instead."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_promised(header: dict[str, list[str]]) -> Iterator[None]:
    (expected,), error = header["expect"], None
    try:
        with at_most(5):
            yield
    except errors.CloisterError as refused:
        error = refused
    assert (type(error).__name__ if error else "accepted") == expected, error
    if not error:
        return
    message = str(error)
    assert header["says"], "a vector promises nothing about its message"
    for said in header["says"]:
        assert said in message
    for secret in header["secret"]:
        assert secret not in message
    # One mistake, one line, which ends with the mend as a sentence; no stack of a library's own words.
    assert len(message.splitlines()) == 1, message
    assert message.endswith((".", "?"))
    assert "Traceback" not in message
    assert len(message) < 500
    assert error.mend


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name.removesuffix(".yaml.txt"))
def test_plan(path: Path):
    header, content = read_vector(path)
    with as_promised(header):
        read_plan(content)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_table(path: Path, tmp_path: Path):
    header, content = read_vector(path)
    site, _, table = content.partition("---\n")
    (tmp_path / "site.yaml").write_text(site, encoding="utf-8")
    (tmp_path / "folder.csv").mkdir()
    for name in ("table.csv", "table.csv.gz", "table.parquet", "table.xlsx"):
        (tmp_path / name).write_bytes(table.encode(header.get("encoding", ["utf-8"])[0]))
    plan = read_plan((HERE / "table" / "plan.yaml").read_text(encoding="utf-8"))
    with as_promised(header):
        load_dataset(open_records(tmp_path / "site.yaml"), plan)


def test_no_folder_of_vectors_is_empty():
    assert len(PLANS) >= 24
    assert len(TABLES) >= 16
    for path in TABLES:
        header, content = read_vector(path)
        for secret in header["secret"]:
            assert secret in content, f"{path.name} does not hold its own secret {secret}"
