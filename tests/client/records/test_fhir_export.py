"""Bulk Data's $export against a small FHIR server on loopback, which is as awkward as real ones are."""

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister_client.connectors.connector import open_records
from cloister_client.connectors.fhir_export import STATE, asked_pause, fetch_export
from cloister_client.site_file import read_site
from cloister_shared.errors import DataRefused, LinkLost

LINES = [json.dumps({"resourceType": "Patient", "id": f"p{n}", "birthDate": "1950-01-01"}) + "\n" for n in range(500)]
PATIENTS = "".join(LINES).encode()


class Fhir(ThreadingHTTPServer):
    """What it does is decided by the test: answers by path, each a list of (status, headers, body, octets sent)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes, int | None]]] = {}

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_port}/r4"

    def will(self, path: str, status: int, body: bytes = b"", sent: int | None = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.setdefault(path, []).append((status, named, body, sent))

    def exports(self, body: bytes = PATIENTS) -> None:
        self.will("/r4/Patient/$export", 202, Content_Location=f"{self.url}/status/1")
        files = [{"type": "Patient", "url": f"{self.url}/files/1"}, {"type": "Basic", "url": f"{self.url}/files/2"}]
        self.will("/r4/status/1", 200, json.dumps({"output": files}).encode())
        self.will("/r4/files/1", 200, body)


class Handler(BaseHTTPRequestHandler):
    server: Fhir

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.path, dict(self.headers)))
        told = self.server.answers.get(path, [(404, {}, b"", None)])
        status, headers, body, sent = told.pop(0) if len(told) > 1 else told[0]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "f")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, now - timedelta(hours=1), now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "ca.pem", folder / "key.pem"


@pytest.fixture
def fhir(certificate) -> Iterator[Fhir]:
    server = Fhir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetch(fhir, certificate, tmp_path, waits):
    (tmp_path / "ca.pem").write_bytes(certificate[0].read_bytes())
    (tmp_path / "token").write_text("s3cret\n")
    export = f"{{url: '{fhir.url}', token: token, ca: ca.pem, hours: 0.1}}"
    (tmp_path / "site.yaml").write_text(f"site: st-marys\nfhir:\n  path: export\n  export: {export}\n")
    return lambda: fetch_export(read_site(tmp_path / "site.yaml"), tmp_path, wait=waits.append)


def test_an_export_is_fetched_and_read(fhir, fetch, tmp_path):
    fhir.exports()
    (path,) = fetch()
    assert path.read_bytes() == PATIENTS
    assert len(open_records(tmp_path / "site.yaml").records(None).patients.id) == 500
    kick_off, headers = fhir.asked[0]
    assert "Observation" in kick_off
    assert headers["Prefer"] == "respond-async"
    assert headers["Authorization"] == "Bearer s3cret"
    assert not (tmp_path / "export" / STATE).exists()


def test_the_server_is_left_alone_for_as_long_as_it_asks(fhir, fetch, waits):
    fhir.will("/r4/status/1", 202, Retry_After="17", X_Progress="10 %")
    fhir.will("/r4/status/1", 429, Retry_After="33")
    fhir.exports()
    fetch()
    assert waits[0] == 17
    assert 33 <= waits[1] <= 40


def test_a_busy_server_is_asked_again_ever_more_slowly(fhir, fetch, waits):
    for _ in range(3):
        fhir.will("/r4/files/1", 503)
    fhir.exports()
    fetch()
    assert waits == sorted(waits)
    assert len(waits) == 3


def test_a_file_that_breaks_off_goes_on_at_its_octet(fhir, fetch):
    fhir.will("/r4/files/1", 200, PATIENTS, 1000)
    fhir.will("/r4/files/1", 206, PATIENTS[1000:])
    fhir.exports()
    (path,) = fetch()
    assert path.read_bytes() == PATIENTS
    assert fhir.asked[-1][1]["Range"] == "bytes=1000-"


def test_a_server_without_ranges_sends_it_all_again(fhir, fetch):
    fhir.will("/r4/files/1", 200, PATIENTS, 1000)
    fhir.exports()
    (path,) = fetch()
    assert path.read_bytes() == PATIENTS


def test_a_fetch_that_ended_goes_on_with_the_same_export(fhir, fetch, tmp_path):
    fhir.will("/r4/Patient/$export", 202, Content_Location=f"{fhir.url}/status/1")
    fhir.will("/r4/status/1", 500)
    with pytest.raises(LinkLost, match="too busy"):
        fetch()
    fhir.answers = {}
    fhir.exports()
    asked = len(fhir.asked)
    fetch()
    assert not any("$export" in path for path, _ in fhir.asked[asked:])


def test_an_export_that_the_server_forgot_is_begun_anew(fhir, fetch, tmp_path):
    fhir.exports()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / STATE).write_text(json.dumps({"status": f"{fhir.url}/status/old"}))
    (path,) = fetch()
    assert path.read_bytes() == PATIENTS


def test_a_newer_export_takes_the_place_of_the_older(fhir, fetch):
    fhir.exports()
    (old,) = fetch()
    fhir.answers = {"/r4/status/2": [], "/r4/files/1": []}
    fhir.will("/r4/Patient/$export", 202, Content_Location=f"{fhir.url}/status/2")
    output = {"output": [{"type": "Patient", "url": f"{fhir.url}/files/1"}]}
    fhir.will("/r4/status/2", 200, json.dumps(output).encode())
    fhir.will("/r4/files/1", 200, LINES[0].encode())
    (new,) = fetch()
    assert new.read_bytes() == LINES[0].encode()
    assert not old.exists()


def test_the_token_goes_to_no_other_server(fhir, fetch):
    fhir.will("/r4/Patient/$export", 202, Content_Location="https://elsewhere.example/status/1")
    with pytest.raises(LinkLost, match="another server"):
        fetch()


@pytest.mark.parametrize(("status", "said"), [(401, "the right to"), (403, "the right to"), (400, "offer Bulk Data")])
def test_a_refusal_of_the_server_is_told(fhir, fetch, status, said):
    fhir.will("/r4/Patient/$export", status)
    with pytest.raises(DataRefused, match=said) as refused:
        fetch()
    assert "s3cret" not in str(refused.value)


def test_an_export_that_never_ends_is_given_up(fhir, fetch):
    fhir.will("/r4/Patient/$export", 202, Content_Location=f"{fhir.url}/status/1")
    fhir.will("/r4/status/1", 202)
    with pytest.raises(LinkLost, match=r"0\.1 hours"):
        fetch()


def test_a_server_whose_certificate_nobody_vouches_for_is_refused(fhir, fetch, tmp_path):
    text = (tmp_path / "site.yaml").read_text().replace(", ca: ca.pem", "")
    (tmp_path / "site.yaml").write_text(text)
    fhir.exports()
    with pytest.raises(LinkLost, match="certificate"):
        fetch()
    assert fhir.asked == []


def test_a_pause_may_be_a_date():
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert 80 < asked_pause(later.strftime("%a, %d %b %Y %H:%M:%S GMT"), 1) < 91
    assert asked_pause("soon", 4.0) == 4.0
