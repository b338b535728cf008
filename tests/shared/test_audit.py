"""cloister_shared.audit: whatever is done to the log, it is whole, or mended, or refused by the entry's number."""

import json
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_shared import audit
from cloister_shared.errors import AuditBroken

HAPPENED = [("budget.ceiling", {"epsilon": 4.0}), ("budget.reserved", {"study": "é"}), ("budget.closed", {})]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    for what, said in HAPPENED:
        audit.append(path, what, said)
    return path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_appended_is_read_in_order(log):
    entries = audit.verify(log)
    assert [(entry.what, entry.said) for entry in entries] == HAPPENED
    assert [entry.number for entry in entries] == [1, 2, 3]
    assert [entry.before for entry in entries] == [audit.START, entries[0].hash, entries[1].hash]
    assert entries[0].at.endswith("+00:00")


def test_the_head_of_an_export_stands_for_all_of_it(log, tmp_path):
    told = audit.export(log)
    assert told["head"] == told["entries"][-1]["hash"] == audit.verify(log)[-1].hash
    assert [entry["what"] for entry in told["entries"]] == [what for what, _ in HAPPENED]
    assert audit.export(tmp_path / "none.jsonl") == {"head": audit.START, "entries": []}


def test_a_line_is_flushed_before_append_returns(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.readlink(f"/proc/self/fd/{handle}")))
    audit.append(tmp_path / "audit.jsonl", "a", {})
    assert flushed[-1] == str(tmp_path / "audit.jsonl")
    assert str(tmp_path / "audit.jsonl.head.tmp") in flushed[:-1]  # and its head before it


# --- changed -----------------------------------------------------------------------------------------------
CHANGES = {
    "a value": (2, lambda it: [it[0], it[1].replace(b"reserved", b"refused!"), it[2]]),
    "a value and its hash": (2, lambda it: [it[0], again(it[1], said={"study": "x"}), it[2]]),
    "white space": (1, lambda it: [it[0].replace(b":", b": ", 1), *it[1:]]),
    "a key more": (3, lambda it: [*it[:2], it[2].replace(b"{", b'{"also":1,', 1)]),
    "not JSON": (2, lambda it: [it[0], b"nonsense\n", it[2]]),
    "taken out at the start": (1, lambda it: it[1:]),
    "taken out in the middle": (2, lambda it: [it[0], it[2]]),
    "put in twice": (2, lambda it: [it[0], it[0], *it[1:]]),
    "two exchanged": (1, lambda it: [it[1], it[0], it[2]]),
}


def again(line: bytes, **changes: object) -> bytes:
    """The same entry with changes and a hash that fits them."""
    held = json.loads(line) | changes
    del held["hash"]
    own = audit._hash(**held)
    return audit._line(own=own, **held)


@pytest.mark.parametrize("kind", CHANGES)
def test_the_first_entry_that_is_not_what_it_was_is_named(log, kind):
    number, change = CHANGES[kind]
    log.write_bytes(b"".join(change(lines(log))))
    if kind == "a value and its hash":
        number = 3  # itself it is sound; what follows holds another hash
    with pytest.raises(AuditBroken, match=rf"Entry {number} of .*audit.jsonl"):
        audit.verify(log)
    with pytest.raises(AuditBroken):
        audit.append(log, "more", {})


@pytest.mark.parametrize("keep", [0, 1])
def test_a_log_that_was_cut_is_refused(log, keep):
    log.write_bytes(b"".join(lines(log)[:keep]))
    with pytest.raises(AuditBroken, match=f"ends at entry {keep}, and its head tells of another end"):
        audit.verify(log)


def test_a_log_without_its_head_is_refused(log):
    (log.parent / "audit.jsonl.head").unlink()
    with pytest.raises(AuditBroken, match="ends at entry 3, and its head tells of another end"):
        audit.verify(log)


def test_a_tail_that_was_never_appended_is_refused(log):
    with log.open("ab") as file:
        file.write(b'{"at":"2')
    with pytest.raises(AuditBroken, match="ends in something else after entry 3"):
        audit.verify(log)


def test_a_tail_that_is_not_the_heads_is_refused(log):
    log.write_bytes(b"".join(lines(log)[:2]) + b'{"at":"1')
    with pytest.raises(AuditBroken, match=r"ends in something else after entry 2\."):
        audit.verify(log)


# --- torn --------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1))
def test_an_append_that_a_crash_cut_short_is_written_out(tmp_path, share):
    path = tmp_path / "torn.jsonl"
    for name in ("torn.jsonl", "torn.jsonl.head"):
        (tmp_path / name).unlink(missing_ok=True)
    for what, said in HAPPENED:
        audit.append(path, what, said)
    whole, last = path.read_bytes(), lines(path)[-1]
    path.write_bytes(whole[: len(whole) - round(share * len(last))])
    assert len(audit.verify(path)) == 3
    assert path.read_bytes() == whole
    assert audit.append(path, "more", {}).number == 4


def test_processes_that_append_at_once_all_find_their_place(tmp_path):
    path, children = tmp_path / "audit.jsonl", []
    for child in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                for number in range(5):
                    audit.append(path, "x", {"child": child, "number": number})
            finally:
                os._exit(0)
        children.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in children)
    entries = audit.verify(path)
    assert len(entries) == 20
    assert sorted((e.said["child"], e.said["number"]) for e in entries) == [(c, n) for c in range(4) for n in range(5)]


def test_killed_between_head_and_line_the_entry_is_there_once(log, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(audit, "_write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        audit.append(log, "killed", {})
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [entry.what for entry in audit.verify(log)][-1] == "killed"
    assert len(lines(log)) == 4


def test_what_is_missing_is_found_and_appended_with_nobody_between(log):
    seen = []

    def missing(entries):
        seen.append(len(entries))
        return [("late", {"n": n}) for n in (1, 2)]

    entries = audit.append_where(log, missing)
    assert seen == [3]
    assert [entry.what for entry in entries][3:] == ["late", "late"]
    assert entries == audit.verify(log)
    assert (log.parent / "audit.jsonl.lock").exists()
