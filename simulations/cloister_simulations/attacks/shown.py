"""The attacks run before somebody's eyes, and what came of them as a table, as JSON or for the documentation."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console

from cloister_simulations.attacks import suite
from cloister_simulations.engines import hushed


def tell(form: Literal["table", "json", "markdown"], console: Console) -> list[str]:
    """Run every attack and show how it went; the names of those that got through."""
    watched = Console(stderr=True, highlight=False)
    with (
        tempfile.TemporaryDirectory() as folder,
        watched.status("Six hospitals are set up …") as status,
        hushed("cloister", logging.CRITICAL),  # each refusal is in the table
    ):
        found, known = suite.run_all(
            Path(folder), lambda name, done, all_: status.update(f"{done} of {all_}: {name} …")
        )
    succeeded = [outcome.name for outcome in found if not outcome.refused]
    match form:
        case "json":
            said = {"attacks": [asdict(one) for one in found], "not stopped": [asdict(one) for one in known]}
            sys.stdout.write(json.dumps({**said, "succeeded": succeeded}, indent=1, ensure_ascii=False) + "\n")
        case "markdown":
            sys.stdout.write(suite.as_markdown(found, known) + "\n")
        case "table":
            for part in suite.tables(found, known):
                console.print(part)
            console.print(
                f"{len(found) - len(succeeded)} of {len(found)} attacks were refused."
                + (f" Not refused: {', '.join(succeeded)}." if succeeded else ""),
                style="bold red" if succeeded else "bold",
            )
    return succeeded
