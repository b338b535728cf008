"""What a command says where a package is missing that not everybody installs."""

import sys
import tomllib
from pathlib import Path

import pytest

from cloister_shared.console import BROKEN, EXTRAS, plain_errors

EXTRA = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_missing_package_is_one_sentence_that_names_its_extra(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as ended, plain_errors():
        __import__(name)
    assert ended.value.code == BROKEN
    said = f"This needs {name}, which is not installed. Run pip install 'cloister[{EXTRAS[name]}]'.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(("name", "extra"), EXTRAS.items())
def test_the_extra_brings_the_package(name, extra):
    distribution = {"PIL": "pillow", "fhir": "fhir.resources", "dicomweb_client": "dicomweb-client"}.get(name, name)
    assert any(wanted.startswith(distribution) for wanted in EXTRA[extra])


def test_any_other_missing_module_is_a_fault_of_ours():
    with pytest.raises(ModuleNotFoundError), plain_errors():
        __import__("cloister_shared.no_such_room")
