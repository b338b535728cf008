"""The doctor: every line says what was found and, where something fails, what to do; and each fault has its line."""

import base64
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import SimpleNamespace

import pytest

from cloister_client import doctor, doctor_doors
from cloister_client.doctor import examined
from cloister_client.findings import Finding, State, as_text, fails, in_all, ok, warning
from cloister_client.membership import calling
from cloister_shared.certificates import Kind, new_authority, new_key, public_key, read_key, server_context
from cloister_shared.errors import LinkLost
from cloister_simulations.sources.clinical_forms import invent, write_form


@pytest.fixture
def alder(enrolled):
    return enrolled("alder")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """What imports torch in another process is tried by one test alone."""
    done = SimpleNamespace(returncode=0, stdout='["2", "", 0]', stderr="")
    monkeypatch.setattr(doctor, "_python", lambda code: done)


def lines(hospital, invite=None):
    found = {}
    for finding in examined(hospital.site, invite):
        found.setdefault(finding.what, []).append(finding)
    return {what: findings[-1] for what, findings in found.items()}


def states(found):
    return {what: finding.state.value for what, finding in found.items()}


def check(found, what, state, said, mend=""):
    assert found[what].state == state, found[what]
    assert said in found[what].found
    assert mend in found[what].mend
    assert state == State.OK or found[what].mend, "what fails says what to do"


# --- all is well -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.usefixtures("rounds")
def test_where_all_is_well_every_line_is_ok_and_both_doors_were_tried(coordinator, alder, monkeypatch):
    monkeypatch.undo()  # torch and the sandbox too, in their own processes
    alder.officer("ada")
    said = alder.types("doctor")
    for line in (
        "ok       site.yaml              alder;",
        "ok       enrolment              alder in North",
        "ok       rounds: proxy          none, straight to the coordinator",
        "ok       rounds: name           localhost is 127.0.0.1",
        "ok       rounds: connection     localhost:",
        "ok       rounds: TLS            TLSv1.3, certificate of the coordinator until 20",
        "ok       rounds: let in         our certificate is accepted",
        "ok       control: TLS           TLSv1.3",
        "ok       control: let in        our certificate is accepted, as alder",
        "ok       versions               the coordinator speaks 1.0",
        "ok       clock                  0.0 s",
        "ok       Flower                 1.41.0",
        "ok       torch and GPU          torch 2.",
        "ok       no network             training cannot reach the network",
        "ok       disk ",
        "ok       records                table.csv: 212 rows, 16 columns",
        "ok       audit log ",
        "ok       budget                 ceiling of epsilon 4",
        "ok       officers               ada",
        "0 warnings, 0 fail. Next: cloister-site start",
    ):
        assert line in said, line


def test_both_doors_are_tried_through_the_proxy(coordinator, alder, rounds, proxy):
    alder.says(proxy=proxy.url)
    found = lines(alder)
    settings = coordinator.consortium.settings
    assert set(proxy.places) == {settings.rounds, settings.control}
    for door in ("rounds", "control"):
        check(found, f"{door}: proxy", "ok", f"{proxy.url[7:]}, from site.yaml")
        check(found, f"{door}: connection", "ok", f"through {proxy.url[7:]}")
        check(found, f"{door}: let in", "ok", "our certificate is accepted")
    assert rounds.callers == ["alder"]


def test_the_proxy_of_the_environment_is_used_unless_the_host_is_excepted(
    coordinator, alder, rounds, proxy, monkeypatch
):
    monkeypatch.setenv("HTTPS_PROXY", proxy.url.removeprefix("http://"))
    check(lines(alder), "control: proxy", "ok", "from HTTPS_PROXY")
    assert proxy.places
    proxy.places.clear()
    monkeypatch.setenv("NO_PROXY", "localhost")
    check(lines(alder), "control: proxy", "ok", "none")
    assert not proxy.places


def test_a_name_that_only_the_proxy_knows_is_no_fault():
    door = doctor_doors._Door("rounds", "no-such-name.invalid", 1, SimpleNamespace())
    assert "the proxy looks it up" in doctor_doors._named(door).found


# --- one fault each ----------------------------------------------------------------------------------------
def test_a_proxy_that_wants_a_password(alder, rounds, proxy):
    proxy.authorization = base64.b64encode(b"agent:s3cret").decode()
    alder.says(proxy=proxy.url)
    check(lines(alder), "rounds: connection", "fails", "wants a name and a password", "http://USER:PASSWORD@HOST:PORT")
    alder.says(proxy=proxy.url.replace("//", "//agent:s3cret@"))
    found = lines(alder)
    assert "fails" not in {found["rounds: let in"].state, found["control: let in"].state}
    assert not any("s3cret" in as_text(finding) for finding in found.values())


def test_a_proxy_that_forbids_the_port(alder, rounds, proxy):
    proxy.status = "403 Forbidden"
    alder.says(proxy=proxy.url)
    check(lines(alder), "rounds: connection", "fails", "does not open a way to localhost:", "Have IT allow CONNECT to")


def test_a_proxy_that_is_not_there(alder):
    alder.says(proxy="http://127.0.0.1:9")
    check(lines(alder), "control: connection", "fails", "The proxy 127.0.0.1:9 cannot be reached", "Have IT allow")


def test_a_proxy_of_the_environment_that_cannot_be_one(alder, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
    check(lines(alder), "rounds: proxy", "fails", "The proxy that HTTPS_PROXY names cannot be used", "http://HOST:PORT")


def test_a_name_that_nobody_knows(alder):
    known = json.loads((alder.agent / "consortium.json").read_text())
    (alder.agent / "consortium.json").write_text(json.dumps(known | {"rounds": "no-such-name.invalid:8443"}))
    found = lines(alder)
    check(found, "rounds: name", "fails", "no-such-name.invalid is not known here", "DNS")
    check(found, "rounds: connection", "fails", "is not known here", "DNS")


def test_nothing_listens(alder):
    check(lines(alder), "rounds: connection", "fails", "cannot be reached: connection refused", "Have IT allow")


@contextmanager
def listening_where_the_rounds_are(coordinator, answer):
    """``answer`` gets each connection."""
    host, port = coordinator.consortium.settings.rounds.split(":")
    listening = socket.create_server((host, int(port)))

    def accept():
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            with plain, suppress(OSError):
                answer(plain)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def tls(coordinator, tmp_path, *, authority=None, hosts=("localhost",), lifetime=timedelta(days=300)):
    """Answers with another certificate than the coordinator's, then hangs up."""
    ca = authority or coordinator.consortium.authority
    tmp_path.mkdir()
    key = new_key(tmp_path / "server.key")
    (tmp_path / "server.crt").write_bytes(ca.issue(public_key(key), Kind.COORDINATOR, "North", lifetime, hosts))
    (tmp_path / "ca.crt").write_bytes(coordinator.consortium.authority.certificate)
    context = server_context(tmp_path / "server.crt", tmp_path / "server.key", tmp_path / "ca.crt")
    return lambda plain: context.wrap_socket(plain, server_side=True).close()


TLS = {
    "another authority": (
        lambda p: {"authority": new_authority(p, "Thief")},
        "not this consortium's",
        "TLS inspection",
    ),
    "another host": (lambda p: {"hosts": ("elsewhere.example.org",)}, "is for another host", "Tell the consortium"),
    "over": (lambda p: {"lifetime": timedelta(seconds=-1)}, "is over", "clock"),
}


@pytest.mark.parametrize("name", TLS)
def test_a_server_with_another_certificate(coordinator, alder, tmp_path, name):
    changes, said, mend = TLS[name]
    with listening_where_the_rounds_are(coordinator, tls(coordinator, tmp_path / "server", **changes(tmp_path))):
        check(lines(alder), "rounds: TLS", "fails", said, mend)


def test_a_server_that_hangs_up_when_it_sees_our_certificate(coordinator, alder, tmp_path):
    with listening_where_the_rounds_are(coordinator, tls(coordinator, tmp_path / "server")):
        check(lines(alder), "rounds: let in", "fails", "hung up when it saw our certificate", "revoked")


def test_something_that_speaks_no_tls(coordinator, alder):
    def answer(plain):
        plain.recv(10)
        plain.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with listening_where_the_rounds_are(coordinator, answer):
        check(lines(alder), "rounds: TLS", "fails", "ended the TLS handshake", "check the port")


def test_a_certificate_that_is_revoked_is_refused_at_both_doors(coordinator, alder, rounds):
    rounds.status = 403
    coordinator.expel("alder")
    found = lines(alder)
    check(found, "rounds: let in", "fails", "Our certificate is refused (403)", "revoked")
    assert found["control: let in"].state == "fails"
    assert found["control: let in"].found == "The certificate of alder is revoked. Ask the consortium why."


def test_a_clock_that_is_wrong(alder, rounds, monkeypatch):
    real = time.time
    for behind, state in ((0, "ok"), (120, "warning"), (600, "fails")):
        clock = SimpleNamespace(time=lambda off=behind: real() - off, perf_counter=time.perf_counter)
        monkeypatch.setattr(doctor_doors, "time", clock)
        found = lines(alder)
        assert found["clock"].state == state
        assert f"{behind}.0 s behind" in found["clock"].found
        assert "NTP" in found["clock"].mend or not behind


def test_the_clock_is_told_by_the_rounds_where_control_is_silent(coordinator, alder, rounds, monkeypatch):
    rounds.ahead = 600.0
    monkeypatch.setattr(doctor_doors, "calling", lambda agent: (_ for _ in ()).throw(LinkLost("Gone.")))
    found = lines(alder)
    check(found, "control: let in", "fails", "Gone.", "doctor")
    check(found, "clock", "fails", "requests will be refused", "NTP")


def test_versions_that_do_not_fit(alder, monkeypatch):
    asked = calling

    def older(agent):
        control = asked(agent)
        met = control.hello()
        met.version = "7.0 (cloister 7.0.0)"
        monkeypatch.setattr(control, "hello", lambda: met)
        return control

    monkeypatch.setattr(doctor_doors, "calling", older)
    check(lines(alder), "versions", "fails", "the coordinator speaks 7.0", "Upgrade")


def certified(coordinator, alder, **times):
    key = public_key(read_key(alder.agent / "agent.key"))
    made = coordinator.consortium.authority.issue(key, Kind.SITE, "alder", timedelta(**times))
    (alder.agent / "agent.crt").write_bytes(made)


def test_a_certificate_that_is_over_or_soon(coordinator, alder):
    certified(coordinator, alder, minutes=2)
    check(lines(alder), "own certificate", "warning", "of alder until", "cloister-site renew")
    certified(coordinator, alder, minutes=-1)
    check(lines(alder), "own certificate", "fails", "It is over", "enrol FILE --again")


def test_keys_that_do_not_belong_together(coordinator, alder, tmp_path):
    (alder.agent / "agent.key").unlink()
    new_key(alder.agent / "agent.key")
    found = lines(alder)
    check(found, "own certificate", "fails", "agent.crt is not of agent.key", "same backup")
    check(found, "our certificate", "fails", "are not an authority, a certificate and its key", "same backup")
    assert "rounds: name" not in found


@pytest.mark.parametrize(("name", "line"), [("agent.key", "own certificate"), ("identity.key", "own identity")])
def test_a_key_that_others_can_read(alder, name, line):
    (alder.agent / name).chmod(0o640)
    check(lines(alder), line, "fails", f"Others on this machine can read {alder.agent / name}", "chmod 600")


def test_an_identity_that_was_replaced(alder):
    from cloister_shared.envelope import new_identity

    (alder.agent / "identity.key").unlink()
    new_identity(alder.agent / "identity.key")
    check(lines(alder), "own identity", "fails", "is not the one that was enrolled", "backup")


def test_a_folder_that_others_can_look_into(alder):
    alder.agent.chmod(0o755)
    check(lines(alder), "agent's folder", "warning", "Others on this machine can look into", "chmod 700")


def test_a_hospital_that_is_not_enrolled_is_examined_as_far_as_it_goes(hospital):
    found = lines(hospital("alder"))
    check(found, "enrolment", "fails", "This hospital is not enrolled", "cloister-site enrol")
    check(found, "records", "ok", "212 rows")
    check(found, "budget", "warning", "There is no ledger", "cloister-site budget officer")
    check(found, "officers", "warning", "none; the policy demands 1", "cloister-site budget officer")
    assert "rounds: name" not in found


def test_records_that_are_gone_or_empty(alder):
    table = alder.folder / "table.csv"
    header = table.read_text().splitlines()[0]
    table.write_text(header + "\n")
    check(lines(alder), "records", "fails", "0 rows", "Export")
    table.unlink()
    check(lines(alder), "records", "fails", "table.csv is not there", "site.yaml")


def test_records_that_nothing_here_reads(alder, monkeypatch):
    write_form(invent(20, 1), "fhir", alder.folder, "alder")
    monkeypatch.setitem(sys.modules, "orjson", None)
    check(lines(alder), "records", "fails", "orjson, which is not installed", "cloister[records]")


def test_a_site_yaml_that_cannot_be_read(alder):
    alder.site.write_text("site: [")
    check(lines(alder), "site.yaml", "fails", "site.yaml", "")


def test_a_site_yaml_of_another_hospital(alder):
    alder.says(site="birch")
    check(lines(alder), "site.yaml", "fails", "It is of birch, and alder is enrolled here", "Write site: alder")


def test_a_disk_that_is_full_or_nearly(alder, monkeypatch):
    for free, state in ((0.5e9, "fails"), (3e9, "warning"), (50e9, "ok")):
        monkeypatch.setattr("cloister_client.doctor.shutil.disk_usage", lambda _, left=free: SimpleNamespace(free=left))
        assert lines(alder)["disk"].state == state


def test_a_folder_that_cannot_be_written(alder, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied", str(alder.folder))

    monkeypatch.setattr("cloister_client.doctor.tempfile.NamedTemporaryFile", refused)
    check(lines(alder), "disk", "fails", "Permission denied", "")


def test_another_flower(alder, monkeypatch):
    monkeypatch.setattr("cloister_client.doctor.importlib.metadata.version", lambda name: "1.42.0")
    check(lines(alder), "Flower", "fails", "1.42.0 is installed, and this release works with 1.41.0", "pip")


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [("torch and GPU", "_TORCH", "torch cannot be used"), ("no network", "_CONFINE", "the kernel is too old")],
)
def test_a_process_that_fails_tells_why(alder, monkeypatch, line, code, said):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\ncloister.Refused: the kernel is too old")
    before, broken = doctor._python, getattr(doctor, code)
    monkeypatch.setattr(doctor, "_python", lambda asked: failed if asked == broken else before(asked))
    check(lines(alder), line, "fails", said)


def test_a_sandbox_that_is_off(alder):
    alder.says(policy={"sandbox": "off"})
    check(lines(alder), "no network", "warning", "The sandbox is off", "Take sandbox: off out")


def test_an_audit_log_that_was_edited(alder):
    log = alder.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b"North", b"South"))
    check(lines(alder), "audit log", "fails", "is not what was written", "backup")


# --- before enrolment --------------------------------------------------------------------------------------
@pytest.mark.usefixtures("rounds")
def test_with_an_invite_the_way_is_tried_before_enrolment(coordinator, hospital, proxy):
    alder = hospital("alder")
    alder.says(proxy=proxy.url)
    found = lines(alder, coordinator.invite("alder"))
    check(found, "invite", "ok", "of North for alder, until 20")
    assert states(found)["rounds: TLS"] == states(found)["control: TLS"] == "ok"
    assert "enrolment" not in found
    assert not alder.agent.exists()
    assert len(set(proxy.places)) == 2


def test_an_invite_that_is_damaged_is_one_line(coordinator, hospital):
    path = coordinator.invite("alder")
    path.write_text("{}")
    check(lines(hospital("alder"), path), "invite", "fails", "is no invite of a consortium", "Ask the consortium")


# --- how it is told ----------------------------------------------------------------------------------------
def test_what_fails_ends_in_1_and_json_says_the_same(alder):
    said = alder.types("doctor", code=1)
    assert "fails    rounds: connection" in said
    assert "do: Have IT allow connections" in said
    assert "Mend what fails from the top" in said
    found = json.loads(alder.types("doctor", "--json", code=1))
    assert {"what", "state", "found", "mend"} == set(found[0])
    assert next(line for line in found if line["what"] == "rounds: connection")["state"] == "fails"


def test_a_line_is_at_most_100_columns():
    long = Finding("what was looked at", State.FAILS, "found " * 60, "do something " * 30)
    assert max(map(len, as_text(long).splitlines())) <= 100


def test_findings_are_counted():
    assert in_all([ok("a", "b"), warning("a", "b", "c"), fails("a", "b", "c")]) == "1 ok, 1 warnings, 1 fail."


def test_no_invite_key_stays_on_disk(coordinator, hospital, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    lines(hospital("alder"), coordinator.invite("alder"))
    assert not list((tmp_path / "tmp").iterdir())
