"""Units of measurement: what multiplies a value on its way to another unit, written as UCUM or as pint has it.

UCUM (ucum.org) is what FHIR and OMOP write units in; pint reads most of it as it stands, and the rest by this page.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pint

_UCUM = {
    "%": "percent", "Cel": "degC", "[degF]": "degF", "K": "kelvin",
    "mm[Hg]": "mmHg", "cm[H2O]": "cmH2O", "[psi]": "psi", "[in_i]": "inch", "[ft_i]": "foot", "[in_us]": "inch",
    "[lb_av]": "pound", "[oz_av]": "ounce", "[IU]": "unit_of_activity", "[iU]": "unit_of_activity",
    "U": "enzyme_unit", "eq": "equivalent", "a": "year", "mo": "month", "wk": "week", "d": "day", "h": "hour",
    "min": "minute", "s": "second", "osm": "mole",
}  # fmt: skip
"""What UCUM spells otherwise than pint."""
_ATOM = re.compile(r"((?:da|[YZEPTGMkhdcmunpfazy])?)(\[\w+\]|[A-Za-zµμ]+(?:\[\w+\])?)(-?\d+)?$")
_NUMBER = re.compile(r"(10[*^])?(-?\d+)$|\d+\.\d+$")
_EVERYDAY = {
    "lbs": (1.0, "pound"), "C": (1.0, "degC"), "F": (1.0, "degF"), "bpm": (1.0, "1/minute"), "mmhg": (1.0, "mmHg"),
    "K/uL": (1e3, "1/uL"), "k/uL": (1e3, "1/uL"), "M/uL": (1e6, "1/uL"),
    "x10E3/uL": (1e3, "1/uL"), "x10E6/uL": (1e6, "1/uL"), "1": (1.0, "dimensionless"), "": (1.0, "dimensionless"),
}  # fmt: skip
"""What pint would read as something else: a coulomb, a farad, kelvin by volume."""


@cache
def factor(given: str, wanted: str) -> tuple[float, float] | None:
    """What to multiply a value in ``given`` by, and then to add, to have it in ``wanted``.

    None where a unit is not known, or the two do not measure the same thing.
    """
    if given == wanted:
        return 1.0, 0.0
    here, there = _read(given), _read(wanted)
    if here is None or there is None:
        return None
    try:
        zero, one = (_units().Quantity(value * here[0], here[1]).to(there[1]).magnitude for value in (0.0, 1.0))
    except Exception:  # of other dimensions; and pint raises whatever it meets on the way
        return None
    return (one - zero) / there[0], zero / there[0]


def known(unit: str) -> bool:
    """Whether it is a unit at all, so that it may be said aloud: a cell of a column of units can hold anything."""
    return len(unit) <= 40 and _read(unit) is not None


@cache
def _read(text: str) -> tuple[float, pint.Unit] | None:
    """So many of which of pint's units; None where it is none."""
    for spell in (_plain, ucum):
        try:
            scale, unit = spell(text.strip())
            return scale, _units().Unit(unit)
        except Exception:  # pint reads a unit with Python's tokenizer, and raises whatever that meets
            continue
    return None


def _plain(text: str) -> tuple[float, str]:
    """As pint itself spells it, and as laboratories do."""
    return _EVERYDAY.get(text) or (1.0, text)


def ucum(text: str) -> tuple[float, str]:
    """A number and a unit as pint reads it: ``10*3/uL`` is 1000 of 1/uL.

    Raises:
        ValueError: it is not UCUM.
    """
    bare = re.sub(r"\{[^}]*\}", "", text)  # an annotation, which UCUM gives no meaning
    scale, made = 1.0, ""
    for place, part in enumerate(bare.split("/")):
        for atom in filter(None, part.split(".")):
            if number := _NUMBER.match(atom):
                count = 10.0 ** int(number[2]) if number[1] else float(atom)
                scale = scale / count if place else scale * count
            else:
                made += f"{'/' if place else '*'}({_atom(atom)})"
    return scale, f"1{made}" if made else "dimensionless"


def _atom(atom: str) -> str:
    if atom in _UCUM:
        return _UCUM[atom]
    if not (found := _ATOM.match(atom)):
        raise ValueError("no unit of UCUM")
    prefix, name, power = found[1], found[2], found[3]
    name = prefix + _UCUM.get(name, name)
    return f"{name}**{power}" if power else name


@cache
def _units() -> pint.UnitRegistry[Any]:
    """Every unit that pint knows, and a few of the laboratory; half a second to read in."""
    import pint

    registry: pint.UnitRegistry[Any] = pint.UnitRegistry(cache_folder=None)
    registry.define("unit_of_activity = [arbitrary_activity]")  # of a hormone, a vitamin: no two are the same thing
    registry.define("equivalent = [equivalents] = eq = Eq")
    return registry
