"""The final model of a study, signed by the consortium, in a folder to carry away."""

from __future__ import annotations

from pathlib import Path

from cloister_server.folder import open_consortium, record
from cloister_server.store import Store
from cloister_shared import model_file
from cloister_shared.errors import StudyRefused
from cloister_shared.model_file import Manifest
from cloister_shared.plan_file import read_plan
from cloister_shared.tally import glance


def export(folder: Path, called: str, out: Path) -> Manifest:
    """Write the model of the finished study ``called`` (its name, or how its digest begins) of the consortium's folder.

    Whoever can read the folder is the consortium, so this asks for no account; the audit log has a line of it.

    Raises:
        StudyRefused: there is no such study, it is not finished, or ``out`` holds something.
    """
    consortium = open_consortium(folder)
    try:
        study = consortium.registry.study(called)
        plan = read_plan(study.plan, study.file)
        store = Store(folder / "studies" / study.digest[:16])
        checkpoint = store.load(study.digest)
        if study.state != "finished" or checkpoint is None or checkpoint.round < plan.rounds:
            raise StudyRefused(f"{study.name} is {study.state}.", mend="Export it once it is finished.")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StudyRefused(f"{out} exists and is not empty.", mend="Name a new folder with --out.")
        rounds = consortium.registry.rounds(study.digest)
        made = model_file.write(
            out,
            plan,
            checkpoint.model,
            checkpoint.normalisation,
            consortium.signing,
            at=checkpoint.round,
            metrics={name: rounds[-1]["numbers"].get(name) for name in glance(plan)} if rounds else {},
            metrics_of=f"Means over hospitals of the model that round {plan.rounds} began with, on held-out rows",
            public=store.folder,
        )
    finally:
        consortium.registry.close()
    record(folder, "the machine", "operator", "study export", study.digest, "done")
    return made
