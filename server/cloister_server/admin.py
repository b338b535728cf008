"""What the people of the consortium ask of the coordinator: hospitals in and out, studies offered and run, accounts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from threading import Event

import grpc

from cloister_server.access import FROM, Access, Caller
from cloister_server.board import AT_ONCE, TICK, Board, round_reply
from cloister_server.door import Door, open_door, service
from cloister_server.folder import Consortium, Nodes, is_loopback, open_nodes, server_tls, split
from cloister_server.records import Role, Study
from cloister_shared import audit, certificates, durable
from cloister_shared.agreement import Offer, sign_offer
from cloister_shared.certificates import Kind
from cloister_shared.control_pb2 import (
    AccountReply,
    AccountRequest,
    AuditReply,
    AuditRequest,
    ExpelReply,
    ExpelRequest,
    Hospital,
    HospitalsReply,
    HospitalsRequest,
    InviteReply,
    InviteRequest,
    ListReply,
    ListRequest,
    SteerRequest,
    StudyReply,
    SubmitRequest,
    WatchRequest,
)
from cloister_shared.enrolment import Invite
from cloister_shared.envelope import key_id, save_roster
from cloister_shared.errors import AccessRefused, EnrolmentRefused, PlanRefused, StudyRefused
from cloister_shared.plan_file import read_plan

LARGEST = 1024 * 1024
"""Octets of a request."""

LARGEST_PLAN = 256 * 1024
"""Octets. A plan is a few pages; one of a megabyte would take a minute to read."""

HOURS, MOST_HOURS = 72, 24 * 30
"""Of an invite."""

ENTRIES, MOST_ENTRIES = 20, 1000
"""Of the audit log, in one reply."""


def serve(consortium: Consortium, nodes: Nodes | None = None, address: str = "") -> Door:
    """Open the admin port, under TLS; on loopback, unless ``coordinator.yaml`` says that it may be on the network.

    ``nodes``: hospitals as Flower knows them, the consortium's link if not given; ``address``: what to listen on,
    ``admin`` if not given.

    Raises:
        AccessRefused: other machines could reach it, and ``admin_on_network`` is not set.
        LinkLost: the address cannot be listened on.
        KeyBroken: a key of the coordinator cannot be used.
    """
    address = address or consortium.settings.admin
    if not is_loopback(split(address)[0]) and not consortium.settings.admin_on_network:
        raise AccessRefused(
            f"Other machines could reach the admin port at {address}.",
            mend="Write 127.0.0.1 in coordinator.yaml, or admin_on_network: true if only a VPN leads there.",
        )
    access = Access(consortium)
    admin = Admin(consortium, nodes or open_nodes(consortium.folder), access)
    admin.publish_revocations()  # a crash may have come between the records and the list
    methods = {
        "Invite": admin.invite,
        "Hospitals": admin.hospitals,
        "Expel": admin.expel,
        "Submit": admin.submit,
        "Steer": admin.steer,
        "List": admin.list_studies,
        "Watch": admin.watch,
        "Account": admin.account,
        "Audit": admin.audit,
    }
    checked = {name: access.checked(name, method) for name, method in methods.items()}
    credentials = grpc.ssl_server_credentials([server_tls(consortium)])
    return open_door(address, credentials, [service("Admin", access.admit, checked)], LARGEST)


class Admin:
    """The methods of the service Admin."""

    def __init__(self, consortium: Consortium, nodes: Nodes, access: Access) -> None:
        self._consortium, self._registry, self._nodes = consortium, consortium.registry, nodes
        self._access, self._board = access, Board(consortium.registry)

    # --- hospitals -----------------------------------------------------------------------------------------
    def invite(self, request: InviteRequest, caller: Caller) -> InviteReply:
        """A file that lets one hospital enrol, once."""
        hours = request.hours or HOURS
        if hours > MOST_HOURS:
            raise EnrolmentRefused(f"An invite ends within {MOST_HOURS} hours.", mend="Invite again when it is needed.")
        settings, key = self._consortium.settings, certificates.made_key()
        made = self._consortium.authority.issue(
            certificates.public_key(key), Kind.INVITE, request.hospital, timedelta(hours=hours)
        )
        bearer = certificates.bearer(made)
        self._registry.invite(bearer.serial, bearer.name, bearer.not_after)
        invite = Invite(
            consortium=settings.name,
            hospital=bearer.name,
            rounds=settings.rounds,
            control=settings.control,
            ca=self._consortium.authority.certificate.decode(),
            signing=self._consortium.signing.public,
            certificate=made.decode(),
            key=certificates.key_pem(key).decode(),
            expires=bearer.not_after.isoformat(),
        )
        return InviteReply(invite=invite.text())

    def hospitals(self, request: HospitalsRequest, caller: Caller) -> HospitalsReply:
        """All that are invited, enrolled or expelled."""
        online = self._nodes.online()
        found = [
            Hospital(
                name=each.name,
                key_id=key_id(each.identity),
                standing=each.standing,
                online=each.standing == "enrolled" and each.node in online,
                version=each.version,
                seen=each.seen.timestamp() if each.seen else 0,
                not_after=each.not_after.timestamp(),
            )
            for each in self._registry.hospitals()
        ]
        found += [
            Hospital(name=name, standing="invited", not_after=ends.timestamp())
            for name, ends in sorted(self._registry.invites().items())
        ]
        return HospitalsReply(hospitals=found)

    def expel(self, request: ExpelRequest, caller: Caller) -> ExpelReply:
        """End a hospital's membership: its certificates are revoked, its open invite is withdrawn."""
        known = [each for each in self._registry.hospitals() if each.name == request.hospital]
        if not any(each.standing == "expelled" for each in known) or request.hospital in self._registry.invites():
            self._registry.expel(request.hospital)  # else what follows may have been cut short last time
        self.publish_revocations()
        for each in known:
            self._nodes.forget(each.public_key)
        return ExpelReply()

    def publish_revocations(self) -> None:
        """Write ``revoked.crl``, which every process reads, from the records."""
        path = self._consortium.folder / "revoked.crl"
        with durable.locked(path):
            durable.save_text(path, self._consortium.authority.crl(self._registry.revocations()).decode())

    # --- studies -------------------------------------------------------------------------------------------
    def submit(self, request: SubmitRequest, caller: Caller) -> StudyReply:
        """Offer a plan to hospitals: to all that are enrolled, if none are named."""
        if len(request.plan.encode()) > LARGEST_PLAN:
            raise PlanRefused(f"A plan has at most {LARGEST_PLAN // 1024} KB.", mend="Submit the plan alone.")
        file = _printable(os.path.basename(request.file))[-100:] or "plan.yaml"
        plan = read_plan(request.plan, file)
        roster = self._roster(request.hospitals)
        least, most = plan.cohort.min_sites, plan.cohort.max_sites
        if not least <= len(roster) <= most:
            raise StudyRefused(
                f"{plan.study} is for {least} to {most} hospitals; {len(roster)} are"
                f" {'named' if request.hospitals else 'enrolled'}.",
                mend="Name fitting hospitals with --hospitals, or change cohort.min_sites or cohort.max_sites.",
            )
        offer = Offer(
            consortium=self._consortium.settings.name,
            plan=request.plan,
            file=file,
            digest=plan.digest,
            roster=roster,
            submitted_by=caller.name,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        folder = self._consortium.folder / "studies" / plan.digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with durable.locked(folder / "roster.json"):
            if all(study.digest != plan.digest for study in self._registry.studies()):
                save_roster(folder / "roster.json", roster)  # a study in the records has its roster on disk
            signed = sign_offer(self._consortium.signing, offer)
            self._registry.add_study(plan.digest, plan.study, request.plan, file, caller.name, roster, signed)
        return self._reply(plan.digest)

    def _roster(self, named: Iterable[str]) -> dict[str, str]:
        enrolled = {each.name: each.identity for each in self._registry.hospitals() if each.standing == "enrolled"}
        chosen = sorted(set(named)) or sorted(enrolled)
        if strangers := [name for name in chosen if name not in enrolled]:
            raise StudyRefused(
                f"Not enrolled: {', '.join(name[:60] for name in strangers[:10])}.",
                mend="List the hospitals for their names.",
            )
        return {name: enrolled[name] for name in chosen}

    def steer(self, request: SteerRequest, caller: Caller) -> StudyReply:
        """Run a study that enough hospitals approved; stop it; resume it where it stopped."""
        if request.verb not in FROM:
            raise StudyRefused(f"A study cannot be told to {request.verb[:20]!r}.", mend="Say run, stop or resume.")
        study = self._registry.study(request.study)
        if study.state not in FROM[request.verb]:
            raise StudyRefused(
                f"{study.name} is {study.state}; to {request.verb} it, it must be {' or '.join(FROM[request.verb])}."
            )
        reason = _printable(request.reason)[:300]
        if request.verb == "stop":
            self._registry.move(study.digest, "stopped", reason or f"by {caller.name}", only_from=FROM["stop"])
        else:
            self._agreed(study)
            self._registry.move(study.digest, "running", reason, only_from=FROM[request.verb])
        return self._reply(study.digest)

    def _agreed(self, study: Study) -> None:
        decided = self._registry.decisions(study.digest)
        enrolled = {each.name: each.identity for each in self._registry.hospitals() if each.standing == "enrolled"}
        gone = [site for site, identity in study.roster.items() if enrolled.get(site) != identity]
        here = [site for site in study.roster if site not in gone]
        approved = [site for site in here if decided.get(site) == "approved"]
        least = read_plan(study.plan, study.file).cohort.min_sites
        if len(approved) >= least:
            return
        others = {
            "not decided": [site for site in here if site not in decided],
            "rejected": [site for site in here if decided.get(site) == "rejected"],
            "revoked": [site for site in here if decided.get(site) == "revoked"],
            "no longer enrolled": gone,
        }
        said = "; ".join(f"{what}: {', '.join(sites)}" for what, sites in others.items() if sites)
        raise StudyRefused(
            f"{study.name} asks for {least} hospitals that approve, and {len(approved)} did; {said}.",
            mend="Each approves it with cloister-site approve.",
        )

    def list_studies(self, request: ListRequest, caller: Caller) -> ListReply:
        """Every study, as it was submitted."""
        self._board.look_again()
        return ListReply(studies=[standing.reply() for standing in self._board.standings()])

    def watch(self, request: WatchRequest, caller: Caller, ended: Event) -> Iterator[StudyReply]:
        """A study and its rounds so far, then whatever changes, until it is finished or stopped."""
        digest, told, after = self._registry.study(request.study).digest, None, 0
        self._board.look_again()
        while True:
            self._access.still(caller)
            standing = self._board.standing(digest)
            reply = standing.reply()
            if reply != told:
                told = reply
                history = [round_reply(said) for said in self._registry.rounds(digest, after)]
                after = max((each.round for each in history), default=after)
                for at in range(0, max(len(history), 1), AT_ONCE):
                    part = StudyReply(history=history[at : at + AT_ONCE])
                    part.MergeFrom(reply)
                    yield part
            if standing.glance.state in ("finished", "stopped") or ended.wait(TICK):
                return

    def _reply(self, digest: str) -> StudyReply:
        self._board.look_again()
        return self._board.standing(digest).reply()

    # --- accounts and the log ------------------------------------------------------------------------------
    def account(self, request: AccountRequest, caller: Caller) -> AccountReply:
        """Add an account, renew its token, remove it, or list all."""
        match request.verb:
            case "add":
                if request.role not in list(Role):
                    raise AccessRefused(f"{request.role[:40]!r} is no role.", mend=f"One of: {', '.join(Role)}.")
                return AccountReply(token=self._registry.add_account(request.name, Role(request.role)))
            case "renew":
                return AccountReply(token=self._registry.renew_account(request.name))
            case "remove":
                if request.name == caller.name:
                    raise AccessRefused("An account cannot remove itself.", mend="Ask another operator to.")
                self._registry.remove_account(request.name)
                return AccountReply()
            case "list":
                return AccountReply(accounts={each.name: each.role for each in self._registry.accounts()})
            case _:
                raise AccessRefused(f"{request.verb[:20]!r} is nothing to do with an account.", mend="Add or list.")

    def audit(self, request: AuditRequest, caller: Caller) -> AuditReply:
        """The newest entries, every hash of the whole log checked, and the hash that stands for all of it."""
        entries = audit.verify(self._consortium.folder / "audit.jsonl")
        last = min(request.last or ENTRIES, MOST_ENTRIES)
        return AuditReply(
            entries=[entry.line.decode() for entry in entries[-last:]],
            head=entries[-1].hash if entries else audit.START,
        )


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)
