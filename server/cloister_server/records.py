"""What the coordinator keeps records of, and the tables they are kept in.

The tables are what all revisions in ``migrations`` together make.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Literal

import sqlalchemy as sa

State = Literal["submitted", "running", "waiting", "finished", "stopped"]
"""Of a study: waiting is for its quorum."""


class Role(StrEnum):
    """What an account is for."""

    OPERATOR = "operator"
    RESEARCHER = "researcher"
    PRIVACY_OFFICER = "privacy-officer"
    AUDITOR = "auditor"


@dataclass(frozen=True)
class Hospital:
    """An enrolled hospital, or one that was: ``standing`` is ``enrolled`` or ``expelled``."""

    name: str
    identity: str
    """Ed25519 public key, in hex."""
    public_key: bytes
    """Of its certificate: PEM SubjectPublicKeyInfo."""
    node: int
    """By which Flower knows it."""
    serial: int
    """Of its newest certificate, which ends at ``not_after``."""
    not_after: datetime
    standing: str
    version: str
    """What it last stated to speak; empty before it ever called."""
    seen: datetime | None


@dataclass(frozen=True)
class Account:
    """A person, or a program, that may command the coordinator."""

    name: str
    role: Role


@dataclass(frozen=True)
class Study:
    """A plan that was submitted, and how it stands. ``round`` is the last whole one."""

    digest: str
    name: str
    plan: str
    """The YAML as submitted, in a file called ``file``."""
    file: str
    submitted_by: str
    roster: Mapping[str, str]
    offer: str
    """The coordinator's envelope."""
    at: datetime
    state: State
    reason: str
    round: int


@dataclass(frozen=True)
class Glance:
    """How a study stands, and what its hospitals decided: what may change of it."""

    state: State
    reason: str
    round: int
    decisions: Mapping[str, str]


# --- the tables -------------------------------------------------------------------------------------------
class _Whole(sa.TypeDecorator[int]):
    """An integer of any size: serials have 160 bits, nodes 64 without a sign."""

    impl = sa.String(50)
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> int | None:
        return None if value is None else int(value)


class _Moment(sa.TypeDecorator[datetime]):
    """A time with its zone, kept in UTC."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class _Json(sa.TypeDecorator[Any]):
    """JSON as text: a metric may be NaN, which PostgreSQL's own type does not take."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return json.loads(value or "null")


TABLES = sa.MetaData()


def _words(name: str, length: int | None = None, **more: Any) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text, nullable=False, **more)


invites = sa.Table(
    "invites",
    TABLES,
    sa.Column("serial", _Whole, primary_key=True),
    _words("hospital", 60),
    sa.Column("expires", _Moment, nullable=False),
    sa.Column("taken", _Moment),
)
hospitals = sa.Table(
    "hospitals",
    TABLES,
    _words("name", 60, primary_key=True),
    _words("identity", 64, unique=True),
    _words("public_key", unique=True),
    sa.Column("node", _Whole, nullable=False, unique=True),
    sa.Column("serial", _Whole, nullable=False),
    _words("standing", 10),
    _words("version", 80),
    sa.Column("seen", _Moment),
)
certificates = sa.Table(
    "certificates",
    TABLES,
    sa.Column("serial", _Whole, primary_key=True),
    sa.Column("hospital", sa.ForeignKey("hospitals.name"), nullable=False),
    sa.Column("not_after", _Moment, nullable=False),
    sa.Column("revoked", _Moment),
)
accounts = sa.Table("accounts", TABLES, _words("name", 60, primary_key=True), _words("role", 20), _words("token", 64))
studies = sa.Table(
    "studies",
    TABLES,
    _words("digest", 64, primary_key=True),
    _words("name", 60),
    _words("plan"),
    _words("file"),
    _words("submitted_by", 60),
    sa.Column("roster", _Json, nullable=False),
    _words("offer"),
    sa.Column("at", _Moment, nullable=False),
    _words("state", 10),
    _words("reason"),
)
decisions = sa.Table(
    "decisions",
    TABLES,
    sa.Column("digest", sa.ForeignKey("studies.digest"), primary_key=True),
    _words("site", 60, primary_key=True),
    _words("decision", 10),
    _words("envelope"),
)
rounds = sa.Table(
    "rounds",
    TABLES,
    sa.Column("digest", sa.ForeignKey("studies.digest"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("said", _Json, nullable=False),
)
