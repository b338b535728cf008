"""What people type: the folder that ``init`` makes, and the commands against a running service."""

import re
import stat
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from cloister_server import folder
from cloister_server.cli import app
from cloister_server.desk import dialled
from cloister_shared.certificates import Revocations, bearer, read_authority
from cloister_shared.control_pb2 import HelloRequest
from cloister_shared.enrolment import read_invite
from cloister_shared.envelope import read_identity
from cloister_shared.errors import KeyBroken, PlanRefused
from cloister_shared.versions import RELEASE, spoken


@pytest.fixture
def typed(world, tmp_path, monkeypatch):
    """Type a command beside the folder ``consortium`` of a running service; its output, which must go well."""
    path = world.consortium.folder / "coordinator.yaml"
    path.write_text(path.read_text().replace("127.0.0.1:8445", world.admin))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_TOKEN", raising=False)
    monkeypatch.delenv("CLOISTER_CONSORTIUM", raising=False)

    def run(*words: str, code: int = 0, **env: str):
        done = CliRunner().invoke(app, list(words), env=env)
        assert done.exit_code == code, done.output
        assert max(map(len, done.stderr.splitlines()), default=0) <= 100 or code, done.stderr
        assert max(map(len, done.stdout.splitlines()), default=0) <= 100 or words[0] == "invite", done.stdout
        return done

    return run


@pytest.fixture
def as_(world, tmp_path):
    """The options that make a command that of an account with this role."""

    def options(role: str) -> list[str]:
        path = tmp_path / f"{role}.token"
        path.write_text(world.token(role) + "\n")
        path.chmod(0o600)
        return ["--token-file", str(path)]

    return options


# --- the folder --------------------------------------------------------------------------------------------
def test_init_makes_a_folder_that_opens_and_says_what_to_do_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "consortium/", "--name", "North", "--host", "coordinator.example.org"])
    assert done.exit_code == 0, done.output
    made = tmp_path / "consortium"
    token = (made / "officer.token").read_text().strip()
    assert "consortium/officer.token" in done.output
    assert token not in done.output
    assert "cloister-coordinator start consortium" in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    opened = folder.open_consortium(made)
    assert (opened.settings.name, opened.settings.rounds) == ("North", "coordinator.example.org:8443")
    assert (opened.settings.listen.control, opened.settings.admin) == ("0.0.0.0:8444", "127.0.0.1:8445")
    account = opened.registry.account(token)
    assert account is not None
    assert (account.name, account.role) == ("officer", "operator")
    assert 1 not in Revocations(made)
    assert bearer((made / "coordinator.crt").read_bytes()).kind == "coordinator"
    for name in ("ca.key", "coordinator.key", "signing.key", "officer.token", "coordinator.yaml", "registry.sqlite"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600, name
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    opened.registry.close()
    assert [path.name for path in tmp_path.iterdir()] == ["consortium"]


def test_init_replaces_nothing(tmp_path):
    made = tmp_path / "consortium"
    made.mkdir()
    (made / "notes.txt").write_text("mine")
    done = CliRunner().invoke(app, ["init", str(made)])
    assert done.exit_code == 2
    assert "exists and is not empty" in done.output
    assert [path.name for path in made.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "no host"], 'rounds = "no host:8443" is not HOST:PORT. Write it as coordinator.example.org:8443.'),
        (["--rounds-port", "8444"], "has the port of listen.rounds. Give each a port of its own."),
        (["--admin-port", "99999"], 'admin = "127.0.0.1:99999" is not HOST:PORT.'),
        (["--name", "a/b"], "a name is letters"),
        (["--database", "mysql://ada:secret@db/x"], "database"),
    ],
)
def test_init_that_cannot_be_leaves_nothing_behind(tmp_path, words, said):
    done = CliRunner().invoke(app, ["init", str(tmp_path / "consortium"), *words])
    assert done.exit_code in (1, 2), done.output
    assert said in done.output
    assert "secret" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_crash_within_init_leaves_no_half_made_folder(tmp_path, monkeypatch):
    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device", "audit.jsonl")

    monkeypatch.setattr(folder, "record", crash)
    done = CliRunner().invoke(app, ["init", str(tmp_path / "consortium")])
    assert done.exit_code == 2
    assert "No space left on device" in done.output
    assert list(tmp_path.iterdir()) == []


FAULTS = {
    "misspelt": (
        "admin_on_network: false",
        "admin_on_netwerk: false",
        "line 15: admin_on_netwerk = false is not a known key",
    ),
    "missing": ('control: "localhost:8444"\n\n', "\n", "control is missing. Add control: VALUE."),
    "no port": (
        'rounds: "localhost:8443"\ncontrol',
        "rounds: localhost\ncontrol",
        'line 5: rounds = "localhost" is not HOST:PORT',
    ),
    "port 0": ("127.0.0.1:8445", "127.0.0.1:0", 'line 14: admin = "127.0.0.1:0" is not HOST:PORT'),
    "on the network": (
        "127.0.0.1:8445",
        "0.0.0.0:8445",
        'line 14: admin = "0.0.0.0:8445" can be reached from other machines',
    ),
    "text for a switch": (
        "admin_on_network: false",
        "admin_on_network: no",
        'line 15: admin_on_network = "no" is not accepted',
    ),
    "not YAML": ("listen:", "listen", "this is not YAML"),
    "twice": ("listen:", "name: South\nlisten:", "name is given a second time, first on line 2"),
}


@pytest.mark.parametrize(("old", "new", "said"), FAULTS.values(), ids=FAULTS)
def test_coordinator_yaml_is_read_strictly(made_once, tmp_path, old, new, said):
    text = (made_once / "coordinator.yaml").read_text()
    assert old in text
    (tmp_path / "coordinator.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(PlanRefused) as caught:
        folder.read_settings(tmp_path)
    assert said in str(caught.value)
    assert "coordinator.yaml" in str(caught.value)


def test_a_password_in_coordinator_yaml_is_in_no_message(made_once, tmp_path):
    text = (made_once / "coordinator.yaml").read_text()
    url = "postgresql+psycopg://ada:secret@db/records"
    (tmp_path / "coordinator.yaml").write_text(re.sub('database: ".*"', f'databse: "{url}"', text))
    with pytest.raises(PlanRefused, match="databse") as caught:
        folder.read_settings(tmp_path)
    assert "secret" not in str(caught.value)
    assert "ada" not in str(caught.value)


def test_a_folder_that_is_none_is_said_to_be_none(tmp_path):
    with pytest.raises(PlanRefused, match=r"coordinator\.yaml is not there\. Make a consortium with"):
        folder.open_consortium(tmp_path)


def test_a_key_that_others_can_read_opens_no_consortium(made_once, tmp_path):
    import shutil

    shutil.copytree(made_once, tmp_path / "consortium")
    (tmp_path / "consortium" / "ca.key").chmod(0o644)
    with pytest.raises(KeyBroken, match="chmod 600"):
        folder.open_consortium(tmp_path / "consortium")


def test_the_coordinator_s_certificate_follows_its_settings(made_once, tmp_path):
    import shutil

    from cryptography import x509

    made = tmp_path / "consortium"
    shutil.copytree(made_once, made)
    path = made / "coordinator.yaml"
    path.write_text(path.read_text().replace('control: "localhost:8444"\n\n', 'control: "[2001:db8::1]:8444"\n\n'))
    opened = folder.open_consortium(made)
    _, certificate = folder.server_tls(opened)
    opened.registry.close()
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert "2001:db8::1" in map(str, names.value.get_values_for_type(x509.IPAddress))
    assert (made / "coordinator.crt").read_bytes() == certificate


def test_postgres_is_not_taken_for_a_file_and_a_file_lies_beside(made_once):
    assert (made_once / "registry.sqlite").exists()
    assert read_authority(made_once).certificate
    assert read_identity(made_once / "signing.key").public


@pytest.mark.parametrize(("opened", "dials"), [("0.0.0.0:1", "localhost:1"), ("[::]:1", "localhost:1"), ("a:1", "a:1")])
def test_a_port_that_is_open_everywhere_is_dialled_here(opened, dials):
    assert dialled(opened) == dials


# --- commands ----------------------------------------------------------------------------------------------
def test_an_invite_is_alone_on_stdout(typed):
    done = typed("invite", "St Mary's", "--hours", "5")
    invite = read_invite(done.stdout)
    assert invite.hospital == "St Mary's"
    assert f"until {invite.expires[:10]} {invite.expires[11:16]} UTC" in done.stderr
    assert "cloister-site enrol" in done.stderr
    assert invite.key not in done.stderr


def test_hospitals_are_a_table(typed, world):
    assert "No hospital is invited yet" in typed("hospitals").stdout
    world.enrol("Oak")
    world.invite("北京协和医院")
    world.invite("The Royal Infirmary of the North and of all the Islands")
    world.site(world.enrol("Ash")).Hello(HelloRequest(version=spoken()), timeout=20)
    lines = typed("hospitals").stdout.splitlines()
    assert lines[0].split() == ["HOSPITAL", "STANDING", "NOW", "SEEN", "UNTIL", "KEY", "RELEASE"]
    assert re.match(rf"Ash +enrolled +there +20[-\d]+ \d\d:\d\d +20[-\d]+ +[0-9a-f]{{8}} +{RELEASE}$", lines[1])
    assert re.match(r"Oak +enrolled +there +- +20\d\d-", lines[2])
    assert re.match(r"The Royal Infirmary of the Nor +invited", lines[3])
    assert [cell_len(line[: line.index("invited")]) for line in lines[3:]] == [32, 32]


def test_a_hospital_is_expelled_with_a_reason(typed, world):
    world.enrol("Oak")
    typed("expel", "Oak", code=2)
    assert "is expelled" in typed("expel", "Oak", "--reason", "left").stdout
    assert "No hospital 'Elm'" in typed("expel", "Elm", "--reason", "x", code=1).output


def test_a_study_from_plan_to_end(typed, as_, world, tmp_path):
    members = [world.enrol(name) for name in ("Oak", "Ash, North", "Elm")][:2]
    (tmp_path / "plan.yaml").write_text(world.plan)
    done = typed("study", "submit", "plan.yaml", "--hospitals", "Oak,", "--hospital", "Ash, North", *as_("researcher"))
    digest = world.consortium.registry.study("three-numbers").digest
    assert f"three-numbers is offered, as {digest[:16]}." in done.stdout
    assert "  not decided: Ash, North, Oak" in done.stdout
    assert "not decided: Ash, North, Oak" in typed("study", "run", "three-numbers", code=1).output
    for member in members:
        world.decide(member, digest)
    assert f"three-numbers {digest[:16]} is running, round 0 of 3" in typed("study", "run", "three-numbers").stdout
    said = {
        "answered": ["Oak"],
        "rejected": {"Ash, North": "no answer " * 12},
        "numbers": {"loss": 0.25},
        "seconds": 1.0,
    }
    world.consortium.registry.add_round(digest, 1, {"round": 1, "seconds": 1.0, **said})
    listed = typed("study", "list").stdout
    assert "is running, round 1 of 3" in listed
    assert "  approved: Ash, North, Oak" in listed
    assert f"resume {digest[:12]}" in typed("study", "stop", "three-numbers", "--reason", "a doubt").stdout
    watched = typed("study", "watch", digest[:10]).stdout
    assert "round 1 of 3: 1 hospitals, 1.0 s, loss 0.25" in watched
    assert "    without Ash, North: no answer" in watched
    assert "is stopped, round 1 of 3: a doubt" in watched
    assert "is running" in typed("study", "resume", "three-numbers").stdout


def test_a_plan_s_fault_has_its_line(typed, as_, world, tmp_path):
    (tmp_path / "plan.yaml").write_text(world.plan.replace("rounds: 3", "rounds: many"))
    done = typed("study", "submit", "plan.yaml", *as_("researcher"), code=1)
    assert 'plan.yaml line 9: rounds = "many"' in done.output
    (tmp_path / "plan.yaml").write_text("x" * 10_000_000)
    assert "has more than 256 KB" in typed("study", "submit", "plan.yaml", *as_("researcher"), code=1).output


def test_accounts_are_made_renewed_and_removed(typed, world, tmp_path):
    done = typed("account", "add", "Ada", "--role", "researcher")
    path = tmp_path / "Ada.token"
    token = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token not in done.output
    assert "Ada is a researcher." in done.stdout
    assert re.search(r"Ada +researcher\n", typed("account", "list").stdout)
    assert "who may not hospitals" in typed("hospitals", code=1, CLOISTER_TOKEN=token).output
    assert "exists" in typed("account", "add", "Ada", "--role", "auditor", code=2).output
    assert "is no role" in typed("account", "add", "Bob", "--role", "god", code=1).output
    assert not (tmp_path / "Bob.token").exists()
    typed("account", "renew", "Ada", "--into", "new.token")
    assert "No account has the token" in typed("study", "list", code=1, CLOISTER_TOKEN=token).output
    typed("study", "list", "--token-file", "new.token")
    typed("account", "remove", "Ada")
    assert "No account has the token" in typed("study", "list", "--token-file", "new.token", code=1).output


def test_the_audit_log_is_read_by_those_it_is_for(typed, as_, world):
    typed("invite", "Oak")
    assert "who may not audit. Ask an account of: privacy-officer, auditor." in typed("audit", code=1).output
    lines = typed("audit", "--last", "2", *as_("auditor")).stdout
    assert re.search(r"officer \(operator\) invite Oak: done\n", lines)
    assert re.search(r"officer \(operator\) audit: refused: officer is operator", lines)
    assert re.search(r"^head [0-9a-f]{64}$", lines, re.M)


def test_a_service_that_is_down_is_said_to_be_down(typed, world, tmp_path):
    path = world.consortium.folder / "coordinator.yaml"
    path.write_text(path.read_text().replace(world.admin, "127.0.0.1:9"))
    done = typed("hospitals", code=2)
    assert "does not answer at 127.0.0.1:9." in done.output
    assert "cloister-coordinator start consortium" in done.output


def test_another_coordinator_is_not_taken_for_ours(typed, world, tmp_path):
    from cloister_shared.certificates import new_authority

    (tmp_path / "other").mkdir()
    (world.consortium.folder / "ca.crt").write_bytes(new_authority(tmp_path / "other", "North").certificate)
    assert "is not the coordinator of consortium" in typed("hospitals", code=2).output


@pytest.mark.parametrize(
    ("words", "env", "said"),
    [
        (["--token-file", "nope.token"], {}, "nope.token is not there"),
        (["--token-file", "open.token"], {}, "Run chmod 600 open.token"),
        (["--token-file", "odd.token"], {}, "holds no token"),
        ([], {"CLOISTER_TOKEN": "tok\nen"}, "holds no token"),
        ([], {"CLOISTER_TOKEN": "wrong"}, "No account has the token that was shown."),
        (["--consortium", "nowhere"], {}, "nowhere/coordinator.yaml is not there"),
        ([], {"CLOISTER_CONSORTIUM": "elsewhere"}, "elsewhere/coordinator.yaml is not there"),
    ],
)
def test_without_a_usable_token_or_folder_a_command_says_what_is_missing(typed, tmp_path, words, env, said):
    (tmp_path / "open.token").write_text("x")
    (tmp_path / "open.token").chmod(0o644)
    (tmp_path / "odd.token").write_bytes(b"\xff\xfe")
    (tmp_path / "odd.token").chmod(0o600)
    done = typed("hospitals", *words, code=2 if "chmod" in said else 1, **env)
    assert said in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_the_token_that_is_named_counts_before_that_of_the_environment(typed, world):
    typed("hospitals", "--token-file", str(Path("consortium/officer.token")), CLOISTER_TOKEN="wrong")


def test_start_hands_over_to_the_service(tmp_path, monkeypatch):
    from types import SimpleNamespace

    import cloister_server

    started: list[Path] = []
    service = SimpleNamespace(start=started.append)
    monkeypatch.setitem(sys.modules, "cloister_server.coordinator", service)
    monkeypatch.setattr(cloister_server, "coordinator", service, raising=False)
    assert CliRunner().invoke(app, ["start", str(tmp_path)]).exit_code == 0
    assert started == [tmp_path]
