"""What hospital people read and type about a study, from its arrival to its end."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from cloister_client.approval_page import page, plain
from cloister_client.approvals import Approvals, Standing
from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_client.ledger import Ledger
from cloister_client.liaison import catch_up
from cloister_client.membership import consortium_of, site_of
from cloister_client.offers import receive, study_of
from cloister_client.privacy import plan_cost
from cloister_shared.errors import TicketRefused


def words(text):
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


def red(text):
    return re.findall(r"\x1b\[31m\x1b\[1m(.*?)\x1b\[0m", text)


def test_from_an_offer_to_an_approval_and_back(coordinator, offered):
    alder, digest = offered
    assert f"generated-ehr {digest[:12]} undecided - submitted" in words(alder.types("studies"))
    key = alder.officer("ada")
    page = alder.types("approve", digest[:12], "--officer", "ada", "--key", key, "--yes")
    assert f"generated-ehr ({digest[:12]}) is approved by ada. The coordinator has been told." in words(page)
    assert coordinator.said(digest) == {"alder": "approved"}
    assert f"{digest[:12]} approved ada submitted" in words(alder.types("studies"))
    assert "cloister-site revoke" in alder.types("show", digest[:12])
    said = alder.types("revoke", digest[:12], "--reason", "the board said so")
    assert "is revoked here. Nothing more leaves for it" in words(said)
    assert f"cloister-site budget release {digest[:12]}" in said
    assert coordinator.said(digest) == {"alder": "revoked"}
    page = words(alder.types("approve", digest[:12], "--officer", "ada", "--key", key, "--yes"))
    assert re.search(r"Here revoked by account \w+ on \d{4}-\d\d-\d\d: the board said so", page)
    assert coordinator.said(digest) == {"alder": "approved"}


def test_the_page_says_what_is_asked_of_whom_and_at_what_cost(coordinator, offered):
    alder, digest = offered
    alder.officer("ada")
    shown = alder.types("show", digest[:12])
    page = words(shown)
    for said in (
        "Asked by North; submitted by a researcher on",
        "Here not decided yet",
        "Predicts deteriorated from 14 features",
        "Rounds 20 of 20 local steps",
        "strategy fedavg",
        "Secure sum on: the coordinator sees only the sum",
        "Protects a patient with all records",
        "Mechanism DP-SGD at each hospital",
        "bmi number kg/m**2, 10 to 70 LOINC:39156-5",
        "admission_type category emergency, urgent, -",
        "deteriorated OUTCOME 1 against 0",
        "patient_id patient's id",
        "Hours 0.",
        "GB 0.",
        "Epsilon 3.000 at delta 1e-05, by itself",
        "Ledger now epsilon 0.000",
        "Ledger then epsilon 3.000",
        "Ceiling epsilon 4, signed by ada",
        f"Plan {digest}",
        "(these charges, and no others)",
        "Next, one of:",
    ):
        assert said in page, said
    assert re.search(r"alder +(\w{4} ){4} this one", shown)


def test_new_hospitals_and_what_is_turned_off_are_in_red(coordinator, offered):
    alder, digest = offered
    alder.officer("ada")
    said = red(alder.types("show", digest[:12]))
    assert [line.split()[0] for line in said[:3]] == ["birch", "cedar", "birch,"]
    assert said[2].startswith("birch, cedar are new: compare the keys by telephone before you approve.")
    assert said[3].startswith("Held-out metrics EXACT")


def test_the_page_names_this_hospitals_own_columns_and_units(coordinator, offered):
    alder, digest = offered
    alder.says(table={"path": "table.csv", "columns": {"bmi": "BMI_VALUE"}, "units": {"weight": "lb"}})
    page = words(alder.types("show", digest[:12]))
    assert "bmi number kg/m**2, 10 to 70 LOINC:39156-5 BMI_VALUE" in page
    assert "weight number kg, 25 to 300 LOINC:29463-7 - in lb" in page


def test_the_page_is_shown_without_a_budget_and_says_what_to_do(coordinator, offered):
    alder, digest = offered
    said = red(alder.types("show", digest[:12]))
    assert "There is no quote, so it cannot be approved now. alder has no privacy budget yet." in " ".join(said)


def test_it_is_asked_before_anything_is_signed(coordinator, offered):
    alder, digest = offered
    key = alder.officer("ada")
    said = alder.types("approve", digest[:12], "--officer", "ada", "--key", key, code=1, answer="n\n")
    assert "Do you, ada, approve this study for North? [y/N]" in said
    assert "Nothing was approved." in said
    assert Approvals(alder.agent).standing(digest) == "offered"
    alder.types("approve", digest[:12], "--officer", "ada", "--key", key, answer="y\n")
    assert Approvals(alder.agent).standing(digest) == "approved"


def test_two_officers_where_the_policy_says_so(coordinator, offered):
    alder, digest = offered
    alder.says(policy={"approvals": 2})
    ada, bob = alder.officer("ada"), alder.officer("bob", ceiling=False)
    first = words(alder.types("approve", digest[:12], "--officer", "ada", "--key", ada, "--yes"))
    assert "ada approved generated-ehr; it counts once another officer does:" in first
    assert "1 of 2 yes ada" in words(alder.types("studies"))
    assert coordinator.said(digest) == {}
    again = alder.types("approve", digest[:12], "--officer", "ada", "--key", ada, "--yes", code=1)
    assert "ada approved generated-ehr already; the policy demands 2 people." in words(again)
    assert "Here not decided yet; ada approved, too few so far" in words(alder.types("show", digest[:12]))
    alder.types("approve", digest[:12], "--officer", "bob", "--key", bob, "--yes")
    assert coordinator.said(digest) == {"alder": "approved"}
    assert "approved ada, bob" in words(alder.types("studies"))


def test_what_was_approved_is_what_the_ledger_holds_a_study_to(coordinator, offered):
    alder, digest = offered
    alder.types("approve", digest[:12], "--officer", "ada", "--key", alder.officer("ada"), "--yes")
    quote, plan = Approvals(alder.agent).quote(digest), study_of(alder.agent, digest).plan
    cost = plan_cost(plan, load_dataset(open_records(alder.site), plan))
    assert quote == cost.digest
    ledger = Ledger(alder.folder / "ledger.sqlite")
    try:
        with pytest.raises(TicketRefused, match="is not what was approved"):
            ledger.reserve(replace(cost, charges=cost.charges[:1]), approved=quote)
        ledger.reserve(cost, approved=quote)
    finally:
        ledger.close()


def test_a_study_past_the_ceiling_cannot_be_approved(coordinator, offered):
    alder, digest = offered
    key = alder.officer("ada", ceiling=False)
    alder.types("budget", "ceiling", "--epsilon", "2", "--delta", "1e-5", "--officer", "ada", "--key", key)
    said = words(alder.types("approve", digest[:12], "--officer", "ada", "--key", key, "--yes", code=1))
    assert "It would be refused now." in said
    assert "cannot be approved: Study generated-ehr asks for epsilon 3" in said
    assert Approvals(alder.agent).standing(digest) == "offered"


@pytest.mark.parametrize("key", ["bob.key", "nope.key", "site.yaml"])
def test_another_key_than_the_officers_is_one_sentence(coordinator, offered, key):
    alder, digest = offered
    alder.officer("ada")
    alder.officer("bob", ceiling=False)
    code = 1 if key == "bob.key" else 2
    said = alder.types("approve", digest[:12], "--officer", "ada", "--key", alder.folder / key, "--yes", code=code)
    assert "Traceback" not in said
    assert key in said or "pins for ada" in said
    assert Approvals(alder.agent).standing(digest) == "offered"


def test_without_the_coordinator_everything_is_decided_here_and_told_later(coordinator, offered):
    alder, digest = offered
    key = alder.officer("ada")
    coordinator.stop()
    try:
        page = words(alder.types("approve", digest[:12], "--officer", "ada", "--key", key, "--yes"))
        assert "The coordinator could not be told now; the agent will tell it." in page
        shown = words(alder.types("studies"))
        assert f"{digest[:12]} approved ada submitted" in shown
        assert "What stands here may be old. The coordinator at" in shown
        assert "may be old" not in alder.types("studies", "--offline")
        assert "is revoked here" in alder.types("revoke", digest[:12], "--reason", "a bad night")
    finally:
        coordinator.start()
    assert coordinator.said(digest) == {}
    catch_up(alder.agent)
    assert coordinator.said(digest) == {"alder": "revoked"}


def test_a_damaged_study_is_named_and_the_others_are_listed(coordinator, offered, plan_text):
    alder, digest = offered
    version = len(coordinator.consortium.registry.studies()) + 1
    second = coordinator.submit(plan_text + f"version: {version}\n", "alder", "birch", "cedar")
    catch_up(alder.agent)
    path = alder.agent / "studies" / digest[:16] / "offer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"payload": ""}))
    said = words(alder.types("studies", "--offline"))
    assert second[:12] in said
    assert "Nothing of it runs here." in said
    assert "No study called" in alder.types("show", digest[:12], code=1)


def test_rejecting_needs_a_reason_and_no_key(coordinator, offered):
    alder, digest = offered
    assert "Missing option '--reason'" in words(alder.types("reject", digest[:12], code=2))
    assert f"generated-ehr ({digest[:12]}) is rejected here." in words(
        alder.types("reject", digest[:12], "--reason", "not our patients")
    )
    assert coordinator.said(digest) == {"alder": "rejected"}


# --- what others wrote cannot forge the page ---------------------------------------------------------------
def test_signs_that_move_the_cursor_are_taken_out():
    assert plain("a\x1b[2Jb\u202ec\rd\u200be") == "a�[2Jb�c�d�e"
    assert plain("Hôpital Saint-Louis, ε 3") == "Hôpital Saint-Louis, ε 3"


def page_of(alone, **changes):
    terms = yaml.safe_load(alone.plan)
    study = receive(alone.agent, alone.news(yaml.safe_dump(terms | changes)))
    known, site = consortium_of(alone.agent), site_of(alone.agent)
    return [line for line, _ in page(study, known, site, Standing("offered"), "?")]


def test_a_title_cannot_write_its_own_page(alone):
    title = "Harmless\n\x1b[2J\x1b[HWHAT IT COSTS HERE\n\nEpsilon 0.001\u202e"
    lines = page_of(alone, title=title)
    assert all(line.isprintable() for line in lines)
    assert lines.count("WHAT IT COSTS HERE") == 1
    assert not any(line.startswith("Epsilon") for line in lines)


def test_long_names_are_wrapped_and_nothing_is_cut_off(alone):
    table = yaml.safe_load(alone.plan)["table"]
    categories = [f"category number {at}" for at in range(12)]
    table["features"] += [{"name": "n" * 80, "kind": "category", "categories": categories}]
    lines = page_of(alone, table=table)
    assert max(map(len, lines)) <= 100
    assert sum(line.count("n") for line in lines if "n" * 10 in line) >= 80
    assert "category number 7" in words(" ".join(lines))
    assert any("and 4" in line for line in lines)
