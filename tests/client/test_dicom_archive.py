"""Connector ``dicom``: files and findings joined by a tag, from a folder and from a real DICOMweb server."""

import http.server
import json
import logging
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cloister_client.connectors.connector import open_records
from cloister_client.connectors.dicom_web import fetch
from cloister_client.dataset import load_dataset
from cloister_shared.errors import DataRefused, LinkLost, PlanRefused
from cloister_shared.plan_file import amend
from cloister_simulations.hospitals import build
from cloister_simulations.scenario import read_scenario
from cloister_simulations.sources.dicom_folder import DicomFolder, dicom_file

PLAN = amend(read_scenario("dicom").plan, cohort={"min_patients": 5}, evaluation={"min_count": 1})
CLEAN = {"PatientIdentityRemoved": "YES", "BodyPartExamined": "ABDOMEN"}
PLUGIN = next(
    (
        path
        for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc")
        for path in Path(folder).glob("libOrthancDicomWeb.so*")
    ),
    None,
)
ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Two small hospitals' archives."""
    folder = tmp_path_factory.mktemp("archives")
    return build(DicomFolder(source="dicom-folder", sites=2, patients=20), folder)


@pytest.fixture
def archive(archives, tmp_path):
    """The first hospital's site.yaml, in a copy that may be changed."""
    shutil.copytree(archives[0].parent, tmp_path / "alder")
    return tmp_path / "alder" / "site.yaml"


def loaded(site_yaml, plan=PLAN):
    return load_dataset(open_records(site_yaml), plan)


def problems(site_yaml, plan=PLAN):
    with pytest.raises(DataRefused) as refused:
        loaded(site_yaml, plan)
    return refused.value.said


def test_every_picture_finds_its_finding(archives):
    for path in archives:
        connector = open_records(path)
        assert connector.count() == 20
        assert set(connector.describe()) == {"patient_id", "ACCESSION", "lesion"}
        data = loaded(path)
        assert len(data.train) + len(data.test) == 20
        assert set(data.train.y.tolist()) == {0.0, 1.0}
        assert -1 <= float(data.train.x.min()) < -0.5 < 0.2 < float(data.train.x.max()) <= 1


def test_findings_follow_the_accession_number_and_not_the_order(archive):
    before = loaded(archive)
    table = archive.parent / "findings.csv"
    pd.read_csv(table).iloc[::-1].to_csv(table, index=False)
    for at, path in enumerate(sorted((archive.parent / "archive").iterdir(), reverse=True)):
        path.rename(path.with_name(f"IM{at:04d}"))
    after = loaded(archive)
    assert np.array_equal(np.sort(before.train.x.sum(1)), np.sort(after.train.x.sum(1)))
    assert (before.train.x[before.train.patients.argsort()] == after.train.x[after.train.patients.argsort()]).all()
    assert (before.train.y[before.train.patients.argsort()] == after.train.y[after.train.patients.argsort()]).all()


def test_a_finding_without_a_picture_is_a_bad_row(archive):
    (archive.parent / "archive" / "alder-00003.dcm").unlink()
    assert "slice: no picture in row 3" in problems(archive)


def test_two_pictures_of_one_finding_are_a_bad_row(archive):
    units = np.zeros((32, 32), np.int16)
    written = dicom_file(units, uid="1.2.3", AccessionNumber="alder-00003", **CLEAN)
    (archive.parent / "archive" / "other.dcm").write_bytes(written)
    assert "slice: several files where the plan wants one picture in row 3" in problems(archive)


def test_another_modality_of_the_same_examination_is_not_looked_at(archive):
    units = np.zeros((32, 32), np.int16)
    written = dicom_file(units, uid="1.2.3", AccessionNumber="alder-00003", Modality="CR", **CLEAN)
    (archive.parent / "archive" / "other.dcm").write_bytes(written)
    assert len(loaded(archive).train) == len(loaded(archive).train)


def test_what_is_no_dicom_is_counted(archive, caplog):
    (archive.parent / "archive" / "notes.txt").write_text("Roe^Jane")
    loaded(archive)
    assert "1 files of archive are not DICOM, and are left out" in caplog.text
    assert "notes" not in caplog.text


def test_identified_files_need_the_switch(archives, tmp_path):
    shutil.copytree(archives[1].parent, tmp_path / "birch")
    path = tmp_path / "birch" / "site.yaml"
    path.write_text(path.read_text().replace("identified: true", "identified: false"))
    said = problems(path)
    assert "slice: a file that tells who the patient is in rows 1, 2, 3" in said
    assert "Invented" not in said


def test_a_volume_is_a_series(tmp_path):
    (tmp_path / "archive").mkdir()
    for patient in (1, 2):
        for at in range(3):
            tags = {
                "PatientID": f"P{patient}",
                "SeriesInstanceUID": f"1.2.{patient}",
                "ImagePositionPatient": [0, 0, at],
            }
            tags |= {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], **CLEAN}
            units = np.full((4, 4), 100 * patient + at, np.int16)
            path = tmp_path / "archive" / f"{patient}{2 - at}"
            path.write_bytes(dicom_file(units, uid=f"1.2.3.{patient}.{at}", **tags))
    (tmp_path / "table.csv").write_text("PID,lesion\nP2,1\nP1,0\n")
    (tmp_path / "site.yaml").write_text(
        "site: elm\ndicom: {folder: archive, join: PatientID,"
        " labels: {path: table.csv, columns: {PatientID: PID, patient_id: PID}}}\n"
    )
    feature = PLAN.table.features[0].model_copy(update={"size": (3, 4, 4), "window": None, "range": (0.0, 400.0)})
    schema = PLAN.table.model_copy(update={"features": (feature,)})
    frame = open_records(tmp_path / "site.yaml").rows(schema)
    assert frame["lesion"].tolist() == ["1", "0"]
    assert [len(cell) for cell in frame["slice"]] == [3, 3]
    from cloister_client.encoders import image
    from cloister_client.quality import ColumnReport

    x = image.encode(feature, frame["slice"].to_numpy(), tmp_path, ColumnReport("slice")).reshape(2, 3, 16)
    assert (x[:, :, 0] * 200 + 200).round(3).tolist() == [[200, 201, 202], [100, 101, 102]]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("site: a\n", "table is missing"),
        ("site: a\ntable: {path: t.csv}\ndicom: {folder: f, labels: {path: t.csv}}\n", "dicom stands beside table"),
        (
            "site: a\ndicom: {folder: f, labels: {path: t}, web: {url: 'http://pacs.local/'}}\n",
            "does not have the form",
        ),
    ],
)
def test_a_site_file_that_is_not_sound(tmp_path, written, said):
    (tmp_path / "site.yaml").write_text(written)
    with pytest.raises(PlanRefused, match=said):
        open_records(tmp_path / "site.yaml")


# --- DICOMweb ----------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture(scope="module")
def orthanc(archives, tmp_path_factory):
    """A real Orthanc with its DICOMweb plugin, on loopback, that holds the first archive's pictures."""
    if ORTHANC is None or PLUGIN is None:
        pytest.skip("no Orthanc with its DICOMweb plugin here (Debian: orthanc, orthanc-dicomweb)")
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    terms = {
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"reader": "secret"},
        "StorageDirectory": str(folder / "held"),
        "IndexDirectory": str(folder / "held"),
        "Plugins": [str(PLUGIN)],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(terms))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")], stdout=log, stderr=log)
    passwords = urllib.request.HTTPPasswordMgrWithPriorAuth()
    passwords.add_password(None, f"http://127.0.0.1:{port}/", "reader", "secret", is_authenticated=True)
    browser = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords), urllib.request.ProxyHandler({})
    )
    try:
        for _ in range(300):
            try:
                browser.open(f"http://127.0.0.1:{port}/system", timeout=2).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        for path in sorted((archives[0].parent / "archive").iterdir()):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/instances", path.read_bytes(), method="POST")
            browser.open(request, timeout=10).close()
        yield f"http://127.0.0.1:{port}/dicom-web"
    finally:
        process.terminate()
        process.wait(20)


def pointed(site_yaml: Path, url: str, **more: object):
    """The hospital's connector with a server, and nothing in its folder yet."""
    import yaml

    terms = yaml.safe_load(site_yaml.read_text())
    terms["dicom"] |= {"folder": "fetched", "web": {"url": url, **more}}
    site_yaml.write_text(yaml.safe_dump(terms))
    return open_records(site_yaml)


@pytest.mark.slow
def test_pictures_come_from_orthanc_as_they_were(orthanc, archive, archives, caplog):
    caplog.set_level(logging.DEBUG)
    (archive.parent / "token").write_text("reader:secret\n")
    connector = pointed(archive, orthanc, token="token", modality=["CT"])
    told = []
    assert fetch(connector, lambda done, whole: told.append((done, whole))) == 20
    assert told[-1] == (20, 20)
    assert fetch(connector) == 0, "what is there is not fetched again"
    one = next((archive.parent / "fetched").iterdir())
    assert one.stat().st_mode & 0o077 == 0
    one.unlink()
    assert fetch(connector) == 1, "a fetch that was cut off goes on"
    from_web, from_disk = loaded(archive), loaded(archives[0])
    assert (from_web.train.x == from_disk.train.x).all()
    assert (from_web.train.y == from_disk.train.y).all()
    assert "alder-0" not in caplog.text, "no accession number is logged"


@pytest.mark.slow
def test_orthanc_refuses_a_wrong_password(orthanc, archive):
    (archive.parent / "token").write_text("reader:wrong\n")
    with pytest.raises(LinkLost, match=r"The DICOMweb server at http://127.* answered 401") as lost:
        fetch(pointed(archive, orthanc, token="token"))
    assert "alder" not in str(lost.value)


@contextmanager
def server(answers):
    """A server that answers each request with the next status, and then with an empty list."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status = answers.pop(0) if answers else 200
            asked.append((self.path, status))
            said = b"[]" if status == 200 else b""
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as held:
        thread = threading.Thread(target=held.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{held.server_port}/dicom-web", asked
        finally:
            held.shutdown()
            thread.join()


def test_a_busy_server_is_asked_again(archive, caplog):
    caplog.set_level(logging.DEBUG)
    with server([429, 503]) as (url, asked):
        assert fetch(pointed(archive, url)) == 0
    assert [status for _, status in asked[:3]] == [429, 503, 200]
    assert len({path for path, _ in asked[:3]}) == 1
    assert len(asked) == 20 + 2
    assert "alder-0" not in caplog.text


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_that_goes_on_refusing_is_told_without_the_question(archive, status):
    with server([status] * 50) as (url, asked):
        with pytest.raises(LinkLost) as lost:
            fetch(pointed(archive, url, tries=2))
        assert len(asked) == (1 if status == 404 else 2)
    assert "alder" not in str(lost.value)


def test_a_server_that_is_not_there(archive):
    with pytest.raises(LinkLost, match="could not be asked"):
        fetch(pointed(archive, f"http://127.0.0.1:{free_port()}/dicom-web", tries=1))
