"""``cloister-site doctor``: all that the agent needs, tried one after the other, and what to do where it fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cloister_client.book import begun
from cloister_client.ceilings import officers_of
from cloister_client.connectors.connector import Connector, open_records
from cloister_client.doctor_doors import doors, doors_of_invite
from cloister_client.enrolment import due
from cloister_client.findings import Finding, fails, ok, tried, warning
from cloister_client.ledger import Ledger
from cloister_client.membership import agent_folder, consortium_of, own_certificate
from cloister_client.site_file import OmopSource
from cloister_shared import audit
from cloister_shared.certificates import public_key, read_key
from cloister_shared.envelope import key_id, read_identity
from cloister_shared.errors import CloisterError

_ROOM, _LITTLE = 5.0, 1.0
"""GB free on the disk: enough, and so few that a study may not end."""
_PATIENCE = 120
"""Seconds for a process that imports torch from a slow disk."""

_TORCH = (
    "import json, torch; found = torch.cuda.is_available();"
    "print(json.dumps([torch.__version__, torch.cuda.get_device_name(0) if found else '', torch.cuda.device_count()]))"
)
_CONFINE = "from cloister_client.sandbox import confine; confine(4.0)"


def examined(site_yaml: Path, invite: Path | None = None) -> Iterator[Finding]:
    """Every finding, from the hospital's own files outwards and back. ``invite``: before this hospital is enrolled."""
    agent, table = agent_folder(site_yaml), None
    try:
        table = open_records(site_yaml)
        yield ok("site.yaml", f"{table.site.site}; {site_yaml.resolve()}")
    except CloisterError as error:
        yield fails("site.yaml", error.said, error.mend)
    configured = table.site.proxy if table else None
    if invite is not None:
        yield from doors_of_invite(invite, configured)
    else:
        enrolled = list(_enrolment(agent, table))
        yield from enrolled
        if not any(finding.what == "enrolment" and finding.state == "fails" for finding in enrolled):
            yield from doors(agent, configured)
    yield tried("Flower", _flower)
    yield tried("torch and GPU", _gpu)
    yield tried("no network", lambda: _sandbox(off=bool(table and table.site.policy.sandbox == "off")))
    yield tried("disk", lambda: _disk(site_yaml.parent))
    if table:
        yield tried("records", lambda: _records(table))
        if omop := table.site.omop:
            yield tried("records' account", lambda: _account(table.site.site, omop, table.folder))
        yield from _budget(table, site_yaml.parent)


# --- enrolment ---------------------------------------------------------------------------------------------
def _enrolment(agent: Path, table: Connector | None) -> Iterator[Finding]:
    try:
        known = consortium_of(agent)
        yield ok(
            "enrolment", f"{known.site} in {known.consortium}, with {len(known.roster) - 1} other hospitals pinned"
        )
    except CloisterError as error:
        yield fails("enrolment", error.said, error.mend)
        return
    if table and table.site.site != known.site:
        mend = f"Write site: {known.site}; another hospital needs a folder and an invite of its own."
        yield fails("site.yaml", f"It is of {table.site.site}, and {known.site} is enrolled here.", mend)
    yield tried("own certificate", lambda: _certificate(agent))
    yield tried("own identity", lambda: _identity(agent))
    if agent.stat().st_mode & 0o077:
        yield warning("agent's folder", f"Others on this machine can look into {agent}.", f"chmod 700 {agent}")


def _certificate(agent: Path) -> Finding | str:
    what, held, key = "own certificate", own_certificate(agent), read_key(agent / "agent.key")
    said = f"of {held.name} until {held.not_after:%Y-%m-%d %H:%M} UTC"
    if held.public_key != public_key(key):
        return fails(what, "agent.crt is not of agent.key beside it.", "Restore both from the same backup.")
    if held.not_after <= datetime.now(UTC):
        mend = "Ask the consortium for an invite, and type cloister-site enrol FILE --again."
        return fails(what, f"It is over: {said}.", mend)
    if due(held):
        return warning(what, said, "cloister-site renew; a running agent does it by itself.")
    return said


def _identity(agent: Path) -> Finding | str:
    known, own = consortium_of(agent), read_identity(agent / "identity.key").public
    if known.roster.get(known.site) != own:
        mend = "Restore identity.key from a backup; a new key needs a new invite."
        return fails("own identity", f"The key {key_id(own)} is not the one that was enrolled.", mend)
    return f"key {key_id(own)}"


# --- this machine ------------------------------------------------------------------------------------------
def _flower() -> Finding | str:
    """By the files of what is installed: Flower itself takes a second to import."""
    required = importlib.metadata.requires("cloister") or []
    wanted = next((found[1] for text in required if (found := re.match(r"flwr==([\w.]+)$", text))), "")
    try:
        here = importlib.metadata.version("flwr")
    except importlib.metadata.PackageNotFoundError:
        here = "none"
    if here != wanted:
        return fails("Flower", f"{here} is installed, and this release works with {wanted} alone.", _INSTALL)
    return here


_INSTALL = "pip install 'cloister[site]', in an environment of its own."


def _gpu() -> Finding | str:
    what = "torch and GPU"
    if importlib.util.find_spec("torch") is None:
        return fails(what, "torch is not installed.", _INSTALL)
    done = _python(_TORCH)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return fails(what, f"torch cannot be used: {why}.", _INSTALL)
    version, name, count = json.loads(done.stdout.splitlines()[-1])
    return f"torch {version}; " + (f"{count} GPU, {name}" if name else "no GPU, training is on the processor")


def _sandbox(*, off: bool) -> Finding | str:
    what = "no network"
    if off:
        return warning(
            what, "The sandbox is off: training could reach the network.", "Take sandbox: off out of site.yaml."
        )
    done = _python(_CONFINE)
    if done.returncode == 0:
        return "training cannot reach the network: seccomp works here"
    why = (done.stderr.strip().splitlines() or ["no word"])[-1].partition(": ")[2]
    return fails(
        what, why or "Training cannot be kept from the network.", "Run the agent on 64-bit Linux with seccomp."
    )


def _python(code: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, so that this one need not import what is slow, nor take on limits for good."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(code, 1, "", f"Error: no answer in {_PATIENCE} s")


def _disk(folder: Path) -> Finding | str:
    free = shutil.disk_usage(folder).free / 1e9
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:  # an OSError says what is not writable
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    said = f"{free:.1f} GB free at {folder.resolve()}"
    if free < _LITTLE:
        return fails("disk", said, "Make room: answers and budget are written here before anything leaves.")
    return warning("disk", said, "Make room soon.") if free < _ROOM else said


# --- records and budget ------------------------------------------------------------------------------------
def _records(table: Connector) -> Finding | str:
    rows, columns = table.count(), len(table.describe())
    of = "encounters" if table.site.coded else "rows"
    said = f"{table.source}: {rows} {of}, {columns} {'codes' if of == 'encounters' else 'columns'}"
    return said if rows else fails("records", f"{said}.", "Export the table again.")


def _account(site: str, terms: OmopSource, folder: Path) -> Finding | str:
    from cloister_client.connectors.omop import may_write

    if may_write(site, terms, folder):
        mend = "Give it a role of its own: GRANT SELECT on the tables of OMOP, and nothing else."
        return warning("records' account", "It may change the records, which nothing here needs.", mend)
    return "it may only read"


def _budget(table: Connector, folder: Path) -> Iterator[Finding]:
    yield tried("audit log", lambda: f"{len(audit.verify(folder / 'audit.jsonl'))} entries, each in its place")
    yield tried("budget", lambda: _ceiling(folder / "ledger.sqlite", table.site.population))
    yield tried("officers", lambda: _officers(folder, table.site.policy.approvals))


def _ceiling(path: Path, population: str) -> Finding | str:
    mend = "cloister-site budget officer NAME, then cloister-site budget ceiling."
    if not begun(path):
        return warning("budget", "There is no ledger: no private study can be approved.", mend)
    ledger = Ledger(path, population)
    try:
        ceiling = ledger.ceiling()
    finally:
        ledger.close()
    if ceiling is None:
        return warning("budget", f"No ceiling is set for the {population}: nothing private may leave.", mend)
    return f"ceiling of epsilon {ceiling.epsilon:g} at delta {ceiling.delta:g}, signed by {ceiling.officer}"


def _officers(folder: Path, wanted: int) -> Finding | str:
    names = sorted(officers_of(folder))
    said = f"{', '.join(names) or 'none'}; the policy demands {wanted} to approve a study"
    if len(names) < wanted:
        return warning("officers", said, "cloister-site budget officer NAME, for each.")
    return said
