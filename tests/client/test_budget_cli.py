"""cloister-site budget: what an officer and a reviewer see, and one sentence for each of their mistakes."""

import json
import shutil
import sqlite3
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cloister_client.cli import app
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.ledger import Ledger
from cloister_client.privacy import plan_cost
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import build


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A hospital with a plan, before anybody thought of a budget."""
    folder = tmp_path_factory.mktemp("prepared")
    scenario = Path(str(files("cloister_simulations") / "scenarios" / "generated-ehr.yaml"))
    site = build(GeneratedEhr(source="generated-ehr", sites=2, patients=400), folder)[0]
    plan = yaml.safe_load(scenario.read_text())["plan"]
    plan["training"]["batch_size"] = 100_000  # every row in every step, which is priced at once
    (site.parent / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return site.parent


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    shutil.copytree(prepared, tmp_path / "alder")
    monkeypatch.chdir(tmp_path / "alder")
    return tmp_path / "alder"


def said(*arguments: str, code: int = 0) -> str:
    """What the command prints; no line is wider than a terminal of 100 columns, and nothing is a traceback."""
    done = CliRunner().invoke(app, ["budget", *arguments])
    assert done.exit_code == code, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    if code == 0 and arguments[0] != "export":
        assert max(map(len, done.output.splitlines()), default=0) <= 100
    return done.output


def budgeted(epsilon: float = 4.0) -> None:
    said("officer", "ada")
    said("ceiling", "--epsilon", f"{epsilon}", "--delta", "1e-5", "--officer", "ada", "--key", "ada.key")


def plan_of(folder: Path) -> StudyPlan:
    return read_plan((folder / "plan.yaml").read_text())


def reserved(folder: Path, **changes: object) -> StudyPlan:
    plan = amend(plan_of(folder), **changes)
    ledger = Ledger(folder / "ledger.sqlite")
    ledger.reserve(plan_cost(plan, load_dataset(open_records(folder / "site.yaml"), plan)))
    ledger.close()
    return plan


def test_from_the_first_officer_to_the_export(folder):
    assert "is an officer of this hospital" in said("officer", "ada")
    assert (folder / "ada.key").stat().st_mode & 0o777 == 0o600
    shown = said(
        "ceiling", "--epsilon", "4", "--delta", "1e-5", "--officer", "ada", "--key", "ada.key", "--reason", "the board"
    )
    assert "Ceiling 1 of the patients: epsilon 4 at delta 1e-05, signed by ada." in shown
    plan = reserved(folder)
    shown = said("show")
    for words in ("epsilon 4 at delta 1e-05", "by ada on", "the board", "epsilon 0.000", "epsilon 3.000", "by PLD 2."):
        assert words in shown
    assert f"{plan.study:<40}  {plan.digest[:12]}  open" in shown
    told = said("history")
    for words in ("officer ada named", "ceiling 1 of the patients", "the board", f"reserved for {plan.study}"):
        assert words in told
    found = json.loads(said("export"))
    assert found["audit"]["head"] == found["audit"]["entries"][-1]["hash"]
    assert found["reservations"][0]["plan"] == plan.digest
    assert found["ceiling"]["epsilon"] == 4.0
    released = said("release", plan.study, "--reason", "the study was called off")
    assert "of epsilon 3 it had spent 0" in released
    assert "the study was called off" in " ".join(said("history").split())
    assert "closed" in said("show")


def test_a_quote_says_what_approval_binds_and_what_is_enforced(folder):
    budgeted()
    plan = plan_of(folder)
    page = said("quote", "plan.yaml")
    cost = plan_cost(plan, load_dataset(open_records(folder / "site.yaml"), plan))
    for words in (plan.digest, cost.digest, "20 of 20 local steps", "an estimate", "GB", "Ceiling     epsilon 4"):
        assert words in page
    assert "Epsilon     3.000 at delta 1e-05" in page
    assert "Ledger now  epsilon 0.000" in page
    assert "Ledger then epsilon 3.000" in page
    assert not [path for path in folder.glob("*") if path.name.startswith("answers")]
    reserved(folder)
    assert "it is reserved already" in said("quote", "plan.yaml")


def test_a_quote_that_does_not_fit_says_so_and_exits_1(folder):
    budgeted(2.0)
    page = said("quote", "plan.yaml", code=1)
    for words in (
        "It would be refused now",
        "asks for epsilon 3",
        "have spent 0",
        "the ceiling is 2 at",
        "rounds with",
    ):
        assert words in " ".join(page.split())
    assert max(map(len, page.splitlines())) <= 100


def test_a_quote_of_a_plan_without_privacy_needs_no_budget(folder):
    plan = yaml.safe_load((folder / "plan.yaml").read_text())
    plan |= {"privacy": {"mechanism": "none"}, "normalisation": {"method": "plan"}}
    (folder / "open.yaml").write_text(yaml.safe_dump(plan))
    page = said("quote", "open.yaml")
    assert "NONE: the model may remember a patient" in page
    assert "Ledger" not in page
    assert not (folder / "ledger.sqlite").exists()


def test_what_is_sent_follows_from_the_plan(folder):
    from cloister_client.quote import traffic
    from cloister_shared.layout import initial_model, layout_of

    plan = amend(plan_of(folder), rounds=7, aggregation={"secure_sum": True, "bits": 24, "weights": "equal"})
    size = layout_of(plan, initial_model(plan)).size
    assert traffic(plan) == (pytest.approx(size * 3 * 7 / 1e9), pytest.approx(size * 4 * 8 / 1e9))


# --- mistakes ----------------------------------------------------------------------------------------------
CEILING = ("ceiling", "--epsilon", "4", "--delta", "1e-5", "--officer", "ada", "--key", "ada.key")


@pytest.mark.parametrize("command", [("show",), ("history",), ("export",), ("quote", "plan.yaml"), ("release", "x")])
def test_before_there_is_a_budget_every_question_names_the_mend_and_writes_nothing(folder, command):
    before = sorted(folder.iterdir())
    assert "has no privacy budget yet. Name an officer (cloister-site budget officer)" in said(*command, code=1)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "code", "mend"),
    [
        (("show", "--site", "nope.yaml"), 1, "nope.yaml is not there."),
        (("quote", "nope.yaml"), 1, "nope.yaml is not there."),
        (("officer", "ada"), 2, "already pins a key of ada"),
        (("officer", "a b"), 2, "is no name for an officer"),
        (("officer", "bob", "--key", "ada.key"), 2, "is the key of another officer"),
        (("officer", "bob", "--key", "plan.yaml"), 2, "plan.yaml"),
        (("release", "nothing"), 1, "No open reservation is called nothing. Open now: none."),
        ((*CEILING[:2], "-4", *CEILING[3:]), 1, "A ceiling with epsilon '-4.0' cannot be set."),
        ((*CEILING[:2], "nan", *CEILING[3:]), 1, "A ceiling with epsilon 'nan' cannot be set."),
        ((*CEILING[:4], "2", *CEILING[5:]), 1, "A ceiling with delta '2.0' cannot be set."),
        ((*CEILING[:6], "bob", *CEILING[7:]), 1, "officers.json pins for bob"),
        ((*CEILING[:8], "nope.key"), 2, "nope.key is not there."),
        ((*CEILING[:8], "site.yaml"), 2, "site.yaml"),
        ((*CEILING, "--reason", "x" * 500), 1, "A ceiling with reason"),
        ((*CEILING, "--population", "No One!"), 1, "A ceiling with population 'No One!' cannot be set."),
    ],
)
def test_a_mistake_is_one_sentence_with_its_mend(folder, command, code, mend):
    budgeted()
    shown = said(*command, code=code)
    assert mend in shown
    assert len(shown.splitlines()) == 1
    assert len(json.loads(said("export"))["audit"]["entries"]) == 3


def test_a_damaged_ledger_is_one_sentence(folder):
    budgeted()
    (folder / "ledger.sqlite").write_bytes(b"damaged, and not by us" * 100)
    for path in folder.glob("ledger.sqlite-*"):
        path.unlink()
    assert "cannot be used as a ledger" in said("show", code=2)


def test_an_edited_ledger_is_one_sentence(folder):
    budgeted()
    reserved(folder)
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute("UPDATE reservations SET open = 0")
    assert "is not as it was logged" in said("show", code=2)


def test_a_broken_audit_log_is_one_sentence(folder):
    budgeted()
    log = folder / "audit.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"epsilon":4.0', b'"epsilon":9.0'))
    assert "Entry 3 of audit.jsonl is not what was written" in said("show", code=2)


def test_a_damaged_list_of_officers_is_one_sentence(folder):
    budgeted()
    (folder / "officers.json").write_text("[]")
    assert "officers.json is no roster" in said("show", code=2)


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ("UPDATE ceilings SET rank = 'x'", "at no order of the accountant's"),
        ("UPDATE ceilings SET rank = 1", "at no order of the accountant's"),
        ("DELETE FROM book", "has lost its name"),
        ("INSERT INTO entries (what, said) VALUES ('budget.note', '[1]')", "was not written by Cloister"),
    ],
)
def test_an_edited_ledger_is_refused_in_a_sentence(folder, edit, why):
    budgeted()
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        database.execute(edit)
    assert why in " ".join(said("show", code=2).split())
