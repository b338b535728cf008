"""What hospitals ask of the coordinator: enrolment, renewal, the studies they are invited to, and their decisions.

A hospital is who its certificate says, at every call and at every message of a stream; nothing in a request can name
another. An invite's certificate opens ``Enrol`` and nothing else, a hospital's everything else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from math import ceil
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import grpc

from cloister_server.board import TICK, Board, Standing
from cloister_server.door import Buckets, Door, open_door, service
from cloister_server.folder import Consortium, Nodes, open_nodes, record, server_tls
from cloister_shared.agreement import Decision, read_decision, roster_digest
from cloister_shared.certificates import Bearer, Kind, Revocations, bearer, read_request
from cloister_shared.control_pb2 import (
    DecideReply,
    DecideRequest,
    EnrolReply,
    EnrolRequest,
    HelloReply,
    HelloRequest,
    RenewReply,
    RenewRequest,
    StudiesRequest,
    StudyNews,
)
from cloister_shared.enrolment import check_proof
from cloister_shared.errors import (
    AccessRefused,
    CloisterError,
    EnrolmentRefused,
    EnvelopeRefused,
    LinkLost,
    RateRefused,
    StudyRefused,
)
from cloister_shared.versions import agree, spoken

if TYPE_CHECKING:
    from cloister_server.records import Hospital, Study

log = logging.getLogger("cloister")

LIFETIME = timedelta(days=365)
"""Of a hospital's certificate."""

LARGEST = 256 * 1024
"""Octets of a request; the largest there is, a certificate request, has one."""

SEEN = 30.0
"""Seconds after which a hospital whose stream stands is written down as seen again."""

CALLS, DEEDS = (40, 1.0), (20, 1 / 60)
"""Calls of one hospital, so many at once, then so many a second; deeds are those that the audit log holds."""


def serve(consortium: Consortium, nodes: Nodes | None = None, address: str = "") -> Door:
    """Open the control port, under mutual TLS: no other authority's certificate gets a word in.

    ``nodes``: where hospitals are made known to Flower, the consortium's link if not given; ``address``: what to
    listen on, ``listen.control`` if not given.

    Raises:
        LinkLost: the address cannot be listened on.
        KeyBroken: a key of the coordinator cannot be used.
    """
    control = Control(consortium, nodes or open_nodes(consortium.folder))
    credentials = grpc.ssl_server_credentials(
        [server_tls(consortium)], root_certificates=consortium.authority.certificate, require_client_auth=True
    )
    services = [
        service("Enrolment", control.admit, {"Enrol": control.enrol}),
        service(
            "Control",
            control.admit,
            {"Hello": control.hello, "Renew": control.renew, "Studies": control.studies, "Decide": control.decide},
        ),
    ]
    return open_door(address or consortium.settings.listen.control, credentials, services, LARGEST)


class Control:
    """The methods of the services Enrolment and Control."""

    def __init__(self, consortium: Consortium, nodes: Nodes) -> None:
        self._consortium, self._registry, self._nodes = consortium, consortium.registry, nodes
        self._revoked = Revocations(consortium.folder)
        self._board = Board(consortium.registry)
        self._calls, self._deeds = Buckets(*CALLS), Buckets(*DEEDS)
        self._streams, self._lock = dict[str, Event](), Lock()

    def admit(self, method: str, context: grpc.ServicerContext) -> Bearer:
        """Who calls, by the certificate that TLS has checked.

        Raises:
            AccessRefused: it is revoked, has ended, or does not open this method.
        """
        shown: Any = context.auth_context()["x509_pem_cert"]
        caller = bearer(shown[0])
        wanted = Kind.INVITE if method == "Enrol" else Kind.SITE
        if caller.kind is not wanted:
            raise AccessRefused(
                f"The certificate of {caller.name} is one of kind {caller.kind}; {method} asks for {wanted}.",
                mend="Enrol with an invite, once; call with the certificate that enrolment gave.",
            )
        self._still(caller)
        buckets = self._calls if method in ("Hello", "Studies") else self._deeds
        if wait := buckets.take(caller.name):
            raise RateRefused(f"{caller.name} calls too often.", mend=f"Wait {ceil(wait)} s.")
        return caller

    # --- enrolment -----------------------------------------------------------------------------------------
    def enrol(self, request: EnrolRequest, caller: Bearer) -> EnrolReply:
        """Trade an invite for a certificate. Whoever lost the answer may ask again with the same two keys."""
        with self._recorded("enrol", "invite", caller.name):
            agree(request.version, f"the agent of {caller.name}", "the coordinator")
            public = read_request(request.request.encode())
            check_proof(request.proof, request.request, request.identity)
            made = self._consortium.authority.issue(public, Kind.SITE, caller.name, LIFETIME)
            self._admit(caller, request.identity, public, bearer(made))
        hospitals = self._registry.hospitals()
        roster = {each.name: each.identity for each in hospitals if each.standing == "enrolled"}
        return EnrolReply(version=spoken(), certificate=made.decode(), roster=roster)

    def _admit(self, caller: Bearer, identity: str, public: bytes, made: Bearer) -> None:
        """Known to Flower first, which is of no use without a certificate; then to us, and the invite is taken."""
        try:
            self._registry.require_invite(caller.serial)
            node = self._nodes.register(public)
            self._registry.admit(caller.serial, identity, public, made.serial, made.not_after, node)
        except EnrolmentRefused:
            asked = (caller.name, identity, public, "enrolled")
            if all((h.name, h.identity, h.public_key, h.standing) != asked for h in self._registry.hospitals()):
                raise
            self._registry.renewed(caller.name, made.serial, made.not_after)

    def renew(self, request: RenewRequest, caller: Bearer) -> RenewReply:
        """A new certificate for the same key: Flower knows the hospital by it."""
        with self._recorded("renew", "hospital", caller.name):
            if read_request(request.request.encode()) != self._hospital(caller).public_key:
                raise EnrolmentRefused(
                    f"The request is for another key than the one that {caller.name} enrolled with.",
                    mend="Renew with the key in agent.key; for a new key, be expelled and enrol again.",
                )
            made = self._consortium.authority.issue(caller.public_key, Kind.SITE, caller.name, LIFETIME)
            self._registry.renewed(caller.name, bearer(made).serial, bearer(made).not_after)
        return RenewReply(certificate=made.decode())

    # --- studies -------------------------------------------------------------------------------------------
    def hello(self, request: HelloRequest, caller: Bearer) -> HelloReply:
        """Whom we take the caller for, and our clock."""
        self._greet(request.version, caller)
        return HelloReply(version=spoken(), site=caller.name, time=time.time(), not_after=caller.not_after.timestamp())

    def studies(self, request: StudiesRequest, caller: Bearer, ended: Event) -> Iterator[StudyNews]:
        """Every study of the caller's, now and again whenever one changes; a newer stream of the caller's ends this."""
        told: dict[str, tuple[Standing, StudyNews]] = {}
        greeted = float("-inf")
        with self._newest(caller) as superseded:
            while True:
                if time.monotonic() - greeted > SEEN:
                    self._greet(request.version, caller)
                    greeted = time.monotonic()
                for standing in self._board.standings():
                    digest = standing.study.digest
                    before, last = told.get(digest, (None, None))
                    if standing is before or caller.name not in standing.study.roster:
                        continue
                    told[digest] = standing, (news := standing.news(caller.name))
                    if news != last:
                        self._still(caller)
                        yield news
                if ended.wait(TICK):
                    return
                self._still(caller)
                if superseded.is_set():
                    raise LinkLost(
                        f"A newer connection of {caller.name} took over.", mend="Let one agent run at a hospital."
                    )

    def decide(self, request: DecideRequest, caller: Bearer) -> DecideReply:
        """What named people of the hospital decided, signed by it; its latest word counts."""
        with self._recorded("decide", "hospital", caller.name) as about:
            hospital = self._hospital(caller)
            said = read_decision(request.envelope, {hospital.name: hospital.identity})
            study = self._registry.study(said.plan)
            about.append(f"{study.name} {study.digest[:16]}: {said.decision} by {', '.join(said.people)}")
            if study.roster.get(hospital.name) != hospital.identity:
                raise StudyRefused(
                    f"{study.name} was not offered to {hospital.name} under the key that it signs with now.",
                    mend="Submit the study anew, with this hospital.",
                )
            if said.roster != roster_digest(study.roster):
                raise EnvelopeRefused(
                    f"{hospital.name} decided upon {study.name} with other hospitals than it was offered with.",
                    mend="Look at the study again, and decide again.",
                )
            self._not_older(study, said, request.envelope)
            self._registry.decide(study.digest, hospital.name, said.decision, request.envelope)
        self._board.look_again()
        return DecideReply(state=self._registry.study(study.digest).state)

    def _not_older(self, study: Study, said: Decision, envelope: str) -> None:
        """Consent that was taken back stays so: an approval from before does not count. No is taken at any time."""
        before = self._registry.envelopes(study.digest).get(said.site)
        if said.decision != "approved" or before in (None, envelope):
            return
        last = read_decision(before, study.roster)
        if datetime.fromisoformat(said.at) <= datetime.fromisoformat(last.at):
            raise StudyRefused(f"{said.site} {last.decision} {study.name} at {last.at}, later than {said.at}.", mend="")

    # --- who calls -----------------------------------------------------------------------------------------
    def _still(self, caller: Bearer) -> None:
        if caller.serial in self._revoked:
            raise AccessRefused(f"The certificate of {caller.name} is revoked.", mend="Ask the consortium why.")
        if caller.not_after <= datetime.now(UTC):
            raise AccessRefused(f"The certificate of {caller.name} has ended.", mend="Ask for a new invite.")

    def _hospital(self, caller: Bearer) -> Hospital:
        found = self._registry.hospital(caller.name)
        if found.standing != "enrolled" or found.public_key != caller.public_key:
            raise AccessRefused(f"{caller.name} is not enrolled with this key.", mend="Ask the consortium why.")
        return found

    def _greet(self, version: str, caller: Bearer) -> None:
        agree(version, f"the agent of {caller.name}", "the coordinator")
        self._hospital(caller)
        self._registry.seen(caller.name, "".join(sign if sign.isprintable() else "?" for sign in version[:80]))

    @contextmanager
    def _newest(self, caller: Bearer) -> Generator[Event, None, None]:
        """Ends the stream that the caller had, and says when this one is to end for the same reason."""
        mine = Event()
        with self._lock:
            before, self._streams[caller.name] = self._streams.get(caller.name), mine
        if before:
            before.set()
        try:
            yield mine
        finally:
            with self._lock:
                if self._streams.get(caller.name) is mine:
                    del self._streams[caller.name]

    @contextmanager
    def _recorded(self, action: str, role: str, who: str) -> Generator[list[str], None, None]:
        """Write what was asked, and what became of it, to the audit log."""
        about: list[str] = []

        def write(outcome: str) -> None:
            record(self._consortium.folder, who, role, action, "".join(about) or who, outcome)

        try:
            yield about
        except CloisterError as error:
            write(f"refused: {error}")
            raise
        except Exception:
            write("failed")
            raise
        write("done")
