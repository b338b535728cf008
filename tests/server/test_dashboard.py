"""The coordinator's pages: who may look, what they say, and that nothing from outside becomes a part of the page."""

import base64
import hashlib
import html
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.testclient import TestClient

from cloister_server.dashboard.curve import HEIGHT, WIDTH, curve
from cloister_server.dashboard.pages import app, serve
from cloister_server.folder import init, open_consortium, record, settings_for
from cloister_server.records import Role
from cloister_shared import audit
from cloister_shared.agreement import Decision, roster_digest, sign_decision
from cloister_shared.envelope import new_identity
from cloister_shared.errors import KeyBroken, LinkLost, PlanRefused, RegistryBroken
from cloister_shared.plan_file import read_plan

PLAN = """
study: stays
title: Readmission within 30 days
task: {name: tabular}
table:
  features: [{name: age, kind: number, range: [0, 100]}]
  target: {name: died, positive: 1, negative: 0}
cohort: {min_sites: 2, min_patients: 5, max_rows: 1000}
rounds: 40
strategy: {name: fedavg}
aggregation: {secure_sum: false, weights: rows, max_update_norm: 10, bound: 100}
training: {learning_rate: 0.1, batch_size: 8, local_steps: 1}
privacy: {mechanism: none}
"""
DIGEST = read_plan(PLAN).digest
SITES = ("Ash", "Beech", "Cedar")
PAGES = ("/", f"/study/{DIGEST}", "/audit")
EVIL = "<script>\"'><img src=x onerror=x>{{7*7}}"
HOW_LONG = (200, 29, -3)
"""Days that the certificates still hold."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A consortium of three with one study of three rounds, and an account in each role."""
    folder = tmp_path_factory.mktemp("pages") / "consortium"
    init(folder, settings_for("Northern Hospitals", "127.0.0.1", _port(), _port(), _port(), pages=_port()))
    registry = open_consortium(folder).registry
    now = datetime.now(UTC)
    identities = {site: new_identity(folder / f"{site}.key") for site in SITES}
    roster = {site: identity.public for site, identity in identities.items()}
    for number, (site, days) in enumerate(zip(SITES, HOW_LONG, strict=True), start=1):
        registry.invite(number, site, now + timedelta(days=1))
        ends = now + timedelta(days=days, hours=1)
        registry.admit(number, roster[site], site.encode(), 100 + number, ends, number)
        registry.seen(site, f"1.{number}")
    registry.invite(9, "Elder", now + timedelta(days=1))
    registry.add_study(DIGEST, "stays", PLAN, "plan.yaml", "Ben", roster, "offer")
    for site, decision, people in (("Ash", "approved", ("Ada Weiss", "Jo Okafor")), ("Beech", "rejected", ("Max",))):
        registry.decide(DIGEST, site, decision, _decision(identities[site], site, decision, people, roster))
    for number in (1, 2, 3):
        out = {"Beech": "no answer within 300 s"} if number == 2 else {}
        registry.add_round(DIGEST, number, _said(number, [s for s in SITES if s not in out], out))
    for number in range(205):
        record(folder, "officer", "operator", "invite", f"hospital {number}", "done")
    tokens = {role: registry.add_account(f"The {role}", role) for role in Role}
    return SimpleNamespace(folder=folder, registry=registry, tokens=tokens, identities=identities, roster=roster)


@pytest.fixture
def pages(made: SimpleNamespace) -> TestClient:
    return _client(made, Role.OPERATOR)


@pytest.fixture
def running(made: SimpleNamespace) -> Iterator[None]:
    made.registry.move(DIGEST, "running")
    yield
    made.registry.move(DIGEST, "submitted")


def _client(made: SimpleNamespace, role: Role, address: str = "10.0.0.1") -> TestClient:
    found = TestClient(app(made.registry, made.folder), client=(address, 1), raise_server_exceptions=False)
    found.auth = (f"The {role}", made.tokens[role])
    return found


def _decision(identity, site, decision, people, roster, plan=DIGEST) -> str:
    at, digest = "2025-03-02T10:20:30+00:00", roster_digest(roster)
    said = Decision(site=site, plan=plan, roster=digest, decision=decision, people=people, at=at, reason="As agreed.")
    return sign_decision(identity, said)


def _said(number: int, answered: list[str], rejected: dict[str, str]) -> dict:
    numbers = {"rows": 90.0, "loss": 0.7 - number / 100, "auroc": 0.8 + number / 100}
    at = f"2025-03-02T10:2{number}:30+00:00"
    known = {"round": number, "answered": answered, "rejected": rejected, "numbers": numbers, "at": at}
    return {**known, "update_norm": 1.0, "metrics": {}, "seconds": 2.5, "glimpse": None}


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Read(HTMLParser):
    """Tags with their attributes, and text row by row."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[str] = [""]
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("tr", "table"):
            self.rows.append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append("")

    def handle_data(self, data):
        self.rows[-1] += " " + data.strip()

    def row(self, begins: str) -> str:
        return next(text for row in self.rows if (text := " ".join(row.split())).startswith(begins))


# --- who may look ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PAGES)
def test_nobody_looks_without_name_and_token(made: SimpleNamespace, path: str):
    answer = TestClient(app(made.registry, made.folder)).get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert "Ash" not in answer.text


@pytest.mark.parametrize("authorization", ["Bearer {token}", "Basic {token}", "Basic !!", "Basic", "Basic w6k="])
def test_a_header_of_another_form_is_no_name_and_token(made: SimpleNamespace, authorization: str):
    header = authorization.format(token=made.tokens[Role.OPERATOR])
    answer = TestClient(app(made.registry, made.folder)).get("/", headers={"Authorization": header})
    assert answer.status_code == 401


@pytest.mark.parametrize("name", ["", "The auditor", "the operator", "The operator "])
def test_a_token_counts_under_its_own_name_alone(made: SimpleNamespace, name: str):
    answer = TestClient(app(made.registry, made.folder)).get("/", auth=(name, made.tokens[Role.OPERATOR]))
    assert answer.status_code == 401


@pytest.mark.parametrize("role", Role)
def test_every_role_reads_studies_and_hospitals(made: SimpleNamespace, role: Role):
    client = _client(made, role)
    assert [client.get(path).status_code for path in PAGES[:2]] == [200, 200]


@pytest.mark.parametrize("role", Role)
def test_a_researcher_does_not_read_the_audit_log(made: SimpleNamespace, role: Role):
    client, may = _client(made, role), role is not Role.RESEARCHER
    assert client.get("/audit").status_code == (200 if may else 403)
    assert ('href="/audit"' in client.get("/").text) is may


def test_an_account_that_was_removed_sees_nothing(made: SimpleNamespace):
    token = made.registry.add_account("Gone", Role.AUDITOR)
    client = TestClient(app(made.registry, made.folder))
    client.auth = ("Gone", token)
    assert client.get("/").status_code == 200
    made.registry.remove_account("Gone")
    assert client.get("/").status_code == 401


def test_many_wrong_tokens_from_one_address_are_told_to_wait(made: SimpleNamespace):
    shared = app(made.registry, made.folder)
    here, there = (TestClient(shared, client=(address, 1)) for address in ("10.0.0.7", "10.0.0.8"))
    before = len(audit.verify(made.folder / "audit.jsonl"))
    codes = [here.get("/", auth=("The operator", f"wrong {number}")).status_code for number in range(14)]
    assert codes == [401] * 10 + [429] * 4
    assert int(here.get("/", auth=("The operator", "wrong")).headers["retry-after"]) > 0
    assert there.get("/", auth=("The operator", "wrong")).status_code == 401
    # On loopback everybody has one address: wrong tokens of one person keep no other out.
    assert here.get("/", auth=("The operator", made.tokens[Role.OPERATOR])).status_code == 200
    written = audit.verify(made.folder / "audit.jsonl")[before:]
    assert len(written) == 11
    assert "wrong" not in str([entry.said for entry in written]).replace("refused: no account", "")


def test_one_network_of_ipv6_is_one_address(made: SimpleNamespace):
    shared = app(made.registry, made.folder)
    codes = [
        TestClient(shared, client=(f"2001:db8::{number:x}", 1)).get("/", auth=("x", "y")).status_code
        for number in range(11)
    ]
    assert codes == [401] * 10 + [429]


@pytest.mark.parametrize("path", [*PAGES, "/nowhere"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_the_pages_are_only_read(pages: TestClient, method: str, path: str):
    answer = pages.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", PAGES)
def test_head_answers_as_get_does(pages: TestClient, path: str):
    assert pages.head(path).status_code == 200


# --- what the browser is told ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("GET", path, 200) for path in PAGES],
        ("GET", "/nowhere", 404),
        ("GET", "/audit/", 404),
        ("GET", "/study/ffffffff", 404),
        ("POST", "/", 405),
    ],
)
def test_every_answer_is_closed_to_anything_from_elsewhere(pages: TestClient, method: str, path: str, status: int):
    _closed(pages.request(method, path), status)


def test_a_refusal_to_look_is_closed_too(made: SimpleNamespace):
    client = TestClient(app(made.registry, made.folder))
    _closed(client.get("/"), 401)
    _closed(_client(made, Role.RESEARCHER).get("/audit"), 403)
    client.auth = ("x", "y")
    _closed([client.get("/") for _ in range(11)][-1], 429)


def _closed(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.S)
    hashed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'sha256-{}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    assert answer.headers["content-security-policy"] == policy.format(hashed)
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"url\(|@import", style)
    for tag, attributes in _Read(answer.text).tags:
        assert tag not in ("script", "link", "img", "iframe", "form", "object", "embed")
        assert not {"style", "src", "srcset", "action"} & set(attributes)  # which the policy would turn away
        assert all(not name.startswith("on") for name in attributes)
        assert str(attributes.get("href", "/")).startswith("/")


def test_a_fault_is_told_to_the_log_alone(made: SimpleNamespace, monkeypatch, caplog):
    def broken():
        raise RuntimeError("at line 7 of the code")

    monkeypatch.setattr(made.registry, "studies", broken)
    answer = _client(made, Role.OPERATOR).get("/")
    _closed(answer, 500)
    assert "line 7" not in answer.text


def test_records_that_cannot_be_read_are_tried_again(made: SimpleNamespace, monkeypatch, caplog):
    def broken():
        raise RegistryBroken("registry.sqlite is locked.")

    monkeypatch.setattr(made.registry, "studies", broken)
    answer = _client(made, Role.OPERATOR).get("/")
    _closed(answer, 503)
    assert "sqlite" not in answer.text
    assert 'http-equiv="refresh"' in answer.text
    assert "registry.sqlite is locked" in caplog.text


# --- studies and hospitals ---------------------------------------------------------------------------------
def test_a_study_stands_in_one_line(made: SimpleNamespace, pages: TestClient):
    made.registry.move(DIGEST, "waiting", "Round 4: 1 of the 2 hospitals needed.")
    line = _Read(pages.get("/").text).row("stays")
    made.registry.move(DIGEST, "submitted")
    expected = f"stays {DIGEST[:12]} waiting Round 4: 1 of the 2 hospitals needed. 3 of 40 1 of 3 Ash 2.5 s"
    assert line.startswith(expected)
    assert "2 Mar 2025, 10:23" in line


def test_a_page_is_renewed_while_a_study_is_under_way(pages: TestClient, running: None):
    for path in PAGES[:2]:
        assert '<meta http-equiv="refresh" content="10">' in pages.get(path).text


def test_a_page_stands_still_once_nothing_runs(pages: TestClient):
    for path in PAGES:
        assert 'http-equiv="refresh"' not in pages.get(path).text


def test_a_certificate_that_ends_within_thirty_days_is_shown_in_red(pages: TestClient):
    page = pages.get("/").text
    rows = {site: page[page.index(f'<th scope="row">{site}<') :].partition("</tr>")[0] for site in SITES}
    assert "red" not in rows["Ash"]
    assert "in 29 days" in rows["Beech"]
    assert "it has ended" in rows["Cedar"]
    assert all("red" in rows[site] for site in ("Beech", "Cedar"))


def test_a_hospital_is_online_that_called_just_now(made: SimpleNamespace, pages: TestClient):
    assert _Read(pages.get("/").text).row("Ash").startswith("Ash enrolled yes 1.1")
    earlier = datetime.now(UTC) - timedelta(seconds=91)
    _rewrite(made, "update hospitals set seen = ? where name = 'Ash'", earlier.replace(tzinfo=None).isoformat(" "))
    assert _Read(pages.get("/").text).row("Ash").startswith("Ash enrolled no last called ")
    made.registry.seen("Ash", "1.1")


def test_an_invited_hospital_is_listed(pages: TestClient):
    assert _Read(pages.get("/").text).row("Elder").startswith("Elder invited until ")


def test_an_empty_consortium_says_so(tmp_path: Path):
    init(tmp_path / "new", settings_for("New", "127.0.0.1", 1, 2, 3))
    registry = open_consortium(tmp_path / "new").registry
    client = TestClient(app(registry, tmp_path / "new"))
    client.auth = ("officer", (tmp_path / "new" / "officer.token").read_text().strip())
    page = client.get("/").text
    assert "None was submitted yet." in page
    assert "None was invited yet." in page


def _rewrite(made: SimpleNamespace, statement: str, *values: str) -> None:
    with sqlite3.connect(made.folder / "registry.sqlite") as database:
        assert database.execute(statement, values).rowcount


# --- one study ---------------------------------------------------------------------------------------------
def test_what_was_asked_is_said_in_words_and_what_is_off_in_red(pages: TestClient):
    page = html.unescape(pages.get(PAGES[1]).text)
    assert "Readmission within 30 days" in page
    assert "at least 2 hospitals with 5 training patients each" in page
    assert '<p class="red">Differential privacy OFF: the model may remember a patient' in page
    assert '<p class="red">Secure sum OFF: the coordinator sees each hospital\'s un-noised update.</p>' in page


def test_who_decided_what(pages: TestClient):
    read = _Read(pages.get(PAGES[1]).text)
    assert read.row("Ash") == "Ash approved Ada Weiss, Jo Okafor 2 Mar 2025, 10:20 As agreed."
    assert read.row("Beech").startswith("Beech rejected Max")
    assert read.row("Cedar") == "Cedar none yet"


@pytest.mark.parametrize(
    ("signer", "site", "decision", "plan", "doubt"),
    [
        ("Beech", "Cedar", "approved", DIGEST, "Beech signed a decision in another hospital's name."),
        ("Beech", "Beech", "approved", DIGEST, "Beech signed “approved”."),
        ("Cedar", "Cedar", "rejected", DIGEST, "Cedar signed “rejected”."),
        ("Cedar", "Cedar", "approved", "0" * 64, "for another plan, or for other hospitals"),
    ],
)
def test_a_decision_that_its_hospital_did_not_sign_is_not_believed(
    made: SimpleNamespace, pages: TestClient, signer: str, site: str, decision: str, plan: str, doubt: str
):
    forged = _decision(made.identities[signer], site, decision, ("Ada",), made.roster, plan)
    made.registry.decide(DIGEST, "Cedar", "approved", forged)
    row = _Read(pages.get(PAGES[1]).text).row("Cedar")
    _rewrite(made, "delete from decisions where site = 'Cedar'")
    assert row.startswith("Cedar approved Not to be believed. ")
    assert doubt in row


def test_who_took_part_in_each_round_and_who_missed_it_and_why(pages: TestClient):
    read = _Read(pages.get(PAGES[1]).text)
    assert read.row("3 2 Mar 2025, 10:23").endswith("all 3 hospitals 0.6700 0.8300 2.5 s")
    assert read.row("2 2 Mar 2025, 10:22").endswith("Ash, Cedar Beech : no answer within 300 s 0.6800 0.8200 2.5 s")


def test_a_hospital_that_was_not_asked_is_said_to_have_missed_the_round(made: SimpleNamespace, pages: TestClient):
    made.registry.add_round(DIGEST, 4, _said(4, ["Ash", "Beech"], {}))
    row = _Read(pages.get(PAGES[1]).text).row("4 2 Mar")
    _rewrite(made, "delete from rounds where number = 4")
    assert "Ash, Beech Cedar : not asked: it had not approved, or was not there" in row


def test_loss_and_auroc_are_drawn(pages: TestClient):
    tags = _Read(pages.get(PAGES[1]).text).tags
    assert [said["aria-label"] for tag, said in tags if tag == "svg"] == [
        "Loss by round; 0.67 in round 3",
        "AUROC by round; 0.83 in round 3",
    ]
    assert sum(tag == "circle" for tag, _ in tags) == 6


def test_a_plan_that_this_release_cannot_read_is_said_to_be_so(made: SimpleNamespace, pages: TestClient):
    made.registry.add_study("a" * 64, "odd", "nonsense: 1", "odd.yaml", "Ben", made.roster, "offer")
    page, overview = pages.get("/study/odd"), pages.get("/")
    _rewrite(made, "delete from studies where name = 'odd'")
    assert page.status_code == overview.status_code == 200
    assert "The plan cannot be put in words." in page.text


def test_a_study_is_found_by_the_start_of_its_digest(pages: TestClient):
    assert "Readmission within 30 days" in pages.get(f"/study/{DIGEST[:12]}").text


# --- the audit log -----------------------------------------------------------------------------------------
def test_the_newest_entries_are_shown_and_the_log_is_whole(made: SimpleNamespace, pages: TestClient):
    entries = audit.verify(made.folder / "audit.jsonl")
    page = pages.get("/audit").text
    assert f"The log is whole: {len(entries)} entries" in page
    assert entries[-1].hash in page
    numbers = [int(number) for number in re.findall(r'<th scope="row" class="number">(\d+)</th>', page)]
    assert numbers == list(range(len(entries), len(entries) - 200, -1))


def test_a_log_that_was_changed_is_said_to_be_so(made: SimpleNamespace, pages: TestClient):
    path = made.folder / "audit.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"hospital 17", b"hospital 18"))
    page = pages.get("/audit").text
    path.write_bytes(whole)
    assert "The log is not whole." in page
    assert re.search(r"Entry \d+ of .*audit.jsonl is not what was written", page)
    assert "hospital 18" not in page


# --- what comes from outside -------------------------------------------------------------------------------
def test_nothing_from_outside_becomes_a_part_of_a_page(tmp_path: Path):
    folder = tmp_path / "consortium"
    init(folder, settings_for("Northern Hospitals", "127.0.0.1", 1, 2, 3))
    registry = open_consortium(folder).registry
    made = SimpleNamespace(folder=folder, registry=registry)
    identity = new_identity(tmp_path / "ash.key")
    roster = {"Ash": identity.public, EVIL: "b" * 64}
    plan = PLAN.replace("Readmission within 30 days", "'" + EVIL.replace("'", "''") + "'")
    digest = read_plan(plan).digest
    registry.invite(1, "Ash", datetime.now(UTC) + timedelta(days=1))
    registry.admit(1, identity.public, b"ash", 7, datetime.now(UTC) + timedelta(days=1), 1)
    registry.seen("Ash", EVIL)
    registry.invite(2, "Beech", datetime.now(UTC) + timedelta(days=1))
    _rewrite(made, "update hospitals set name = ?", EVIL)
    _rewrite(made, "update invites set hospital = ?", EVIL)
    registry.add_study(digest, EVIL, plan, EVIL, EVIL, roster, EVIL)
    registry.move(digest, "stopped", EVIL)
    registry.decide(digest, EVIL, "approved", EVIL)
    signed = Decision(
        site="Ash",
        plan=digest,
        roster="c" * 64,
        decision="approved",
        people=(EVIL,),
        at="2025-03-02T10:20:30Z",
        reason=EVIL,
    )
    registry.decide(digest, "Ash", "approved", sign_decision(identity, signed))
    registry.add_round(digest, 1, _said(1, [EVIL], {"Ash": EVIL}))
    audit.append(folder / "audit.jsonl", EVIL, {EVIL: EVIL, "in a list": [EVIL]})
    client = TestClient(app(registry, folder))
    client.auth = ("officer", (folder / "officer.token").read_text().strip())
    safe = EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
    safe = safe.replace("'", "&#39;")
    for path, times in (("/", 6), (f"/study/{digest}", 12), ("/audit", 3)):
        answer = client.get(path)
        _closed(answer, 200)
        assert answer.text.count(safe) >= times, path
        assert "<script" not in answer.text
        assert "<img" not in answer.text
    missing = client.get(f"/study/none of {EVIL}")
    _closed(missing, 404)
    assert "&lt;script&gt;" in missing.text


# --- the drawing -------------------------------------------------------------------------------------------
def test_a_round_without_a_value_is_a_gap_in_the_line():
    drawn = curve({1: 0.5, 2: 0.6, 3: None, 4: 0.7, 5: float("nan"), 6: 0.8, 7: 0.9})
    assert drawn
    assert [len(points.split()) for points in drawn.lines] == [2, 2]
    assert len(drawn.dots) == 5  # round 4, which no line holds, among them


@pytest.mark.parametrize("values", [{}, {1: None}, {1: None, 2: float("inf")}])
def test_nothing_is_drawn_of_nothing(values: dict[int, float | None]):
    assert curve(values) is None


@pytest.mark.parametrize(
    "values",
    [
        {1: 0.5},
        {1: 0.0, 2: 0.0},
        {3: 1e-9, 4: 2e-9},
        {1: -4.0, 2: 1e6},
        {1: 0.123456, 2: 0.123457},
        {number: 1 / number for number in range(1, 301)},
    ],
)
def test_whatever_is_drawn_lies_within_the_drawing(values: dict[int, float | None]):
    drawn = curve(values)
    assert drawn
    points = [tuple(map(float, each.split(","))) for line in drawn.lines for each in line.split()]
    points += [(x, y) for x, y, _ in drawn.dots]
    assert points
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    assert 2 <= len(drawn.up) <= 8
    assert len({label for _, label in drawn.up}) == len(drawn.up)
    assert len({label for _, label in drawn.across}) == len(drawn.across) <= 8


# --- served ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pages", ["0.0.0.0:8446", "coordinator.example.org:8446", "[::]:8446"])
def test_the_pages_stay_on_this_machine(made: SimpleNamespace, pages: str, tmp_path: Path):
    path = tmp_path / "coordinator.yaml"
    text = (made.folder / "coordinator.yaml").read_text()
    path.write_text(re.sub(r'pages: ".*"', f'pages: "{pages}"', text))
    with pytest.raises(PlanRefused, match="can be reached from other machines"):
        serve(tmp_path)


def test_an_address_that_is_taken_is_said_to_be(made: SimpleNamespace):
    port = int(open_consortium(made.folder).settings.pages.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(LinkLost, match=f"127.0.0.1:{port}"):
        serve(made.folder)


def test_a_certificate_of_another_key_is_refused(tmp_path: Path):
    init(tmp_path / "new", settings_for("New", "127.0.0.1", 1, 2, 3))
    (tmp_path / "new" / "coordinator.crt").write_text((tmp_path / "new" / "ca.crt").read_text())
    with pytest.raises(KeyBroken, match=r"coordinator\.crt is not the certificate of"):
        serve(tmp_path / "new")


@pytest.mark.slow
def test_the_pages_are_served_under_the_coordinators_certificate(made: SimpleNamespace):
    address = open_consortium(made.folder).settings.pages
    code = "import sys, pathlib; from cloister_server.dashboard.pages import serve; serve(pathlib.Path(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, made.folder], env=dict(os.environ)) as process:
        try:
            _await(address, process)
            with httpx.Client(
                base_url=f"https://{address}",
                verify=ssl.create_default_context(cafile=made.folder / "ca.crt"),
                auth=("The operator", made.tokens[Role.OPERATOR]),
            ) as client:
                _closed(client.get("/"), 200)
                head = client.head("/")
                assert (head.status_code, head.content) == (200, b"")
                # A header that a stranger writes is no address of its own.
                forged = [{"X-Forwarded-For": f"10.1.1.{number}"} for number in range(11)]
                assert client.get("/", auth=("x", "y"), headers=forged[0]).status_code == 401
                assert [client.get("/", auth=("x", "y"), headers=each).status_code for each in forged][-1] == 429
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"http://{address}/")
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, -signal.SIGTERM)


def _await(address: str, process: subprocess.Popen) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(400):
        assert process.poll() is None, "it ended by itself"
        with socket.socket() as tried:
            if tried.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    pytest.fail("nobody listens there")
