"""A benchmark of several families of figures: which to measure, how to print them, and the exit code.

A family is the start of its figures' names and the module beside this one whose ``figures()`` measures them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from figures import Figure, missed, progress


def measure(family: str, module: str) -> list[Figure]:
    """A family's figures; one that breaks is a figure missed, so that the others are still measured."""
    from cloister_shared.errors import CloisterError

    try:
        return importlib.import_module(module).figures()
    except CloisterError as refused:
        progress(f"{family}: {refused}")
        return [missed(family, f"not measured ({type(refused).__name__})")]
    except Exception as fault:
        logging.exception("%s could not be measured", family)
        return [missed(family, f"not measured ({type(fault).__name__})")]


def run(about: str, families: Mapping[str, str], arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print it; 1 when a figure falls short, else 0."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families, or starts of figures' names")
    terms = parser.parse_args(arguments)
    wanted: list[str] = terms.only or list(families)
    if unknown := [name for name in wanted if name.split(".")[0] not in families]:
        parser.error(f"there is no {unknown[0]}; families are {', '.join(families)}")
    found: list[Figure] = []
    for family, module in families.items():
        starts = tuple(name for name in wanted if name.split(".")[0] == family)
        figures = [_of(family, figure) for figure in measure(family, module)] if starts else []
        # A family that could not be measured stands for each of its figures.
        shown = [figure for figure in figures if figure.name.startswith(starts) or figure.name == family]
        found += shown
        if not terms.json:
            for figure in shown:
                print(figure.line(), flush=True)
    if terms.json:
        print(json.dumps([figure.as_json() for figure in found], indent=1))
    return int(any(figure.holds is False for figure in found))


def _of(family: str, figure: Figure) -> Figure:
    """Under the family's name, which a module that measures several things leaves out."""
    own = figure.name == family or figure.name.startswith(f"{family}.")
    return figure if own else replace(figure, name=f"{family}.{figure.name}")
