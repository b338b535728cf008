"""One measure over the rounds as a line: where its points and ticks lie. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH, HEIGHT = 420.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 14.0, 12.0, 28.0
"""Margins, in the units of the drawing."""

_MOST_DOTS = 60
"""With more rounds the line alone is drawn."""


@dataclass(frozen=True)
class Curve:
    """A drawing of ``WIDTH`` by ``HEIGHT``; a gap is a round without a value."""

    lines: tuple[str, ...]
    """As SVG's ``points``."""
    dots: tuple[tuple[float, float, str], ...]
    """Each with what it stands for, in words."""
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    last: str


def curve(values: Mapping[int, float | None]) -> Curve | None:
    """Round to value, drawn; None if no round has one that is finite."""
    known = {number: value for number, value in values.items() if value is not None and math.isfinite(value)}
    if not known:
        return None
    rounds, up = sorted(values), _ticks(min(known.values()), max(known.values()))
    first, last = rounds[0], rounds[-1]
    between = _ticks(first, last, least=1.0)
    room = (between[1] - between[0]) / 2
    across = sorted({first, last, *(at for at in between if first + room < at < last - room)})

    def x(number: float) -> float:
        return round(LEFT + (number - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT), 2)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM), 2)

    stretches: list[list[int]] = [[]]
    for number in rounds:
        if number in known:
            stretches[-1].append(number)
        elif stretches[-1]:
            stretches.append([])
    places = max(0, -math.floor(math.log10(up[1] - up[0]) + 1e-9))
    alone = {stretch[0] for stretch in stretches if len(stretch) == 1}
    dotted = known if len(known) <= _MOST_DOTS else alone
    return Curve(
        tuple(" ".join(f"{x(at)},{y(known[at])}" for at in stretch) for stretch in stretches if len(stretch) > 1),
        tuple((x(at), y(known[at]), f"Round {at}: {known[at]:.4g}") for at in sorted(dotted)),
        tuple((x(at), f"{at:g}") for at in across),
        tuple((y(at), f"{at:.{places}f}") for at in up),
        f"{known[max(known)]:.4g} in round {max(known)}",
    )


def _ticks(low: float, high: float, least: float = 0.0) -> list[float]:
    """Round numbers, two to about six, the first not above ``low`` and the last not below ``high``."""
    span = max(high - low, 1e-3 * max(abs(high), abs(low)), 1e-6)
    rough = max(span / 4, least)
    power = 10.0 ** math.floor(math.log10(rough) + 1e-9)
    by = next(power * step for step in (1, 2, 5, 10) if power * step >= rough * (1 - 1e-9))
    first, last = math.floor(low / by + 1e-9), math.ceil(high / by - 1e-9)
    return [at * by for at in range(first, max(last, first + 1) + 1)]
