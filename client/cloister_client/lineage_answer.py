"""Which studies used the rows of which patients of a list: in what part, in which rounds, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cloister_client.approvals import Approvals
from cloister_client.ledger import Ledger
from cloister_client.lineage_book import Facts, LineageBook, Use
from cloister_client.offers import news_in, study_folder
from cloister_shared.pseudonyms import Names, among, pseudonyms

Rounds = tuple[tuple[int, int], ...]
"""First and last of each stretch; in order."""


@dataclass(frozen=True)
class Part:
    """What a study did with one patient's rows. Where nothing is said of a part, they were in none of it."""

    trained: Rounds = ()
    judged: Rounds = ()
    """Rounds whose model the patient's held-out rows judged; of the plan's metrics, exact ones alone."""
    statistics: bool = False
    """Whether the rows were in the sums and counts before round 1."""
    final: bool = False
    """Whether held-out rows judged the final model."""


@dataclass(frozen=True)
class Budget:
    """What the ledger says of a study: epsilons of one patient, at the plan's delta."""

    whole: float
    spent: float


@dataclass(frozen=True)
class Trace:
    """One study, and those of the list that it used."""

    facts: Facts
    parts: Mapping[int, Part]
    """By the number of a patient's line; only those that were used."""
    known: bool
    """Whether the plan says whose each row is; else nobody can be traced."""
    still: frozenset[int]
    """Who is in the set that was used last."""
    since: int | None
    """The first round that was worked on without any of them; None if there was none yet."""
    reached: int
    """The last round that was worked on here."""
    state: str
    """``finished`` or ``stopped`` as the coordinator said, ``revoked`` and the like here, ``running``, ``unknown``."""
    model: str
    """SHA-256 of the file that is released of the final model; "" if it did not come here."""
    budget: Budget | None

    @property
    def trained(self) -> list[int]:
        """Lines of those whose rows trained the model."""
        return [line for line, part in self.parts.items() if part.trained]

    @property
    def held_out(self) -> list[int]:
        """Lines of those whose rows judged it."""
        return [line for line, part in self.parts.items() if part.judged or part.final]

    @property
    def goes_on(self) -> bool:
        """Whether a message of it would be answered here."""
        return self.state == "running"


def traces(book: LineageBook, agent: Path, lines: Mapping[int, str], ledger: Ledger | None) -> list[Trace]:
    """Of every study on record, in order of its first use. ``lines``: the ids of a list, by line.

    Raises:
        LineageBroken: the record is damaged.
        LedgerBroken: the ledger is.
    """
    names = pseudonyms(book.key, lines.values())
    found = list[Trace]()
    for plan in dict.fromkeys(use.plan for use in book.uses()):
        uses, facts = book.uses(plan), book.facts(plan)
        digests = {digest for use in uses for digest in (use.train, use.held_out)}
        inside = {digest: _lines(book, digest, names, list(lines)) for digest in digests}
        used = [inside[use.train] | inside[use.held_out] for use in uses]
        last = max((at for at, those in enumerate(used) if those), default=-1)
        found.append(
            Trace(
                facts=facts,
                parts={line: part for line in sorted(lines) if (part := _part(line, uses, inside, facts)) != Part()},
                known=any(use.train for use in uses),
                still=used[-1],
                since=uses[last + 1].began if 0 <= last < len(uses) - 1 else None,
                reached=max(use.last or use.began for use in uses),
                state=_state(agent, plan),
                model=book.model(plan),
                budget=_budget(ledger, facts) if ledger else None,
            )
        )
    return found


def unrecorded(book: LineageBook, ledger: Ledger | None) -> list[str]:
    """Studies that worked on rows here, as the logs and the ledger say, and whose patients are on no record."""
    known = {use.plan for use in book.uses()}
    lost = {str(e.said["plan"]): str(e.said["study"]) for e in book.lost()}
    paid = {one.plan: one.study for one in (ledger.reservations() if ledger else []) if one.spent}
    return sorted(f"{study} ({plan[:12]})" for plan, study in {**paid, **lost}.items() if plan not in known)


def _lines(book: LineageBook, digest: str, names: Names, lines: list[int]) -> frozenset[int]:
    """Whose pseudonym is in a set."""
    if not digest or not lines:
        return frozenset()
    found = among(names, book.members(digest))
    return frozenset(line for line, is_in in zip(lines, found.tolist(), strict=True) if is_in)


def _part(line: int, uses: Iterable[Use], inside: Mapping[str, frozenset[int]], facts: Facts) -> Part:
    trained = [use for use in uses if line in inside[use.train]]
    held_out = [use for use in uses if line in inside[use.held_out]]
    return Part(
        trained=_rounds(trained),
        judged=_rounds(held_out) if facts.exact else (),
        statistics=any(use.statistics for use in (trained + held_out if facts.readiness else trained)),
        final=any(use.judged for use in held_out),
    )


def _rounds(uses: Iterable[Use]) -> Rounds:
    return stretches(((use.first, use.last),) for use in uses if use.first is not None and use.last is not None)


def stretches(found: Iterable[Rounds]) -> Rounds:
    """All rounds of all of them, those that touch made one."""
    made = list[tuple[int, int]]()
    for first, last in sorted(stretch for one in found for stretch in one):
        if made and first <= made[-1][1] + 1:
            made[-1] = made[-1][0], max(made[-1][1], last)
        else:
            made.append((first, last))
    return tuple(made)


def _state(agent: Path, plan: str) -> str:
    standing, said = Approvals(agent).standing(plan), news_in(study_folder(agent, plan)).state
    if said in ("finished", "stopped"):
        return said
    return "running" if standing == "approved" else standing


def _budget(ledger: Ledger, facts: Facts) -> Budget | None:
    own = [one for one in ledger.reservations() if one.plan == facts.plan]
    if not own or facts.delta is None:
        return None
    spent = [event for one in own for event in one.spent]
    return Budget(ledger.price(own[0].charges, facts.delta), ledger.price(spent, facts.delta))
