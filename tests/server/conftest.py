"""A consortium on loopback: its two gRPC ports, real certificates, and hospitals that enrol as hospitals do."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from cloister_server import admin, control, folder
from cloister_server.folder import Consortium
from cloister_shared.agreement import Decision, roster_digest, sign_decision
from cloister_shared.certificates import key_pem, made_key, request
from cloister_shared.control_pb2 import DecideRequest, EnrolReply, EnrolRequest, InviteRequest, SubmitRequest
from cloister_shared.control_pb2_grpc import AdminStub, ControlStub, EnrolmentStub
from cloister_shared.enrolment import Invite, prove, read_invite
from cloister_shared.envelope import Identity, new_identity
from cloister_shared.errors import EnrolmentRefused
from cloister_shared.versions import spoken

PLAN = """\
study: three-numbers
title: Three numbers and an outcome
task: {name: tabular}
table:
  target: {name: outcome, positive: 1, negative: 0}
  features:
    - {name: a, kind: number, range: [-2, 2]}
cohort: {min_sites: 2, max_sites: 3, min_patients: 4}
rounds: 3
strategy: {name: fedavg}
aggregation: {secure_sum: false}
training: {learning_rate: 0.5, batch_size: 24, local_steps: 2}
privacy: {mechanism: none}
evaluation: {min_count: 3}
"""


class FakeNodes:
    """What Flower would know."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}
        self._next, self._forgotten = count(2**63), set[bytes]()

    def register(self, public_key: bytes) -> int:
        if public_key in self._forgotten:
            raise EnrolmentRefused("This key was expelled from the consortium.", mend="Make a new one.")
        return self.known.setdefault(public_key, next(self._next))

    def forget(self, public_key: bytes) -> None:
        if self.known.pop(public_key, None):
            self._forgotten.add(public_key)

    def online(self) -> set[int]:
        return set(self.known.values())


@dataclass
class Member:
    """A hospital with its keys."""

    name: str
    identity: Identity
    key: object = field(default_factory=made_key)
    certificate: bytes = b""

    def csr(self, named: str = "") -> str:
        return request(self.key, named or self.name).decode()

    def enrol_request(self, named: str = "") -> EnrolRequest:
        csr = self.csr(named)
        return EnrolRequest(
            version=spoken(), request=csr, identity=self.identity.public, proof=prove(self.identity, csr)
        )


@dataclass
class World:
    """An open consortium and ways to call it."""

    consortium: Consortium
    nodes: FakeNodes
    control: str
    admin: str
    tmp: Path
    channels: list[grpc.Channel] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    plan: str = PLAN

    # --- calling ---
    def channel(self, certificate: bytes | None = None, key: bytes | None = None, ca: bytes = b"") -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(ca or self.consortium.authority.certificate, key, certificate)
        made = grpc.secure_channel(self.control, credentials, [("grpc.use_local_subchannel_pool", 1)])
        self.channels.append(made)
        return made

    def site(self, member: Member) -> ControlStub:
        return ControlStub(self.channel(member.certificate, key_pem(member.key)))

    def door(self, invite: Invite) -> EnrolmentStub:
        return EnrolmentStub(self.channel(invite.certificate.encode(), invite.key.encode()))

    def admin_channel(self) -> grpc.Channel:
        made = grpc.secure_channel(self.admin, grpc.ssl_channel_credentials(self.consortium.authority.certificate))
        self.channels.append(made)
        return made

    def desk(self, role: str = "operator") -> SimpleNamespace:
        """The admin service under an account of the role."""
        return self.desk_with(self.token(role))

    def desk_with(self, token: str) -> SimpleNamespace:
        stub = AdminStub(self.admin_channel())

        def bound(method: Callable) -> Callable:
            return lambda asked: method(asked, metadata=[("authorization", f"Bearer {token}")], timeout=20)

        return SimpleNamespace(**{name: bound(method) for name, method in vars(stub).items()})

    def token(self, role: str) -> str:
        if role not in self.tokens:
            from cloister_server.records import Role

            self.tokens[role] = self.consortium.registry.add_account(f"a {role}", Role(role))
        return self.tokens[role]

    def refused(self, call: Callable, asked: object, code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED) -> str:
        """What the coordinator says to a call that it must refuse with this status."""
        with pytest.raises(grpc.RpcError) as caught:
            self.whole(call, asked)
        assert caught.value.code() is code, caught.value
        return str(caught.value.details())

    @staticmethod
    def whole(call: Callable, asked: object) -> list[object]:
        """The reply to a call, or all its replies."""
        reply = call(asked)
        return list(reply) if hasattr(reply, "__next__") else [reply]

    # --- what people do ---
    def member(self, name: str) -> Member:
        return Member(name, new_identity(self.tmp / f"{name}-{len(list(self.tmp.iterdir()))}.key"))

    def invite(self, name: str) -> Invite:
        return read_invite(self.desk().Invite(InviteRequest(hospital=name)).invite)

    def enrol(self, name: str) -> Member:
        member = self.member(name)
        reply: EnrolReply = self.door(self.invite(name)).Enrol(member.enrol_request(), timeout=20)
        member.certificate = reply.certificate.encode()
        return member

    def submit(self, *names: str, plan: str = PLAN) -> str:
        return self.desk("researcher").Submit(SubmitRequest(plan=plan, file="plan.yaml", hospitals=names)).digest

    def decision(self, member: Member, digest: str, said: str = "approved", **changed: object) -> DecideRequest:
        study = self.consortium.registry.study(digest)
        terms = {
            "site": member.name,
            "plan": digest,
            "roster": roster_digest(study.roster),
            "decision": said,
            "people": ("Ada",),
            "at": datetime.now(UTC).isoformat(),
        } | changed
        return DecideRequest(envelope=sign_decision(member.identity, Decision(**terms)))

    def decide(self, member: Member, digest: str, said: str = "approved") -> None:
        self.site(member).Decide(self.decision(member, digest, said), timeout=20)

    @property
    def log(self) -> str:
        return (self.consortium.folder / "audit.jsonl").read_text()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("made") / "consortium"
    folder.init(made, folder.settings_for("North", "localhost", 8443, 8444, 8445))
    return made


@pytest.fixture
def world(made_once: Path, tmp_path: Path) -> Iterator[World]:
    shutil.copytree(made_once, tmp_path / "consortium")
    consortium = folder.open_consortium(tmp_path / "consortium")
    nodes = FakeNodes()
    doors = [serve(consortium, nodes, "127.0.0.1:0") for serve in (control.serve, admin.serve)]
    (tmp_path / "keys").mkdir()
    made = World(consortium, nodes, *(f"127.0.0.1:{door.port}" for door in doors), tmp_path / "keys")
    try:
        yield made
    finally:
        for channel in made.channels:
            channel.close()
        for door in doors:
            door.stop(0)
        consortium.registry.close()
