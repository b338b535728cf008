"""cloister_client.egress: what left is on disk before it leaves, in a chain that shows every change."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cloister_client.egress import Egress, told
from cloister_client.objects import Contents
from cloister_shared.errors import AuditBroken

HELD = Contents(7, "a" * 64, (("update", "float32", 25_000_000),), ("run", "round", "site", "metrics.loss"), 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "egress.jsonl"


def note(log: Egress, held: Contents = HELD, octets: int = 100_000_000) -> None:
    log.note("ab" * 32, "07", "train", "cd" * 32, octets, held)


@pytest.fixture
def opened(path) -> Iterator[Callable[[], Egress]]:
    """The log as an agent opens it that was started anew."""
    with ExitStack() as logs:
        yield lambda: logs.enter_context(closing(Egress(path)))


def test_a_line_says_what_kinds_of_values_left(path, opened):
    note(opened())
    (line,) = path.read_text().splitlines()
    said = json.loads(line)["said"]
    assert said["vectors"] == [["update", "float32", 25_000_000]]
    assert (said["round"], said["octets"], said["message"]) == (3, 100_000_000, "cd" * 32)
    assert said["header"] == ["run", "round", "site", "metrics.loss"]


def test_it_goes_on_where_it_was_left(path, opened):
    for _ in range(3):
        note(opened())
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("at", [0, 1])
def test_a_line_that_was_changed_is_found(path, at, opened):
    log = opened()
    for _ in range(2):
        note(log)
    lines = path.read_text().splitlines(keepends=True)
    lines[at] = lines[at].replace("100000000", "1")
    path.write_text("".join(lines))
    with pytest.raises(AuditBroken, match=f"Entry {at + 1} "):
        told(path)
    with pytest.raises(AuditBroken):
        opened()


def test_a_line_that_a_crash_cut_short_was_never_sent(path, opened):
    note(opened())
    with path.open("a") as file:
        file.write('{"at": "20')
    assert "1 message," in told(path)
    note(opened())
    assert "2 messages," in told(path)


def test_a_full_disk_leaves_no_half_line(path, monkeypatch, opened):
    log = opened()
    note(log)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            note(log)
    assert path.read_bytes() == before
    note(log)
    assert "2 messages," in told(path)


def test_the_table_is_for_people(path, opened):
    log = opened()
    note(log)
    note(log, Contents(7, "a" * 64, error=1001), 300)
    note(log, Contents(7, "a" * 64, (), tuple(f"metrics.sum_of_feature_{at}" for at in range(30))), 4000)
    page = told(path)
    assert max(map(len, page.splitlines())) <= 100
    assert "update (float32 x 25,000,000)" in page
    assert "error 1001" in page
    assert "3 messages, 100,004,300 octets" in page


def test_before_anything_left_it_says_so(path):
    assert told(path) == "Nothing has left this hospital yet."
