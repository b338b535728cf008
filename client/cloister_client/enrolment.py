"""How this hospital joins a consortium, and how its certificate is renewed. Its keys are made here and stay here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from cloister_client.control import Control
from cloister_client.membership import Consortium, calling, consortium_of, own_certificate, site_of, tell
from cloister_client.proxy import proxy_to
from cloister_shared import durable
from cloister_shared.certificates import Bearer, Key, Kind, bearer, new_key, public_key, read_key, request
from cloister_shared.enrolment import Invite, prove, read_invite
from cloister_shared.envelope import Identity, Roster, key_id, new_identity, read_identity
from cloister_shared.errors import EnrolmentRefused, LinkLost
from cloister_shared.versions import agree

_TELL = "Tell the consortium."


@dataclass(frozen=True)
class Enrolled:
    """What came of an invite, and what the person who enrolled should know."""

    known: Consortium
    until: datetime
    warnings: Sequence[str]


def opened(path: Path) -> tuple[Invite, list[str]]:
    """The invite in a file, and what is to be said of the file.

    Raises:
        EnrolmentRefused: it is missing, damaged, or no invite.
    """
    try:
        others = path.stat().st_mode & 0o077
        invite = read_invite(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EnrolmentRefused(f"{path} is not there.", mend="Give the path of the invite.") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise EnrolmentRefused(f"{path} is no invite of a consortium.", mend="Ask the consortium for it.") from None
    said = f"Others on this machine can read {path}, which holds a private key: whoever reads it first can enrol."
    return invite, [said] if others else []


def enrol(folder: Path, path: Path, *, again: bool = False) -> Enrolled:
    """Trade the invite at ``path`` for a certificate; ``folder`` is the agent's, beside ``site.yaml``.

    May be repeated until it succeeds: the keys are kept, and the coordinator gives the same hospital the same answer.
    ``again``: this hospital was enrolled in the consortium before, and its certificate is over or revoked.

    Raises:
        EnrolmentRefused: enrolled already; the invite is damaged, over, used, or for another hospital or consortium.
        LinkLost: the coordinator cannot be reached.
        VersionRefused: the coordinator's release does not work with this one.
        KeyBroken: a key that lies here cannot be used.
    """
    site = site_of(folder)
    before = consortium_of(folder) if (folder / "consortium.json").exists() else None
    if before and not again:
        raise EnrolmentRefused(
            f"{before.site} is enrolled in {before.consortium} already.",
            mend="If its certificate is over, add --again. To join another consortium, use another folder.",
        )
    invite, warnings = opened(path)
    if site.site != invite.hospital:
        raise EnrolmentRefused(
            f"The invite is for {invite.hospital}, and site.yaml is of {site.site}.",
            mend="If that is this hospital, write it as site in site.yaml; if not, ask for an invite of your own.",
        )
    if before and (before.consortium, before.signing) != (invite.consortium, invite.signing):
        raise EnrolmentRefused(
            f"{before.site} is enrolled in {before.consortium}, signing key {key_id(before.signing)}; the invite is of"
            f" {invite.consortium}, signing key {key_id(invite.signing)}.",
            mend="To join another consortium, use another folder; cloister-site leave says how to end this one.",
        )
    now = datetime.now(UTC)
    if (end := datetime.fromisoformat(invite.expires)) <= now:
        raise EnrolmentRefused(
            f"The invite ended on {end:%Y-%m-%d at %H:%M} UTC; this machine's clock says {now:%Y-%m-%d %H:%M}.",
            mend="Ask the consortium for a new one, if that clock is right.",
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with durable.locked(folder / "consortium.json"):
        key, identity = _keys(folder, "agent.next.key" if before else "agent.key")
        pinned = {name: peer for name, peer in before.roster.items() if name != before.site} if before else {}
        return Enrolled(*_traded(folder, invite, site.proxy, key, identity, pinned), warnings)


def _keys(folder: Path, name: str) -> tuple[Key, Identity]:
    """Both keys, made here unless an earlier attempt did. The consortium takes a key of TLS once: again, a new one."""
    tls, own = folder / name, folder / "identity.key"
    return (
        read_key(tls) if tls.exists() else new_key(tls),
        read_identity(own) if own.exists() else new_identity(own),
    )


def _traded(
    folder: Path, invite: Invite, configured: str | None, key: Key, identity: Identity, pinned: Roster
) -> tuple[Consortium, datetime]:
    asked = request(key, invite.hospital)
    proxy = proxy_to(invite.control.rpartition(":")[0].strip("[]"), configured)
    shown = (invite.ca.encode(), invite.certificate.encode(), invite.key.encode())
    with Control(invite.control, *shown, proxy) as control:
        try:
            answer = control.enrol(asked, identity.public, prove(identity, asked.decode()))
        except LinkLost as error:
            mend = "cloister-site doctor --invite FILE tries each part of the way; then enrol again with the same file."
            raise LinkLost(error.said, mend=mend) from None
    agree(answer.version, "the coordinator", "this hospital's cloister-site")
    until = _ours(answer.certificate.encode(), key, invite.hospital).not_after
    roster = {**answer.roster, **pinned, invite.hospital: identity.public}
    if answer.roster.get(invite.hospital, identity.public) != identity.public:
        raise EnrolmentRefused(f"The coordinator took {invite.hospital} for the holder of another key.", mend=_TELL)
    try:
        known = Consortium(
            consortium=invite.consortium,
            site=invite.hospital,
            rounds=invite.rounds,
            control=invite.control,
            signing=invite.signing,
            roster=dict(sorted(roster.items())),
        )
    except ValidationError:
        raise EnrolmentRefused("The coordinator sent a list of hospitals that is none.", mend=_TELL) from None
    if len(set(roster.values())) < len(roster):
        raise EnrolmentRefused("The coordinator shows two hospitals with one key.", mend=_TELL)
    durable.save_text(folder / "ca.crt", invite.ca)
    durable.save_text(folder / "agent.crt", answer.certificate)
    if (new := folder / "agent.next.key").exists():
        durable.replace(new, folder / "agent.key")
    peers = {name: key_id(peer) for name, peer in known.roster.items()}
    tell(folder, "enrolled", {"consortium": known.consortium, "signing": key_id(known.signing), "pinned": peers})
    durable.save_text(folder / "consortium.json", known.model_dump_json(indent=1))  # last: with it, it is enrolled
    return known, until


def _ours(certificate: bytes, key: Key, name: str) -> Bearer:
    """A certificate that the coordinator sent, if it is this hospital's."""
    held = bearer(certificate)
    if (held.kind, held.name, held.public_key) != (Kind.SITE, name, public_key(key)):
        raise EnrolmentRefused(
            f"The coordinator sent a certificate of {held.name} ({held.kind}), or for another key, to {name}.",
            mend=_TELL,
        )
    return held


# --- renewal -----------------------------------------------------------------------------------------------
def due(held: Bearer, now: datetime | None = None) -> bool:
    """Whether less than a third of a certificate's lifetime is left."""
    return held.not_after - (now or datetime.now(UTC)) < (held.not_after - held.not_before) / 3


def renew(folder: Path) -> Bearer:
    """A new certificate for the same key, written over the old one; connections made from now on show it.

    Raises:
        EnrolmentRefused: not enrolled, or the certificate is over or revoked: only a new invite helps then.
        LinkLost: the coordinator cannot be reached.
    """
    consortium_of(folder)
    held, key = own_certificate(folder), read_key(folder / "agent.key")
    if held.not_after <= datetime.now(UTC):
        raise EnrolmentRefused(
            f"The certificate of {held.name} ended on {held.not_after:%Y-%m-%d}, and opens no connection any more.",
            mend="Ask the consortium for a new invite, and type cloister-site enrol FILE --again.",
        )
    with calling(folder) as control:
        certificate = control.renew(request(key, held.name))
    found = _ours(certificate, key, held.name)
    durable.save_text(folder / "agent.crt", certificate.decode())
    tell(folder, "renewed", {"until": found.not_after.isoformat()})
    return found
