"""cloister_shared.plan, plan_file and schema: sound plans. Unsound ones: tests/vectors/plan."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cloister_shared.errors import PlanRefused
from cloister_shared.inputs import columns, numbers, plan_constants, width
from cloister_shared.plan import FedAvg, FedAvgM, StudyPlan
from cloister_shared.plan_file import Source, amend, load, parse, read_plan
from cloister_shared.plan_rules import broken
from cloister_shared.plan_text import summary

ROOT = Path(__file__).resolve().parents[2]
SOUND = (ROOT / "tests/vectors/plan/sound.yaml.txt").read_text(encoding="utf-8").partition("---\n")[2]
SCENARIOS = sorted((ROOT / "simulations/cloister_simulations/scenarios").glob("*.yaml"))
PLAN = read_plan(SOUND)


# --- the digest --------------------------------------------------------------------------------------------
def test_the_digest_is_a_golden():
    """Every hospital has approved a digest: if this changes, every approval ever given is void."""
    assert PLAN.digest == "ecc98ea587448857d2098da7808722a3d277638b98f093daabf4fa5545933b18"


def test_canonical_form_is_sorted_compact_ascii_json_of_every_term():
    canonical = PLAN.canonical()
    assert json.dumps(json.loads(canonical), sort_keys=True, separators=(",", ":")).encode() == canonical
    assert canonical.isascii()
    written = json.loads(canonical)
    assert written["evaluation"]["min_count"] == 5, "a default is a term too"
    assert StudyPlan.model_validate_json(canonical) == PLAN


def test_how_a_plan_is_written_does_not_matter():
    terms = yaml.safe_load(SOUND)
    backwards = yaml.safe_dump(dict(reversed(terms.items())), sort_keys=False)
    as_json = json.dumps(terms, indent=3)
    assert {read_plan(text).digest for text in (SOUND, backwards, as_json)} == {PLAN.digest}
    assert read_plan(SOUND.replace("epsilon: 3.0", "epsilon: 3")).digest == PLAN.digest
    assert read_plan(SOUND.replace("\n", "\r\n")).digest == PLAN.digest


def leaves(terms: object, path: tuple = ()):
    if isinstance(terms, dict):
        for key, value in terms.items():
            yield from leaves(value, (*path, key))
    elif isinstance(terms, list):
        for at, value in enumerate(terms):
            yield from leaves(value, (*path, at))
    else:
        yield path, terms


def test_every_term_is_part_of_the_digest():
    """Change one leaf at a time: whatever is still a plan is another plan."""
    whole, changed, digests = PLAN.model_dump(mode="json"), 0, {PLAN.digest}
    for path, value in leaves(whole):
        match value:
            case bool():
                other = not value
            case int() | float():
                other = value + (1 if isinstance(value, int) else 0.01)
            case str():
                other = value + "s"
            case _:
                continue
        terms = json.loads(json.dumps(whole))
        at = terms
        for part in path[:-1]:
            at = at[part]
        at[path[-1]] = other
        try:
            digests.add(StudyPlan.model_validate_json(json.dumps(terms)).digest)
            changed += 1
        except ValidationError:
            continue
    assert changed > 30
    assert len(digests) == changed + 1


def test_a_plan_is_frozen():
    with pytest.raises(ValidationError):
        PLAN.rounds = 100  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PLAN.privacy.epsilon = 100.0  # type: ignore[misc]


# --- the scenarios that we ship ----------------------------------------------------------------------------
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_shipped_plans_are_sound(path: Path):
    plan = parse(StudyPlan, load(path.read_text(encoding="utf-8"), path.name).below("plan"), broken)
    assert plan.private
    assert width(plan.table) >= len(plan.table.features)


def test_a_fault_in_a_part_keeps_the_line_of_the_whole_file():
    text = "simulation: {seeds: [0]}\nplan:\n" + "".join(f"  {line}\n" for line in SOUND.splitlines())
    assert parse(StudyPlan, load(text, "s.yaml").below("plan"), broken).digest == PLAN.digest
    with pytest.raises(PlanRefused, match=r"^s\.yaml line 15: plan\.rounds = 0 must be at least 1\."):
        parse(StudyPlan, load(text.replace("rounds: 20", "rounds: 0"), "s.yaml").below("plan"), broken)


# --- several faults at once --------------------------------------------------------------------------------
def test_each_fault_has_a_line_of_its_own():
    text = (
        SOUND.replace("rounds: 20", "rounds: 0")
        .replace("epsilon:", "epsilonn:")
        .replace("kind: boolean", "kind: bolean")
    )
    with pytest.raises(PlanRefused) as refused:
        read_plan(text, "plan.yaml")
    lines = str(refused.value).splitlines()
    # In the order of the file's terms; a misspelt key is not also said to be missing.
    assert [found.groups() for line in lines if (found := re.match(r"plan\.yaml line (\d+): (\S+)", line))] == [
        ("10", "table.features[2].kind"),
        ("13", "rounds"),
        ("17", "privacy.epsilonn"),
    ]
    assert all(line.endswith((".", "?")) for line in lines)


def test_broken_rules_are_all_told():
    text = SOUND.replace("hidden: [16]", "hidden: [16], norm: batch").replace("range: [18, 110]", "range: [110, 18]")
    with pytest.raises(PlanRefused) as refused:
        read_plan(text)
    assert [line.split()[3] for line in str(refused.value).splitlines()] == [
        "table.features[0].range",
        "task.norm",
    ]


# --- amend -------------------------------------------------------------------------------------------------
def test_amend_merges_sections_and_replaces_terms():
    changed = amend(PLAN, rounds=5, privacy={"epsilon": 1.0}, training={"batch_size": 64})
    assert (changed.rounds, changed.privacy.epsilon, changed.privacy.delta) == (5, 1.0, PLAN.privacy.delta)
    assert (changed.training.batch_size, changed.training.local_steps) == (64, 10)
    assert changed.digest != PLAN.digest
    assert amend(PLAN) == PLAN


def test_amend_to_another_strategy_keeps_nothing_of_the_old_one():
    plan = amend(PLAN, strategy={"name": "fedavgm", "momentum": 0.5, "server_learning_rate": 2.0})
    assert amend(plan, strategy={"name": "fedavg"}).strategy == FedAvg(name="fedavg")
    assert amend(plan, strategy={"momentum": 0.1}).strategy == FedAvgM(
        name="fedavgm", momentum=0.1, server_learning_rate=2.0
    )


def test_amend_checks_anew():
    with pytest.raises(PlanRefused, match=r"stroke-risk as amended: privacy\.epsilon = -1\.0 must be above 0"):
        amend(PLAN, privacy={"epsilon": -1.0})
    with pytest.raises(PlanRefused, match="no per-row clip holds under DP"):
        amend(PLAN, normalisation={"method": "site"})


# --- whatever is in the file -------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_spoilt_plan_is_refused_in_sentences(data: st.DataObject):
    """A plan with some characters changed is a plan or a refusal, and never a traceback."""
    text = SOUND
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.sampled_from([0, 1, 1, 5, 40]))
        put = data.draw(
            st.text("\n\t -:{}[],&*!|>'\"%@`#?~.019eEaxnoé\ud800\u2028", max_size=4)
            | st.sampled_from(["<<: ", "null", "!!set", "- ", "? "])
        )
        text = text[:at] + put + text[at + length :]
    refused_in_sentences(text)


def test_a_key_with_a_line_separator_is_told_on_one_line():
    refused_in_sentences(SOUND + '"od\u2028d": 1\n')


ODD = """null ~ '' [] {} [[]] {a:b} -1 1e400 0x10 1_000 true !!str 2020-01-01 '\\uD800' "\\uD800" *x &x ? << ="""


@pytest.mark.parametrize("value", [*ODD.split(), "{a: b}", "!!str 1", "&x 1", "|\n  x"])
def test_an_odd_value_anywhere_is_refused_in_sentences(value: str):
    lines = SOUND.splitlines()
    for at, line in enumerate(lines):
        key, colon, _ = line.partition(": ")
        if colon:
            refused_in_sentences("\n".join([*lines[:at], f"{key}: {value}", *lines[at + 1 :]]))
        for found in re.finditer(r"(?<=: )[^,{}\[\]]+(?=[,}])", line):
            spoilt = line[: found.start()] + value + line[found.end() :]
            refused_in_sentences("\n".join([*lines[:at], spoilt, *lines[at + 1 :]]))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
@example("? [a, b]\n: c")
@example("? {a: b}\n: c")
@example("1: a\n'1': b")
@example(".nan: 1\n.inf: 2")
@example("%YAML 9.9\n---\na: 1")
@example("<<: {a: 1}")
def test_any_text_is_refused_in_sentences(text: str):
    refused_in_sentences(text)


def refused_in_sentences(text: str) -> None:
    refused = None
    try:
        read_plan(text)
    except PlanRefused as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith("plan")
        for line in refused.splitlines():
            assert line.rstrip().endswith((".", "?")), line


def test_values_without_a_file_are_told_without_lines():
    terms = PLAN.model_dump(mode="json")
    del terms["rounds"]
    with pytest.raises(PlanRefused, match=r"^mine: rounds is missing\."):
        parse(StudyPlan, Source("mine", terms), broken)


# --- the schema's columns ----------------------------------------------------------------------------------
def test_columns_in_order():
    assert [(column.name, column.kind, column.absent) for column in columns(PLAN.table)] == [
        ("age", "number", False),
        ("weight", "number", False),
        ("weight is missing", "number", True),
        ("smoker", "boolean", False),
        ("rhythm = sinus", "category", False),
        ("rhythm = paced", "category", False),
    ]
    assert [feature.name for feature in numbers(PLAN.table)] == ["age", "weight"]


def test_plan_constants_bring_the_range_to_plus_minus_two_unless_mean_and_sd_are_given():
    age, weight = numbers(PLAN.table)
    centre, scale = plan_constants(age)
    assert [(value - centre) / scale for value in age.range] == [-2.0, 2.0]
    assert plan_constants(weight.model_copy(update={"mean": 80.0, "sd": 15.0})) == (80.0, 15.0)


# --- readiness ---------------------------------------------------------------------------------------------
def test_a_term_that_is_not_there_is_not_in_the_digest():
    """Plans that ask for no readiness keep the digest that they were approved under."""
    assert b"readiness" not in PLAN.canonical()
    asking = amend(PLAN, readiness={})
    assert b'"readiness":{"epsilon_share":null,"hold":false}' in asking.canonical()
    assert len({PLAN.digest, asking.digest, amend(PLAN, readiness={"hold": True}).digest}) == 3


def test_the_page_says_what_a_hospital_tells_of_itself():
    page = " ".join(summary(amend(PLAN, readiness={"epsilon_share": 0.1, "hold": True})).split())
    assert "before training the coordinator learns of this hospital by itself how many" in page
    assert "alone within 10% of epsilon and counted in it; then the study waits until a person has read it" in page
    assert "counts of each hospital's own before training, within 10% of epsilon alone" in page
    assert "Readiness" not in summary(PLAN)
