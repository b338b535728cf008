"""Every command that a guide or a deployment file tells people to type is one that exists, with its options."""

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from cloister_client.cli import app as site
from cloister_server.cli import app as coordinator
from cloister_server.folder import open_consortium

ROOT = Path(__file__).parents[2]
PAGES = [
    "docs/guides/coordinator.md",
    "docs/guides/hospital.md",
    "server/deploy/compose.yaml",
    "server/deploy/chart/templates/NOTES.txt",
    "server/deploy/cloister-coordinator.service",
]
COMMANDS = {"cloister-site": typer.main.get_command(site), "cloister-coordinator": typer.main.get_command(coordinator)}


def typed(page: str) -> list[list[str]]:
    """The command lines of a page, from the command's name on; of a guide, those in its code."""
    text = (ROOT / page).read_text()
    if page.endswith(".md"):
        text = "\n".join(re.findall(r"```\w*\n.*?```|`[^`\n]+`", text, flags=re.S))
    text = re.sub(r"\\\n[\s#]*", "", text).replace("compose run --rm coordinator", "cloister-coordinator")
    lines = re.findall(r"\b(cloister-(?:site|coordinator) [a-z][^\n`]*)", text)
    return [[word.rstrip(").,;:") for word in re.split(r"\s#|\s[>|]|&&", line)[0].split()] for line in lines]


def missing(words: list[str]) -> str | None:
    """The word of a command line that its command does not know."""
    command: click.Command = COMMANDS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest:
        if rest[0] not in command.commands:
            return rest[0]
        command = command.commands[rest.pop(0)]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return next((word for word in rest if word.startswith("--") and word not in {*options, "--help"}), None)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_to_type_exists(page):
    lines = typed(page)
    assert lines
    assert {" ".join(words): word for words in lines if (word := missing(words))} == {}


def test_a_backup_made_as_the_guide_says_is_a_consortium_again(tmp_path):
    here, there, backup = (tmp_path / name for name in ("here", "there", "backup"))
    assert CliRunner().invoke(coordinator, ["init", str(here / "consortium")]).exit_code == 0
    there.mkdir()
    backup.mkdir()
    (line,) = re.findall(r"^tar -C .* consortium", (ROOT / "docs/guides/coordinator.md").read_text(), flags=re.M)
    line = line.replace("/var/lib/cloister", str(here)).replace("/backup", str(backup))
    subprocess.run(["sh", "-c", line], check=True)
    shutil.rmtree(here)
    subprocess.run(["sh", "-c", f"cd {there} && tar -xzpf {backup}/consortium-*.tar.gz"], check=True)
    again = open_consortium(there / "consortium")
    assert [account.name for account in again.registry.accounts()] == ["officer"]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("cloister-site enroll FILE", "enroll"),
        ("cloister-coordinator study delete X", "delete"),
        ("cloister-site approve STUDY --officier ada", "--officier"),
        ("cloister-coordinator invite NAME --hours 3", None),
    ],
)
def test_a_command_that_does_not_exist_is_found(line, word):
    assert missing(line.split()) == word
