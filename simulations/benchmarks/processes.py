"""Other processes as Linux shows them in /proc: their memory, CPU time, open files and children; and one to run.

A process that let nobody look into it, as agents do, shows its files and its exact memory to root alone.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from cloister_shared.errors import Fault

TICKS = os.sysconf("SC_CLK_TCK")
PATIENCE = 60.0
"""Seconds that a command has to end what it began, when it is told to stop."""


def resident(pid: int) -> int:
    """Octets of memory in use, with what is shared."""
    return _status(pid, "VmRSS")


def peak(pid: int) -> int:
    """The most that was ``resident`` since the process began, or since ``forget_peak``."""
    return _status(pid, "VmHWM")


def forget_peak(pid: int) -> int:
    """Let the peak begin anew, and say what is resident now."""
    _file(pid, "clear_refs").write_text("5", encoding="ascii")
    return resident(pid)


def proportional(pid: int) -> int:
    """Octets of memory in use; of what several processes share, each counts its part."""
    return _kilobytes(_file(pid, "smaps_rollup").read_text(encoding="ascii"), "Pss")


def cpu(pid: int) -> float:
    """Seconds of a core that the process and its ended children used."""
    return sum(map(int, _stat(pid)[11:15])) / TICKS


def open_files(pid: int) -> int:
    """File descriptors, of sockets too."""
    return len(os.listdir(_file(pid, "fd")))


def kept_files(pid: int) -> int:
    """File descriptors that are no connection, and connections that the other side has ended and this one has not."""
    ended, count = _ended_by_the_other_side(pid), 0
    for path in _file(pid, "fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            name = os.readlink(path)
            count += not name.startswith("socket:") or name[8:-1] in ended
    return count


def _ended_by_the_other_side(pid: int) -> set[str]:
    """Inodes of TCP sockets in CLOSE_WAIT, which the kernel keeps until the process closes them."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in _file(pid, f"net/{name}").read_text().splitlines()]
    return {parts[9] for parts in lines if parts[3] == "08"}


def words(pid: int) -> list[str]:
    """The command, empty for one that has ended."""
    return _file(pid, "cmdline").read_text(encoding="utf-8").split("\0")[:-1]


def children(pid: int) -> list[int]:
    """Processes that it began and that run."""
    found: list[int] = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, *_ = _stat(int(each.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(each.name))
    return sorted(found)


def family(pid: int) -> list[int]:
    """The process, its children and theirs."""
    return [pid, *(each for child in children(pid) for each in family(child))]


@contextmanager
def watched(look: Callable[[], None], every: float) -> Generator[None, None, None]:
    """Look again and again while the block runs, and once more at its end."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(every):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    look()


def said_by(command: Sequence[str], seconds: float, allowed: Sequence[int] = (0,)) -> str:
    """What a command prints. One that is not waited for any more is interrupted, so that it ends what it began.

    Raises:
        Fault: it ended with a code that is not ``allowed``, or was not done in so many seconds.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        said = process.communicate(timeout=seconds)[0].decode()
    except BaseException as error:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Fault(f"{command[-1]} was not done in {seconds:g} s.") from None
        raise
    if process.returncode not in allowed:
        raise Fault(f"{command[-1]} ended with {process.returncode}: {said[-400:].strip()}")
    return said


def _file(pid: int, name: str) -> Path:
    return Path(f"/proc/{pid}/{name}")


def _stat(pid: int) -> list[str]:
    """The fields from the third on, which is the state; the second is a name with whatever in it."""
    return _file(pid, "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _status(pid: int, name: str) -> int:
    return _kilobytes(_file(pid, "status").read_text(encoding="utf-8"), name)


def _kilobytes(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise ProcessLookupError(f"a process has ended whose {name} was to be read")
    return 1024 * int(found[1])
