"""cloister_client.sandbox: no socket, no other process's memory, no more memory of its own than allowed."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cloister_client import sandbox

CALLS = (
    "io_uring_setup",
    "socketpair",
    "sendto",
    "ptrace",
    "process_vm_readv",
    "pidfd_getfd",
    "unshare",
    "bpf",
    "keyctl",
)

CONFINED = """
import ctypes, socket, subprocess, sys, threading
import numpy as np
from cloister_client import sandbox

early, go = [], threading.Event()

def tried(work):
    try:
        work()
    except PermissionError:
        return "refused"
    return "let through"

def other():
    go.wait()
    early.append(tried(socket.socket))

thread = threading.Thread(target=other)
thread.start()
try:
    sandbox.confine(1.0)
    {code}
finally:
    go.set()
    thread.join()
"""


def confined(code: str) -> list[str]:
    """What a process prints that confined itself and then ran ``code``."""
    program = CONFINED.replace("{code}", code.replace("\n", "\n    "))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_no_socket_of_any_family_can_be_made():
    said = confined("print({tried(lambda: socket.socket(f, t)) for f in range(46) for t in (1, 2, 3, 5)})")
    assert said == ["{'refused'}"]


def test_a_thread_that_ran_before_is_confined_too():
    assert confined("go.set(); thread.join(); print(early)") == ["['refused']"]


def test_a_program_that_it_starts_is_confined_too():
    said = confined("subprocess.run([sys.executable, '-c', 'import socket; socket.socket()'], stderr=sys.stdout)")
    assert said[-1].startswith("PermissionError")


def test_no_other_way_leads_to_a_socket_or_into_another_process():
    code = f"""
libc = ctypes.CDLL(None, use_errno=True)
for call in {CALLS}:
    number = sandbox._DENIED[call][sandbox._KINDS[sandbox.platform.machine()][2]]
    print(call, libc.syscall(number, 0, 0, 0, 0, 0, 0), ctypes.get_errno())
"""
    assert confined(code) == [f"{call} -1 1" for call in CALLS]


def test_nobody_of_this_user_can_look_into_it():
    assert confined("print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))") == ["0"]  # PR_GET_DUMPABLE


def test_more_memory_than_allowed_is_a_sentence():
    code = """
try:
    np.ones(2**28)
except MemoryError as fault:
    print(sandbox.out_of_memory(fault))
"""
    assert "memory_gb under policy" in confined(code)[0]


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("[..] DefaultCPUAllocator: can't allocate memory: .."),
    ],
)
def test_what_no_memory_looks_like(fault):
    assert sandbox.out_of_memory(fault)


def test_another_fault_is_not_for_want_of_memory():
    assert not sandbox.out_of_memory(RuntimeError("the size of tensor a must match"))


def test_each_call_has_the_number_that_the_kernel_gives_it():
    headers = {
        "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
        "aarch64": "/usr/include/asm-generic/unistd.h",
    }
    header = Path(headers.get(platform.machine(), ""))
    if not header.is_file():
        pytest.skip("the kernel's headers are not installed")
    known = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", header.read_text()))
    column = sandbox._KINDS[platform.machine()][2]
    ours = {name: str(numbers[column]) for name, numbers in sandbox._DENIED.items() if name in known}
    assert ours == {name: known[name] for name in ours}
    assert len(ours) > 30


def test_nothing_that_makes_threads_is_imported_before_it_is_said_how_many():
    look = "import sys, cloister_client.child; print([name for name in ('numpy', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout == "[]\n"
