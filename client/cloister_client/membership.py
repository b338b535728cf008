"""What a hospital has pinned of its consortium: where it is, who signs for it, and the keys of the other hospitals.

Everything lies in ``agent/`` beside ``site.yaml``. A key that is pinned is never replaced by what arrives: only a
person at the hospital can forget it.
"""

from __future__ import annotations

import fcntl
import hashlib
import shlex
import ssl
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from cloister_client.control import Control
from cloister_client.proxy import proxy_to
from cloister_client.site_file import SiteFile, read_site
from cloister_shared import audit, durable
from cloister_shared.agreement import Digest
from cloister_shared.certificates import Bearer, bearer, key_pem, read_key
from cloister_shared.enrolment import Address
from cloister_shared.envelope import Roster, key_id
from cloister_shared.errors import DataRefused, EnrolmentRefused, EnvelopeRefused, KeyBroken
from cloister_shared.names import SiteName


class Consortium(BaseModel):
    """``consortium.json``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    consortium: SiteName
    site: SiteName
    rounds: Address
    control: Address
    signing: Digest
    """The coordinator's Ed25519 public key, with which it signs offers."""
    roster: dict[SiteName, Digest]
    """Hospitals and their Ed25519 public keys; this one is among them."""


def agent_folder(site_yaml: Path) -> Path:
    """Where the agent of the hospital with this ``site.yaml`` keeps its keys and studies.

    Raises:
        DataRefused: the file has another name, under which the agent would not find it.
    """
    if site_yaml.name != "site.yaml":
        raise DataRefused(f"The agent reads site.yaml, and {site_yaml} is called otherwise.", mend="Rename it.")
    return site_yaml.parent / "agent"


def site_of(folder: Path) -> SiteFile:
    """The ``site.yaml`` beside the agent's folder.

    Raises:
        DataRefused: it is missing.
        PlanRefused: it is malformed.
    """
    return read_site(folder.parent / "site.yaml")


def consortium_of(folder: Path) -> Consortium:
    """What enrolment pinned, and which hospitals were added since.

    Raises:
        EnrolmentRefused: this hospital is not enrolled.
        KeyBroken: the file is damaged.
    """
    path = folder / "consortium.json"
    try:
        return Consortium.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise EnrolmentRefused(
            f"This hospital is not enrolled: {path} is not there.",
            mend="Ask the consortium for an invite, and type cloister-site enrol FILE.",
        ) from None
    except ValidationError:
        raise KeyBroken(f"{path} is damaged.", mend="Restore it from a backup, or enrol again.") from None


def own_certificate(folder: Path) -> Bearer:
    """Whose ``agent.crt`` is, and until when.

    Raises:
        EnrolmentRefused: it is missing or damaged.
    """
    try:
        return bearer((folder / "agent.crt").read_bytes())
    except FileNotFoundError:
        raise EnrolmentRefused(f"{folder / 'agent.crt'} is not there.", mend="Restore it from a backup.") from None


def calling(folder: Path) -> Control:
    """A connection to the control service under the hospital's own certificate.

    Raises:
        EnrolmentRefused: this hospital is not enrolled.
        KeyBroken: a file of its enrolment is missing, damaged or open to others.
        LinkLost: the proxy that is named cannot be used.
    """
    known = consortium_of(folder)
    try:
        authority, certificate = ((folder / name).read_bytes() for name in ("ca.crt", "agent.crt"))
    except FileNotFoundError as error:
        raise KeyBroken(f"{error.filename} is not there.", mend="Restore it from a backup.") from None
    proxy = proxy_to(known.control.rpartition(":")[0].strip("[]"), site_of(folder).proxy)
    return Control(known.control, authority, certificate, key_pem(read_key(folder / "agent.key")), proxy)


def running(folder: Path) -> bool:
    """Whether an agent serves this hospital now: it holds a lock for as long as it lives."""
    try:
        with (folder / "agent.lock").open(encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def tell(folder: Path, what: str, said: Mapping[str, object]) -> None:
    """Write to the hospital's audit log, beside the ledger.

    Raises:
        AuditBroken: the log was changed.
    """
    audit.append(folder.parent / "audit.jsonl", what, said)


# --- peers -------------------------------------------------------------------------------------------------
def hold_against(pinned: Roster, shown: Roster) -> list[str]:
    """The hospitals in ``shown`` that are not pinned yet.

    Raises:
        EnvelopeRefused: a hospital is shown with another key than the pinned one, or under another's key.
    """
    whose = {key: name for name, key in pinned.items()}
    for name, key in shown.items():
        if name in pinned and pinned[name] != key:
            raise EnvelopeRefused(
                f"{name} is shown with another key than the one pinned here: {key_id(pinned[name])} is pinned, and"
                f" {key_id(key)} is shown.",
                mend=f"Telephone {name}. If the new key is theirs: cloister-site peers --forget {shlex.quote(name)}",
            )
        if whose.get(key, name) != name:
            raise EnvelopeRefused(
                f"{name} is shown with the key of {whose[key]}, {key_id(key)}.", mend="Tell the consortium."
            )
    return sorted(set(shown) - set(pinned))


def pin(folder: Path, shown: Roster) -> list[str]:
    """Pin the hospitals that are not pinned yet; their names.

    Raises:
        EnvelopeRefused: one is shown with another key than the pinned one.
    """
    path = folder / "consortium.json"
    with durable.locked(path):
        known = consortium_of(folder)
        if new := hold_against(known.roster, shown):
            tell(folder, "peers.pinned", {name: key_id(shown[name]) for name in new})
            roster = dict(sorted({**known.roster, **shown}.items()))
            durable.save_text(path, known.model_copy(update={"roster": roster}).model_dump_json(indent=1))
        return new


def forget(folder: Path, name: str) -> str:
    """Forget a hospital's key, so that the next study that shows it with another can be looked at; the key's id.

    Raises:
        EnrolmentRefused: no such hospital is pinned, or it is this one.
    """
    path = folder / "consortium.json"
    with durable.locked(path):
        known = consortium_of(folder)
        if name == known.site or name not in known.roster:
            why = "this hospital itself" if name == known.site else "not pinned here"
            raise EnrolmentRefused(f"{name} is {why}.", mend="cloister-site peers lists the pinned hospitals.")
        tell(folder, "peers.forgotten", {name: key_id(known.roster[name])})
        roster = {other: key for other, key in known.roster.items() if other != name}
        durable.save_text(path, known.model_copy(update={"roster": roster}).model_dump_json(indent=1))
        return key_id(known.roster[name])


def spelled(fingerprint: str) -> str:
    """A fingerprint in groups of four, to be read out over the telephone."""
    return " ".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def authority_id(certificate: str) -> str:
    """The short name of an authority: the start of the SHA-256 of its certificate (PEM)."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()[:16]
