"""How long the same octets take with nothing around them: one process a hospital, plain TCP on loopback.

The coordinator sends each hospital a model and takes one from each, all at once: no TLS, no hash, no disk, no sum.

    python simulations/benchmarks/tcp_floor.py SITES OCTETS    prints the seconds of some rounds, as JSON
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

ROUNDS, PART = 5, 2**20


def rounds(sites: int, octets: int) -> list[float]:
    """Seconds of each of some rounds."""
    taken: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as door, ThreadPoolExecutor(sites) as threads:
        hospitals = [_begun(lambda: _hospital(door.getsockname(), octets)) for _ in range(sites)]
        ends = [door.accept()[0] for _ in range(sites)]
        for _ in range(ROUNDS):
            began = time.perf_counter()
            list(threads.map(lambda end: _ask(end, octets), ends))
            taken.append(time.perf_counter() - began)
        for end in ends:
            end.close()
        for hospital in hospitals:
            os.waitpid(hospital, 0)
    return taken


def _begun(work: Callable[[], None]) -> int:
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def _ask(end: socket.socket, octets: int) -> None:
    _send(end, octets)
    _take(end, octets)


def _hospital(door: tuple[str, int], octets: int) -> None:
    with socket.create_connection(door) as end:
        while _take(end, octets):
            _send(end, octets)


def _send(end: socket.socket, octets: int) -> None:
    for size in _parts(octets):
        end.sendall(memoryview(_SAID)[:size])


def _take(end: socket.socket, octets: int) -> bool:
    """Into one model; False where the other end is closed."""
    room = memoryview(bytearray(octets))
    while room:
        if not (got := end.recv_into(room)):
            return False
        room = room[got:]
    return True


def _parts(octets: int) -> Iterable[int]:
    return (min(PART, octets - at) for at in range(0, octets, PART))


_SAID = bytes(PART)

if __name__ == "__main__":
    print(json.dumps(rounds(*map(int, sys.argv[1:]))))
