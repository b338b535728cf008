"""Every figure of the training core: what was measured, the bar, and whether it holds.

    make figures TOPIC=study                             all of them, some ten minutes
    make figures TOPIC=study ARGS="--only heart memory"  some families, or figures by the start of their name
    make figures TOPIC=study ARGS=--json                 as a list for a program

Exits 1 when a figure falls short. Real records are read from the folder that CLOISTER_DATA names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence

for name, value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

from figures import Figure, missed, progress  # noqa: E402 the environment must be set before torch is imported

FAMILIES = {
    "heart": "heart_flamby",
    "demo": "demo",
    "round": "round_time",
    "memory": "memory",
    "epsilon": "accounting",
    "resume": "resume",
    "start-up": "start_up",
    "engines": "engines_agree",
    "vectors": "vectors",
}
"""Start of the figures' names: the module beside this one whose ``figures()`` measures them."""


def measure(family: str) -> list[Figure]:
    """A family's figures; one that breaks is a figure missed, so that the others are still measured."""
    from cloister_shared.errors import CloisterError

    try:
        return importlib.import_module(FAMILIES[family]).figures()
    except CloisterError as refused:
        progress(f"{family}: {refused}")
        return [missed(family, f"not measured ({type(refused).__name__})")]
    except Exception as fault:
        logging.exception("%s could not be measured", family)
        return [missed(family, f"not measured ({type(fault).__name__})")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the training core against its bars.")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="families, or starts of figures' names")
    terms = parser.parse_args(arguments)
    wanted: list[str] = terms.only or list(FAMILIES)
    if unknown := [name for name in wanted if name.split(".")[0] not in FAMILIES]:
        parser.error(f"there is no {unknown[0]}; families are {', '.join(FAMILIES)}")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus, on every network
    found: list[Figure] = []
    for family in FAMILIES:
        starts = tuple(name for name in wanted if name.split(".")[0] == family)
        figures = measure(family) if starts else []
        # A family that could not be measured stands for each of its figures.
        shown = [figure for figure in figures if figure.name.startswith(starts) or figure.name == family]
        found += shown
        if not terms.json:
            for figure in shown:
                print(figure.line(), flush=True)
    if terms.json:
        print(json.dumps([figure.as_json() for figure in found], indent=1))
    return int(any(figure.holds is False for figure in found))


if __name__ == "__main__":
    sys.exit(main())
