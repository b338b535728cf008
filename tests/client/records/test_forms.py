"""The same invented hospital as FHIR, OMOP, HL7 messages, C-CDA and a flat table: the same tensors, bit for bit."""

import json
import sqlite3
import sys
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import sqlalchemy.exc
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.connectors.omop import may_write, opened
from cloister_client.dataset import Dataset, load_dataset
from cloister_shared.plan import Cohort, StudyPlan
from cloister_shared.plan_file import load, parse
from cloister_shared.plan_rules import broken
from cloister_shared.schema import Schema
from cloister_simulations.sources.clinical_forms import Invented, Table, invent, omop_tables, write_form, write_tables

sys.path.insert(0, str(Path(__file__).parents[3] / "simulations" / "benchmarks"))
from clinical_postgres import postgres, site_folder  # pyright: ignore[reportMissingImports]


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    text = (files("cloister_simulations") / "scenarios" / "clinical-forms.yaml").read_text(encoding="utf-8")
    return parse(StudyPlan, load(text, "clinical-forms.yaml").below("plan"), broken)


@pytest.fixture(scope="module")
def invented() -> Invented:
    return invent(240, seed=5)


@pytest.fixture(scope="module")
def flat(plan, invented, tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("flat")
    return load_dataset(open_records(write_form(invented, "table", folder, "st-marys")), plan)


def same(one: Dataset, other: Dataset) -> None:
    for mine, theirs in ((one.train, other.train), (one.test, other.test)):
        assert len(mine) > 10
        assert mine.x.numpy().tobytes() == theirs.x.numpy().tobytes()
        assert mine.y.numpy().tobytes() == theirs.y.numpy().tobytes()
        np.testing.assert_array_equal(mine.patients, theirs.patients)


@pytest.mark.parametrize("form", ["fhir", "omop"])
def test_a_clinical_form_and_the_flat_table_are_the_same(form, plan, invented, flat, tmp_path):
    same(load_dataset(open_records(write_form(invented, form, tmp_path, "st-marys")), plan), flat)


def test_hl7_messages_and_documents_are_the_same(plan, tmp_path):
    few, plan = invent(40, seed=5), plan.model_copy(update={"cohort": Cohort(min_sites=2, min_patients=10)})
    flat, messages, documents = (
        load_dataset(open_records(write_form(few, form, tmp_path / form, "st-marys")), plan)
        for form in ("table", "hl7", "ccda")
    )
    same(messages, flat)
    same(documents, flat)


WORDS = ("vocabulary_id", "concept_code", "standard_concept")


def fill(connection, tables: dict[str, Table], mark: str) -> None:
    """The tables of OMOP with the types that its own scripts give them."""
    for name, (columns, rows) in tables.items():
        kinds = [
            "double precision" if column == "value_as_number"
            else "timestamp" if column.endswith("datetime")
            else "date" if column.endswith("date")
            else "varchar(50)" if column in WORDS or "_value" in column
            else "bigint"
            for column in columns
        ]  # fmt: skip
        connection.execute(f"CREATE TABLE {name} ({', '.join(map(' '.join, zip(columns, kinds, strict=True)))})")
        cells = [tuple(None if cell == "" else cell for cell in row) for row in rows]
        marks = ", ".join([mark] * len(columns))
        connection.cursor().executemany(f"INSERT INTO {name} VALUES ({marks})", cells)


def in_sqlite(folder: Path, tables: dict[str, Table]) -> str:
    with sqlite3.connect(folder / "cdm.sqlite") as connection:
        fill(connection, tables, "?")
    connection.close()
    return "sqlite:///cdm.sqlite"


def in_duckdb(folder: Path, tables: dict[str, Table]) -> str:
    duckdb = pytest.importorskip("duckdb")
    write_tables(tables, folder / "csv")
    with duckdb.connect(folder / "cdm.duckdb") as connection:
        for name in tables:
            path = folder / "csv" / f"{name.upper()}.csv"
            connection.read_csv(str(path)).create(name)
    return "duckdb:///cdm.duckdb"


@pytest.mark.parametrize("put", [in_sqlite, in_duckdb])
def test_a_database_is_the_same_as_its_tables(put, plan, invented, flat, tmp_path):
    url = put(tmp_path, omop_tables(invented))
    (tmp_path / "site.yaml").write_text(f"site: st-marys\nomop: {{database: '{url}'}}\n")
    same(load_dataset(open_records(tmp_path / "site.yaml"), plan), flat)


@pytest.mark.slow
def test_postgresql_is_the_same_and_is_only_read(plan, invented, flat, tmp_path):
    psycopg = pytest.importorskip("psycopg")
    with ExitStack() as running:
        try:
            socket = running.enter_context(postgres())
        except FileNotFoundError as absent:
            pytest.skip(str(absent))
        with psycopg.connect(f"host={socket} user=cloister dbname=postgres", autocommit=True) as connection:
            connection.execute("CREATE SCHEMA cdm; SET search_path TO cdm")
            fill(connection, omop_tables(invented), "%s")
            connection.execute("CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA cdm TO reader")
            connection.execute("GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO reader")
        reader = open_records(site_folder(tmp_path / "reader", socket))
        same(load_dataset(reader, plan), flat)
        assert reader.site.omop
        assert not may_write("a", reader.site.omop, reader.folder)
        site = site_folder(tmp_path / "reader", socket)
        site.write_text(site.read_text().replace("schema: cdm", "schema: cdm, folder: copy"))
        shown = CliRunner().invoke(app, ["fetch", str(site)])
        assert shown.exit_code == 0, shown.output
        assert (tmp_path / "reader" / "copy" / "measurement.csv").stat().st_mode & 0o077 == 0
        copied = open_records(site)
        owner = open_records(site_folder(tmp_path / "owner", socket, "cloister"))
        assert owner.site.omop
        assert may_write("a", owner.site.omop, owner.folder)
        with (
            opened("a", owner.site.omop, owner.folder) as database,
            pytest.raises(sa.exc.InternalError, match="read-only"),
        ):
            database._connection.execution_options(stream_results=False).execute(sa.text("DELETE FROM cdm.person"))
    same(load_dataset(copied, plan), flat)  # with the server gone


def test_a_series_is_the_same_in_both_forms(plan, invented, tmp_path):
    channels = [
        {"name": "hr", "code": "LOINC:8867-4", "unit": "1/min", "range": [20, 250]},
        {"name": "temperature", "code": "LOINC:8310-5", "unit": "degC", "range": [30, 45]},
    ]
    series = {
        "name": "vitals",
        "kind": "series",
        "channels": channels,
        "steps": 6,
        "step_hours": 4.0,
        "required": False,
    }
    schema = Schema.model_validate_json(json.dumps(plan.table.model_dump(mode="json") | {"features": [series]}))
    fhir, omop = (
        open_records(write_form(invented, form, tmp_path / form, "st-marys")).rows(schema) for form in ("fhir", "omop")
    )
    assert len(fhir) > 100
    assert sum(map(len, fhir["vitals"])) > 2 * len(fhir)
    for mine, theirs in zip(fhir["vitals"], omop["vitals"], strict=True):
        assert mine.shape[1:] == (3,)
        assert mine.tobytes() == theirs.tobytes()
