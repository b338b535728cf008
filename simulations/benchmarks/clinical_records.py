"""Clinical records into tensors: how fast, in how much memory, the same from every form, and none misread."""

from __future__ import annotations

import sys
import time
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import malformed_hl7
from clinical_postgres import ROWS, measured
from figures import Figure, at_least, at_most, missed, progress
from malformed_records import CASES, fault

if TYPE_CHECKING:
    from cloister_client.dataset import Dataset
    from cloister_shared.plan import StudyPlan

_SECONDS, _GB, _SPEED = 60.0, 2.0, 20.0
_PATIENTS, _SENT = 2000, 300
"""Of the hospital whose files are timed, and of the one whose messages are read too."""


def figures() -> list[Figure]:
    found: list[Figure] = []
    progress(f"omop: {ROWS:,} measurements in a PostgreSQL server of our own")
    try:
        told = measured()
        found.append(at_most("omop.seconds", told["seconds"], _SECONDS, f"{{:.1f}} s, {ROWS:,} rows to tensors"))
        found.append(at_most("omop.memory", told["gb"], _GB, "{:.2f} GB at the most"))
    except FileNotFoundError as absent:
        found += [missed(name, str(absent)) for name in ("omop.seconds", "omop.memory")]
    progress("fhir and forms: one invented hospital in three forms")
    with TemporaryDirectory(prefix="cloister-") as scratch:
        found += _forms(Path(scratch))
    every = [*((case, fault) for case in CASES), *((case, malformed_hl7.fault) for case in malformed_hl7.CASES)]
    progress(f"malformed: {len(every)} ways to be broken")
    with TemporaryDirectory(prefix="cloister-") as scratch:
        wrong = [case.name for at, (case, judge) in enumerate(every) if judge(case, Path(scratch) / str(at))]
    for name in wrong:
        progress(f"malformed: {name}")
    said = f"{{:.0f}} of {len(every)} end as they should"
    return [*found, at_least("malformed", len(every) - len(wrong), len(every), said)]


def _forms(folder: Path) -> list[Figure]:
    from cloister_client.connectors.connector import open_records
    from cloister_client.dataset import load_dataset
    from cloister_shared.plan import StudyPlan
    from cloister_shared.plan_file import load, parse
    from cloister_simulations.sources.clinical_forms import invent, write_form

    text = (files("cloister_simulations") / "scenarios" / "clinical-forms.yaml").read_text(encoding="utf-8")
    plan = parse(StudyPlan, load(text, "clinical-forms.yaml").below("plan"))
    invented = invent(_PATIENTS, seed=11)
    sites = {form: write_form(invented, form, folder / form, "st-marys") for form in ("fhir", "omop", "table")}
    load_dataset(open_records(sites["fhir"]), plan)  # what is imported and compiled once is not reading
    began = time.process_time()
    loaded = {"fhir": load_dataset(open_records(sites["fhir"]), plan)}
    seconds = time.process_time() - began
    octets = _octets(folder / "fhir" / "export")
    loaded |= {form: load_dataset(open_records(sites[form]), plan) for form in ("omop", "table")}
    flat = loaded.pop("table")
    apart = sum(_apart(other, flat) for other in loaded.values())
    rows = len(flat.train) + len(flat.test)
    return [
        at_least(
            "fhir.speed", octets / 1e6 / seconds, _SPEED, f"{{:.0f}} MB/s a core, {octets / 1e6:.0f} MB to tensors"
        ),
        at_most("forms.same", apart, 0.0, f"{{:.0f}} numbers apart in {rows} rows, 3 forms"),
        _sent(folder, plan),
    ]


def _sent(folder: Path, plan: StudyPlan) -> Figure:
    """The same of HL7's messages and documents, of a smaller hospital: python-hl7 takes its time."""
    from cloister_client.connectors.connector import open_records
    from cloister_client.dataset import load_dataset
    from cloister_simulations.sources.clinical_forms import invent, write_form

    invented = invent(_SENT, seed=12)
    flat, *others = (
        load_dataset(open_records(write_form(invented, form, folder / f"few-{form}", "st-marys")), plan)
        for form in ("table", "hl7", "ccda")
    )
    rows = len(flat.train) + len(flat.test)
    said = f"{{:.0f}} numbers apart in {rows} rows, HL7 messages, C-CDA and a table"
    return at_most("forms.hl7", sum(_apart(other, flat) for other in others), 0.0, said)


def _apart(other: Dataset, flat: Dataset) -> int:
    """Numbers of one that are not those of the other, bit for bit."""
    import numpy as np

    if (len(other.train), len(other.test)) != (len(flat.train), len(flat.test)):
        return max(len(flat.train) + len(flat.test), 1)
    return sum(
        int((np.ascontiguousarray(mine).view(np.uint32) != np.ascontiguousarray(theirs).view(np.uint32)).sum())
        for one, two in ((other.train, flat.train), (other.test, flat.test))
        for mine, theirs in zip(one.arrays, two.arrays, strict=True)
    )


def _octets(folder: Path) -> int:
    """Of NDJSON, unpacked."""
    import gzip

    return sum(
        len(gzip.decompress(path.read_bytes())) if path.suffix == ".gz" else path.stat().st_size
        for path in folder.iterdir()
    )


if __name__ == "__main__":
    shown = figures()
    for figure in shown:
        print(figure.line())
    sys.exit(int(any(figure.holds is False for figure in shown)))
