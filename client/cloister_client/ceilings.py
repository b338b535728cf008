"""A ceiling of the hospital's privacy budget: a statement that a named officer signs, and who the officers are.

The officers' public keys are in ``officers.json`` beside the ledger; their own halves are with the officers.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister_client.book import Book
from cloister_shared import durable
from cloister_shared.envelope import (
    Identity,
    Roster,
    key_id,
    new_identity,
    read_identity,
    read_roster,
    save_roster,
    verify,
)
from cloister_shared.errors import BudgetExceeded, EnvelopeRefused, KeyBroken
from cloister_shared.terms import Slug

_PURPOSE = "ceiling"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]{0,59}")


class Ceiling(BaseModel):
    """So much may be learned of any one patient of a population, over all studies together."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    ledger: str
    """The ledger that it is for; a ceiling copied from another hospital's is refused."""
    population: Slug
    version: Annotated[int, Field(ge=1)]
    """One more than the ceiling before, so that an older one cannot be shown again."""
    epsilon: Annotated[float, Field(gt=0, le=1000)]
    delta: Annotated[float, Field(gt=0, lt=0.1)]
    officer: str
    at: str
    """When it was signed, UTC."""
    reason: Annotated[str, Field(max_length=400)] = ""


SIGN_AGAIN = "Have a pinned officer sign a new one: cloister-site budget ceiling."


def put(
    book: Book, population: str, epsilon: float, delta: float, officer: str, identity: Identity, reason: str
) -> Ceiling:
    """Sign a new ceiling and write it down, within ``book.writing()``.

    Raises:
        BudgetExceeded: epsilon or delta is none.
        EnvelopeRefused: the key is not the one that is pinned for the officer.
    """
    if officers_of(book.path.parent).get(officer) != identity.public:
        raise EnvelopeRefused(
            f"That is not the key that {book.path.parent / 'officers.json'} pins for {officer}.",
            mend="Give the officer's own key; cloister-site budget officer NAME pins a new officer.",
        )
    last = book.rows("SELECT max(version) FROM ceilings WHERE population = ?", population)[0][0] or 0
    try:
        made = Ceiling(
            ledger=book.id,
            population=population,
            version=last + 1,
            epsilon=epsilon,
            delta=delta,
            officer=officer,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            reason=reason,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BudgetExceeded(
            f"A ceiling with {first['loc'][0]} {str(first['input'])[:40]!r} cannot be set.",
            mend="Epsilon is above 0 and at most 1000, delta above 0 and below 0.1, a reason of 400 letters at most.",
        ) from None
    envelope = identity.sign(_PURPOSE, made.model_dump_json().encode())
    book.rows("INSERT INTO ceilings VALUES (?, ?, ?, NULL)", population, made.version, envelope)
    book.note("ceiling", {"envelope": envelope, **made.model_dump(exclude={"ledger"})})
    return made


def in_force(book: Book, population: str) -> Ceiling | None:
    """The newest ceiling, its signature verified; None before the first.

    Raises:
        EnvelopeRefused: it is not what a pinned officer signed for this ledger, population and place.
    """
    found = book.rows(
        "SELECT version, envelope FROM ceilings WHERE population = ? ORDER BY version DESC LIMIT 1", population
    )
    if not found:
        return None
    version, envelope = found[0]
    try:
        ceiling = _read(envelope, officers_of(book.path.parent))
    except EnvelopeRefused as error:
        raise EnvelopeRefused(error.said, mend=SIGN_AGAIN) from None
    if (ceiling.ledger, ceiling.population, ceiling.version) != (book.id, population, version):
        raise EnvelopeRefused("The ceiling was signed for another ledger, population or place.", mend=SIGN_AGAIN)
    return ceiling


def _read(envelope: str, officers: Roster) -> Ceiling:
    officer, payload = verify(envelope, _PURPOSE, officers)
    try:
        ceiling = Ceiling.model_validate_json(payload)
    except ValidationError:
        raise EnvelopeRefused(f"The ceiling that {officer} signed cannot be read.") from None
    if ceiling.officer != officer:
        raise EnvelopeRefused(f"{officer} signed a ceiling in the name of {ceiling.officer}.")
    return ceiling


# --- officers ----------------------------------------------------------------------------------------------
def officers_of(folder: Path) -> Roster:
    """The officers that a hospital has pinned; none before the first.

    Raises:
        KeyBroken: the file is damaged.
    """
    path = folder / "officers.json"
    return read_roster(path) if path.exists() else {}


def pin_officer(book: Book, name: str, key: Path) -> Identity:
    """Make an officer's key, or take the one at ``key``, pin its public half, and tell the audit log.

    Raises:
        KeyBroken: the name is pinned already, or the key cannot be used.
    """
    path = book.path.parent / "officers.json"
    if not _NAME.fullmatch(name):
        raise KeyBroken(f"{name!r} is no name for an officer.", mend="Use up to 60 letters, digits, dots and dashes.")
    with durable.locked(path):
        officers = officers_of(book.path.parent)
        if name in officers:
            raise KeyBroken(
                f"{path} already pins a key of {name}.",
                mend="Take that line out first, if the key was lost; ceilings that it signed are then void.",
            )
        identity = read_identity(key) if key.exists() else new_identity(key)
        if identity.public in officers.values():
            raise KeyBroken(f"{key} is the key of another officer.", mend="Give each officer a key of their own.")
        with book.writing():  # first, so that nobody is ever pinned whom the log does not name
            book.note("officer", {"officer": name, "key": key_id(identity.public)})
        book.publish()
        save_roster(path, {**officers, name: identity.public})
    return identity
