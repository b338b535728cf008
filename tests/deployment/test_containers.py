"""The images and the compose file, held against rules of our own; what the coordinator's image brings beside it."""

import ast
import datetime
import json
import re
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "server/deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = PROJECT["project"]["version"]
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "LABEL", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = "\n".join(line for line in dockerfile.splitlines() if line.strip() and not line.startswith("#"))
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in lines.replace("\\\n", "").splitlines())
    ]


def sent_to_the_builder(path: str) -> bool:
    """Whether .dockerignore, a list of what is let in, lets a path in."""
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    let_in = [line[1:] for line in rest if line.startswith("!")]
    return any(path == entry or path.startswith(f"{entry}/") for entry in let_in)


def faults(dockerfile: str) -> list[str]:
    """What is wrong with a Dockerfile, by our rules."""
    said, stages, final = [], set[str](), list[tuple[str, str]]()
    for word, rest in instructions(dockerfile):
        if word not in KNOWN:
            said.append(f"unknown instruction {word}")
        if word == "FROM":
            image, _, stage = rest.partition(" AS ")
            if not re.fullmatch(r"[\w./-]+:[\w.-]+", image) or image.endswith(":latest"):
                said.append(f"not pinned: {image}")
            stages.add(stage)
            final = []
        if word == "COPY":
            flags, paths = re.match(r"((?:--\S+ )*)(.*)", rest).groups()  # type: ignore[union-attr]
            stage = re.search(r"--from=(\S+)", flags)
            sources = [] if stage else paths.split()[:-1]
            said += [f"no stage {stage[1]}"] if stage and stage[1] not in stages else []
            said += [f"missing: {path}" for path in sources if not (ROOT / path).exists()]
            said += [f"kept from the builder: {path}" for path in sources if not sent_to_the_builder(path)]
        if word in {"ENV", "ARG"} and re.search(r"(?i)passw|secret|token|_key", rest):
            said.append(f"a secret in the image: {rest}")
        if word in {"ENTRYPOINT", "CMD"} or (word == "HEALTHCHECK" and rest != "NONE"):
            try:
                json.loads(rest[rest.index("[") :])
            except ValueError:
                said.append(f"needs a shell: {word} {rest}")
        final.append((word, rest))
    words = [word for word, _ in final]
    users = [rest for word, rest in final if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        said.append(f"runs as {users[-1:] or 'root'}")
    elif "RUN" in words[words.index("USER") :]:
        said.append("RUN after USER")
    said += [f"no {word}" for word in ("HEALTHCHECK", "ENTRYPOINT", "LABEL", "WORKDIR") if word not in words]
    return said


def bundled(role: str) -> tuple[str, ...]:
    """The extras that the bundle of a role holds."""
    text = (ROOT / "client/deploy/bundle.py").read_text()
    said = next(line for line in text.splitlines() if line.startswith("EXTRAS = "))
    return ast.literal_eval(said.removeprefix("EXTRAS = "))[role]


IMAGES = {"coordinator": DEPLOY / "Dockerfile", "site": ROOT / "client/deploy/Dockerfile"}


@pytest.mark.parametrize("role", IMAGES)
def test_an_image_keeps_to_the_rules(role):
    assert faults(IMAGES[role].read_text()) == []


@pytest.mark.parametrize(
    ("was", "becomes", "fault"),
    [
        ("FROM python:3.11-slim-bookworm\n", "FROM python\n", "not pinned: python"),
        ("FROM python:3.11-slim-bookworm\n", "FROM python:latest\n", "not pinned: python:latest"),
        ("USER 10001:10001\n", "", "runs as root"),
        ("USER 10001:10001", "USER cloister", "runs as ['cloister']"),
        ("COPY --from=build", "COPY --from=bulid", "no stage bulid"),
        ("COPY pyproject.toml", "COPY poetry.lock", "missing: poetry.lock"),
        ("COPY pyproject.toml", "COPY SECURITY.md", "kept from the builder: SECURITY.md"),
        ("COPY pyproject.toml", "ADD https://example.org/pyproject.toml", "unknown instruction ADD"),
        ('CMD ["start"]', "CMD start", "needs a shell: CMD start"),
        ("EXPOSE 8443", "RUN true\nEXPOSE 8443", "RUN after USER"),
        ("ARG TORCH_INDEX=", "ARG INDEX_TOKEN=", "a secret in the image"),
        ("HEALTHCHECK", "ENV A=b\n#", "no HEALTHCHECK"),
    ],
)
def test_a_broken_dockerfile_is_told(was, becomes, fault):
    good = IMAGES["coordinator"].read_text()
    assert was in good
    assert any(said.startswith(fault) for said in faults(good.replace(was, becomes, 1)))


@pytest.mark.parametrize("role", IMAGES)
def test_an_image_holds_the_whole_distribution_at_its_pinned_versions(role):
    text = IMAGES[role].read_text()
    told = instructions(text)
    copied = {path for word, rest in told if word == "COPY" for path in rest.split()[:-1]}
    assert copied >= {*PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], "README.md", "LICENSE"}
    torch, whole = [rest for word, rest in told if word == "RUN" and "pip install" in rest]
    assert torch.endswith('pip install --no-deps --constraint constraints.txt --index-url "$TORCH_INDEX" torch')
    installed = re.search(r'pip install --constraint constraints.txt "\.\[(.*)\]"$', whole)
    assert installed
    assert installed[1] == ",".join(bundled(role))  # the same as without containers
    assert f'org.opencontainers.image.version="{VERSION}"' in text
    assert f'ENTRYPOINT ["cloister-{role}"]' in text


def test_the_coordinator_opens_the_ports_of_hospitals_and_the_agent_none():
    exposed = {
        role: [rest for word, rest in instructions(path.read_text()) if word == "EXPOSE"]
        for role, path in IMAGES.items()
    }
    assert exposed == {"coordinator": ["8443 8444"], "site": []}


def test_nothing_is_let_into_the_builder_that_is_not_there():
    let_in = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [path for path in let_in if not (ROOT / path).exists()] == []


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("name", ["coordinator", "db"])
def test_a_service_can_do_no_more_than_it_must(compose, name):
    service = compose["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert not {"privileged", "cap_add", "network_mode", "pid", "devices"} & set(service)
    assert service.get("user") != "root"
    assert service["restart"] == "unless-stopped"
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", service["image"])


def test_hospitals_reach_their_two_ports_and_nobody_the_admin_port(compose):
    assert compose["services"]["coordinator"]["ports"] == ["8443:8443", "8444:8444"]


def test_the_database_is_reached_by_the_coordinator_alone(compose):
    assert "ports" not in compose["services"]["db"]
    assert compose["services"]["db"]["networks"] == ["inside"]
    assert compose["networks"]["inside"] == {"internal": True}


def test_secrets_are_files_and_no_variable_holds_one(compose):
    assert {name: list(secret) for name, secret in compose["secrets"].items()} == {
        "db_password": ["file"],
        "pgpass": ["file"],
    }
    for service in compose["services"].values():
        assert set(service["secrets"]) <= set(compose["secrets"])
        for variable, value in service["environment"].items():
            assert not re.search("(?i)passw|pgpass|secret", variable) or value.startswith("/run/secrets/")
    kept = subprocess.run(["git", "check-ignore", "-q", "server/deploy/secrets/pgpass"], cwd=ROOT, check=False)
    assert kept.returncode in {0, 128}  # 128: this is no checkout


def test_what_is_kept_is_on_declared_volumes(compose):
    mounted = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert mounted == set(compose["volumes"])
    assert compose["services"]["coordinator"]["volumes"] == ["coordinator:/var/lib/cloister"]


def test_compose_builds_the_image_of_this_version(compose):
    coordinator = compose["services"]["coordinator"]
    build = DEPLOY / coordinator["build"]["context"]
    assert build.resolve() == ROOT
    assert (build / coordinator["build"]["dockerfile"]).is_file()
    assert coordinator["image"] == f"cloister-coordinator:{VERSION}"


def _healthy(port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEPLOY / "healthy.py", str(port)], capture_output=True, text=True, check=False
    )


def _serve(greet: Any) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    greet(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[int]:
    """A server that, like the coordinator, wants a certificate of whoever calls."""
    key, name, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([]), datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
    (tmp_path / "pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem")
    context.load_verify_locations(tmp_path / "pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def greet(connection: socket.socket) -> None:
        with suppress(OSError):  # it brings no certificate
            context.wrap_socket(connection, server_side=True)

    yield from _serve(greet)


@pytest.fixture
def mute_port() -> Iterator[int]:
    yield from _serve(lambda connection: None)


def test_a_port_that_greets_is_healthy(tls_port):
    assert _healthy(tls_port).returncode == 0


def test_a_port_that_is_open_but_mute_is_not(mute_port):
    done = _healthy(mute_port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Port {mute_port} does not answer")


def test_a_closed_port_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    assert _healthy(closed).stderr.startswith(f"Port {closed} does not answer")


@pytest.mark.parametrize(("there", "made"), [(False, "made"), (True, "was there")])
def test_a_first_start_is_made_once(tmp_path, there, made):
    file = tmp_path / "coordinator.yaml"
    if there:
        file.write_text("was there")
    command = [sys.executable, "-c", f"open({str(file)!r}, 'w').write('made')"]
    subprocess.run([sys.executable, DEPLOY / "unless.py", str(file), *command], check=True)
    assert file.read_text() == made
