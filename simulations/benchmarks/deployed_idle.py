"""What an agent costs a hospital while nothing is asked of it: enrolled, in touch, no study approved."""

from __future__ import annotations

import time

import deployed
from figures import Figure, at_most, progress, told
from processes import cpu, family, open_files, proportional, resident

SECONDS, SETTLE = 60.0, 10.0
CPU_BAR, MEMORY_BAR = 1.0, 250.0


def figures() -> list[Figure]:
    progress(f"idle: one agent, watched for {SECONDS:g} s")
    with deployed.consortium(1) as consortium:
        agent = consortium.processes[next(iter(consortium.sites))].pid
        time.sleep(SETTLE)
        began, before = time.monotonic(), sum(map(cpu, family(agent)))
        time.sleep(SECONDS)
        processes = family(agent)
        used = 100 * (sum(map(cpu, processes)) - before) / (time.monotonic() - began)
        memory, own, files = (
            sum(map(of, processes)) / unit for of, unit in ((resident, 1e6), (proportional, 1e6), (open_files, 1))
        )
    return [
        at_most("idle.cpu", used, CPU_BAR, "{:.2f} % of a core"),
        at_most("idle.memory", memory, MEMORY_BAR, f"{{:.0f}} MB, before any study ({own:.0f} own)"),
        told("idle.files", files, "{:.0f} open files"),
    ]
