"""The consortium's folder: made once by ``init``, then opened by every process of the coordinator.

``coordinator.yaml`` says where the coordinator is found and where it listens; keys, records and the audit log lie
beside it. Whoever can read the folder is the consortium: it belongs to one account of the machine, and to its backups.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict

from cloister_shared import audit, certificates, durable
from cloister_shared.certificates import Authority, Kind
from cloister_shared.envelope import Identity, new_identity, read_identity
from cloister_shared.errors import KeyBroken, PlanRefused
from cloister_shared.names import SiteName
from cloister_shared.plan_file import Source, load, parse
from cloister_shared.terms import Broken

if TYPE_CHECKING:
    from cloister_server.registry import Registry

OFFICER = "officer"
"""The first account; its token is in ``officer.token``."""

LIFETIME = timedelta(days=825)
"""Of the coordinator's own certificate; every start makes it anew."""

DATABASE = "sqlite:///registry.sqlite"

PAGES = 8446
"""The port of the pages."""

_PEOPLE = (("admin",), ("pages",))
"""Addresses that are people's, not hospitals'."""


class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Listen(_Terms):
    """Where the two public ports are opened on this machine."""

    rounds: str
    control: str


class Settings(_Terms):
    """``coordinator.yaml``. Every address is ``host:port``."""

    name: SiteName
    rounds: str
    """What hospitals dial for rounds."""
    control: str
    """What hospitals dial for everything else."""
    admin: str
    """What people dial, and where their port is opened."""
    pages: str = f"127.0.0.1:{PAGES}"
    """Where browsers find the pages, and where they are opened."""
    listen: Listen
    database: str = DATABASE
    """``sqlite:///FILE`` beside ``coordinator.yaml``, or ``postgresql+psycopg://…``."""
    admin_on_network: bool = False
    """Admin port and pages may be reached from other machines: on a VPN, never from the internet."""


@dataclass(frozen=True)
class Consortium:
    """An opened folder."""

    folder: Path
    settings: Settings
    authority: Authority
    signing: Identity
    registry: Registry


class Nodes(Protocol):
    """Hospitals as Flower knows them, each by the public key of its certificate: ``link.Link``."""

    def register(self, public_key: bytes) -> int:
        """Its number; the same key has the same one.

        Raises:
            EnrolmentRefused: the key was forgotten before.
        """
        ...

    def forget(self, public_key: bytes) -> None:
        """Flower takes nothing from its bearer any more, and never will again."""
        ...

    def online(self) -> set[int]:
        """The numbers of those that are there for rounds now."""
        ...


# --- making it ---------------------------------------------------------------------------------------------
def init(folder: Path, settings: Settings) -> Path:
    """Make the folder, whole or not at all: authority, keys, records, the first account. The path of its token.

    Raises:
        KeyBroken: the folder holds something already.
        EnrolmentRefused: a name does not fit the rule for names.
        RegistryBroken: the database cannot be used, or holds another consortium.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise KeyBroken(
            f"{folder} exists and is not empty.",
            mend="Choose another folder: a consortium's keys are never replaced unseen.",
        )
    from cloister_server.records import Role

    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    beside.mkdir(mode=0o700, parents=True)
    try:
        authority = certificates.new_authority(beside, settings.name)
        certificates.new_key(beside / "coordinator.key")
        _certify(beside, settings, authority)
        new_identity(beside / "signing.key")
        durable.save_text(beside / "revoked.crl", authority.crl({}).decode())
        (beside / "studies").mkdir()
        durable.save_secret(beside / "coordinator.yaml", _yaml(settings))  # a database's URL may hold its password
        registry = open_records(beside, settings)
        if registry.accounts() or registry.hospitals():
            raise KeyBroken("The database holds another consortium.", mend="Give each consortium one of its own.")
        durable.save_secret(beside / "officer.token", registry.add_account(OFFICER, Role.OPERATOR) + "\n")
        registry.close()
        record(beside, OFFICER, Role.OPERATOR, "init", settings.name, "done")
        os.replace(beside, folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder / "officer.token"


def settings_for(
    name: str, host: str, rounds: int, control: int, admin: int, database: str = DATABASE, pages: int = PAGES
) -> Settings:
    """Settings of a coordinator on one host; on loopback nothing is opened to other machines.

    Raises:
        PlanRefused: one of them cannot be.
    """
    anywhere = host if is_loopback(host) else "0.0.0.0"
    host, anywhere = (f"[{each}]" if ":" in each else each for each in (host, anywhere))
    terms = {
        "name": name,
        "rounds": f"{host}:{rounds}",
        "control": f"{host}:{control}",
        "admin": f"127.0.0.1:{admin}",
        "pages": f"127.0.0.1:{pages}",
        "listen": {"rounds": f"{anywhere}:{rounds}", "control": f"{anywhere}:{control}"},
        "database": database,
    }
    return _parsed(Source("What was given", terms))


def _yaml(settings: Settings) -> str:
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in settings.model_dump().items()}
    return f"""\
# The coordinator of a consortium. A change takes effect when the coordinator is started again.
name: {quoted["name"]}

# Where hospitals find it: HOST:PORT, as their firewalls must let them out to. The host is in the certificate.
rounds: {quoted["rounds"]}
control: {quoted["control"]}

# Where it listens on this machine.
listen:
  rounds: {json.dumps(settings.listen.rounds)}
  control: {json.dumps(settings.listen.control)}

# Where the people of the consortium command it. Only on this machine, unless admin_on_network says true.
admin: {quoted["admin"]}
admin_on_network: {quoted["admin_on_network"]}

# Records: a file beside this one, or postgresql+psycopg://USER:PASSWORD@HOST/NAME.
database: {quoted["database"]}

# Where people's browsers find its pages, by https://. Only on this machine, unless admin_on_network says true.
pages: {quoted["pages"]}
"""


# --- opening it --------------------------------------------------------------------------------------------
def open_consortium(folder: Path) -> Consortium:
    """Everything that a process of the coordinator needs.

    Raises:
        PlanRefused: ``coordinator.yaml`` is missing, or a line of it is wrong.
        KeyBroken: a key is missing, damaged, or open to others.
        RegistryBroken: the records cannot be used.
    """
    settings = read_settings(folder)
    authority, signing = certificates.read_authority(folder), read_identity(folder / "signing.key")
    return Consortium(folder, settings, authority, signing, open_records(folder, settings))


def read_settings(folder: Path) -> Settings:
    """The folder's ``coordinator.yaml``.

    Raises:
        PlanRefused: it is missing, or a line of it is wrong.
    """
    path = folder / "coordinator.yaml"
    try:
        return _parsed(load(path.read_text(encoding="utf-8"), str(path)))
    except FileNotFoundError:
        raise PlanRefused(
            f"{path} is not there.",
            mend=f"Make a consortium with cloister-coordinator init {folder}, or name its folder with --consortium.",
        ) from None
    except UnicodeDecodeError:
        raise PlanRefused(f"{path} is not UTF-8 text.", mend="Save it as plain UTF-8 YAML.") from None


def server_tls(consortium: Consortium) -> tuple[bytes, bytes]:
    """Key and certificate of the coordinator's ports, PEM. The certificate is made anew: it names the hosts that
    ``coordinator.yaml`` names now, and ends ``LIFETIME`` from now. The file ``coordinator.crt`` is it too.

    Raises:
        KeyBroken: the key is missing, damaged, or open to others.
    """
    with durable.locked(consortium.folder / "coordinator.crt"):
        made = _certify(consortium.folder, consortium.settings, consortium.authority)
    return certificates.key_pem(certificates.read_key(consortium.folder / "coordinator.key")), made


def open_nodes(folder: Path) -> Nodes:
    """The consortium's link."""
    from cloister_server.link import open_link  # pyright: ignore[reportMissingImports]

    return open_link(folder / "link")


def record(folder: Path, who: str, role: str, action: str, about: str, outcome: str) -> None:
    """One line of ``audit.jsonl``: who did what to what, and what became of it (``done``, or why it was refused).

    Raises:
        AuditBroken: the log is not as it was left; nothing is appended to it then.
    """
    said = {"account": who, "role": role, "about": about[:200], "outcome": outcome[:400]}
    audit.append(folder / "audit.jsonl", action, said)


# --- addresses ---------------------------------------------------------------------------------------------
def split(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``; port 0, to listen on whichever is free, is for tests.

    Raises:
        ValueError: it is not one.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([A-Za-z0-9.\-]+)):([0-9]{1,5})", address)
    if not found or int(found[3]) > 65535:
        raise ValueError(address)
    return found[1] or found[2], int(found[3])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _rules(settings: Settings) -> Iterator[Broken]:
    opened: dict[int, str] = {}
    for path, address in (
        (("rounds",), settings.rounds),
        (("control",), settings.control),
        (("listen", "rounds"), settings.listen.rounds),
        (("listen", "control"), settings.listen.control),
        (("admin",), settings.admin),
        (("pages",), settings.pages),
    ):
        try:
            host, port = split(address)
            if not port:
                raise ValueError(address)
        except ValueError:
            yield Broken(path, "is not HOST:PORT", "Write it as coordinator.example.org:8443.")
            continue
        if path in _PEOPLE and not is_loopback(host) and not settings.admin_on_network:
            yield Broken(
                path,
                "can be reached from other machines",
                "Write 127.0.0.1, or admin_on_network: true if only a VPN leads there.",
            )
        if len(path) == 2 or path in _PEOPLE:
            if port in opened:
                yield Broken(path, f"has the port of {opened[port]}", "Give each a port of its own.")
            opened[port] = ".".join(path)


def _parsed(source: Source) -> Settings:
    try:
        return parse(Settings, source, _rules)
    except PlanRefused as error:  # which quotes the line, and a line may hold the database's password
        said, mend = (re.sub(r"://[^\s\"]*", "://...", part) for part in (error.said, error.mend))
        raise PlanRefused(said, mend=mend) from None


def open_records(folder: Path, settings: Settings) -> Registry:
    """The consortium's records alone, for a process that needs no key of it.

    Raises:
        RegistryBroken: they cannot be used.
    """
    from cloister_server.registry import open_registry

    local = re.fullmatch(r"sqlite:///([^/].*)", settings.database)
    return open_registry(f"sqlite:///{folder.resolve() / local[1]}" if local else settings.database)


def _hosts(settings: Settings) -> list[str]:
    named = [split(address)[0] for address in (settings.rounds, settings.control, settings.admin, settings.pages)]
    return list(dict.fromkeys([*named, "localhost", "127.0.0.1"]))


def _certify(folder: Path, settings: Settings, authority: Authority) -> bytes:
    key = certificates.read_key(folder / "coordinator.key")
    made = authority.issue(
        certificates.public_key(key), Kind.COORDINATOR, settings.name, LIFETIME, hosts=_hosts(settings)
    )
    durable.save_text(folder / "coordinator.crt", made.decode())
    return made
