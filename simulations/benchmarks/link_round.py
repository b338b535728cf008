"""Rounds over the embedded SuperLink alone: hospitals that are Flower's own client, and nobody who trains.

The rounds are served by their own processes over mutual TLS on loopback, each hospital is a process, and this one is
the round worker, which adds up each reply and lets it go. Small: 5 hospitals, a thousand parameters; the median of
many rounds, without the first. Large: 10 hospitals, 25 million float32 down and as many back, all of them different.

    python simulations/benchmarks/link_round.py HOSPITALS PARAMETERS ROUNDS    prints what it measures, as JSON
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, at_most, in_fresh_process, progress, told
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from plain_hospital import PlainHospital, disk, found_consortium, free_port, in_thread, memory, serving

from cloister_server.link import open_link
from cloister_server.rounds import collect

SMALL, LARGE = (5, 1000, 30), (10, 25_000_000, 3)
QUIET = 15.0


def figures() -> list[Figure]:
    progress("link: 30 rounds of 5 hospitals with a tiny model, then 3 of 10 hospitals with 25 million parameters")
    small = in_fresh_process(__file__, *map(str, SMALL))
    large = in_fresh_process(__file__, *map(str, LARGE))
    return [
        at_most("link.round", statistics.median(small["rounds"][1:]), 0.25, "{:.3f} s, 5 hospitals"),
        at_most("link.idle", 100 * small["idle"], 5.0, "{:.1f} % of a core, 5 pulls held"),
        at_most("link.large-round", min(large["rounds"]), 4.0, "{:.2f} s, 10 x 100 MB both ways"),
        told("link.large-round.median", statistics.median(large["rounds"]), "{:.2f} s"),
        told("link.large-round.cpu", large["serve_cpu"], "{:.1f} s of processors to serve it"),
        told("link.large-round.cpu-hospitals", large["hospital_cpu"], "{:.1f} s for ten hospitals"),
        at_most("link.worker", large["worker"] / large["model"], 4.0, "{:.2f} models above the imports"),
        at_most("link.serve", large["serve"] / large["model"], 2.0, "{:.2f} models above idle"),
        at_most("link.disk", large["disk"] / large["model"], 12.0, "{:.1f} models at the most"),
        at_most("link.disk-after", large["left"], 10.0, "{:.1f} MB after the run"),
    ]


def measure(folder: Path, hospitals: int, parameters: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round, and memory (MB), disk (MB) and processor time (s) of who took part."""
    found_consortium(folder)
    with serving(folder, port := free_port()) as process:
        link = open_link(folder / "link")
        there = [PlainHospital(folder, f"Hospital {number}", port) for number in range(hospitals)]
        for hospital in there:
            link.register(hospital.public_key)
        children = [
            multiprocessing.get_context("fork").Process(target=answer, args=(hospital, parameters), daemon=True)
            for hospital in there
        ]
        for child in children:
            child.start()
        while len(link.online()) < hospitals:
            time.sleep(0.05)
        servers = [process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]
        idle = processors(servers)
        time.sleep(QUIET if parameters < 10**6 else 0)
        idle = (processors(servers) - idle) / QUIET
        before, busy = memory(os.getpid(), "VmRSS"), processors(servers)
        serve = sum(memory(pid, "VmRSS") for pid in servers)
        worked = processors([child.pid or 0 for child in children])
        with watched(folder / "link") as sizes, link.run("ab" * 32) as grid:
            seconds = [one_round(grid, list(grid.get_node_ids()), parameters, number) for number in range(rounds)]
        found = {
            "rounds": seconds,
            "idle": idle,
            "model": parameters * 4 / 2**20,
            "worker": memory(os.getpid()) - before,
            "serve": sum(memory(pid) for pid in servers) - serve,
            "serve_cpu": (processors(servers) - busy) / rounds,
            "hospital_cpu": (processors([child.pid or 0 for child in children]) - worked) / rounds,
            "disk": max(sizes),
            "left": disk(folder / "link"),
        }
        for child in children:
            child.kill()
            child.join()
    return found


def one_round(grid: Any, nodes: Sequence[int], parameters: int, number: int) -> float:
    """Seconds from the model to the sum of what came back, which is checked."""
    model = np.full(parameters, number, dtype="<f4")
    model[: len(model) // 2] += np.arange(len(model) // 2, dtype="<f4")  # so that its parts differ
    total = np.zeros(parameters, dtype="<f4")
    began = time.perf_counter()
    record = packed(model)
    sent = grid.push_messages(
        [Message(RecordDict({"vectors": record, "header": ConfigRecord({"json": str(n)})}), n, "train") for n in nodes]
    )
    del record

    def add(_: int, reply: Message) -> None:
        np.add(total, np.frombuffer(reply.content["vectors"]["model"].data, "<f4"), out=total)  # pyright: ignore

    silent = collect(grid, dict(zip(sent, nodes, strict=True)), 600.0, add)
    took = time.perf_counter() - began
    if silent or not np.allclose(total[-1], len(nodes) * number + sum(range(1, len(nodes) + 1)), rtol=1e-5):
        raise RuntimeError(f"the sum is {total[-1]}; silent: {silent}")
    return took


def answer(hospital: PlainHospital, parameters: int) -> None:
    """Send each model back, plus this hospital's number. Told apart at every place, so nothing is sent once for two."""
    own = np.random.default_rng(int(hospital.name.split()[1])).standard_normal(parameters, dtype=np.float32)
    own[-1] = int(hospital.name.split()[1]) + 1
    hospital.connect()
    hospital.activate()
    beat = time.monotonic()
    while True:
        message = hospital.receive()
        if time.monotonic() > beat + 20:
            hospital.activate()  # as good a sign of life as any
            beat = time.monotonic()
        if message is None:
            continue
        model = np.frombuffer(message.content["vectors"]["model"].data, "<f4")  # pyright: ignore
        content = RecordDict({"vectors": packed(model + own), "header": ConfigRecord({"json": hospital.name})})
        hospital.send(Message(content, reply_to=message))


def packed(vector: np.ndarray) -> ArrayRecord:
    return ArrayRecord({"model": Array("float32", vector.shape, "cloister.float32.le", vector.tobytes())})


@contextmanager
def watched(folder: Path) -> Generator[list[float], None, None]:
    """MB on the disk, five times a second."""
    sizes, done = [disk(folder)], threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            sizes.append(disk(folder))

    with in_thread(look):
        try:
            yield sizes
        finally:
            done.set()


def processors(pids: Sequence[int]) -> float:
    """Seconds of processor time of these processes."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch) / "consortium", *map(int, sys.argv[1:4]))))
