"""Commands around the agent: its service, its start, its way out; and how quickly they answer."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from cloister_client import agent as agent_module
from cloister_client.approvals import Approvals
from cloister_client.decisions import approve
from cloister_client.egress import Egress
from cloister_client.membership import running
from cloister_client.offers import study_of
from cloister_client.service import unit
from cloister_shared import audit
from cloister_shared.envelope import read_identity

ANALYZE = shutil.which("systemd-analyze")


# --- service -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["--user", "--system"])
def test_the_unit_starts_this_agent_in_its_own_folder_and_nothing_else(enrolled, kind):
    alder = enrolled("alder")
    said = alder.types("service", kind, "--memory", "8G")
    for line in (
        f'ExecStart="{sys.executable}" -m cloister_client.cli start --site "{alder.site}"',
        f'ReadWritePaths="{alder.folder}"',
        "MemoryMax=8G",
        "Restart=on-failure",
        "RestartSec=15",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "SystemCallFilter=@system-service seccomp",
        "PrivateDevices=yes",
    ):
        assert line in said.splitlines(), line
    assert ("User=" in said) is (kind == "--system")
    assert ("WantedBy=default.target" in said) is (kind == "--user")
    assert "PrivateDevices=no" in alder.types("service", kind, "--gpu")


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not here")
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", ["alder", "St Mary's 100% $HOME"])
def test_systemd_takes_the_unit_and_finds_little_exposed(tmp_path, system, name):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "site.yaml").write_text("")
    path = tmp_path / "cloister-agent.service"
    path.write_text(unit(folder / "site.yaml", name, system=system))
    manager = [] if system else ["--user"]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}

    def analyzed(*arguments: str) -> str:
        command = [ANALYZE, *arguments, *manager, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "cloister-agent" not in analyzed("verify")
    exposed = float(analyzed("security", "--offline=true").rpartition("service: ")[2].split()[0])
    assert exposed < 2.0


# --- start -------------------------------------------------------------------------------------------------
def test_start_hears_of_studies_while_the_agent_runs(coordinator, enrolled, plan_text, monkeypatch):
    alder = enrolled("alder")
    for name in ("birch", "cedar"):
        enrolled(name)
    version = len(coordinator.consortium.registry.studies()) + 1
    digest = coordinator.submit(plan_text + f"version: {version}\n")
    seen = []

    def run_agent(folder, stop, program):
        end = time.monotonic() + 15
        while time.monotonic() < end and Approvals(folder / "agent").standing(digest) != "offered":
            time.sleep(0.02)
        seen.append((folder, Approvals(folder / "agent").standing(digest), stop.is_set()))

    monkeypatch.setattr(agent_module, "run_agent", run_agent)
    alder.types("start")
    assert seen == [(alder.folder, "offered", False)]


@pytest.mark.slow
def test_a_real_agent_starts_keeps_others_out_and_ends_when_told(coordinator, enrolled, tmp_path):
    alder = enrolled("alder")
    command = [sys.executable, "-m", "cloister_client.cli", "start", "--site", str(alder.site)]
    with (tmp_path / "log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            end = time.monotonic() + 20
            while not (running(alder.agent) and "hears of studies" in (tmp_path / "log").read_text()):
                assert started.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.05)
            second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            assert second.returncode == 1
            assert f"as process {started.pid}" in second.stderr
            assert "Traceback" not in second.stderr
            assert "The agent still runs." in alder.types("leave", "--yes", code=1)
            assert alder.types("studies")
        finally:
            started.send_signal(signal.SIGTERM)
            code = started.wait(20)
    assert code == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert "A newer connection" not in (tmp_path / "log").read_text()


# --- egress ------------------------------------------------------------------------------------------------
def test_egress_says_that_nothing_left(enrolled):
    assert "Nothing has left this hospital yet." in enrolled("alder").types("egress")


def test_egress_prints_the_log(enrolled):
    alder = enrolled("alder")
    log = Egress(alder.agent / "egress.jsonl")
    log.close()
    assert "Nothing has left" in alder.types("egress")


# --- leave -------------------------------------------------------------------------------------------------
def test_leaving_says_what_to_do_and_deletes_nothing(enrolled):
    alder = enrolled("alder")
    before = sorted(alder.folder.rglob("*"))
    said = " ".join(alder.types("leave").split())
    for words in (
        "alder leaves North. Nothing is deleted yet.",
        "systemctl --user disable --now cloister-agent",
        "cloister-site leave --yes",
        "revokes nothing, for no study is approved",
        "Tell North to expel alder",
        "what your patients' privacy has cost",
        "Keep these as long as you keep the records.",
    ):
        assert words in said, words
    assert sorted(alder.folder.rglob("*")) == before


def test_leaving_revokes_tells_and_keeps_the_budget(coordinator, offered):
    alder, digest = offered
    key = alder.officer("ada")
    approve(alder.agent, study_of(alder.agent, digest), "ada", read_identity(key), "")
    assert "revokes the study that is approved" in " ".join(alder.types("leave").split())
    said = " ".join(alder.types("leave", "--yes").split())
    assert f"Study {digest[:12]} is revoked, and the coordinator knows." in said
    assert coordinator.said(digest) == {"alder": "revoked"}
    assert not alder.agent.exists()
    assert {"ledger.sqlite", "audit.jsonl", "officers.json", "site.yaml", "table.csv"} <= {
        path.name for path in alder.folder.iterdir()
    }
    assert [e.what for e in audit.verify(alder.folder / "audit.jsonl")][-2:] == ["study.decided", "left"]


def test_leaving_without_the_coordinator_deletes_and_says_so(coordinator, offered):
    alder, digest = offered
    approve(alder.agent, study_of(alder.agent, digest), "ada", read_identity(alder.officer("ada", ceiling=False)), "")
    coordinator.stop()
    try:
        said = " ".join(alder.types("leave", "--yes").split())
    finally:
        coordinator.start()
    assert f"Study {digest[:12]} is revoked here; the coordinator could not be told" in said
    assert not alder.agent.exists()


# --- tables ------------------------------------------------------------------------------------------------
def test_before_the_first_study_the_table_says_how_one_comes(enrolled):
    assert "No study was offered to this hospital yet." in enrolled("alder").types("studies", "--offline")


def test_the_table_shows_how_far_a_study_is_and_why_it_waits(coordinator, offered):
    alder, digest = offered
    registry = coordinator.consortium.registry
    registry.add_round(digest, 7, {"answered": ["alder", "birch"]})
    registry.move(digest, "waiting", "2 of 3 hospitals answered before the deadline " * 4)
    end = time.monotonic() + 10
    while "waiting" not in (said := alder.types("studies")):
        assert time.monotonic() < end
    assert "7/20" in said
    assert "the coordinator says: 2 of 3 hospitals answered" in said


# --- speed -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", [[], ["doctor"], ["approve"]])
def test_help_is_quick(command):
    """In seconds of the processor, which a busy machine does not stretch as it does the clock's."""
    asked = [sys.executable, "-m", "cloister_client.cli", *command, "--help"]
    before = os.times()
    subprocess.run(asked, check=True, capture_output=True, timeout=30)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_no_command_imports_torch_or_grpc_to_say_what_it_does():
    code = "import sys; import cloister_client.cli; print(*{'torch', 'grpc', 'flwr', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == ""
