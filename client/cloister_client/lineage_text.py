"""What the record says of a list of patients, for a privacy officer: a page of 100 columns, or values for a program.

A patient is a line of the list. No id is printed: who asks has the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

from cloister_client.lineage_answer import Rounds, Trace, stretches


@dataclass(frozen=True)
class Answer:
    """What was found."""

    source: str
    """The list's file."""
    lines: tuple[int, ...]
    """Of the patients on it, each once."""
    allowed: frozenset[int]
    """Those who are not on the hospital's own list of opt-outs."""
    traces: Sequence[Trace]
    """Of all studies on record."""
    unrecorded: Sequence[str]

    @property
    def used(self) -> list[Trace]:
        """The studies that used rows of theirs."""
        return [trace for trace in self.traces if trace.parts]


def page(answer: Answer, *, by_patient: bool = False) -> str:
    """In words."""
    whom = {line for trace in answer.used for line in trace.parts}
    count, studies = len(answer.lines), len(answer.traces)
    recorded = f"{studies} stud{'y' if studies == 1 else 'ies'} on record here"
    head = f"{_patients(count)} {'is' if count == 1 else 'are'} on {answer.source}; "
    if whom:
        head += f"rows of {len(whom)} were used, in {len(answer.used)} of {recorded}."
    else:
        head += f"no row of theirs was used in {recorded}."
    lines = [fill(head, 100)]
    for trace in answer.used:
        lines += ["", *(_term(*term) for term in _study(trace, answer))]
    if by_patient and answer.used:
        lines += ["", *_table(answer.used)]
    lines += [""] * bool(notes := _notes(answer)) + [fill(note, 100) for note in notes]
    return "\n".join(lines)


def values(answer: Answer, *, by_patient: bool = False) -> dict[str, Any]:
    """For a program: the same, and every study on record."""

    def value(trace: Trace) -> dict[str, Any]:
        said = {
            **asdict(trace.facts),
            "patients": len(trace.parts),
            "trained": {"patients": len(trace.trained), "rounds": stretches(p.trained for p in trace.parts.values())},
            "held_out": {"patients": len(trace.held_out), "rounds": stretches(p.judged for p in trace.parts.values())},
            "in_statistics": sum(part.statistics for part in trace.parts.values()),
            "traceable": trace.known,
            "state": trace.state,
            "reached": trace.reached,
            "unused_from": trace.since,
            "still_in": len(trace.still),
            "bound": bound(trace),
            "budget": asdict(trace.budget) if trace.budget else None,
            "model": trace.model,
        }
        if by_patient:
            said["by_line"] = {line: asdict(part) for line, part in trace.parts.items()}
        return said

    return {
        "list": answer.source,
        "patients": len(answer.lines),
        "studies": [value(trace) for trace in answer.traces],
        "unrecorded": list(answer.unrecorded),
    }


# --- a study -----------------------------------------------------------------------------------------------
def _study(trace: Trace, answer: Answer) -> list[tuple[str, str]]:
    parts, facts = trace.parts.values(), trace.facts
    said = [("Study", _named(trace)), ("Plan", facts.plan)]
    if trace.trained:
        rounds = stretches(part.trained for part in parts)
        said.append(("Trained", f"rows of {_patients(len(trace.trained))}, in {_spoken(rounds)} of {facts.rounds}"))
    if counted := sum(part.statistics for part in parts):
        said.append(("Counted", f"rows of {_patients(counted)}, in the sums and counts before round 1"))
    if trace.held_out:
        rounds = stretches(part.judged for part in parts)
        when = [f"in {_spoken(rounds)}"] * bool(rounds) + ["at the end"] * any(part.final for part in parts)
        bounded = "exact metrics over such rows left, which nothing bounds" if facts.exact else "within its epsilon"
        what = f"judged the model {' and '.join(when)} and taught it nothing; {bounded}"
        said.append(("Held out", f"rows of {_patients(len(trace.held_out))}, which {what}"))
    return [*said, ("Now", _now(trace, answer)), ("Bound", bound(trace)), ("Model", _model(trace))]


def bound(trace: Trace) -> str:
    """What a model may tell of a patient who trained it."""
    facts, budget = trace.facts, trace.budget
    if not facts.unit or facts.epsilon is None:
        return "none: without differential privacy nothing limits what the model may tell of a patient"
    whom = {"patient": "any one patient", "record": "any one record", "site": "the hospital's whole table"}[facts.unit]
    said = (
        f"by differential privacy the model tells of {whom} at most epsilon {facts.epsilon:g} at delta {facts.delta:g}"
    )
    if facts.unit != "patient":
        said += f"; of one patient {f'epsilon {budget.whole:.3g}' if budget else 'perhaps more'}"
    if budget:
        said += f"; epsilon {budget.spent:.3g} of a patient is spent so far"
    return said + ("; against the coordinator, not if other hospitals help it" if facts.shared else "")


def _now(trace: Trace, answer: Answer) -> str:
    last = trace.facts.rounds
    here = f"before round 1 of {last}" if not trace.reached else f"here at round {min(trace.reached, last)} of {last}"
    said = f"{ {'running': 'still runs', 'unknown': 'not known here any more'}.get(trace.state, trace.state) }, {here}"
    if trace.since is not None:
        when = "the final evaluation" if trace.since > last else f"round {trace.since}"
        return f"{said}; from {when} on none of their rows was used"
    if trace.state != "running":
        return f"{said}; nothing more is computed of their rows for it"
    if still := len(trace.still & answer.allowed):
        return f"{said}, and goes on with {_patients(still)} who {'is' if still == 1 else 'are'} not on the opt-outs"
    after = f"round {trace.reached + 1}" if trace.reached < last else "the final evaluation"
    return f"{said}; the opt-outs are read again before its next message: not used from {after} on"


def _model(trace: Trace) -> str:
    if trace.model:
        return f"the final one came here: model.safetensors with SHA-256 {trace.model}"
    return "no final one came here; the manifest.json of one that was released names the plan above"


# --- parts -------------------------------------------------------------------------------------------------
def _notes(answer: Answer) -> list[str]:
    notes = list[str]()
    if any(trace.trained for trace in answer.used):
        notes.append(
            "A model that was trained keeps what it learned; ask the consortium to withdraw it, or to train anew"
            " without these patients."
        )
    for trace in answer.traces:
        if not trace.known:
            notes.append(f"{_named(trace)} ({trace.facts.plan[:12]}) names no table.patient_id: nobody can be traced.")
    for study in answer.unrecorded:
        notes.append(f"Whose rows {study} used is on no record here: nobody can be traced.")
    return notes


def _table(used: Sequence[Trace]) -> list[str]:
    rows = [f"{'Line':>7}  {'Study':<36}  {'Plan':<12}  {'Trained in rounds':<24}  Held out"]
    for line, trace in sorted(((line, one) for one in used for line in one.parts), key=lambda pair: pair[0]):
        part, name = trace.parts[line], _named(trace)
        name = name if len(name) <= 36 else f"{name[:33]}..."
        trained = _numbers(part.trained) or "-"
        held = "yes" if part.judged or part.final else "-"
        rows.append(f"{line:>7}  {name:<36}  {trace.facts.plan[:12]}  {trained:<24}  {held}")
    return rows


def _spoken(rounds: Rounds) -> str:
    alone = len(rounds) == 1 and rounds[0][0] == rounds[0][1]
    return f"round{'' if alone else 's'} {_numbers(rounds)}"


def _numbers(rounds: Rounds) -> str:
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in rounds)


def _named(trace: Trace) -> str:
    return f"{trace.facts.study}, version {trace.facts.version}"


def _patients(count: int) -> str:
    return f"{count} patient{'' if count == 1 else 's'}"


def _term(term: str, said: str) -> str:
    return fill(said, 100, initial_indent=f"{term:<10}", subsequent_indent=" " * 10, break_long_words=False)
