"""A patient withdraws while a study runs in a real training process, and after the hospital left its consortium."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.leaving import left
from cloister_client.lineage_book import LineageBook
from cloister_client.objects import contents
from cloister_shared import audit

from .conftest import TERMS, Hospital
from .letters import asked, parts

pytestmark = pytest.mark.slow

MODEL = np.zeros(4, np.float32)


@pytest.fixture
def plan(consortium, hospital):
    """A study that knows patients, approved at a hospital that has a list of opt-outs."""
    table = hospital.folder / "table.csv"
    head, *rows = table.read_text().splitlines()
    named = [f"{row},MRN-{n // 2:08}" for n, row in enumerate(rows)]
    table.write_text("\n".join([f"{head},patient", *named, ""]))
    site = hospital.folder / "site.yaml"
    site.write_text(yaml.safe_dump({**yaml.safe_load(site.read_text()), "opt_outs": "opt_outs.txt"}))
    (hospital.folder / "opt_outs.txt").write_text("")
    offered = consortium.offers(table="\n  patient_id: patient" + TERMS["table"])
    hospital.approves(offered.digest)
    return offered


def said(hospital: Hospital, *words: str) -> str:
    done = CliRunner().invoke(app, ["lineage", "--site", str(hospital.folder / "site.yaml"), *words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def trained(hospital: Hospital, plan: object, process, *rounds: int) -> None:
    for number in rounds:
        ticket = asked(plan, hospital.name, number=number, model=MODEL)
        assert contents(process.ask(*parts(ticket))).error is None


def somebody_who_trained(folder: Path) -> str:
    """An id that the record has among those who trained."""
    book = LineageBook(folder)
    members = book.members(book.uses()[0].train)
    from cloister_shared.pseudonyms import among, pseudonyms

    ids = [f"MRN-{n:08}" for n in range(30)]
    found = among(pseudonyms(book.key, ids), members)
    book.close()
    return next(id_ for id_, is_in in zip(ids, found, strict=True) if is_in)


def test_a_running_process_reads_the_list_again(hospital, plan, trainer):
    process = trainer()
    trained(hospital, plan, process, 1, 2)
    pid, patient = process._running.process.pid, somebody_who_trained(hospital.folder)
    (hospital.folder / "opt_outs.txt").write_text(f"{patient}\n")
    assert "still runs, here at round 2 of 3; the opt-outs are read again" in said(hospital)
    assert "not used from round 3 on" in said(hospital)
    trained(hospital, plan, process, 3)
    assert process._running.process.pid == pid
    assert "in rounds 1 to 2 of 3" in said(hospital)
    assert "from round 3 on none of their rows was used" in said(hospital)


def test_who_is_not_on_the_opt_outs_is_said_to_be_used_on(hospital, plan, trainer):
    trained(hospital, plan, trainer(), 1)
    asked_for = hospital.folder / "asked.txt"
    asked_for.write_text(f"{somebody_who_trained(hospital.folder)}\n")
    assert "goes on with 1 patient who is not on the opt-outs" in said(hospital, "--patients", str(asked_for))


def test_the_record_stays_when_the_hospital_leaves(hospital, plan, trainer):
    process = trainer()
    trained(hospital, plan, process, 1)
    process.end()
    (hospital.folder / "opt_outs.txt").write_text(f"{somebody_who_trained(hospital.folder)}\n")
    told = " ".join(left(hospital.agent).split())
    assert "lineage" in told
    assert "rows of 1 patient, in round 1 of 3" in said(hospital)
    assert "not known here any more" in said(hospital)
    last = audit.verify(hospital.folder / "audit.jsonl")[-1]
    assert (last.what, last.said["lineage"]) == ("left", "kept")
