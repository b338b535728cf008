"""A million measurements in a PostgreSQL server of our own: seconds and memory until they are tensors, as JSON.

    python simulations/benchmarks/clinical_postgres.py [ROWS]

The reading is a process of its own, so that its memory is what the reading took.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from figures import in_fresh_process

ROWS, PATIENTS = 1_000_000, 5_000

PLAN = """\
study: million
title: A million measurements
task: {name: tabular}
table:
  patient_id: patient
  duplicates: allow
  target: {name: died, positive: 1, negative: 0, code: "LOCAL:death", window: {since: 0, until: 720}}
  features:
    - {name: age, kind: number, code: "LOCAL:age", unit: year, range: [0, 120]}
FEATURES
cohort: {min_sites: 2, min_patients: 1, max_rows: 100000}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 2, local_steps: 1}
privacy: {mechanism: none}
evaluation: {holdout: 0.25}
"""
_TAKES = ("last", "first", "mean", "min", "max", "count")


@contextmanager
def postgres() -> Iterator[Path]:
    """A server of our own, and the folder whose socket alone reaches it.

    Raises:
        FileNotFoundError: there is none on this machine.
    """
    places = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = next((Path(place).resolve().parent for place in places if place), None)
    if found is None:
        raise FileNotFoundError("no PostgreSQL here: initdb, pg_ctl and postgres")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(prefix="pg") as name:
        folder = Path(name)
        if os.geteuid() == 0:  # the server does not run as root
            shutil.chown(folder, "nobody")
            quiet |= {"user": "nobody", "extra_groups": []}

        def run(program: str, *more: str) -> None:
            subprocess.run(
                [found / program, "-D", folder / "data", *more], cwd=folder, timeout=120, check=True, **quiet
            )

        run("initdb", "--auth=trust", "--username=cloister", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8")
        run(
            "pg_ctl", "start", "-w", "-l", str(folder / "log"), "-o", f"-c listen_addresses='' -k {folder} -c fsync=off"
        )
        try:
            yield folder
        finally:
            run("pg_ctl", "stop", "-m", "immediate")


def fill(connection: Any, rows: int) -> None:
    """Patients with 3 stays each and 20 kinds of measurement, made inside the server; and a role that only reads."""
    connection.execute(
        f"""
        CREATE SCHEMA cdm;
        SET search_path TO cdm;
        CREATE TABLE person AS SELECT n::bigint AS person_id, 8507 + 25 * (n % 2) AS gender_concept_id,
            (1930 + n % 70)::int AS year_of_birth, (1 + n % 12)::int AS month_of_birth,
            (1 + n % 28)::int AS day_of_birth
            FROM generate_series(1, {PATIENTS}) n;
        CREATE TABLE visit_occurrence AS SELECT n::bigint AS visit_occurrence_id,
            (1 + n % {PATIENTS})::bigint AS person_id,
            9201 AS visit_concept_id, (date '2019-01-01' + (n % 700)::int) AS visit_start_date,
            timestamp '2019-01-01 08:00' + (n % 700) * interval '1 day' AS visit_start_datetime,
            (date '2019-01-05' + (n % 700)::int) AS visit_end_date,
            timestamp '2019-01-05 08:00' + (n % 700) * interval '1 day' AS visit_end_datetime
            FROM generate_series(1, {3 * PATIENTS}) n;
        CREATE TABLE death AS SELECT person_id, date '2020-06-01' AS death_date FROM person WHERE person_id % 10 = 0;
        CREATE TABLE measurement AS SELECT n::bigint AS measurement_id,
            (1 + (n * 7919) % {PATIENTS})::bigint AS person_id,
            3000000 + (n % 20)::int AS measurement_concept_id, 0 AS measurement_source_concept_id,
            (date '2018-06-01' + ((n * 31) % 1000)::int) AS measurement_date,
            timestamp '2018-06-01' + ((n * 31) % 86400000) * interval '1 second' AS measurement_datetime,
            (50 + (n * 17) % 1000 / 10.0)::numeric AS value_as_number, 0 AS value_as_concept_id,
            CASE WHEN n % 3 = 0 THEN 8636 ELSE 8840 END AS unit_concept_id,
            CASE WHEN n % 3 = 0 THEN 'g/L' ELSE 'mg/dL' END::varchar(50) AS unit_source_value,
            NULL::bigint AS visit_occurrence_id, n::text AS measurement_source_value
            FROM generate_series(1, {rows}::bigint) n;
        CREATE TABLE concept AS SELECT 3000000 + n AS concept_id, 'LOINC' AS vocabulary_id,
            '100' || n || '-0' AS concept_code
            FROM generate_series(0, 19) n UNION ALL VALUES (8636, 'UCUM', 'g/L'), (8840, 'UCUM', 'mg/dL');
        CREATE TABLE concept_ancestor AS SELECT concept_id AS ancestor_concept_id, concept_id AS descendant_concept_id
            FROM concept;
        CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA cdm TO reader;
        GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO reader; ANALYZE;
        """
    )


def site_folder(folder: Path, socket: Path, user: str = "reader") -> Path:
    """A hospital whose records are in that server."""
    folder.mkdir(parents=True, exist_ok=True)
    url = f"postgresql://{user}@/postgres?host={socket}"
    (folder / "site.yaml").write_text(f"site: st-marys\nomop: {{database: '{url}', schema: cdm}}\n", encoding="utf-8")
    return folder / "site.yaml"


def plan_text() -> str:
    lines = [
        f'    - {{name: lab_{at}, kind: number, code: "LOINC:100{at}-0", unit: {"" if take == "count" else "mg/dL"},'
        f" range: [0, 100000], missing: indicator, fill: 100, window: {{since: -8760, until: 24, take: {take}}}}}"
        for at in range(20)
        for take in [_TAKES[at % len(_TAKES)]]
    ]
    return PLAN.replace("FEATURES", "\n".join(lines).replace("unit: , ", "").replace("unit: ,", ""))


_READ = """
import json, resource, sys, time
from pathlib import Path
import torch
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_shared.plan_file import read_plan
plan = read_plan(Path(sys.argv[2]).read_text())
began = time.monotonic()
data = load_dataset(open_records(Path(sys.argv[1])), plan)
seconds = time.monotonic() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
shape = [len(data.train) + len(data.test), data.train.x.shape[1]]
print(json.dumps({"seconds": seconds, "gb": peak, "shape": shape}))
"""


def measured(rows: int = ROWS) -> dict[str, Any]:
    """Seconds, and GB at the most, of the process that makes tensors of ``rows`` measurements."""
    import psycopg

    with postgres() as socket, tempfile.TemporaryDirectory(prefix="cloister-") as scratch:
        with psycopg.connect(f"host={socket} user=cloister dbname=postgres", autocommit=True) as connection:
            fill(connection, rows)
        folder = Path(scratch)
        site = site_folder(folder, socket)
        (folder / "plan.yaml").write_text(plan_text(), encoding="utf-8")
        (folder / "read.py").write_text(_READ, encoding="utf-8")
        return in_fresh_process(str(folder / "read.py"), str(site), str(folder / "plan.yaml"))


if __name__ == "__main__":
    print(measured(int(sys.argv[1]) if len(sys.argv) > 1 else ROWS))
