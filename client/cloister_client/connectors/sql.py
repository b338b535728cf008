"""Tables of a database, read a piece at a time: PostgreSQL and SQLite by SQLAlchemy, DuckDB and CSVs by DuckDB.

One kind of question is asked: these columns of this table, where any of those columns holds any of those values. Names
come from this program and from the database's own catalogue, values are bound; nothing of a plan becomes SQL. Every
transaction is read-only.
"""

from __future__ import annotations

import gzip
import os
import sqlite3
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa
import sqlalchemy.exc
from numpy.typing import NDArray
from sqlalchemy.dialects import postgresql

from cloister_client.connectors.clinical import NEVER
from cloister_client.connectors.gathering import Words
from cloister_client.site_file import OmopSource
from cloister_shared.errors import DataRefused

Kind = Literal["int", "number", "text", "time"]
Piece = dict[str, NDArray[Any]]
"""Where there is none, a whole number is -1, a number NaN, a time NEVER. A text is its place in ``words``, or -1."""
_CLINICAL = "person visit_occurrence death measurement observation condition_occurrence drug_exposure"
_VOCABULARY = "concept concept_ancestor concept_relationship"
TABLES = frozenset(f"{_CLINICAL} procedure_occurrence {_VOCABULARY}".split())
"""Those that are read."""
_ROWS = 50_000
_MOST = 30_000
"""Values that one question may name; beyond, the whole table is read and sifted here."""
_DIALECT = postgresql.dialect(paramstyle="numeric_dollar")


class Database:
    """An open database. ``words`` are all texts that were read."""

    def __init__(self, site: str, source: str, schemas: Mapping[str, str | None]) -> None:
        self.site, self.source, self._schemas, self.words = site, source, schemas, Words()
        self._kind: Literal["postgresql", "sqlite", "duckdb", "csv"] = "sqlite"
        self._engine: Any = None
        self._connection: Any = None

    def has(self, table: str) -> bool:
        """Whether there is such a table at all."""
        return bool(self._columns(table))

    def read(
        self,
        table: str,
        columns: Mapping[str, Kind],
        any_of: Mapping[str, Collection[int] | Collection[str]] | None = None,
        starting: Mapping[str, Collection[str]] | None = None,
        optional: Collection[str] = (),
    ) -> Iterator[Piece]:
        """Rows where any column of ``any_of`` holds one of its values, or of ``starting`` begins with one.

        Columns that are ``optional`` and not there come as empty ones.

        Raises:
            DataRefused: the table or a column is not there, or a cell cannot be what the column is.
        """
        there = self._columns(table)
        if lacking := [name for name in columns if name not in there and name not in optional]:
            what = f"column {table}.{lacking[0]}" if there else f"table {table}"
            raise DataRefused(
                f"{self.site}: {self.source} has no {what}.",
                mend="It must be an OMOP common data model, version 5.4; name its schema in site.yaml.",
            )
        source = sa.table(there[""], *(sa.column(actual) for name, actual in there.items() if name))
        if schema := self._schemas.get(table, self._schemas.get("")):
            source.schema = schema
        chosen = [
            self._expression(source.c[there[name]], kind).label(name) for name, kind in columns.items() if name in there
        ]
        question = sa.select(*chosen)
        given = any_of or {}
        tests = [
            self._expression(source.c[there[name]], "int" if isinstance(next(iter(values)), int) else "text").in_(
                [int(value) if isinstance(value, int | np.integer) else value for value in values]
            )
            for name, values in given.items()
            if len(values) and name in there
        ]
        tests += [
            source.c[there[name]].startswith(value, autoescape=True)
            for name, values in (starting or {}).items()
            for value in values
        ]
        if sum(len(values) for values in given.values()) <= _MOST and (tests or any_of is not None):
            question = question.where(sa.or_(*tests) if tests else sa.false())
        kept: dict[str, Kind] = {name: kind for name, kind in columns.items() if name in there}
        for rows in self._answered(question, table):
            yield self._piece(table, kept, columns, rows)

    # --- what the kinds of database differ in -----------------------------------------------------------------
    def _expression(self, column: Any, kind: Kind) -> Any:
        """A column as numbers or text, whatever it is stored as."""
        lenient = self._kind == "sqlite"  # which makes 0 of whatever it cannot convert, so that Python does it
        if self._kind == "csv":
            column = sa.func.nullif(column, "")
        match kind:
            case "int":
                return sa.func.coalesce(column if lenient else sa.cast(column, sa.BigInteger), -1)
            case "number":
                return column if lenient else sa.cast(column, sa.Double)
            case "text":
                return column if lenient else sa.cast(column, sa.Text)
            case "time" if lenient:
                bare = sa.func.typeof(column).in_(["integer", "real"])  # seconds since 1970, as R writes them
                spelt = sa.cast(sa.func.strftime("%s", column), sa.Integer)
                return sa.case((bare, sa.cast(column, sa.Integer)), else_=spelt)
            case "time":
                stamp = column if self._kind == "postgresql" else getattr(sa.func, "try")(sa.cast(column, sa.TIMESTAMP))
                return sa.cast(sa.func.floor(sa.extract("epoch", stamp)), sa.BigInteger)

    def _columns(self, table: str) -> dict[str, str]:
        """Names in small letters to names as they are; under "" the table's own. Empty where there is none."""
        if self._kind in ("duckdb", "csv"):
            schema = self._schemas.get(table, self._schemas.get("")) or "main"
            found = self._connection.execute(
                "SELECT table_name, column_name FROM information_schema.columns"
                " WHERE lower(table_name) = ? AND table_schema = ?",
                [table, schema],
            ).fetchall()
            return {"": found[0][0]} | {str(name).lower(): str(name) for _, name in found} if found else {}
        inspector, schema = sa.inspect(self._connection), self._schemas.get(table, self._schemas.get(""))
        names = [*inspector.get_table_names(schema), *inspector.get_view_names(schema)]
        actual = next((name for name in names if name.lower() == table), None)
        if actual is None:
            return {}
        return {"": actual} | {c["name"].lower(): c["name"] for c in inspector.get_columns(actual, schema)}

    def _answered(self, question: Any, table: str) -> Iterator[list[Sequence[Any]]]:
        try:
            if self._kind in ("duckdb", "csv"):
                compiled = question.compile(dialect=_DIALECT, compile_kwargs={"render_postcompile": True})
                values = [compiled.params[name] for name in compiled.positiontup or ()]
                self._connection.execute(str(compiled), values)
                while rows := self._connection.fetchmany(_ROWS):
                    yield list(zip(*rows, strict=True))
            else:
                for rows in self._connection.execute(question).partitions(_ROWS):
                    yield list(zip(*rows, strict=True))
        except (sqlalchemy.exc.SQLAlchemyError, sqlite3.Error, *_duck_errors(self._kind)) as error:
            # What the database says may quote a cell.
            raise DataRefused(
                f"{self.site}: table {table} of {self.source} cannot be read ({type(error).__name__}).",
                mend="Check that each column holds what OMOP 5.4 says, and that this account may read the table.",
            ) from None

    def _piece(
        self, table: str, kept: Mapping[str, Kind], columns: Mapping[str, Kind], rows: list[Sequence[Any]]
    ) -> Piece:
        there = dict(zip(kept, rows, strict=True))
        size, piece = len(rows[0]), Piece()
        for name, kind in columns.items():
            values = there.get(name)
            try:
                match kind:
                    case "int":
                        piece[name] = np.full(size, -1) if values is None else np.array(values, dtype=np.int64)
                    case "number":
                        piece[name] = np.full(size, np.nan) if values is None else np.array(values, dtype=np.float64)
                    case "time":
                        whole = [NEVER if value is None else value for value in values or [None] * size]
                        piece[name] = np.array(whole, dtype=np.int64)
                    case "text":
                        place = self.words.place
                        said = [place(None if v is None else str(v)) for v in values or [None] * size]
                        piece[name] = np.array(said, np.int32)
            except (ValueError, TypeError, OverflowError):
                raise DataRefused(
                    f"{self.site}: {table}.{name} of {self.source} holds what is no number.",
                    mend="Correct the cells of that column.",
                ) from None
        return piece

    def may_write(self) -> bool:
        """Whether this account could change the records, which it has no need to."""
        if self._kind != "postgresql":
            return False
        there = self._columns("person")
        schema = self._schemas.get("")
        name = ".".join(f'"{part}"' for part in (schema, there.get("")) if part)
        asked = sa.text("SELECT has_table_privilege(current_user, :name, 'INSERT, UPDATE, DELETE, TRUNCATE')")
        return bool(there) and bool(self._connection.execute(asked, {"name": name}).scalar())


@contextmanager
def open_database(terms: OmopSource, folder: Path, site: str) -> Iterator[Database]:
    """The database or folder that ``site.yaml`` names, in one transaction that only reads.

    Raises:
        DataRefused: it is not there, or lets nobody in.
    """
    url = terms.database or ""
    scheme, _, place = url.partition("://")
    schemas: dict[str, str | None] = {"": terms.schema_name}
    if terms.vocabulary:
        schemas |= dict.fromkeys(_VOCABULARY.split(), terms.vocabulary)
    source = terms.folder or (sa.make_url(url).database or scheme if scheme == "postgresql" else Path(place).name)
    database = Database(site, source, schemas)
    try:
        if terms.folder or scheme == "duckdb":
            with _duck(database, terms, folder, place.removeprefix("/")):
                yield database
            return
        with _served(database, url, scheme, folder / place.removeprefix("/")):
            yield database
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ArgumentError, sqlite3.Error) as error:
        raise DataRefused(
            f"{site}: the database {source} cannot be opened ({type(error).__name__}).",
            mend="Check omop.database in site.yaml, and that its account may connect; a password belongs in ~/.pgpass."
            " A study that trains has no network: give it SQLite, DuckDB or a folder, or sandbox: off.",
        ) from None


@contextmanager
def _served(database: Database, url: str, scheme: str, path: Path) -> Iterator[None]:
    if scheme == "sqlite":
        if not path.is_file():
            raise DataRefused(f"{database.site}: there is no {path.name}.", mend="Correct omop.database in site.yaml.")
        engine = sa.create_engine(
            "sqlite://", creator=lambda: sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)
        )
        options: dict[str, Any] = {}
    else:
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:", 1), poolclass=sa.NullPool)
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True, "stream_results": True}
    database._kind = "sqlite" if scheme == "sqlite" else "postgresql"
    try:
        with engine.connect().execution_options(**options, max_row_buffer=_ROWS) as connection:
            database._connection = connection
            yield
    finally:
        engine.dispose()


@contextmanager
def _duck(database: Database, terms: OmopSource, folder: Path, place: str) -> Iterator[None]:
    """DuckDB's own file; or a database in memory with a view of each CSV, every column of which is text."""
    import duckdb

    place = str(folder / (terms.folder or place))
    there = os.path.isdir(place) if terms.folder else os.path.isfile(place)
    if not there:
        raise DataRefused(
            f"{database.site}: there is no {database.source}.", mend="Correct omop in site.yaml; it is read beside it."
        )
    database._kind = "csv" if terms.folder else "duckdb"
    try:
        settings = {"threads": 1, "autoinstall_known_extensions": False, "autoload_known_extensions": False}
        connection = duckdb.connect(":memory:" if terms.folder else place, read_only=not terms.folder, config=settings)
        with connection:
            for path in sorted(Path(place).iterdir()) if terms.folder else ():
                table = path.name.lower().partition(".")[0]
                if table in TABLES and path.name.lower().endswith((".csv", ".csv.gz")):
                    _view(connection, path, table)
            if terms.folder:
                database._schemas = {}
            database._connection = connection
            yield
    except (duckdb.Error, OSError, EOFError, zlib.error) as error:
        raise DataRefused(
            f"{database.site}: {database.source} cannot be read ({type(error).__name__}).",
            mend="Give a file of DuckDB, or CSVs in UTF-8 with a header, as OMOP's tools write them.",
        ) from None


def _view(connection: Any, path: Path, table: str) -> None:
    """A table's file, with the commas of most exports or the tabs of the vocabulary's own."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
        header = file.readline(100_000)
    if not header.strip():
        return
    tabs = b"\t" in header
    read = connection.read_csv(
        str(path),
        header=True,
        all_varchar=True,
        delimiter="\t" if tabs else ",",
        quotechar="" if tabs else '"',
        escapechar="" if tabs else '"',
        strict_mode=True,
        sample_size=1,
    )
    read.create_view(table)


def _duck_errors(kind: str) -> tuple[type[Exception], ...]:
    if kind not in ("duckdb", "csv"):
        return ()
    import duckdb

    return (duckdb.Error,)
