"""A ceiling of the hospital's privacy budget: a statement that a named officer signs, and who the officers are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cloister_shared.envelope import Identity, Roster, new_identity, read_identity, read_roster, save_roster, verify
from cloister_shared.errors import EnvelopeRefused, KeyBroken
from cloister_shared.plan import Slug

PURPOSE = "ceiling"


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


def sign(ceiling: Ceiling, identity: Identity) -> str:
    """The envelope that the ledger keeps."""
    return identity.sign(PURPOSE, ceiling.model_dump_json().encode())


def read(envelope: str, officers: Roster) -> Ceiling:
    """What a pinned officer signed in their own name.

    Raises:
        EnvelopeRefused: nobody pinned signed it, or in another's name, or it is no ceiling.
    """
    officer, payload = verify(envelope, PURPOSE, officers)
    try:
        ceiling = Ceiling.model_validate_json(payload)
    except ValidationError:
        raise EnvelopeRefused(f"The ceiling that {officer} signed cannot be read.", mend=SIGN_AGAIN) from None
    if ceiling.officer != officer:
        raise EnvelopeRefused(f"{officer} signed a ceiling in the name of {ceiling.officer}.", mend=SIGN_AGAIN)
    return ceiling


SIGN_AGAIN = "Have a pinned officer sign a new one: cloister-site budget ceiling."


def officers_of(folder: Path) -> Roster:
    """The officers that a hospital has pinned; none before the first.

    Raises:
        KeyBroken: the file is damaged.
    """
    path = folder / "officers.json"
    return read_roster(path) if path.exists() else {}


def pin_officer(folder: Path, name: str, key: Path) -> Identity:
    """Make an officer's key, or take the one at ``key``, and pin its public half.

    Raises:
        KeyBroken: the name is pinned already, or the key cannot be used.
    """
    officers = officers_of(folder)
    if name in officers:
        raise KeyBroken(
            f"{folder / 'officers.json'} already pins a key of {name}.",
            mend="Take that line out first, if the key was lost; ceilings that it signed are then void.",
        )
    identity = read_identity(key) if key.exists() else new_identity(key)
    if identity.public in officers.values():
        raise KeyBroken(f"{key} is the key of another officer.", mend="Give each officer a key of their own.")
    save_roster(folder / "officers.json", {**officers, name: identity.public})
    return identity
