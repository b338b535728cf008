"""The hospital's durable budget across studies, and the patient as its unit.

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
RECORDS, OF_RECORDS = (1, 2, 4, 8), Event(2.0, 0.05, 1000)


def figures() -> list[Figure]:
    return [*twenty_studies(), *queries(), kills(), *patients()]


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


def patients() -> list[Figure]:
    """Exact mixture-PLD of DP-SGD where a patient has 1, 2, 4, 8 records, by what is drawn and clipped as one."""
    whole: list[float] = []
    apart: list[float] = []
    for records in RECORDS:
        progress(f"patient: exact mixture for {records} records")
        whole.append(law(records, drawn_whole=True))
        apart.append(law(records, drawn_whole=False))
    ours = [budget.pld_epsilon([Event(2.0, 0.05, 1000, records=k)], DELTA) for k in RECORDS[:2]]
    assert max(abs(a - b) for a, b in zip(ours, apart, strict=False)) < 1e-3
    shown = " / ".join(f"{value:.2f}" for value in whole)
    bounds = [budget.epsilon([Event(2.0, 0.05, 1000, records=k)], DELTA) for k in RECORDS]
    return [
        at_most("patient.records", max(whole) - min(whole), 1e-9, shown),
        told("patient.records.apart", apart[-1], " / ".join(f"{value:.1f}" for value in apart) + ", each clipped"),
        told("patient.records.ledger", bounds[-1], " / ".join(f"{value:.1f}" for value in bounds) + ", as counted"),
    ]


def law(records: int, *, drawn_whole: bool) -> float:
    """Epsilon from the law of how far a patient with so many records can move one step's sum, in clip norms.

    Computed here from each record's fate by convolution, and given to dp-accounting's mixture of Gaussians: not by
    the functions that the ledger uses. Drawn whole, all records share one draw and one clip.
    """
    import numpy as np
    from dp_accounting.pld import privacy_loss_distribution as pld

    moved = np.array([1.0])
    one_draw = np.array([1 - OF_RECORDS.sample_rate, OF_RECORDS.sample_rate])
    if drawn_whole:
        # The draw takes none or all of the records, whose clipped sum or mean moves by one clip norm at most.
        by_count = np.zeros(records + 1)
        by_count[[0, records]] = one_draw
        moved = np.array([by_count[0], by_count[1:].sum()])
    else:
        for _ in range(records):
            moved = np.convolve(moved, one_draw)
    one = pld.from_mixture_gaussian_mechanism(
        OF_RECORDS.noise_multiplier, list(range(len(moved))), moved.tolist(), value_discretization_interval=1e-3
    )
    return float(one.self_compose(OF_RECORDS.steps).get_epsilon_for_delta(DELTA))


if __name__ == "__main__":
    import json
    import sys

    print(json.dumps(query(Path(sys.argv[1]))))
