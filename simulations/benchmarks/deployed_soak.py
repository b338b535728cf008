"""Two hundred rounds of 5 hospitals, of which one at a time is killed, cut off or slow, as a seeded generator says.

Memory and open files are read after every round but the last: of the round worker, the SuperLink, the control
service, and of the one agent that is left alone, with its training process. Connections come and go with the hospitals
that are away, so of those only such count as the other side has ended and this one has not closed. The coordinator
itself is left alone too, for a process that is begun anew tells nothing of a leak.
"""

from __future__ import annotations

import random
import signal
import statistics
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import deployed
from deployed import agree, plan_of, records, service
from figures import Figure, at_most, progress
from processes import children, family, kept_files, resident

from cloister_simulations.deployment import CommandFailed, Consortium, until

SITES, ROUNDS, TIMEOUT, LONGEST = 5, 200, 4.0, 2400.0
SEED, PAUSE, AWAY = 20261122, (0.0, 8.0), (0.0, 8.0)
"""Of the troubles; and seconds, from and to, between two, and until a hospital that was killed comes back."""
BAR = 5.0


@dataclass
class Soaked:
    """What was seen."""

    memory: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Of each process, octets after each round."""
    files: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    troubles: list[str] = field(default_factory=list[str])
    rounds: int = 0
    """Recorded, each with the hospitals that took part."""
    missed: int = 0
    """Times that a hospital was not in a round."""
    left: list[str] = field(default_factory=list[str])
    """Files that ought to be gone."""


def figures() -> list[Figure]:
    progress(f"soak: {ROUNDS} rounds of {SITES} hospitals, some minutes")
    seen = soaked()
    rounds = Figure(
        "soak.finished",
        f"{seen.rounds} of {ROUNDS}; {len(seen.troubles)} troubles, {seen.missed} missed",
        seen.rounds / ROUNDS,
        "all",
        seen.rounds == ROUNDS,
    )
    for name in seen.left:
        progress(f"soak: {name} was left")
    return [
        rounds,
        *(
            at_most(f"soak.memory.{name}", growth(octets), BAR, f"{{:+.1f}} % to {octets[-1] / 1e6:.0f} MB")
            for name, octets in seen.memory.items()
        ),
        *(
            at_most(f"soak.files.{name}", *fewest(counts), "{:.0f} open in the last quarter")
            for name, counts in seen.files.items()
        ),
        at_most("soak.temp", len(seen.left), 0, "{:.0f} files left behind"),
    ]


def growth(octets: Sequence[float]) -> float:
    """By how many per cent the mean of the last quarter is above that of the second."""
    quarter = len(octets) // 4
    return 100 * (statistics.mean(octets[-quarter:]) / statistics.mean(octets[quarter : 2 * quarter]) - 1)


def fewest(counts: Sequence[int]) -> tuple[int, int]:
    """Open files in the last quarter and in the second: the fewest, for one that is read in mid-request has more."""
    quarter = len(counts) // 4
    return min(counts[-quarter:]), min(counts[quarter : 2 * quarter])


def soaked() -> Soaked:
    """Run the study through all its troubles.

    Raises:
        CommandFailed: it did not come to its end, or a process that is watched did not.
    """
    seen, plan = Soaked(), plan_of("soak", SITES, ROUNDS, round_timeout=TIMEOUT)
    with deployed.consortium(SITES) as consortium:
        agree(consortium, plan)
        watched = processes(consortium, deployed.begin(consortium, plan))
        for name in watched:
            seen.memory[name], seen.files[name] = [], []
        with trouble(consortium, seen.troubles):
            for number in range(1, ROUNDS):  # with the last one the worker ends
                done = partial(reached, consortium, plan.study, number)
                until(done, LONGEST / 10, f"round {number} of the soak")
                look(watched, seen)
        deployed.finish(consortium, plan, LONGEST / 10)
        told = records(consortium, plan)
        seen.rounds = len({record["round"] for record in told if len(record["answered"]) >= plan.cohort.min_sites})
        seen.missed = sum(SITES - len(record["answered"]) for record in told)
        consortium.end(*consortium.processes)
        seen.left = left(consortium)
    return seen


def processes(of: Consortium, worker: int) -> dict[str, list[int]]:
    """What is watched: a name, and the processes that count for it."""
    agent = of.processes[steady(of)].pid
    until(lambda: bool(children(agent)), 60, "the agent has a training process")
    return {
        "worker": [worker],
        "link": family(service(of, "rounds")),
        "control": [service(of, "control")],
        "agent": [agent],
        "training": family(agent)[1:],
    }


def reached(of: Consortium, study: str, number: int) -> bool:
    """Whether a round is done."""
    return of.study(study).round >= number


def steady(of: Consortium) -> str:
    """The hospital that nothing happens to."""
    return next(iter(of.sites))


def look(watched: dict[str, list[int]], seen: Soaked) -> None:
    """Read memory and open files.

    Raises:
        CommandFailed: a process is gone.
    """
    for name, pids in watched.items():
        try:
            memory, files = (sum(map(of, pids)) for of in (resident, kept_files))
        except OSError:
            raise CommandFailed(f"The process called {name} ended during the soak.") from None
        seen.memory[name].append(memory)
        seen.files[name].append(files)


@contextmanager
def trouble(of: Consortium, told: list[str]) -> Generator[None, None, None]:
    """One hospital after the other is killed and begun again, at once or later, or stands still for a while."""
    ended, drawn = threading.Event(), random.Random(SEED)
    others = [name for name in of.sites if name != steady(of)]

    def make() -> None:
        while not ended.wait(drawn.uniform(*PAUSE)):
            name, kind, seconds = (
                drawn.choice(others),
                drawn.choice(("killed", "cut off", "slow")),
                drawn.uniform(*AWAY),
            )
            told.append(f"{name} {kind}")
            if kind == "slow":
                of.kill(name, signal.SIGSTOP)
                ended.wait(seconds)
                of.kill(name, signal.SIGCONT)
                continue
            of.kill(name)
            of.end(name)
            if kind == "cut off":
                ended.wait(seconds)
            of.agent(name)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def left(of: Consortium) -> list[str]:
    """Temporary files, and contents of messages, after everything has ended."""
    found = list(of.folder.rglob("*.tmp"))
    found += deployed.temporary(of).rglob("*")
    found += [path for path in (of.home / "link").glob("*/**/*") if path.is_file()]
    return sorted({str(path.relative_to(of.folder)) for path in found})
