"""Three hospitals and a coordinator as real processes, in which things go wrong: set up once, then a study a fault."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from typer.testing import CliRunner

from cloister_client.ledger import Ledger
from cloister_client.membership import own_certificate
from cloister_client.site_file import read_site
from cloister_server.records import Study
from cloister_shared import budget, certificates, durable
from cloister_shared.certificates import Kind, read_authority
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend
from cloister_simulations.consortium import trained_here
from cloister_simulations.deployed_hospital import COMPARED
from cloister_simulations.deployment import CommandFailed, Consortium, until
from cloister_simulations.forwarder import Forwarder
from cloister_simulations.held_hospital import PROGRAM
from cloister_simulations.hospitals import BreastCancer, build
from cloister_simulations.scenario import read_scenario

LONG = 180.0
"""Seconds within which, on a machine that does much else, whatever is awaited has come."""


class Night(Consortium):
    """The consortium, its commands typed in this process, and what must be true of every study in the morning."""

    LONG = LONG

    def __init__(self, folder: Path) -> None:
        sites = build(BreastCancer(source="breast-cancer", sites=3), folder / "hospitals")
        for path in sites:  # two are enough to open a sum
            terms = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump(terms | {"policy": terms["policy"] | {"min_cohort": 2}}))
        super().__init__(folder, {read_site(path).site: path for path in sites}, PROGRAM)
        self.ways: dict[str, dict[str, Forwarder]] = {}
        """Of each hospital, the stretches of network to ``rounds`` and ``control``."""
        self.held: list[Path] = []
        self._numbers = count(1)
        self._models: dict[str, NDArray[np.float32]] = {}

    @property
    def first(self) -> str:
        """The hospital that things happen to."""
        return next(iter(self.sites))

    @property
    def others(self) -> list[str]:
        return [name for name in self.sites if name != self.first]

    def own(self, name: str) -> Path:
        """A hospital's folder for its agent."""
        return self.sites[name].parent / "agent"

    def _command(self, module: str, words: Collection[str], environment: Mapping[str, str]) -> str:
        done = CliRunner().invoke(import_module(module).app, list(words), env=dict(environment))
        if done.exit_code:
            raise CommandFailed(f"{' '.join(list(words)[:3])} ended with {done.exit_code}: {done.output}")
        return done.stdout

    # --- set up -----------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Everybody enrolled and there; each hospital behind a network of its own."""
        self.init("a consortium of trees")
        self.start()
        for name in self.sites:
            self.enrol(name)
            self.officer(name)
            self.grant(name, epsilon=1000.0, delta=1e-5)
            known = json.loads((self.own(name) / "consortium.json").read_text())
            self.ways[name] = {door: Forwarder(known[door]) for door in ("rounds", "control")}
            self._dial(name)
            (self.own(name) / "hold").mkdir()
            self.agent(name)

    def _dial(self, name: str) -> None:
        """Have the hospital dial its own stretch of network."""
        path = self.own(name) / "consortium.json"
        known = json.loads(path.read_text())
        path.write_text(json.dumps(known | {door: way.address for door, way in self.ways[name].items()}))

    def close(self) -> None:
        for way in (way for doors in self.ways.values() for way in doors.values()):
            way.close()

    def mend(self) -> None:
        """Whatever a test left broken."""
        for name in self.sites:
            over = own_certificate(self.own(name)).not_after < datetime.now(UTC) + timedelta(days=1)
            if over or self.registry.hospital(name).standing != "enrolled":
                self.end(name)
                self.rejoin(name)
            for way in self.ways[name].values():
                way.heal()
            for file in (self.own(name) / "hold").iterdir():
                file.unlink(missing_ok=True)
        self.revive()
        for study in self.registry.studies():
            if study.state in ("running", "waiting"):
                self.coordinator("study", "stop", study.digest[:12], "--reason", "the test is over")

    def revive(self) -> None:
        """Start again whoever is dead, as systemd would."""
        for name in ("coordinator", *self.sites):
            if name not in self.processes or self.processes[name].poll() is not None:
                self.start() if name == "coordinator" else self.agent(name)

    def rejoin(self, name: str) -> None:
        """A hospital whose certificate is of no use any more enrols again; its agent has ended."""
        if self.registry.hospital(name).standing == "enrolled":
            self.coordinator("expel", name, "--reason", "its certificate ended")
        self.enrol(name, "--again")
        self._dial(name)
        self.agent(name)

    def certify(self, name: str, seconds: float) -> None:
        """Give a hospital a certificate that ends so soon."""
        own = self.own(name)
        key = certificates.public_key(certificates.read_key(own / "agent.key"))
        made = read_authority(self.home).issue(key, Kind.SITE, name, timedelta(seconds=seconds))
        durable.save_text(own / "agent.crt", made.decode())

    @contextmanager
    def small_disk(self, name: str, octets: int) -> Iterator[Path]:
        """A disk of its own for a hospital; a file that may be filled. Its agent is started anew, twice."""
        folder = self.sites[name].parent
        aside = folder.with_name(f"{name}.aside")
        self.end(name)
        folder.rename(aside)
        folder.mkdir()
        try:
            tried = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={octets}", "tmpfs", folder], capture_output=True, check=False
            )
            if tried.returncode:
                pytest.skip("no small disk can be mounted here; the case `limit` shows the same")
            try:
                shutil.copytree(aside, folder, dirs_exist_ok=True)
                self.agent(name)
                yield folder / "ballast"
            finally:
                if name in self.processes:
                    self.end(name)
                shutil.rmtree(aside)
                shutil.copytree(folder, aside)
                subprocess.run(["umount", folder], check=True)
        finally:
            folder.rmdir()
            aside.rename(folder)
            self.agent(name)

    # --- a study ----------------------------------------------------------------------------------------------
    def plan(self, called: str, min_sites: int = 2) -> StudyPlan:
        """A plan of its own name, with a model large enough that its way over the network can be seen."""
        named = f"{called}-{next(self._numbers)}{COMPARED}"
        terms = {"rounds": 2, "cohort": {"min_sites": min_sites}, "task": {"hidden": [256]}}
        return amend(read_scenario("breast-cancer").plan, study=named, **terms)

    def offer(self, plan: StudyPlan) -> StudyPlan:
        """Submitted and approved everywhere."""
        self.submit(plan)
        for name in self.sites:
            self.approve(name, plan.study)
        return plan

    def run(self, plan: StudyPlan) -> None:
        self.coordinator("study", "run", plan.study)

    def hold(self, stage: str, name: str = "") -> None:
        """Have a hospital stand still at this stage, once."""
        (self.own(name or self.first) / "hold" / stage).touch()

    def await_held(self, stage: str, name: str = "") -> None:
        held = self.own(name or self.first) / "hold" / f"{stage}.held"
        until(held.exists, LONG, f"{name or self.first} stands still at {stage}")

    def release(self, stage: str, name: str = "") -> None:
        (self.own(name or self.first) / "hold" / f"{stage}.held").unlink()

    def sent(self, name: str, plan: StudyPlan) -> list[dict]:
        """What left a hospital for a study."""
        lines = (self.own(name) / "egress.jsonl").read_text().splitlines(keepends=True)
        entries = [json.loads(line)["said"] for line in lines if line.endswith("\n")]
        return [said for said in entries if said["study"] == plan.digest]

    def answered(self, kind: str, plan: StudyPlan, number: int = 0) -> set[str]:
        """The hospitals that gave an answer of this kind, of this round."""
        return {
            name
            for name in self.sites
            if any(s["kind"] == kind and s["round"] == number and "error" not in s for s in self.sent(name, plan))
        }

    def store(self, plan: StudyPlan) -> Path:
        return self.home / "studies" / plan.digest[:16]

    # --- in the morning ------------------------------------------------------------------------------------
    def finished(self, plan: StudyPlan, missed: Mapping[str, Collection[int]] | None = None, wasted: int = 0) -> Study:
        """Wait until the study is finished, and hold everything against what had to come of it.

        ``missed``: the rounds that a hospital was not in, of which it had paid for ``wasted``.
        """
        missed = missed or {}
        study = self.wait(plan.study, seconds=LONG)
        assert study.state == "finished", study.reason
        rounds = range(1, plan.rounds + 1)
        records = self.registry.rounds(plan.digest)
        took = {number: {name for name in self.sites if number not in missed.get(name, ())} for number in rounds}
        assert {record["round"]: set(record["answered"]) for record in records} == took
        for name in self.sites:  # and whoever was not there is named
            absent = missed.get(name, ())
            said = f"{name} in all but {', '.join(map(str, absent))}" if absent else name
            assert (f"{name} in none" if len(absent) == plan.rounds else said) in study.reason
            self.spent_right(name, plan, plan.rounds - len(absent), wasted=wasted if absent else 0)
        self.said_once(plan)
        if not missed:
            assert np.array_equal(self.model(plan), self.made_here(plan))
        return study

    def spent_right(self, name: str, plan: StudyPlan, rounds: int, *, wasted: int = 0) -> None:
        """The ledger has what these rounds cost, no more and no less, and holds nothing back.

        ``wasted`` rounds were paid for, and their answer could not leave.
        """
        ledger = Ledger(self.sites[name].parent / "ledger.sqlite", "patients")
        try:
            until(lambda: not any(one.open for one in self._reserved(ledger, plan)), 30, f"{name} holds nothing back")
            whole, spent = self._reserved(ledger, plan)[0].charges, ledger.history(plan.digest)
            assert sum(e.steps for e in spent) * plan.rounds == sum(e.steps for e in whole) * (rounds + wasted)
            assert plan.privacy.epsilon
            assert plan.privacy.delta
            promised = budget.epsilon(whole, plan.privacy.delta)
            assert budget.epsilon(spent, plan.privacy.delta) <= promised <= plan.privacy.epsilon
            paid = ledger.book.rows(
                "SELECT run, round, count(*) FROM releases WHERE plan = ? GROUP BY 1, 2", plan.digest
            )
            assert len(paid) == rounds + wasted
            assert {times for _, _, times in paid} == {1}
        finally:
            ledger.close()

    def _reserved(self, ledger: Ledger, plan: StudyPlan) -> list:
        return [one for one in ledger.reservations() if one.plan == plan.digest]

    def said_once(self, plan: StudyPlan) -> None:
        """No hospital ever gave two masked replies for one round, nor helped twice to open one."""
        for name in self.sites:
            said: dict[tuple[str, int, str], set[str]] = {}
            path = self.own(name) / "said.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                one = json.loads(line)
                if one["run"].startswith(plan.study):
                    said.setdefault((one["run"], one["round"], one["what"]), set()).add(one["digest"])
            assert {len(digests) for digests in said.values()} == {1}, said
            left: dict[tuple[str, str, int], set[str]] = {}
            for one in self.sent(name, plan):
                if "error" not in one:
                    left.setdefault((one["run"], one["kind"], one["round"]), set()).add(one["message"])
            assert {len(messages) for messages in left.values()} == {1}, left

    def made_here(self, plan: StudyPlan) -> NDArray[np.float32]:
        """The model that the in-process engine makes of the plan; its name and its quorum change nothing in it."""
        terms = plan.model_copy(update={"study": "the-same", "cohort": None}).model_dump_json()
        key = hashlib.sha256(terms.encode()).hexdigest()[:16]
        if key not in self._models:
            self._models[key] = trained_here(plan, self.sites, self.folder / "in-process" / key)
        return self._models[key]


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Night]:
    with Night(tmp_path_factory.mktemp("night")) as night:
        try:
            night.open()
            yield night
        finally:
            night.close()


@pytest.fixture
def night(consortium: Night, request: pytest.FixtureRequest) -> Iterator[Night]:
    """The consortium, whole; and whole again after the test."""
    consortium.revive()
    consortium.ready(LONG)
    yield consortium
    consortium.mend()


@pytest.fixture
def told(consortium: Night) -> Callable[[str], str]:
    """The end of a process's log, for a failure to be understood."""
    return lambda name: consortium.log(name)[-3000:]
