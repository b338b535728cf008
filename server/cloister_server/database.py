"""The coordinator's database, SQLite or PostgreSQL: opened, brought to this release's schema, and its transactions."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from cloister_server import migrations
from cloister_shared import durable
from cloister_shared.errors import RegistryBroken

_PATIENCE = 30.0
"""Seconds that a writer waits for its turn."""

_LOCK = 0x636C6F6973746572
"""Which of PostgreSQL's advisory locks is held while the schema is brought up to date: ``cloister`` in ASCII."""


def open_database(url: str) -> sa.Engine:
    """The database at ``sqlite:///FILE`` or ``postgresql://USER@HOST/NAME``, brought to this release's schema.

    Raises:
        RegistryBroken: there is no such database, or a newer release wrote it.
    """
    try:
        parsed = sa.make_url(url)
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
            engine = _sqlite(parsed, Path(parsed.database))
        elif parsed.drivername == "postgresql+psycopg":
            engine = sa.create_engine(
                parsed, hide_parameters=True, pool_pre_ping=True, connect_args={"connect_timeout": 10}
            )
        else:
            raise RegistryBroken(
                f"The coordinator keeps no records in {parsed.drivername}.",
                mend="Write database: sqlite:///FILE or postgresql://USER@HOST/NAME.",
            )
    except exc.ArgumentError:  # whose text may quote a password
        raise RegistryBroken(
            "database is not the URL of a database.", mend="Write sqlite:///FILE or postgresql://USER@HOST/NAME."
        ) from None
    except ModuleNotFoundError:
        raise RegistryBroken(
            "PostgreSQL needs psycopg, which is not installed.", mend="Run pip install 'cloister[postgres]'."
        ) from None
    try:
        with transaction(engine) as db:
            revision = _revision(db)
        if revision != migrations.REVISIONS[-1]:
            _upgrade(engine)
    except RegistryBroken:
        engine.dispose()
        raise
    return engine


def _sqlite(url: sa.URL, path: Path) -> sa.Engine:
    """SQLite for several processes: a log written ahead, flushed at every commit, and writers that queue."""
    try:
        with durable.locked(path):  # two that start at once would both change the file's mode, for which none waits
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(path, timeout=_PATIENCE)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
    except (OSError, sqlite3.Error) as error:
        raise RegistryBroken(f"{path} cannot be used: {error}.", mend="Correct its folder, or restore it.") from None
    # Two connections are kept; more, when all are busy at once, are closed again: each holds files open.
    engine = sa.create_engine(
        url, hide_parameters=True, connect_args={"timeout": _PATIENCE}, pool_size=2, max_overflow=30
    )

    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # or Python's module begins and ends transactions of its own
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    def begun(connection: sa.Connection) -> None:
        # A transaction that reads first and writes then could not wait for its turn: it is a writer from the start.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    return engine


def _upgrade(engine: sa.Engine) -> None:
    """All revisions that are missing, in one transaction; a second process waits, and finds none missing."""
    with transaction(engine, writes=True) as db:
        if engine.dialect.name == "postgresql":
            db.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        from alembic import command
        from alembic.config import Config

        config = Config(attributes={"connection": db})
        config.set_main_option("script_location", str(Path(migrations.__file__).parent).replace("%", "%%"))
        command.upgrade(config, "head")


def _revision(db: sa.Connection) -> str | None:
    """The revision that the database has, or None of one that is empty.

    Raises:
        RegistryBroken: it is one that this release does not know.
    """
    if not sa.inspect(db).has_table(migrations.VERSION_TABLE):
        return None
    found = db.scalar(sa.text(f"SELECT version_num FROM {migrations.VERSION_TABLE}"))
    if found is not None and found not in migrations.REVISIONS:
        raise RegistryBroken(
            f"The coordinator's records are of revision {found}, which this release does not know.",
            mend="Upgrade this coordinator, or restore the backup from before the newer release was run.",
        )
    return found


@contextmanager
def transaction(engine: sa.Engine, *, writes: bool = False) -> Iterator[sa.Connection]:
    """Committed where the block ends, undone where it raises.

    Raises:
        RegistryBroken: the database cannot be used. What breaks a rule of a table stays an ``IntegrityError``.
    """
    try:
        with engine.execution_options(writes=writes).begin() as db:
            yield db
    except exc.IntegrityError:
        raise
    except (exc.SQLAlchemyError, OSError) as error:
        # The driver's first line: SQLAlchemy's own text would hold the statement.
        said = str(getattr(error, "orig", None) or error).partition("\n")[0].rstrip(".")
        raise RegistryBroken(
            f"The coordinator's records at {engine.url.render_as_string(hide_password=True)} cannot be used: {said}.",
            mend="Look after the disk or the database, then try again; nothing was half written.",
        ) from None
