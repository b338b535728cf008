"""Every attack on the secure sum is refused by whom it should be and for the reason it should be.

And the suite can fail: without the check that refuses an attack, the attack goes through.
"""

import base64
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cloister_client import secure as at_the_hospital
from cloister_client.answers import Answers
from cloister_client.secure import SecureSum
from cloister_shared import durable, masking, plan_rules
from cloister_shared.errors import TicketRefused
from cloister_shared.outcomes import binary
from cloister_shared.wire import Ticket
from cloister_simulations.attacks import flower, suite
from cloister_simulations.attacks.attack import Attack
from cloister_simulations.attacks.consortium import COORDINATOR
from cloister_simulations.attacks.suite import LIMITS, SECURE_SUM, Unexpected, run
from cloister_simulations.cli import SUCCEEDED, app

BY_NAME = {attack.name: attack for attack in (*SECURE_SUM, *LIMITS)}
RECOVERED = "recovered the update of cedar"


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """These tests ask who refuses, not what survives a power cut."""
    monkeypatch.setattr(durable, "_flush", lambda path: None)


@pytest.mark.parametrize("attack", SECURE_SUM, ids=lambda attack: attack.name)
def test_the_attack_is_refused(attack: Attack, tmp_path: Path):
    outcome = run(attack, tmp_path)
    assert outcome.refused, outcome.reason
    assert outcome.by == attack.by
    assert attack.because in outcome.reason


def test_each_attack_has_a_name_of_its_own():
    assert len(BY_NAME) == len(SECURE_SUM) + len(LIMITS)
    assert set(flower.MEASURES) <= {attack.name for attack in SECURE_SUM}
    assert all(attack.attempted and attack.because for attack in BY_NAME.values())


@pytest.mark.parametrize(
    ("name", "gained"),
    [
        ("a third colludes", RECOVERED),
        ("poisoning", "moved every parameter of the mean by 0.25"),
    ],
)
def test_what_the_threat_model_does_not_promise_is_not_stopped(name: str, gained: str, tmp_path: Path):
    """Two of six collude with threshold 4: also proof that the attacker's arithmetic works."""
    outcome = run(BY_NAME[name], tmp_path)
    assert not outcome.refused
    assert gained in outcome.reason


# --- without its check, the attack goes through ------------------------------------------------------------
def without_disjointness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hospital that holds no name in both lists against the coordinator."""
    judge = SecureSum._may_answer

    def lenient(self, request, keys):
        apart = tuple(site for site in request.dropped if site not in request.active)
        judge(self, request.model_copy(update={"dropped": apart}), keys)

    monkeypatch.setattr(SecureSum, "_may_answer", lenient)


def without_once_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hospital that does not move on with its answer."""
    advance = at_the_hospital._advance
    monkeypatch.setattr(at_the_hospital, "_advance", lambda keys, n: None if keys.transcript else advance(keys, n))


def without_a_lock_on_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureSum, "_locked", lambda self: nullcontext())


def without_a_lock_on_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "locked", lambda self, run: nullcontext())


def without_the_model_in_the_transcript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Ticket, "transcript", property(lambda self: Ticket(self.header.model_copy(update={"site": ""})).digest)
    )


def without_one_run_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureSum, "_refuse_another_run", lambda self, run: None)


def with_a_refusal_of_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, name, vector):
        if not np.isfinite(vector).all():
            raise TicketRefused("The update is not finite.")
        return vector.copy(), 0.0

    monkeypatch.setattr(SecureSum, "_within", refuse)


def without_a_coin_for_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(output):
        risk = binary.sigmoid(output[:, 0].astype(np.float64))
        if np.isnan(risk).any():
            raise ValueError("a risk is no number")
        return risk

    monkeypatch.setattr(binary, "probabilities", strict)


def without_a_bound_on_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_rules, "_sum", lambda plan: ())


def without_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    def believe(envelope, kind, roster):
        return kind.model_validate_json(base64.b64decode(json.loads(envelope)["payload"]))

    monkeypatch.setattr(at_the_hospital, "read_signed", believe)


def with_threshold(threshold: Callable[[int], int]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(masking, "threshold", threshold)


@pytest.mark.parametrize(
    ("name", "cut", "gained"),
    [
        ("active and dropped", without_disjointness, RECOVERED),
        ("replay of a share", without_once_a_round, RECOVERED),
        ("share, at once", without_a_lock_on_keys, RECOVERED),
        ("ticket, at once", without_a_lock_on_answers, "one mask hid two draws of noise"),
        ("two halves", with_threshold(lambda sites: sites // 2), RECOVERED),
        ("late update", with_threshold(lambda sites: 1), RECOVERED),
        ("two runs", without_one_run_a_plan, RECOVERED),
        ("two sums", without_one_run_a_plan, RECOVERED),
        ("value by refusals", with_a_refusal_of_what_is_not_finite, "one bit a round"),
        ("value by faults", without_a_coin_for_no_number, "one bit a round"),
        ("tampered model", without_the_model_in_the_transcript, "cedar had another model"),
        ("rows by rounding", without_a_bound_on_rows, "the sum was cedar's update alone"),
        ("key substitution", without_signatures, "the attacker's key"),
    ],
)
def test_without_its_check_the_attack_succeeds(monkeypatch, tmp_path, name, cut, gained):
    """What is ``recovered`` was held against the true update, number by number."""
    cut(monkeypatch)
    for attempt in range(10):
        try:
            outcome = run(BY_NAME[name], tmp_path / str(attempt))
        except (FileNotFoundError, RuntimeError) as tripped:
            # Two writers without their lock may also trip over each other's file: no refusal, and no gain yet.
            if "FileNotFoundError" not in repr(tripped):
                raise
            continue
        break
    else:
        pytest.fail("the attack met a broken file ten times")
    assert not outcome.refused
    assert gained in outcome.reason


def test_another_refusal_does_not_count(tmp_path):
    with pytest.raises(Unexpected, match=r"met another end, by the hospital: Round 1 is over"):
        run(replace(BY_NAME["replay of a round"], because="no such sentence"), tmp_path / "reason")
    with pytest.raises(Unexpected, match="met another end"):
        run(replace(BY_NAME["replay of a round"], by=COORDINATOR), tmp_path / "party")


def test_a_fault_at_the_hospital_is_no_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(SecureSum, "_may_answer", lambda self, request, keys: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError at the hospital"):
        run(BY_NAME["active and dropped"], tmp_path)


# --- the same on Flower's SecAgg+ ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("key substitution", "recovered the update"),
        ("cohort too small", "recovered the update, of a cohort of one"),
        ("active and dropped", "recovered the update"),
        ("two halves", "recovered the update"),
        ("sum of one", "recovered the update"),
        ("split view", "accepted"),
        ("tampered parameters", "accepted"),
        ("replay of a share", "refused: expect setup stage"),
        ("replay of a round", "refused: expect unmask stage"),
        ("same key twice", "refused: Some public keys are identical"),
        ("guessed masks", "2^28 seeds"),
        ("rows by refusals", "in clear"),
        ("reordered blocks", "accepted: the mean is off"),
        ("garbage shares", "the round breaks"),
    ],
)
def test_flower(name: str, said: str):
    assert said in flower.MEASURES[name]()


# --- the command ---------------------------------------------------------------------------------------------
@pytest.fixture
def two_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command run these attacks only."""
    monkeypatch.setattr(suite, "SECURE_SUM", (BY_NAME["active and dropped"], BY_NAME["weak key"]))
    monkeypatch.setattr(suite, "LIMITS", (BY_NAME["a third colludes"],))


@pytest.mark.usefixtures("two_attacks")
def test_the_command_prints_a_table():
    found = CliRunner().invoke(app, ["attack", "secure-sum"], env={"COLUMNS": "100"})
    assert found.exit_code == 0
    assert found.stdout.rstrip().endswith("2 of 2 attacks were refused.")
    for word in ("hospital: A", "recovered", "–", "not stopped", "a third colludes"):
        assert word in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 100


@pytest.mark.usefixtures("two_attacks")
def test_the_command_prints_markdown():
    found = CliRunner().invoke(app, ["attack", "secure-sum", "--markdown"])
    assert "| weak key | A colluding hospital shows" in found.stdout
    assert "| not stopped | attempted | gained |" in found.stdout


@pytest.mark.usefixtures("two_attacks")
def test_the_command_prints_json_and_fails_if_an_attack_got_through(monkeypatch):
    without_disjointness(monkeypatch)
    found = CliRunner().invoke(app, ["attack", "secure-sum", "--json"])
    assert found.exit_code == SUCCEEDED == 3
    said = json.loads(found.stdout)
    assert said["succeeded"] == ["active and dropped"]
    assert [outcome["refused"] for outcome in said["attacks"]] == [False, True]
    assert said["not stopped"][0]["name"] == "a third colludes"


def test_an_unknown_name_is_a_sentence():
    found = CliRunner().invoke(app, ["attack", "secure-sums"])
    assert found.exit_code == 1
    assert "There is no attack secure-sums. Write one of secure-sum." in found.stderr
