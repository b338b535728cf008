"""The coordinator's records: races that one wins, kills that lose nothing, schemas that grow; SQLite and PostgreSQL."""

import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from cloister_server import migrations, records
from cloister_server.database import open_database, transaction
from cloister_server.registry import Account, Registry, Role, open_registry
from cloister_shared.errors import AccessRefused, EnrolmentRefused, RegistryBroken, StudyRefused

SOON = datetime.now(UTC) + timedelta(hours=1)
DIGEST = "a1b2" * 16
ROSTER = {"St Mary's": "ab" * 32, "Ash": "cd" * 32}


# --- databases to try them on ----------------------------------------------------------------------------------
class Postgres:
    """A server of our own that only its folder's socket reaches; it does not run as root."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder, self.made = folder, 0
        self._programs, self._data = programs, folder / "data"
        self._as: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
            self._as |= {"user": "nobody", "extra_groups": []}
        self.run("initdb", "--auth=trust", "--username=cloister", "--no-sync")
        self.start()

    def run(self, program: str, *more: str) -> None:
        subprocess.run([self._programs / program, "-D", self._data, *more], cwd=self.folder, timeout=60, **self._as)

    def start(self) -> None:
        options = f"-c listen_addresses='' -k {self.folder}"
        self.run("pg_ctl", "start", "-w", "-l", str(self.folder / "log"), "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-m", "immediate")

    def new(self) -> str:
        """The URL of an empty database."""
        self.made += 1
        admin = sa.create_engine(
            f"postgresql+psycopg://cloister@/postgres?host={self.folder}", isolation_level="AUTOCOMMIT"
        )
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE test{self.made}")
        admin.dispose()
        return f"postgresql://cloister@/test{self.made}?host={self.folder}"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'cloister[postgres]'")
    places = [shutil.which("initdb"), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))]
    found = next((Path(place).resolve().parent for place in places if place), None)
    if found is None or not (found / "pg_ctl").exists():
        pytest.skip("no PostgreSQL server here: install initdb, pg_ctl and postgres to run this on it")
    # Not pytest's own folder: the server's account cannot enter that, and a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        server = Postgres(found, Path(folder))
        yield server
        server.stop()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def new_url(request, tmp_path) -> Callable[[], str]:
    """The URL of an empty database, another at each call."""
    if request.param == "postgres":
        return request.getfixturevalue("postgres").new
    numbers = itertools.count(1)
    return lambda: f"sqlite:///{tmp_path}/registry{next(numbers)}.sqlite"


@pytest.fixture
def url(new_url) -> str:
    return new_url()


@pytest.fixture
def registry(url) -> Iterator[Registry]:
    opened = open_registry(url)
    yield opened
    opened.close()


WORKER = """
import json, sys
from datetime import UTC, datetime, timedelta
import cloister_server.registry as registry
from cloister_shared.errors import CloisterError
soon = datetime.now(UTC) + timedelta(hours=1)
def open_at(url):
    global records
    records = registry.open_registry(url)
    return "alembic" in sys.modules
def admit(serial, key):
    return records.admit(serial, f"{key:064x}", b"key %d" % key, key, soon, key).name
def move(digest, state, only_from):
    records.move(digest, state, only_from=only_from)
def add_round(digest, number):
    records.add_round(digest, number, {"round": number})
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    name, *arguments = json.loads(line)
    try:
        said = [True, globals()[name](*arguments)]
    except CloisterError as error:
        said = [False, str(error)]
    print(json.dumps(said), flush=True)
"""


class Worker:
    """Another process with the records open. ``tell`` returns at once; ``hear`` waits for what came of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, *words: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Worker]]:
    both = [Worker(), Worker()]
    assert [worker.hear() for worker in both] == ["ready", "ready"]
    yield both
    for worker in both:
        worker.process.kill()
        worker.process.communicate()


def enrol(registry: Registry, hospital: str, number: int, **changes: Any) -> None:
    registry.invite(number, hospital, SOON)
    said: dict[str, Any] = {
        "identity": f"{number:064x}",
        "public_key": b"key %d" % number,
        "certificate_serial": 2**158 + number,
        "not_after": SOON,
        "node": 2**64 - number,
    }
    registry.admit(number, **{**said, **changes})


def submit(registry: Registry, digest: str = DIGEST, name: str = "heart") -> None:
    registry.add_study(digest, name, "plan: text", "heart.yaml", "ann", ROSTER, "envelope")


# --- hospitals ---------------------------------------------------------------------------------------------------
def test_a_hospital_is_as_it_was_admitted(registry):
    enrol(registry, "Hôpital St Mary's", 1)
    (hospital,) = registry.hospitals()
    assert (hospital.name, hospital.identity, hospital.public_key) == ("Hôpital St Mary's", f"{1:064x}", b"key 1")
    assert (hospital.node, hospital.serial, hospital.not_after) == (2**64 - 1, 2**158 + 1, SOON)
    assert (hospital.standing, hospital.version, hospital.seen) == ("enrolled", "", None)


def test_an_invite_is_good_once(registry):
    enrol(registry, "Ash", 1)
    with pytest.raises(EnrolmentRefused, match="unknown, used or expired"):
        registry.admit(1, "0" * 64, b"another", 7, SOON, 7)
    assert [hospital.name for hospital in registry.hospitals()] == ["Ash"]


@pytest.mark.parametrize("serial", [2, 3], ids=["expired", "unknown"])
def test_an_invite_that_does_not_hold_admits_nobody(registry, serial):
    registry.invite(2, "Ash", datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(EnrolmentRefused, match="unknown, used or expired"):
        registry.admit(serial, "0" * 64, b"key", 7, SOON, 7)


def test_a_newer_invite_ends_the_one_before(registry):
    registry.invite(1, "Ash", SOON)
    registry.invite(2, "Ash", SOON)
    assert registry.invites() == {"Ash": SOON}
    with pytest.raises(EnrolmentRefused, match="unknown, used or expired"):
        registry.admit(1, "0" * 64, b"key", 7, SOON, 7)


@pytest.mark.parametrize(
    "taken",
    [{"identity": f"{1:064x}"}, {"public_key": b"key 1"}, {"node": 2**64 - 1}],
    ids=lambda taken: next(iter(taken)),
)
def test_a_key_is_one_hospitals_alone_and_the_invite_stays_open(registry, taken):
    enrol(registry, "Ash", 1)
    with pytest.raises(EnrolmentRefused, match="Oak, or a key that it shows, is enrolled already"):
        enrol(registry, "Oak", 2, **taken)
    assert set(registry.invites()) == {"Oak"}
    assert [hospital.name for hospital in registry.hospitals()] == ["Ash"]


def test_an_enrolled_name_is_not_invited_again(registry):
    enrol(registry, "Ash", 1)
    with pytest.raises(EnrolmentRefused, match="Ash is enrolled"):
        registry.invite(2, "Ash", SOON)
    with pytest.raises(EnrolmentRefused, match="a name is letters"):
        registry.invite(2, "../ash", SOON)


def test_expulsion_names_every_certificate_and_lets_the_hospital_come_anew(registry):
    enrol(registry, "Ash", 1)
    registry.renewed("Ash", 77, SOON + timedelta(days=1))
    assert registry.hospital("Ash").serial == 77
    assert registry.hospital("Ash").not_after == SOON + timedelta(days=1)
    assert set(registry.expel("Ash")) == {77, 2**158 + 1}
    assert set(registry.revocations()) == {77, 2**158 + 1}
    with pytest.raises(EnrolmentRefused, match="No hospital 'Ash'"):
        registry.renewed("Ash", 78, SOON)
    enrol(registry, "Ash", 2)
    assert (registry.hospital("Ash").standing, registry.hospital("Ash").public_key) == ("enrolled", b"key 2")
    assert set(registry.revocations()) == {77, 2**158 + 1}


def test_expulsion_ends_an_invite(registry):
    registry.invite(1, "Ash", SOON)
    assert registry.expel("Ash") == []
    assert registry.invites() == {}
    with pytest.raises(EnrolmentRefused, match="No hospital 'Ash'"):
        registry.expel("Ash")


def test_a_call_is_remembered(registry):
    enrol(registry, "Ash", 1)
    before = datetime.now(UTC)
    registry.seen("Ash", "1.0 (cloister 0.1.0)")
    hospital = registry.hospital("Ash")
    assert hospital.version == "1.0 (cloister 0.1.0)"
    assert before <= (hospital.seen or before - timedelta(1)) <= datetime.now(UTC)


# --- accounts ----------------------------------------------------------------------------------------------------
def test_a_token_opens_its_account_and_no_other(registry):
    ann, bob = registry.add_account("ann", Role.OPERATOR), registry.add_account("bob", Role.AUDITOR)
    assert registry.account(ann) == Account("ann", Role.OPERATOR)
    assert registry.account(bob) == Account("bob", Role.AUDITOR)
    assert registry.account(ann[:-1]) is None
    assert registry.account("") is None
    assert [account.name for account in registry.accounts()] == ["ann", "bob"]


def test_a_token_ends_with_its_renewal_and_with_its_account(registry):
    old = registry.add_account("ann", Role.OPERATOR)
    new = registry.renew_account("ann")
    assert registry.account(old) is None
    assert registry.account(new) == Account("ann", Role.OPERATOR)
    registry.remove_account("ann")
    assert registry.account(new) is None
    for change in (registry.remove_account, registry.renew_account):
        with pytest.raises(AccessRefused, match="no account 'ann'"):
            change("ann")


def test_an_odd_account_is_refused(registry):
    registry.add_account("ann", Role.OPERATOR)
    with pytest.raises(AccessRefused, match="There is an account ann"):
        registry.add_account("ann", Role.AUDITOR)
    with pytest.raises(AccessRefused, match="'king' is not a valid Role"):
        registry.add_account("bob", "king")
    with pytest.raises(AccessRefused, match="a name is letters"):
        registry.add_account("bob\n", Role.AUDITOR)


def test_no_token_is_on_the_disk(tmp_path):
    registry = open_registry(f"sqlite:///{tmp_path}/registry.sqlite")
    token = registry.add_account("ann", Role.OPERATOR)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"operator" in written
    assert token.encode() not in written
    registry.close()


# --- studies -----------------------------------------------------------------------------------------------------
def test_a_study_is_found_by_name_and_by_the_start_of_its_digest(registry):
    submit(registry)
    submit(registry, "a1b3" * 16, "lung")
    assert registry.study("heart") == registry.study(DIGEST) == registry.study("a1b2") == registry.studies()[0]
    assert registry.study("heart").roster == ROSTER
    for called in ("hear", "a1", "a1b%", "ffff"):
        with pytest.raises(StudyRefused, match=f"There is no study '{called}'"):
            registry.study(called)


def test_two_studies_of_one_name_are_told_apart(registry):
    submit(registry)
    submit(registry, "c" * 64)
    with pytest.raises(StudyRefused, match=r"a1b2a1b2a1b2 \(submitted\), cccccccccccc \(submitted\)"):
        registry.study("heart")


def test_a_plan_is_submitted_once(registry):
    submit(registry)
    with pytest.raises(StudyRefused, match="This very plan was submitted before"):
        submit(registry)


def test_a_study_moves_only_from_where_it_may(registry):
    submit(registry)
    registry.move(DIGEST, "running", only_from=("submitted", "waiting"))
    with pytest.raises(StudyRefused, match="heart a1b2a1b2a1b2 is running"):
        registry.move(DIGEST, "running", only_from=("submitted", "waiting"))
    registry.move(DIGEST, "stopped", "by ann")
    assert (registry.study("heart").state, registry.study("heart").reason) == ("stopped", "by ann")
    with pytest.raises(StudyRefused, match="There is no study"):
        registry.move("b" * 64, "running")


def test_the_last_decision_of_a_hospital_counts(registry):
    submit(registry)
    registry.decide(DIGEST, "St Mary's", "approved", "first")
    registry.decide(DIGEST, "St Mary's", "revoked", "second")
    assert registry.decisions(DIGEST) == {"St Mary's": "revoked"}
    assert registry.envelopes(DIGEST) == {"St Mary's": "second"}
    with pytest.raises(StudyRefused, match="Elm is no hospital of heart"):
        registry.decide(DIGEST, "Elm", "approved", "envelope")


def test_rounds_come_back_in_order_and_as_last_done(registry):
    submit(registry)
    for number, told in ((2, "two"), (1, "torn"), (10, "ten"), (1, "one")):
        registry.add_round(DIGEST, number, {"told": told, "auroc": float("nan")})
    assert [said["told"] for said in registry.rounds(DIGEST)] == ["one", "two", "ten"]
    assert [said["told"] for said in registry.rounds(DIGEST, after=2)] == ["ten"]
    assert registry.study("heart").round == 10
    with pytest.raises(StudyRefused, match="There is no study bbbbbbbbbbbb"):
        registry.add_round("b" * 64, 1, {})


# --- several at once -----------------------------------------------------------------------------------------------
def test_two_processes_race_for_an_invite_and_one_is_admitted(registry, url, workers):
    for worker in workers:
        worker.tell("open_at", url)
    assert [worker.hear()[0] for worker in workers] == [True, True]
    winners = set()
    for serial in range(1, 31):
        registry.invite(serial, f"Hospital {serial}", SOON)
        for which, worker in enumerate(workers):
            worker.tell("admit", serial, 100 * serial + which)
        said = [worker.hear() for worker in workers]
        assert sorted(admitted for admitted, _ in said) == [False, True], said
        assert "unknown, used or expired" in next(why for admitted, why in said if not admitted)
        winners.add([admitted for admitted, _ in said].index(True))
    assert len(registry.hospitals()) == 30


def test_two_processes_race_for_a_study_and_one_runs_it(registry, url, workers):
    submit(registry)
    for worker in workers:
        worker.tell("open_at", url)
    assert [worker.hear()[0] for worker in workers] == [True, True]
    for _ in range(20):
        for worker in workers:
            worker.tell("move", DIGEST, "running", ["submitted"])
        assert sorted(worker.hear()[0] for worker in workers) == [False, True]
        registry.move(DIGEST, "submitted")


def test_two_processes_that_start_at_once_make_the_tables_once(new_url, workers):
    for url in [new_url() for _ in range(5)]:
        for worker in workers:
            worker.tell("open_at", url)
        assert [worker.hear()[0] for worker in workers] == [True, True]
        registry = open_registry(url)
        assert registry.hospitals() == []
        registry.close()


def test_threads_write_at_once_and_none_is_turned_away(registry):
    submit(registry)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: registry.add_round(DIGEST, number, {}), range(1, 65)))
    assert len(registry.rounds(DIGEST)) == 64


def test_what_a_killed_process_was_told_is_done_stays_done(registry, url):
    submit(registry)
    worker = Worker()
    assert worker.hear() == "ready"
    worker.tell("open_at", url)
    for number in range(1, 200):
        worker.tell("add_round", DIGEST, number)
    for _ in range(20):
        worker.hear()
    worker.process.send_signal(signal.SIGKILL)
    said, _ = worker.process.communicate()
    done = 19 + len(re.findall(r"\[true, null\]\n", said))
    assert done < 199
    assert len(registry.rounds(DIGEST)) in (done, done + 1)
    registry.add_round(DIGEST, 500, {})


# --- schemas -------------------------------------------------------------------------------------------------------
def upgraded(url: str, revision: str) -> sa.Engine:
    """A database as an older release left it."""
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        command.upgrade(config, revision)
    return engine


def test_records_of_the_first_schema_are_carried_over(url):
    old = upgraded(url, "0001")
    with old.begin() as connection:
        for serial, name, standing in (("71", "Ash", "enrolled"), ("72", "Elm", "expelled")):
            row = f"'{name}', '{serial}', '{serial}', '{serial}', '{serial}', :end, '{standing}', '', NULL"
            connection.execute(sa.text(f"INSERT INTO hospitals VALUES ({row})"), {"end": SOON.replace(tzinfo=None)})
    old.dispose()
    registry = open_registry(url)
    ash, elm = registry.hospitals()
    assert (ash.name, ash.serial, ash.not_after, ash.standing) == ("Ash", 71, SOON, "enrolled")
    assert (elm.name, elm.serial, elm.standing) == ("Elm", 72, "expelled")
    assert set(registry.revocations()) == {72}
    assert abs(registry.revocations()[72] - datetime.now(UTC)) < timedelta(minutes=1)
    assert registry.expel("Ash") == [71]
    registry.close()


def test_all_revisions_together_make_the_tables_that_are_written_down(url):
    engine = open_database(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": migrations.VERSION_TABLE}
        )
        assert compare_metadata(context, records.TABLES) == []
    engine.dispose()


def test_the_revisions_that_are_written_down_are_alembics():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(found)) == migrations.REVISIONS


def test_records_of_a_newer_release_are_refused_and_left_alone(url):
    engine = open_database(url)
    with transaction(engine, writes=True) as connection:
        connection.execute(sa.text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '0099'"))
    with pytest.raises(RegistryBroken, match=r"revision 0099.*Upgrade this coordinator"):
        open_registry(url)
    with transaction(engine) as connection:
        assert connection.scalar(sa.text(f"SELECT version_num FROM {migrations.VERSION_TABLE}")) == "0099"
    engine.dispose()


def test_an_upgrade_that_breaks_leaves_the_old_records(url):
    old = upgraded(url, "0001")
    with old.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE certificates (serial INTEGER)")  # in the way of 0002
    with pytest.raises(RegistryBroken, match="certificates"):
        open_registry(url)
    with old.begin() as connection:
        assert connection.scalar(sa.text(f"SELECT version_num FROM {migrations.VERSION_TABLE}")) == "0001"
        assert "not_after" in {column["name"] for column in sa.inspect(connection).get_columns("hospitals")}
        connection.exec_driver_sql("DROP TABLE certificates")
    old.dispose()
    registry = open_registry(url)
    assert registry.hospitals() == []
    registry.close()


def test_records_of_this_release_are_opened_without_alembic(tmp_path, workers):
    url = f"sqlite:///{tmp_path}/registry.sqlite"
    open_registry(url).close()
    worker = Worker()
    assert worker.hear() == "ready"
    worker.tell("open_at", url)
    assert worker.hear() == [True, False]
    worker.process.communicate()


# --- what breaks ---------------------------------------------------------------------------------------------------
def test_sqlite_keeps_what_it_said_it_kept_and_to_its_owner(tmp_path):
    engine = open_database(f"sqlite:///{tmp_path}/registry.sqlite")
    assert stat.S_IMODE((tmp_path / "registry.sqlite").stat().st_mode) == 0o600
    with transaction(engine) as connection:
        said = {
            name: connection.scalar(sa.text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    assert said == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    engine.dispose()


def damaged(folder: Path) -> str:
    (folder / "registry.sqlite").write_bytes(b"no database " * 1000)
    return f"sqlite:///{folder}/registry.sqlite"


def nowhere(folder: Path) -> str:
    return f"sqlite:///{folder}/absent/registry.sqlite"


def in_memory(folder: Path) -> str:
    return "sqlite://"


def of_another_make(folder: Path) -> str:
    return "mysql://ann:hunter2@127.0.0.1/heart"


def no_url(folder: Path) -> str:
    return "registry.sqlite hunter2"


def nobody_there(folder: Path) -> str:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'cloister[postgres]'")
    return f"postgresql://ann:hunter2@/heart?host={folder}"


PLACES: dict[Callable[[Path], str], str] = {
    damaged: "registry.sqlite cannot be used: file is not a database",
    nowhere: "registry.sqlite cannot be used: .*No such file",
    in_memory: "keeps no records in sqlite",
    of_another_make: "keeps no records in mysql",
    no_url: "database is not the URL",
    nobody_there: "records at postgresql.* cannot be used: connection",
}


@pytest.mark.parametrize(("place", "why"), PLACES.items(), ids=lambda place: getattr(place, "__name__", ""))
def test_a_database_that_cannot_be_used_is_named_without_its_password(tmp_path, place, why):
    with pytest.raises(RegistryBroken, match=why) as raised:
        open_registry(place(tmp_path))
    assert "hunter2" not in str(raised.value)
    assert raised.value.mend


def test_a_writer_that_holds_on_too_long_is_a_fault_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr("cloister_server.database._PATIENCE", 0.1)
    registry = open_registry(f"sqlite:///{tmp_path}/registry.sqlite")
    other = sqlite3.connect(tmp_path / "registry.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RegistryBroken, match="database is locked"):
        registry.add_account("ann", Role.OPERATOR)
    other.execute("ROLLBACK")
    other.close()
    assert registry.accounts() == []
    registry.close()


@pytest.mark.slow
def test_postgres_that_went_away_is_used_again_when_it_is_back(postgres):
    registry = open_registry(postgres.new())
    registry.add_account("ann", Role.OPERATOR)
    postgres.stop()
    try:
        with pytest.raises(RegistryBroken, match="cannot be used"):
            registry.accounts()
    finally:
        postgres.start()
    assert [account.name for account in registry.accounts()] == ["ann"]
    registry.close()
