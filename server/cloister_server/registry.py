"""The coordinator's records: hospitals, accounts, studies, what was decided and what each round told.

One database, SQLite beside ``coordinator.yaml`` or PostgreSQL by URL, used by several processes and threads at once.
Every method is one transaction, so what two of them race for goes to one. Models and checkpoints are files
(``store``); who said what, in an order that cannot be changed later, is the audit log.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from cloister_server import records
from cloister_server.database import open_database, transaction
from cloister_server.records import Account, Glance, Hospital, Role, State, Study
from cloister_shared.errors import AccessRefused, EnrolmentRefused, StudyRefused
from cloister_shared.names import site_name

__all__ = ["Account", "Hospital", "Registry", "Role", "State", "Study", "open_registry"]


class Registry:
    """All methods may be called from any thread, and by several processes on one database.

    Raises, every one of them:
        RegistryBroken: the database cannot be read or written.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def close(self) -> None:
        """Give its connections back."""
        self._engine.dispose()

    # --- hospitals -----------------------------------------------------------------------------------------
    def invite(self, serial: int, hospital: str, expires: datetime) -> None:
        """Remember an invite by the serial of its certificate; earlier ones for the same hospital end.

        Raises:
            EnrolmentRefused: a hospital of this name is enrolled, or it is no name.
        """
        try:
            hospital = site_name(hospital)
        except ValueError as error:
            raise EnrolmentRefused(f"{hospital[:80]!r}: {error}.", mend="Write another name.") from None
        t, c = records.invites, records.hospitals.c
        with self._write() as db:
            if db.scalar(sa.select(c.name).where(c.name == hospital, c.standing == "enrolled")):
                raise EnrolmentRefused(f"{hospital} is enrolled.", mend="Expel it first, if it is to enrol anew.")
            db.execute(sa.delete(t).where(t.c.hospital == hospital, t.c.taken.is_(None)))
            db.execute(sa.insert(t).values(serial=serial, hospital=hospital, expires=expires))

    def invites(self) -> dict[str, datetime]:
        """Hospitals whose invite is open, and when it ends."""
        c = records.invites.c
        with self._read() as db:
            rows = db.execute(sa.select(c.hospital, c.expires).where(c.taken.is_(None), c.expires > datetime.now(UTC)))
            return {row.hospital: row.expires for row in rows}

    def require_invite(self, serial: int) -> None:
        """Look whether an invite is open, without taking it.

        Raises:
            EnrolmentRefused: it is unknown, used or expired.
        """
        with self._read() as db:
            if db.scalar(sa.select(records.invites.c.serial).where(*_open(serial))) is None:
                raise _spent()

    def admit(
        self, serial: int, identity: str, public_key: bytes, certificate_serial: int, not_after: datetime, node: int
    ) -> Hospital:
        """Take an invite and enrol its hospital, both or neither. One that was expelled may be enrolled anew.

        Raises:
            EnrolmentRefused: the invite is unknown, used or expired, or the name or a key is enrolled already.
        """
        t, h = records.invites, records.hospitals
        hospital = ""
        try:
            with self._write() as db:
                # Whoever comes second finds the invite taken: the database lets one of them change the row.
                if not db.execute(sa.update(t).where(*_open(serial)).values(taken=datetime.now(UTC))).rowcount:
                    raise _spent()
                hospital = db.execute(sa.select(t.c.hospital).where(t.c.serial == serial)).scalar_one()
                said = {
                    "identity": identity,
                    "public_key": public_key.decode(),
                    "node": node,
                    "serial": certificate_serial,
                    "standing": "enrolled",
                    "version": "",
                    "seen": None,
                }
                before = sa.update(h).where(h.c.name == hospital, h.c.standing == "expelled")
                if not db.execute(before.values(said)).rowcount:
                    db.execute(sa.insert(h).values(name=hospital, **said))
                self._certify(db, hospital, certificate_serial, not_after)
        except IntegrityError:
            raise EnrolmentRefused(
                f"{hospital}, or a key that it shows, is enrolled already.",
                mend="A hospital that lost its keys is expelled first, and makes new ones.",
            ) from None
        return self.hospital(hospital)

    def renewed(self, hospital: str, certificate_serial: int, not_after: datetime) -> None:
        """The hospital has a newer certificate.

        Raises:
            EnrolmentRefused: no such hospital is enrolled.
        """
        h = records.hospitals
        with self._write() as db:
            mine = sa.update(h).where(h.c.name == hospital, h.c.standing == "enrolled")
            if not db.execute(mine.values(serial=certificate_serial)).rowcount:
                raise _unknown(hospital)
            self._certify(db, hospital, certificate_serial, not_after)

    def expel(self, hospital: str) -> list[int]:
        """End a hospital's membership and its open invites; the serials of all its certificates, now revoked.

        Raises:
            EnrolmentRefused: no such hospital is enrolled or invited.
        """
        h, t, c = records.hospitals, records.invites, records.certificates
        with self._write() as db:
            uninvited = db.execute(sa.delete(t).where(t.c.hospital == hospital, t.c.taken.is_(None))).rowcount
            mine = sa.update(h).where(h.c.name == hospital, h.c.standing == "enrolled")
            if not db.execute(mine.values(standing="expelled")).rowcount and not uninvited:
                raise _unknown(hospital)
            current = c.c.hospital == hospital, c.c.revoked.is_(None)
            serials = list(db.scalars(sa.select(c.c.serial).where(*current)))
            db.execute(sa.update(c).where(*current).values(revoked=datetime.now(UTC)))
            return serials

    def revocations(self) -> dict[int, datetime]:
        """Every certificate that was revoked, and when: what the revocation list must hold."""
        c = records.certificates.c
        with self._read() as db:
            rows = db.execute(sa.select(c.serial, c.revoked).where(c.revoked.is_not(None)))
            return {row.serial: row.revoked for row in rows}

    def hospitals(self) -> list[Hospital]:
        """All that are enrolled or were, by name."""
        h, c = records.hospitals, records.certificates
        with self._read() as db:
            rows = db.execute(sa.select(h, c.c.not_after).join(c, c.c.serial == h.c.serial).order_by(h.c.name))
            return [Hospital(**{**row._mapping, "public_key": row.public_key.encode()}) for row in rows]

    def hospital(self, name: str) -> Hospital:
        """One of them.

        Raises:
            EnrolmentRefused: there is none of this name.
        """
        found = next((hospital for hospital in self.hospitals() if hospital.name == name), None)
        if found is None:
            raise _unknown(name)
        return found

    def seen(self, hospital: str, version: str) -> None:
        """It called just now, and stated this version."""
        h = records.hospitals
        with self._write() as db:
            mine = sa.update(h).where(h.c.name == hospital)
            db.execute(mine.values(seen=datetime.now(UTC), version=version[:80]))

    def _certify(self, db: sa.Connection, hospital: str, serial: int, not_after: datetime) -> None:
        db.execute(sa.insert(records.certificates).values(serial=serial, hospital=hospital, not_after=not_after))

    # --- accounts ------------------------------------------------------------------------------------------
    def add_account(self, name: str, role: Role) -> str:
        """A new account's token, which is shown this once.

        Raises:
            AccessRefused: there is an account of this name, or it is no name.
        """
        token = secrets.token_urlsafe(32)
        try:
            with self._write() as db:
                said = {"name": site_name(name), "role": Role(role), "token": _hashed(token)}
                db.execute(sa.insert(records.accounts).values(said))
        except IntegrityError:
            raise AccessRefused(
                f"There is an account {name}.", mend="Choose another name, or renew its token."
            ) from None
        except ValueError as error:
            raise AccessRefused(f"No account {name[:80]!r}: {error}.", mend="Correct it.") from None
        return token

    def renew_account(self, name: str) -> str:
        """A new token; the old one no longer counts.

        Raises:
            AccessRefused: there is no such account.
        """
        token, a = secrets.token_urlsafe(32), records.accounts
        with self._write() as db:
            if not db.execute(sa.update(a).where(a.c.name == name).values(token=_hashed(token))).rowcount:
                raise AccessRefused(f"There is no account {name[:80]!r}.")
        return token

    def remove_account(self, name: str) -> None:
        """Its token no longer counts.

        Raises:
            AccessRefused: there is no such account.
        """
        with self._write() as db:
            if not db.execute(sa.delete(records.accounts).where(records.accounts.c.name == name)).rowcount:
                raise AccessRefused(f"There is no account {name[:80]!r}.")

    def account(self, token: str) -> Account | None:
        """Whose token this is. Every account's is compared, each in constant time."""
        hashed, found = _hashed(token), None
        with self._read() as db:
            for row in db.execute(sa.select(records.accounts)):
                if hmac.compare_digest(row.token, hashed):
                    found = Account(row.name, Role(row.role))
        return found

    def accounts(self) -> list[Account]:
        """All of them, by name."""
        with self._read() as db:
            rows = db.execute(sa.select(records.accounts).order_by(records.accounts.c.name))
            return [Account(row.name, Role(row.role)) for row in rows]

    # --- studies -------------------------------------------------------------------------------------------
    def add_study(
        self, digest: str, name: str, plan_text: str, file: str, by: str, roster: Mapping[str, str], offer: str
    ) -> Study:
        """A study as submitted.

        Raises:
            StudyRefused: this very plan was submitted before.
        """
        said = {
            "digest": digest,
            "name": name,
            "plan": plan_text,
            "file": file,
            "submitted_by": by,
            "roster": dict(roster),
            "offer": offer,
            "at": datetime.now(UTC),
            "state": "submitted",
            "reason": "",
        }
        try:
            with self._write() as db:
                db.execute(sa.insert(records.studies).values(said))
        except IntegrityError:
            raise StudyRefused(
                f"This very plan was submitted before, as {name} {digest[:12]}.",
                mend="Run or resume that one; a changed plan, such as another version, is another study.",
            ) from None
        return self.study(digest)

    def study(self, called: str) -> Study:
        """The study of this name, or whose digest begins so (four signs or more).

        Raises:
            StudyRefused: there is none, or more than one.
        """
        s = records.studies.c
        found = self._studies(s.name == called)
        if not found and re.fullmatch(r"[0-9a-f]{4,64}", called):
            found = self._studies(s.digest.startswith(called))
        if not found:
            raise StudyRefused(f"There is no study {called[:80]!r}.", mend="List the studies for their names.")
        if len(found) > 1:
            several = ", ".join(f"{study.digest[:12]} ({study.state})" for study in found)
            raise StudyRefused(f"{called} is the name of several studies: {several}.", mend="Say which by its digest.")
        return found[0]

    def studies(self) -> list[Study]:
        """All of them, as they were submitted."""
        return self._studies()

    def move(self, digest: str, state: State, reason: str = "", *, only_from: Collection[State] = ()) -> None:
        """Put a study into another state; from one of ``only_from``, if any are named.

        Raises:
            StudyRefused: there is no such study, or it is in another state.
        """
        s = records.studies
        with self._write() as db:
            where = [s.c.digest == digest, *([s.c.state.in_(only_from)] if only_from else [])]
            if db.execute(sa.update(s).where(*where).values(state=state, reason=reason)).rowcount:
                return
        study = self.study(digest)
        raise StudyRefused(f"{study.name} {digest[:12]} is {study.state}.")

    def decide(self, digest: str, site: str, decision: str, envelope: str) -> None:
        """What a hospital says of a study now, in place of what it said before.

        Raises:
            StudyRefused: there is no such study, or the hospital is none of its.
        """
        study = self.study(digest)
        if site not in study.roster:
            raise StudyRefused(f"{site} is no hospital of {study.name}.")
        self._put(records.decisions, {"digest": digest, "site": site}, {"decision": decision, "envelope": envelope})

    def decisions(self, digest: str) -> dict[str, str]:
        """Hospital to approved, rejected or revoked; those that said nothing are absent."""
        return {row.site: row.decision for row in self._decided(digest)}

    def envelopes(self, digest: str) -> dict[str, str]:
        """Hospital to its decision as it signed it."""
        return {row.site: row.envelope for row in self._decided(digest)}

    def add_round(self, digest: str, number: int, said: Mapping[str, Any]) -> None:
        """What a round told, as JSON; a round that was done over counts as last done.

        Raises:
            StudyRefused: there is no such study.
        """
        self._put(records.rounds, {"digest": digest, "number": number}, {"said": dict(said)})

    def rounds(self, digest: str, after: int = 0) -> list[Mapping[str, Any]]:
        """What each round after this one told, in order."""
        r = records.rounds.c
        with self._read() as db:
            return list(db.scalars(sa.select(r.said).where(r.digest == digest, r.number > after).order_by(r.number)))

    def glances(self) -> dict[str, Glance]:
        """Digest to how each study stands, as they were submitted; cheap enough to be asked several times a second."""
        s, d, r = records.studies.c, records.decisions.c, records.rounds.c
        last = sa.select(sa.func.coalesce(sa.func.max(r.number), 0)).where(r.digest == s.digest).scalar_subquery()
        with self._read() as db:
            decided: dict[str, dict[str, str]] = {}
            for row in db.execute(sa.select(d.digest, d.site, d.decision)):
                decided.setdefault(row.digest, {})[row.site] = row.decision
            rows = db.execute(sa.select(s.digest, s.state, s.reason, last.label("round")).order_by(s.at, s.digest))
            return {row.digest: Glance(row.state, row.reason, row.round, decided.get(row.digest, {})) for row in rows}

    def _studies(self, *where: sa.ColumnElement[bool]) -> list[Study]:
        s, r = records.studies, records.rounds.c
        last = sa.select(sa.func.coalesce(sa.func.max(r.number), 0)).where(r.digest == s.c.digest).scalar_subquery()
        with self._read() as db:
            rows = db.execute(sa.select(s, last.label("round")).where(*where).order_by(s.c.at, s.c.digest))
            return [Study(**row._mapping) for row in rows]

    def _decided(self, digest: str) -> list[sa.Row[Any]]:
        d = records.decisions
        with self._read() as db:
            return list(db.execute(sa.select(d).where(d.c.digest == digest).order_by(d.c.site)))

    # --- transactions --------------------------------------------------------------------------------------
    def _put(self, table: sa.Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Insert a row of a study, or change the one that is there.

        Raises:
            StudyRefused: there is no such study.
        """
        dialect = postgresql if self._engine.dialect.name == "postgresql" else sqlite
        row = dialect.insert(table).values({**key, **values})
        try:
            with self._write() as db:
                db.execute(row.on_conflict_do_update(index_elements=list(key), set_=dict(values)))
        except IntegrityError:
            raise StudyRefused(f"There is no study {key['digest'][:12]}.") from None

    def _read(self) -> AbstractContextManager[sa.Connection]:
        return transaction(self._engine)

    def _write(self) -> AbstractContextManager[sa.Connection]:
        return transaction(self._engine, writes=True)


def open_registry(url: str) -> Registry:
    """The records in a database, as ``open_database`` has it; each process opens its own, and carries none over a fork.

    Raises:
        RegistryBroken: there is no such database, or a newer release wrote it.
    """
    return Registry(open_database(url))


def _hashed(token: str) -> str:
    """SHA-256: a token is 256 random bits, so there is nothing that a slow hash would keep from being guessed."""
    return hashlib.sha256(token.encode()).hexdigest()


def _open(serial: int) -> tuple[sa.ColumnElement[bool], ...]:
    t = records.invites.c
    return t.serial == serial, t.taken.is_(None), t.expires > datetime.now(UTC)


def _spent() -> EnrolmentRefused:
    return EnrolmentRefused("The invite is unknown, used or expired.", mend="Ask the consortium for a new one.")


def _unknown(hospital: str) -> EnrolmentRefused:
    return EnrolmentRefused(f"No hospital {hospital[:80]!r} is enrolled.", mend="List the hospitals for their names.")
