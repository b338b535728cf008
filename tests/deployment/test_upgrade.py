"""The coordinator is replaced by one of another release while hospitals are online and a study is in mid-round.

The other release is this one with a later protocol, and with one more revision of its records, which a file that
Python reads at start puts in; every process of the coordinator has it, and no process of a hospital.
"""

import os
import shutil
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cloister_server import migrations
from cloister_simulations.deployment import until

RELEASE = """
import cloister_server.migrations as migrations
import cloister_shared.versions as versions

versions.PROTOCOL, versions.RELEASE = {protocol}, "99.0"
migrations.REVISIONS += ("0099",)
migrations.__file__ = {file!r}
"""

REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "0099", {last!r}


def upgrade():
    op.add_column("studies", sa.Column("of_the_next_release", sa.String(10)))
"""


@contextmanager
def next_release(night, folder: Path, protocol: tuple[int, int]):
    """In the block the coordinator is of the next release; after it of this one, and its records too."""
    revisions = folder / "migrations"
    shutil.copytree(Path(migrations.__file__).parent, revisions, ignore=shutil.ignore_patterns("__pycache__"))
    (revisions / "versions/v0099_next.py").write_text(REVISION.format(last=migrations.REVISIONS[-1]))
    (folder / "sitecustomize.py").write_text(RELEASE.format(protocol=protocol, file=str(revisions / "__init__.py")))
    path = os.pathsep.join([str(folder), night.environment["PYTHONPATH"]])
    night.end("coordinator")
    try:
        night.start({"PYTHONPATH": path})
        yield
    finally:
        night.end("coordinator")
        with closing(sqlite3.connect(night.home / "registry.sqlite")) as records, records:
            assert records.execute(f"SELECT version_num FROM {migrations.VERSION_TABLE}").fetchall() == [("0099",)]
            records.execute("ALTER TABLE studies DROP COLUMN of_the_next_release")
            records.execute(f"UPDATE {migrations.VERSION_TABLE} SET version_num = ?", migrations.REVISIONS[-1:])
        night.start()


@pytest.mark.slow
def test_a_later_minor_release_of_the_coordinator_takes_over_in_mid_round(night, tmp_path):
    plan = night.offer(night.plan("upgraded"))
    night.hold("training")
    night.run(plan)
    night.await_held("training")
    with next_release(night, tmp_path, (1, 7)):
        night.release("training")
        night.finished(plan)


@pytest.mark.slow
def test_hospitals_wait_out_a_major_release_that_they_do_not_speak_and_say_what_to_upgrade(night, tmp_path):
    plan = night.offer(night.plan("too-new"))
    night.hold("training")
    night.run(plan)
    night.await_held("training")
    with next_release(night, tmp_path, (2, 0)):
        night.release("training")
        for name in night.sites:
            said = f"Upgrade the agent of {name} to the release of the coordinator."
            until(lambda name=name, said=said: said in night.log(name), night.LONG, f"{name} says what to upgrade")
        assert night.study(plan.study).round == 0
        night.end(*night.sites)
    night.revive()
    night.finished(plan)
