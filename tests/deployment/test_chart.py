"""The Helm chart: rendered by a small reader of the constructs it uses, and by Helm itself where Helm is installed."""

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from cloister_server.cli import app as coordinator

ROOT = Path(__file__).parents[2]
CHART = ROOT / "server/deploy/chart"
RELEASE = {"Name": "north", "Namespace": "research"}
LEAST: dict[str, Any] = {"consortium": {"name": "North", "host": "fl.example.org"}}
MOST: dict[str, Any] = LEAST | {
    "imagePullSecrets": [{"name": "registry"}],
    "database": {
        "url": "postgresql+psycopg://cloister@db:5432/cloister?sslmode=verify-full",
        "passwordSecret": {"name": "pg", "key": "password"},
    },
    "init": {"enabled": False},
    "persistence": {"size": "5Gi", "storageClassName": "fast"},
    "service": {"type": "ClusterIP", "annotations": {"lb/internal": "true"}},
    "networkPolicy": {
        "hospitals": ["192.0.2.0/24", "2001:db8::/32"],
        "database": [{"podSelector": {"matchLabels": {"app": "postgres"}}}],
    },
    "nodeSelector": {"zone": "a"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
}

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ne": lambda left, right: left != right,
    "nindent": lambda width, text: "".join(f"\n{' ' * width}{line}" for line in text.splitlines()),
    "quote": lambda value: json.dumps(str(value), ensure_ascii=False),
    "toYaml": lambda value: yaml.safe_dump(value, default_flow_style=False).rstrip("\n"),
}


def evaluate(expression: str, top: dict[str, Any], dot: Any) -> Any:
    """A pipeline of paths, words and the functions above; anything else of Helm's language is refused."""
    value: list[Any] = []
    for command in expression.split("|"):
        words = re.findall(r'"[^"]*"|\S+', command)
        name = words.pop(0) if words[0] in FUNCTIONS else None
        arguments = [_operand(word, top, dot) for word in words] + value
        value = [FUNCTIONS[name](*arguments) if name else arguments[0]]
        assert name or len(arguments) == 1, f"not read here: {expression}"
    return value[0]


def _operand(word: str, top: dict[str, Any], dot: Any) -> Any:
    if word == ".":
        return dot
    if re.fullmatch(r'"[^"\\]*"|\d+', word):
        return json.loads(word)
    assert re.fullmatch(r"(\.[A-Za-z]+)+", word), f"not read here: {word}"
    assert dot is top, f"{word} inside range means something else"
    found: Any = top
    for key in word[1:].split("."):
        found = found[key]
    return found


def parse(template: str) -> list[Any]:
    """Text, actions as (expression,), and blocks as (verb, expression, body, otherwise)."""
    pieces = re.split(r"(\{\{-?\s.*?\s-?\}\})", template)
    assert not any("{{" in piece or "}}" in piece for piece in pieces[::2]), "a brace that is not read here"
    open_blocks: list[list[Any]] = [[]]
    for at, piece in enumerate(pieces):
        if at % 2 == 0:
            piece = piece.lstrip() if at and pieces[at - 1].endswith("-}}") else piece
            piece = piece.rstrip() if at + 1 < len(pieces) and pieces[at + 1].startswith("{{-") else piece
            open_blocks[-1].append(piece)
            continue
        action = piece.strip("{}-").strip()
        verb, _, expression = action.partition(" ")
        if verb in {"if", "range"}:
            block = (verb, expression, [], [])
            open_blocks[-1].append(block)
            open_blocks += [block[3], block[2]]  # an else closes the first of the two, an end both
        elif action in {"else", "end"} and len(open_blocks) < 3:
            raise AssertionError(f"an {action} of something that is not read here")
        elif action == "else":
            open_blocks.pop()
            open_blocks.append(open_blocks[-1])
        elif action == "end":
            del open_blocks[-2:]
        else:
            open_blocks[-1].append((action,))
    (whole,) = open_blocks
    return whole


def render(template: str, top: dict[str, Any]) -> str:
    """What Helm makes of a template."""
    return _text(parse(template), top, top)


def _text(nodes: list[Any], top: dict[str, Any], dot: Any) -> str:
    out = ""
    for node in nodes:
        match node:
            case str():
                out += node
            case (expression,):
                value = evaluate(expression, top, dot)
                out += str(value).lower() if isinstance(value, bool) else str(value)
            case (verb, expression, body, otherwise):
                value = evaluate(expression, top, dot)
                dots = list(value) if verb == "range" else [dot] * bool(value)
                out += "".join(_text(body, top, item) for item in dots) or _text([] if dots else otherwise, top, dot)
    return out


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return base | {
        key: merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def values(**over: Any) -> dict[str, Any]:
    return merged(yaml.safe_load((CHART / "values.yaml").read_text()), over)


def rendered(given: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of the chart by kind and name."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    top = {"Values": given, "Release": RELEASE, "Chart": {"AppVersion": chart["appVersion"]}}
    texts = [render(path.read_text(), top) for path in sorted((CHART / "templates").glob("*.yaml"))]
    return by_name("\n---\n".join(texts))


def by_name(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    objects = [thing for thing in yaml.safe_load_all(text) if thing]
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}


@pytest.fixture(params=[LEAST, MOST], ids=["least", "most"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    return values(**request.param)


def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text())


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{ .Values.b | quote }} c", 'a "x" c'),
        ("a\n  {{- if .Values.no }}\n  b\n  {{- end }}\nc", "a\nc"),
        ("a\n  {{- if .Values.b }}\n  b\n  {{- else }}\n  d\n  {{- end }}\nc", "a\n  b\nc"),
        ("a\n  {{- if .Values.no }}\n  b\n  {{- else }}\n  d\n  {{- end }}\nc", "a\n  d\nc"),
        ("{{ range .Values.list }}<{{ . }}>{{ end }}", "<1><2>"),
        ("k: {{ toYaml .Values.list | nindent 2 }}", "k: \n  - 1\n  - 2"),
        ('{{ if ne .Values.b "x" }}y{{ end }}', ""),
    ],
)
def test_the_reader_of_templates_does_what_helm_does(template, text):
    assert render(template, {"Values": {"b": "x", "no": [], "list": [1, 2]}}) == text


@pytest.mark.parametrize(
    "template",
    [
        '{{ include "name" . }}',
        "{{ .Values.b | upper }}",
        "{{ with .Values.b }}{{ end }}",
        "{{ .Values.missing }}",
        "{{.Values.b}}",
    ],
)
def test_the_reader_of_templates_refuses_what_it_does_not_know(template):
    with pytest.raises((AssertionError, KeyError)):
        render(template, {"Values": {"b": "x"}})


def test_the_chart_has_what_it_is_made_of(given):
    assert set(rendered(given)) == {
        ("NetworkPolicy", "north-coordinator"),
        ("Service", "north-hospitals"),
        ("StatefulSet", "north-coordinator"),
    }


def test_every_selector_finds_the_pod(given):
    objects = rendered(given)
    pod = objects["StatefulSet", "north-coordinator"]["spec"]["template"]["metadata"]["labels"]
    spec = [thing["spec"] for thing in objects.values()]
    selectors = [s["selector"].get("matchLabels", s["selector"]) for s in spec if "selector" in s]
    selectors += [s["podSelector"]["matchLabels"] for s in spec if "podSelector" in s]
    assert len(selectors) == 3
    assert all(selector.items() <= pod.items() for selector in selectors)


def test_the_service_leads_hospitals_to_their_ports_and_nothing_to_the_admin_port(given):
    objects = rendered(given)
    stateful = objects["StatefulSet", "north-coordinator"]["spec"]
    ports = {p["name"]: p["containerPort"] for p in stateful["template"]["spec"]["containers"][0]["ports"]}
    assert ports == {"rounds": 8443, "control": 8444}
    service = objects["Service", stateful["serviceName"]]["spec"]
    assert {p["targetPort"]: p["port"] for p in service["ports"]} == ports


def test_only_hospitals_enter_and_nothing_leaves_unless_it_is_named():
    policy = rendered(values(**LEAST))["NetworkPolicy", "north-coordinator"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert [[p["port"] for p in rule["ports"]] for rule in policy["ingress"]] == [[8443, 8444]]


def test_the_network_policy_names_who_may_do_what():
    policy = rendered(values(**MOST))["NetworkPolicy", "north-coordinator"]["spec"]
    (hospitals,) = policy["ingress"]
    assert [ip_network(peer["ipBlock"]["cidr"]).version for peer in hospitals["from"]] == [4, 6]
    database, names = policy["egress"]
    assert (database["to"], database["ports"]) == (MOST["networkPolicy"]["database"], [{"port": 5432}])
    assert {p["port"] for p in names["ports"]} == {53}


def test_the_pod_keeps_to_the_restricted_profile(given):
    pod = rendered(given)["StatefulSet", "north-coordinator"]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert {volume for each in pod["volumes"] for volume in each if volume != "name"} <= {"emptyDir", "secret"}
    assert not any(key.startswith("host") for key in pod)
    for container in pod["containers"] + pod.get("initContainers", []):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}


def test_the_password_of_the_database_is_only_ever_a_reference():
    pod = rendered(values(**MOST))["StatefulSet", "north-coordinator"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"] == [
        {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": {"name": "pg", "key": "password"}}}
    ]


def test_a_first_start_makes_the_consortium_that_the_values_describe(tmp_path):
    objects = rendered(values(**LEAST))
    pod = objects["StatefulSet", "north-coordinator"]["spec"]["template"]["spec"]
    command = pod["initContainers"][0]["command"]
    made_of = Path(command[2])
    assert command[:2] == ["python", "/opt/cloister/unless.py"]
    assert command[3:6] == ["cloister-coordinator", "init", str(made_of.parent)]
    done = CliRunner().invoke(coordinator, ["init", str(tmp_path / "new"), *command[6:]])
    assert done.exit_code == 0, done.output
    made = yaml.safe_load((tmp_path / "new" / made_of.name).read_text())
    assert (made["name"], made["rounds"]) == ("North", "fl.example.org:8443")
    ports = {port["name"]: port["port"] for port in objects["Service", "north-hospitals"]["spec"]["ports"]}
    assert made["listen"] == {name: f"0.0.0.0:{port}" for name, port in ports.items()}
    assert made["admin"] == "127.0.0.1:8445"
    assert pod["containers"][0]["startupProbe"]["exec"]["command"][2:] == ["8443", "8445"]


def test_the_notes_name_what_was_made():
    notes = render((CHART / "templates/NOTES.txt").read_text(), {"Values": values(**LEAST), "Release": RELEASE})
    assert "north-coordinator-0" in notes
    assert LEAST["consortium"]["host"] in notes
    assert max(map(len, notes.splitlines())) <= 120


def test_the_schema_takes_the_values(given):
    jsonschema.Draft7Validator.check_schema(schema())
    jsonschema.validate(given, schema())


@pytest.mark.parametrize(
    "over",
    [
        {},
        LEAST | {"image": {"tag": "latest"}},
        LEAST | {"imagee": {}},
        LEAST | {"database": {"url": "postgresql+psycopg://cloister:hunter2@db/cloister"}},
        LEAST | {"networkPolicy": {"hospitals": []}},
        LEAST | {"service": {"type": "ExternalName"}},
    ],
    ids=["nothing said", "latest", "misspelt", "password in the address", "no hospitals", "odd service"],
)
def test_the_schema_refuses(over):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values(**over), schema())


def test_the_chart_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == values()["image"]["tag"] == version


@pytest.mark.skipif(
    shutil.which("helm") is None, reason="no helm on this machine: only our own reader has rendered the chart"
)
def test_helm_renders_the_same(given, tmp_path):
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(given))
    command = [
        "helm",
        "template",
        "north",
        str(CHART),
        "--namespace",
        "research",
        "--values",
        str(tmp_path / "values.yaml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert by_name(done.stdout) == rendered(given)
