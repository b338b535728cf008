"""The coordinator's systemd unit, held against systemd's own judgement."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "server/deploy/cloister-coordinator.service"
ANALYSE = shutil.which("systemd-analyze")


def settings() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return [(key, value) for key, _, value in (line.partition("=") for line in lines)]


def test_the_unit_can_write_in_its_own_folder_alone():
    told = settings()
    assert ("ProtectSystem", "strict") in told
    assert [value for key, value in told if key == "ReadWritePaths"] == ["/var/lib/cloister"]
    assert ("WorkingDirectory", "/var/lib/cloister") in told


def test_the_unit_runs_the_coordinator_without_root_and_without_calling_home():
    told = dict(settings())
    assert told["ExecStart"] == "/opt/cloister/bin/cloister-coordinator start /var/lib/cloister/consortium"
    assert (told["User"], told["NoNewPrivileges"], told["CapabilityBoundingSet"]) == ("cloister", "yes", "")
    assert "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1" in told["Environment"]


@pytest.mark.skipif(ANALYSE is None, reason="no systemd-analyze on this machine: the unit was only read")
def test_systemd_understands_every_line(tmp_path):
    unit = tmp_path / UNIT.name
    # verify looks whether the program is there; it is not, on a machine that only tests.
    unit.write_text(UNIT.read_text().replace("/opt/cloister/bin/cloister-coordinator", sys.executable))
    done = subprocess.run([ANALYSE, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


@pytest.mark.skipif(ANALYSE is None, reason="no systemd-analyze on this machine: the unit was only read")
def test_systemd_finds_little_that_the_unit_is_exposed_to():
    command = [ANALYSE, "security", "--offline=true", "--no-pager", UNIT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure
    assert float(exposure[1]) <= 1.2  # of 10; an ordinary service has 9.6
