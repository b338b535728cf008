"""What the training process may not do: no network, no other process's memory, no more memory of its own than allowed.

Linux alone can promise this, by a seccomp filter (kernel Documentation/userspace-api/seccomp_filter.rst): a few
instructions that the kernel runs before every system call of this process, in all its threads and whatever they
start, and that nobody can take off again. Every call that makes or reaches a socket fails with EPERM, so the file
descriptors that the process was born with are all it has. Installed before any record is opened, and tried out.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import socket
import struct
from contextlib import suppress

from cloister_shared.errors import ConsentRefused

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_KILL_PROCESS, _ALLOW, _DENY = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
"""Classic BPF: load a word of the call's description, jump where it equals, where it is not less, and return."""
_NUMBER, _ARCHITECTURE = 0, 4
"""Where the call's number and the processor's kind stand in that description."""
_X32 = 0x40000000
"""x86-64's second set of numbers for the same calls begins here; nothing of ours uses it."""

_KINDS = {"x86_64": (0xC000003E, 317, 0), "aarch64": (0xC00000B7, 277, 1)}
"""AUDIT_ARCH of a processor, the number of seccomp(2) on it, and its column below."""

_DENIED = {
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "kcmp": (312, 272), "process_madvise": (440, 440),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
}  # fmt: skip
"""Numbers on x86-64 and on aarch64. io_uring makes sockets without a call of its own; pidfd_getfd takes another
process's, such as the agent's."""


def confine(memory_gb: float, *, network: bool = False) -> None:
    """Put this process, and all it starts, under the limits; for good. ``network`` leaves the filter out.

    Raises:
        ConsentRefused: the kernel cannot promise that there is no network.
    """
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("800")  # where the machine's memory ends, this process goes first
    _limit(resource.RLIMIT_DATA, int(memory_gb * 2**30))
    _limit(resource.RLIMIT_CORE, 0)  # a core dump would hold records
    _limit(resource.RLIMIT_NOFILE, 1024)
    if not network:
        _shut()
    unseen()


def unseen() -> None:
    """Let no other process of this user look into this one's memory, where Linux can promise that."""
    if os.uname().sysname == "Linux":
        _prctl(_PR_SET_DUMPABLE, 0)


def out_of_memory(fault: BaseException) -> str:
    """A sentence, if this is what reaching the limit on memory looks like to Python, to torch, or to the system."""
    said = str(fault).lower()
    if not (
        isinstance(fault, MemoryError)
        or (isinstance(fault, OSError) and fault.errno == errno.ENOMEM)
        or (isinstance(fault, RuntimeError) and ("allocate memory" in said or "enough memory" in said))
    ):
        return ""
    return "The work needs more memory than the hospital allows it: memory_gb under policy in its site.yaml."


def _limit(what: int, most: int) -> None:
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (most, most))


def _shut() -> None:
    machine = platform.machine()
    if os.uname().sysname != "Linux" or machine not in _KINDS or struct.calcsize("P") != 8:
        raise _refused(f"there is no rule for {os.uname().sysname} on {machine}")
    audit, seccomp, column = _KINDS[machine]
    denied = [numbers[column] for numbers in _DENIED.values()]
    program = b"".join(
        [
            _instruction(_LOAD, _ARCHITECTURE),
            _instruction(_EQUAL, audit, then=1),
            _instruction(_RETURN, _KILL_PROCESS),  # another processor's calls: none that Python makes
            _instruction(_LOAD, _NUMBER),
            _instruction(_AT_LEAST, _X32, then=len(denied) + 1),
            *(_instruction(_EQUAL, number, then=len(denied) - at) for at, number in enumerate(denied)),
            _instruction(_RETURN, _ALLOW),
            _instruction(_RETURN, _DENY),
        ]
    )
    held = ctypes.create_string_buffer(program, len(program))
    filter_ = struct.pack("H6xP", len(program) // 8, ctypes.addressof(held))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # seccomp(2) and not prctl: with TSYNC the filter is on every thread, those of libraries too.
    if _libc().syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, filter_) != 0:
        raise _refused(os.strerror(ctypes.get_errno()) if ctypes.get_errno() else "a thread would not take the filter")
    with suppress(PermissionError):
        socket.socket(socket.AF_UNIX).close()
        raise _refused("the filter was taken and does not work")


def _instruction(code: int, value: int, then: int = 0) -> bytes:
    """``then``: how many instructions to jump over where the test holds; the next one follows where it does not."""
    return struct.pack("HBBI", code, then, 0, value)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong(0)] * 3) != 0:
        raise _refused(os.strerror(ctypes.get_errno()))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _refused(why: str) -> ConsentRefused:
    return ConsentRefused(
        f"This machine cannot take the network away from training: {why}.",
        mend="Run the agent on 64-bit Linux, or accept it: policy: {sandbox: off} in site.yaml.",
    )
