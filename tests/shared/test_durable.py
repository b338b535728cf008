"""cloister_shared.durable: a file is the old one or the new one, and is read as data or not at all."""

import json
import os
import pickle
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import save_file

from cloister_shared import durable
from cloister_shared.errors import CheckpointBroken

OLD, NEW = (
    ({"round": 1}, {"model": np.arange(3, dtype=np.float32)}),
    ({"round": 2}, {"model": np.ones(5, np.float32)}),
)
vectors = arrays_of.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))
headers = st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(max_size=8), st.lists))


def equal(a: durable.Arrays, b: durable.Arrays) -> bool:
    """To the bit: NaN and -0.0 as well."""
    return a.keys() == b.keys() and all(
        a[name].tobytes() == b[name].tobytes() and a[name].shape == b[name].shape for name in a
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers, st.dictionaries(st.text("abc_.0", min_size=1, max_size=6), vectors, max_size=4))
def test_what_is_saved_is_loaded(tmp_path: Path, header, arrays):
    durable.save(tmp_path / "file", header, arrays)
    found_header, found = durable.load(tmp_path / "file")
    assert found_header == durable.load_header(tmp_path / "file") == header
    assert equal(found, arrays)
    for vector in found.values():  # memory of its own: the next save may replace the file
        assert vector.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_saved_file_stays_as_loaded_when_it_is_replaced(tmp_path: Path):
    durable.save(tmp_path / "file", *OLD)
    _, found = durable.load(tmp_path / "file")
    durable.save(tmp_path / "file", *NEW)
    assert equal(found, OLD[1])


def test_the_file_is_flushed_then_renamed_then_its_folder_flushed(tmp_path: Path, monkeypatch):
    """In any other order a power cut may leave an empty file under the final name."""
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.replace

    def flush(handle: int) -> None:
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{handle}")).name))
        fsync(handle)

    def move(a: Path, b: Path) -> None:
        done.append(("rename", Path(b).name))
        rename(a, b)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", move)
    durable.save(tmp_path / "file", *OLD)
    durable.save_text(tmp_path / "text", "said")
    assert done == [
        ("flush", "file.tmp"),
        ("rename", "file"),
        ("flush", tmp_path.name),
        ("flush", "text.tmp"),
        ("rename", "text"),
        ("flush", tmp_path.name),
    ]


def test_the_disk_works_beside_the_block_and_is_done_after_it(tmp_path: Path, monkeypatch):
    path, working, fsync = tmp_path / "file", threading.Event(), os.fsync
    durable.save(path, *OLD)
    arrays = {"model": NEW[1]["model"].copy()}

    def flush(handle: int) -> None:
        assert working.wait(10)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    with durable.saving(path, NEW[0], arrays):
        assert equal(durable.load(path)[1], OLD[1])
        arrays["model"][:] = np.nan  # as masking in place would
        working.set()
    header, found = durable.load(path)
    assert header == NEW[0]
    assert equal(found, NEW[1])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_block_does_not_end_well_on_a_full_disk(tmp_path: Path, monkeypatch, step):
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"), durable.saving(tmp_path / "file", *NEW):
        pass


def test_a_block_that_fails_leaves_the_file_saved(tmp_path: Path):
    with pytest.raises(ZeroDivisionError), durable.saving(tmp_path / "file", *NEW):
        _ = 1 / 0
    assert equal(durable.load(tmp_path / "file")[1], NEW[1])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch, step):
    path = tmp_path / "file"
    durable.save(path, *OLD)
    durable.save_text(tmp_path / "text", "old")
    for save in (lambda: durable.save(path, *NEW), lambda: durable.save_text(tmp_path / "text", "new")):
        child = os.fork()
        if child == 0:
            try:
                monkeypatch.setattr(os, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                save()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    header, found = durable.load(path)
    assert header == OLD[0]
    assert equal(found, OLD[1])
    assert (tmp_path / "text").read_text() == "old"
    # What lies beside it is in nobody's way.
    durable.save(path, *NEW)
    assert durable.load(path)[0] == NEW[0]


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, -1])
def test_a_torn_file_is_refused(tmp_path: Path, keep):
    path = tmp_path / "file"
    durable.save(path, *OLD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointBroken, match=r"file is damaged or was not written by Cloister\. Restore it"):
        durable.load(path)


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "file"
    durable.save(path, *OLD)
    whole = path.read_bytes()
    others = {
        "longer": whole + b"\0",
        "text": b"round: 1",
        "pickle": pickle.dumps({"model": [1.0]}),
        "endless header": b"\xff" * 16,
    }
    for content in others.values():
        path.write_bytes(content)
        for read in (durable.load, durable.load_header):
            with pytest.raises(CheckpointBroken):
                read(path)


@pytest.mark.parametrize("metadata", [None, {}, {"other": "{}"}, {"header": "{"}])
def test_safetensors_of_others_are_refused(tmp_path: Path, metadata):
    save_file({"model": np.zeros(2, np.float32)}, tmp_path / "file", metadata=metadata)
    with pytest.raises(CheckpointBroken):
        durable.load(tmp_path / "file")


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.float16])
def test_arrays_of_another_type_are_refused(tmp_path: Path, dtype):
    """They would be read as so many float32 of other values."""
    save_file({"model": np.zeros(2, dtype)}, tmp_path / "file", metadata={"header": json.dumps({})})
    with pytest.raises(CheckpointBroken):
        durable.load(tmp_path / "file")


def test_text_is_kept_as_it_is(tmp_path: Path):
    text = "risk ≥ 20 %\nµmol/L\n"
    durable.save_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_text(encoding="utf-8") == text
