"""The hospital's durable budget across studies.

Twenty studies run on the same patients, each of epsilon 1.87 by its own PLD. What the ledger says they
came to is the lowest ceiling under which its filter reserves all of them, held against their joint PLD, which is
valid only for studies fixed in advance. A query is everything that ``budget show`` and a refusal need but PLD, by a
process that has just opened a ledger of twenty unlike studies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import ledger_kills
from figures import Figure, at_most, in_fresh_process, progress, told

from cloister_client.ceilings import pin_officer
from cloister_client.ledger import Cost, Ledger, Release
from cloister_shared import budget
from cloister_shared.budget import Event

NOISE, RATE, STEPS, STUDIES, DELTA = 4.2, 0.05, 1500, 20, 1e-5
RATIO_BAR, QUERY_BAR = 1.10, 100.0


def figures() -> list[Figure]:
    return [*twenty_studies(), *queries(), kills()]


def twenty_studies() -> list[Figure]:
    studies = [Event(NOISE, RATE, STEPS)] * STUDIES
    each, joint = (budget.pld_epsilon(history, DELTA) for history in (studies[:1], studies))
    progress(f"ledger: {STUDIES} studies of epsilon {each:.2f} on the same patients")
    low, high = joint, STUDIES * each
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if all_reserved(studies, middle) else (middle, high)
    return [
        at_most("ledger.twenty-studies", high / joint, RATIO_BAR, f"{{:.3f}} of PLD ({high:.2f} to {joint:.2f})"),
        told("ledger.twenty-studies.added", STUDIES * each, "{:.1f} is the sum of their epsilons"),
    ]


def all_reserved(studies: Sequence[Event], ceiling: float) -> bool:
    """Whether a new ledger reserves them all under a ceiling, one after the other."""
    order = budget.order_of(ceiling, DELTA, studies[:1])
    return all(budget.fits(studies[: n + 1], ceiling, DELTA, order) for n in range(len(studies)))


def queries() -> list[Figure]:
    progress(f"ledger: a query of {STUDIES} unlike studies, each in a fresh process")
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "ledger.sqlite"
        reserving = [1e3 * seconds for seconds in filled(path)]
        taken: list[dict[str, float]] = [in_fresh_process(__file__, str(path)) for _ in range(5)]
    opened, asked = (1e3 * statistics.median(one[name] for one in taken) for name in ("open", "query"))
    return [
        at_most("ledger.query", asked, QUERY_BAR, "{:.1f} ms, first one of a process"),
        told("ledger.query.open", opened, "{:.1f} ms to open and check the ledger"),
        told("ledger.query.reserve", statistics.median(reserving), "{:.0f} ms to reserve, curve and all"),
    ]


def filled(path: Path) -> list[float]:
    """A ledger of twenty studies with a noise of their own each, half of them spent; seconds to reserve each."""
    ledger, taken = Ledger(path), list[float]()
    identity = pin_officer(ledger.book, "ada", path.with_name("ada.key"))
    ledger.set_ceiling(30.0, DELTA, officer="ada", identity=identity)
    for at in range(STUDIES):
        event = Event(4.0 + at / 50, RATE, 75)
        cost = Cost(f"{at:064x}", f"study-{at}", (Event(4.0 + at / 50, RATE, STEPS),), 3.0, DELTA, STEPS // 75)
        began = time.perf_counter()
        ledger.reserve(cost)
        taken.append(time.perf_counter() - began)
        for number in range(1, 11):
            ledger.commit(Release(cost.plan, "run", number, f"t{number}", event), epsilon=3.0, delta=DELTA)
    ledger.close()
    return taken


def query(path: Path) -> dict[str, float]:
    """Seconds to open a ledger, and to say what is spent, reserved, left, and whether one more study fits."""
    import dp_accounting.rdp  # noqa: F401  which a hospital's agent has imported long before

    began = time.perf_counter()
    ledger = Ledger(path)
    opened = time.perf_counter()
    ceiling = ledger.ceiling()
    assert ceiling
    order, counted = ledger.order(ceiling), ledger.counted()
    prices = [ledger.price(events, DELTA) for events in (ledger.spent(), counted)]
    assert prices[0] < prices[1] < ceiling.epsilon
    assert budget.left(counted, ceiling.epsilon, DELTA, order) > 0
    assert budget.fits([*counted, counted[0]], ceiling.epsilon, DELTA, order)
    return {"open": opened - began, "query": time.perf_counter() - opened}


def kills() -> Figure:
    progress("ledger: killed at every durable write")
    found = ledger_kills.walk()
    sound = sum(not kill.wrong for kill in found)
    for kill in found:
        if kill.wrong:
            progress(f"ledger: {kill.point}: {kill.wrong}")
    return Figure(
        "ledger.kills", f"{sound} of {len(found)} sound", sound / len(found), "all", sound == len(found) > 100
    )


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(query(Path(sys.argv[1]))))
