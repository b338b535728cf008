"""Sources joined by patient, encounter or a column give the tensors of the one joined table, bit for bit."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import Dataset, load_dataset
from cloister_client.site_file import read_site
from cloister_shared.errors import CloisterError, DataRefused, PlanRefused
from cloister_shared.plan import Cohort, StudyPlan
from cloister_shared.plan_file import load, parse, read_plan
from cloister_simulations.sources.clinical_forms import flat, invent, write_form
from cloister_simulations.sources.dicom_folder import dicom_file

PLAN = """\
study: three-sources
title: Vitals in a table, pictures in an archive, notes in another table
task: {name: multimodal}
table:
  patient_id: patient
  duplicates: allow
  max_bad_rows: 0
  target: {name: died, positive: 1, negative: 0}
  features:
    - {name: pulse, kind: number, unit: 1/min, range: [20, 250]}
    - {name: weight, kind: number, unit: kg, range: [1, 400], missing: indicator, fill: 70}
    - {name: note, kind: text, tokens: 8, buckets: 50, required: false}
    - {name: film, kind: image, size: [8, 8], range: [-1024, 3071], modality: [CT], required: false}
cohort: {min_sites: 2, min_patients: 1}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
evaluation: {holdout: 0.25}
"""
THREE = """\
site: st-marys
pictures: {identified: true}
table: {path: vitals.csv}
link:
  - {path: notes.csv, key: MRN, columns: {note: TEXT, weight: LB}, units: {weight: lb}}
dicom: {folder: archive, join: AccessionNumber, by: ACCESSION}
"""
ONE = """\
site: st-marys
pictures: {identified: true}
table: {path: joined.csv, units: {weight: lb}}
"""
N = 40


def same(one: Dataset, other: Dataset) -> None:
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert len(mine) > 3
        assert mine.x.numpy().tobytes() == theirs.x.numpy().tobytes()
        assert mine.y.numpy().tobytes() == theirs.y.numpy().tobytes()
        np.testing.assert_array_equal(mine.patients, theirs.patients)


def picture(path: Path, pixels: np.ndarray, n: int, more: str = "") -> None:
    path.write_bytes(dicom_file(pixels, uid=f"1.2.{n}{more}", AccessionNumber=f"A{n}", PatientID=f"{n:04d}"))


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Forty patients in three sources, and in one; the third has no note, the fourth no picture."""
    rng = np.random.default_rng(3)
    (tmp_path / "archive").mkdir()
    vitals, notes, joined = [], [], []
    for n in range(N):
        patient, accession, film = f"{n:04d}", f"A{n}", f"archive/{n}.dcm"
        pulse, pounds, text = 60 + n, round(100 + 7.3 * n, 1), f"word{n % 5} of patient and word{n % 3}"
        pixels = rng.integers(-1000, 3000, (8, 8)).astype(np.int16)
        if n != 3:
            picture(tmp_path / film, pixels, n)
        vitals.append((patient, accession, pulse, n % 2))
        if n != 2:
            notes.append((f" {patient} ", text, pounds))
        joined.append((
            patient, pulse, "" if n == 2 else pounds, "" if n == 2 else text, "" if n == 3 else film, n % 2
        ))  # fmt: skip
    for name, columns, rows in (
        ("vitals", ("patient", "ACCESSION", "pulse", "died"), vitals),
        ("notes", ("MRN", "TEXT", "LB"), notes[::-1]),
        ("joined", ("patient", "pulse", "weight", "note", "film", "died"), joined),
    ):
        pd.DataFrame(rows, columns=list(columns)).to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "site.yaml").write_text(THREE)
    (tmp_path / "one.yaml").write_text(ONE)
    return tmp_path


def loaded(folder: Path, site: str = "site.yaml", plan: str = PLAN) -> Dataset:
    return load_dataset(open_records(folder / site), read_plan(plan))


def refused(folder: Path) -> str:
    with pytest.raises(DataRefused) as refusal:
        loaded(folder)
    assert refusal.value.mend
    assert "word" not in str(refusal.value)
    return refusal.value.said


def change(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


# --- the same as one table ---------------------------------------------------------------------------------
def test_three_sources_are_the_same_as_the_one_joined_table(hospital):
    three = loaded(hospital)
    same(three, loaded(hospital, "one.yaml"))
    page = three.quality.page()
    assert "records that notes.csv has nothing for: 1" in page
    assert "records that archive has nothing for: 1" in page


def test_pictures_are_joined_by_patient_too(hospital):
    change(hospital / "site.yaml", "join: AccessionNumber, by: ACCESSION", "join: PatientID")
    same(loaded(hospital), loaded(hospital, "one.yaml"))


def test_paths_of_pictures_in_a_linked_file_are_pictures(hospital):
    joined = pd.read_csv(hospital / "joined.csv", dtype=str)
    joined[["patient", "film"]].dropna().to_csv(hospital / "films.csv", index=False)
    change(hospital / "site.yaml", "dicom: {folder: archive, join: AccessionNumber, by: ACCESSION}\n", "")
    change(hospital / "site.yaml", "link:\n", "link:\n  - {path: films.csv, key: patient, columns: {film: film}}\n")
    same(loaded(hospital), loaded(hospital, "one.yaml"))


@pytest.fixture(scope="module")
def clinical() -> StudyPlan:
    text = (files("cloister_simulations") / "scenarios" / "clinical-forms.yaml").read_text(encoding="utf-8")
    plan = parse(StudyPlan, load(text, "clinical-forms.yaml").below("plan"))
    return plan.model_copy(update={"cohort": Cohort(min_sites=2, min_patients=10)})


@pytest.mark.parametrize(
    "form", ["fhir", pytest.param("omop", marks=pytest.mark.slow), pytest.param("hl7", marks=pytest.mark.slow)]
)
def test_clinical_records_with_a_file_by_encounter_and_one_by_patient(form, clinical, tmp_path):
    """Sodium, smoking and the outcome by encounter, and sex by patient, from files instead of the records."""
    invented = invent(40, seed=7)
    table = flat(invented)
    stays = sorted((v for v in invented.visits if v.kind == "IMP"), key=lambda v: (str(v.person), v.start, str(v.id)))
    own = table[["sodium", "smoking", "readmitted"]].assign(STAY=[visit.id for visit in stays])
    site = write_form(invented, form, tmp_path / form, "st-marys")
    own[::-1].to_parquet(site.parent / "stays.parquet")
    people = pd.DataFrame([(person.id, person.sex.upper()) for person in invented.people], columns=["MRN", "SEX"])
    people.assign(SEX=people.SEX.str.lower()).to_csv(site.parent / "people.csv", index=False)
    whole = load_dataset(open_records(site), clinical)
    with site.open("a") as file:
        file.write(
            "link:\n"
            "  - path: stays.parquet\n    key: STAY\n    by: encounter\n"
            "    columns: {sodium: sodium, smoking: smoking, readmitted: readmitted}\n"
            "  - {path: people.csv, key: MRN, columns: {sex: SEX}}\n"
        )
    same(load_dataset(open_records(site), clinical), whole)


def test_an_archive_is_joined_to_clinical_records_by_patient(clinical, tmp_path):
    """What FHIR says of the outcome stands in the place of labels."""
    invented = invent(25, seed=7)
    site = write_form(invented, "fhir", tmp_path, "st-marys")
    (tmp_path / "archive").mkdir()
    for person in invented.people:
        tags = {"AccessionNumber": "", "PatientID": str(person.id)}
        pixels = np.full((8, 8), person.id % 1000, np.int16)
        (tmp_path / "archive" / f"{person.id}.dcm").write_bytes(dicom_file(pixels, uid=f"1.2.{person.id}", **tags))
    with site.open("a") as file:
        file.write("dicom: {folder: archive, join: PatientID}\npictures: {identified: true}\n")
    films = [f for f in read_plan(PLAN).table.features if f.name == "film"]
    terms = clinical.table.model_copy(update={"features": (*clinical.table.features, *films)})
    frame = open_records(site).rows(terms)
    assert [f"archive/{patient}.dcm" for patient in frame["patient"]] == frame["film"].tolist()
    data = load_dataset(open_records(site), clinical.model_copy(update={"table": terms}))
    without = load_dataset(open_records(write_form(invented, "fhir", tmp_path / "b", "st-marys")), clinical)
    width = without.train.x.shape[1]
    assert data.train.x[:, :width].numpy().tobytes() == without.train.x.numpy().tobytes()
    assert len(np.unique(data.train.x[:, width:].numpy())) == len(np.unique(data.train.patients))


# --- keys --------------------------------------------------------------------------------------------------
def test_numbers_and_text_are_the_same_key(hospital):
    for name, column in (("vitals", "patient"), ("joined", "patient")):
        frame = pd.read_csv(hospital / f"{name}.csv")
        frame[column] = frame[column].astype(int) + 5000
        frame.to_csv(hospital / f"{name}.csv", index=False)
    notes = pd.read_csv(hospital / "notes.csv")
    notes["MRN"] = notes["MRN"].astype(float) + 5000
    notes.to_parquet(hospital / "notes.parquet")
    change(hospital / "site.yaml", "notes.csv", "notes.parquet")
    same(loaded(hospital), loaded(hospital, "one.yaml"))


def test_keys_that_lost_their_leading_zeros_are_refused(hospital):
    notes = pd.read_csv(hospital / "notes.csv")
    notes["MRN"] = notes["MRN"].astype(int)
    notes.to_csv(hospital / "notes.csv", index=False)
    assert "the keys of 39 records are in notes.csv but for leading zeros" in refused(hospital)


def test_several_rows_for_a_key_are_refused_or_chosen_from(hospital):
    text = (hospital / "notes.csv").read_text()
    (hospital / "notes.csv").write_text(text + " 0005 ,another word,200\n")
    assert "notes.csv has several rows for 1 of 40 keys, such as rows 35 and 40" in refused(hospital)
    change(hospital / "site.yaml", "units: {weight: lb}", "units: {weight: lb}, several: first")
    same(loaded(hospital), loaded(hospital, "one.yaml"))
    change(hospital / "site.yaml", "several: first", "several: last")
    change(hospital / "joined.csv", "0005,65,136.5,word0 of patient and word2", "0005,65,200,another word")
    same(loaded(hospital), loaded(hospital, "one.yaml"))


def test_rows_that_say_the_same_twice_are_one(hospital):
    lines = (hospital / "notes.csv").read_text().splitlines()
    (hospital / "notes.csv").write_text("\n".join([*lines, lines[7]]) + "\n")
    same(loaded(hospital), loaded(hospital, "one.yaml"))


def test_two_pictures_of_one_patient_are_not_chosen_from(hospital):
    picture(hospital / "archive" / "more.dcm", np.zeros((8, 8), np.int16), 7, ".9")
    assert "film: several files where the plan wants one picture in row 8" in refused(hospital)


def test_a_key_that_fits_nobody_is_refused(hospital):
    change(hospital / "site.yaml", "key: MRN", "key: TEXT")
    assert "notes.csv has nothing under the key of any record" in refused(hospital)


def test_a_share_without_a_match_is_what_the_plan_says_of_a_gap(hospital):
    plan = PLAN.replace(", missing: indicator, fill: 70", "")
    with pytest.raises(DataRefused, match="weight: missing value in row 3"):
        loaded(hospital, plan=plan)
    lenient = loaded(hospital, plan=plan.replace("max_bad_rows: 0", "max_bad_rows: 0.1"))
    assert "1 bad rows left out" in lenient.quality.page()


# --- who is left out ---------------------------------------------------------------------------------------
def test_nothing_is_looked_up_for_patients_who_opted_out(hospital):
    with (hospital / "site.yaml").open("a") as file:
        file.write("opt_outs: opt_outs.txt\n")
    (hospital / "opt_outs.txt").write_text("0005\n0006\n")
    with (hospital / "notes.csv").open("a") as file:
        file.write("0005,another word,200\n")
    picture(hospital / "archive" / "more.dcm", np.zeros((8, 8), np.int16), 6, ".9")
    data = loaded(hospital)
    assert len(data.train) + len(data.test) == N - 2
    assert {65.0, 66.0}.isdisjoint([*data.train.x[:, 0].tolist(), *data.test.x[:, 0].tolist()])


# --- what site.yaml may say --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("key: MRN", "key: ID", "has no column ID"),
        ("path: notes.csv", "path: other.csv", "other.csv is not there"),
        ("table: {path: vitals.csv}", "", "labels is missing"),
        ("columns: {note: TEXT, weight: LB}, units: {weight: lb}", "columns: {}", "link"),
        ("by: ACCESSION", "by: ROOM", "has no column ROOM"),
        ("units: {weight: lb}", "units: {weight: mmHg}", "mmHg, which cannot become kg"),
        ("folder: archive", "folder: nowhere", "there is no folder nowhere"),
        ("join: AccessionNumber", "web: {url: 'https://x.local/'}, join: AccessionNumber", "without labels"),
        ("dicom:", "  - {path: vitals.csv, key: patient, columns: {note: pulse}}\ndicom:", "given by two files"),
    ],
)
def test_what_does_not_go_together_is_one_refusal(old, new, said, hospital):
    change(hospital / "site.yaml", old, new)
    with pytest.raises(CloisterError) as refusal:
        loaded(hospital)
    assert said in refusal.value.said


def test_a_plan_without_patients_cannot_be_joined_by_them(hospital):
    with pytest.raises(DataRefused, match="does not say whose each row is"):
        loaded(hospital, plan=PLAN.replace("  patient_id: patient\n", ""))


def test_an_archive_alone_needs_labels(tmp_path):
    (tmp_path / "site.yaml").write_text("site: a\ndicom: {folder: archive}\n")
    with pytest.raises(PlanRefused, match="labels is missing"):
        read_site(tmp_path / "site.yaml")


def test_the_commands_work_with_it(hospital):
    (hospital / "plan.yaml").write_text(PLAN)
    runner = CliRunner()
    shown = runner.invoke(app, ["map", str(hospital / "plan.yaml"), "--site", str(hospital / "site.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "39 of 39, 100%" in shown.output
    checked = runner.invoke(app, ["check", str(hospital / "plan.yaml"), str(hospital / "site.yaml")])
    assert checked.exit_code == 0, checked.output
    connector = open_records(hospital / "site.yaml")
    assert connector.source == "vitals.csv and notes.csv and archive"
    assert connector.describe() == ("patient", "ACCESSION", "pulse", "died", "TEXT", "LB")
