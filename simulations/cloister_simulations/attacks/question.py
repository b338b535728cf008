"""A hostile coordinator at the opening: which questions would take the masks off one update, or off two sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cloister_client.secure import SecureSum
from cloister_shared import masking
from cloister_shared.envelope import new_identity
from cloister_shared.errors import CloisterError, ReplyRejected
from cloister_shared.wire import Statement, digest_of, sign
from cloister_simulations.attacks.attack import attack
from cloister_simulations.attacks.consortium import (
    CULPRIT,
    HOSPITAL,
    HOSPITALS,
    MATHEMATICS,
    OTHERS,
    VICTIM,
    Consortium,
    Loot,
    Refused,
    any_of,
)


# --- two answers -------------------------------------------------------------------------------------------
@attack("active and dropped", HOSPITAL, "both in the sum and dropped")
def active_and_dropped(consortium: Consortium) -> str:
    """The victim is in both lists: one answer has both halves of its masks."""
    loot = Loot(consortium)
    any_of([lambda site=site: loot.ask(site, HOSPITALS, [VICTIM]) for site in OTHERS])
    return loot.open()


@attack("two halves", MATHEMATICS, "can be had")
def two_halves(consortium: Consortium) -> str:
    """Some are told that the victim is in the sum, the rest that it is not."""
    return halves(consortium, ())


@attack("halves + hospital", MATHEMATICS, "can be had")
def two_halves_and_a_hospital(consortium: Consortium) -> str:
    """The same, and a colluding hospital gives the keys to both."""
    return halves(consortium, (CULPRIT,))


def halves(consortium: Consortium, colluding: Sequence[str]) -> str:
    """Just enough hospitals to open the victim's own mask; the rest, for the masks with the others."""
    loot = Loot(consortium)
    honest = [site for site in OTHERS if site not in colluding]
    for site in colluding:
        loot.collude(site)
    told = masking.threshold(len(HOSPITALS)) - len(colluding)
    for site in (VICTIM, *honest[: told - 1]):
        loot.ask(site, HOSPITALS)
    for site in honest[told - 1 :]:
        loot.ask(site, OTHERS, [VICTIM])
    return loot.open()


@attack("replay of a share", HOSPITAL, "answers once a round")
def ask_twice(consortium: Consortium) -> str:
    """The sum with the victim; a restart; then its masks as if it had dropped out."""
    loot = Loot(consortium)
    for site in HOSPITALS:
        loot.ask(site, HOSPITALS)
        consortium.sites[site] = consortium.opened(site)
    any_of([lambda site=site: loot.ask(site, OTHERS, [VICTIM]) for site in OTHERS])
    return loot.open()


@dataclass(frozen=True)
class _Slow(SecureSum):
    """A hospital's process that pauses between looking at a question and writing down that it was answered."""

    pause: Callable[[], object]

    def _answer(self, request: Any, keys: Any) -> bytes:
        self.pause()
        return super()._answer(request, keys)


@attack("share, at once", HOSPITAL, "answers once")
def ask_twice_at_once(consortium: Consortium) -> str:
    """Both questions in one moment, to two processes of each hospital."""
    loot, refused = Loot(consortium), list[CloisterError]()
    loot.ask(VICTIM, HOSPITALS)

    def slow(site: str, pause: Callable[[], object]) -> SecureSum:
        secure = consortium.opened(site).secure
        assert secure
        return _Slow(**vars(secure), pause=pause)

    def ask(process: SecureSum, active: Sequence[str], dropped: Sequence[str] = ()) -> None:
        try:
            answer = process.unmask(loot.question(process.site, active, dropped))
        except CloisterError as refusal:
            refused.append(refusal)
        else:
            loot.take(process.site, active, dropped, answer)

    for site in OTHERS:
        both, told = threading.Event(), threading.Event()
        one, other = slow(site, partial(both.wait, 0.6)), slow(site, partial(_meet, both, told))
        with ThreadPoolExecutor(2) as processes:
            first = processes.submit(ask, one, HOSPITALS)
            first.add_done_callback(lambda _, told=told: told.set())
            second = processes.submit(ask, other, OTHERS, (VICTIM,))
        first.result()
        second.result()
    if len(refused) == len(OTHERS):
        raise Refused(HOSPITAL, str(refused[0]))
    return loot.open()


def _meet(both: threading.Event, told: threading.Event) -> None:
    both.set()
    told.wait(2)


@attack("keys of round 1", MATHEMATICS, "does not open")
def keys_of_the_round_before(consortium: Consortium) -> str:
    """Keys given away for round 1, on the shares of round 2."""
    first = Loot(consortium)
    for site in HOSPITALS:
        first.ask(site, HOSPITALS)
    second = Loot(consortium, consortium.asked(2))
    second.keys = first.keys
    try:
        return second.open()
    except ReplyRejected as odd:
        raise Refused(MATHEMATICS, f"{odd}.") from None


@attack("late update", MATHEMATICS, "can be had")
def late_update(consortium: Consortium) -> str:
    """The victim is declared dropped and the sum opened; then it answers."""
    loot = Loot(consortium, sites=OTHERS)
    for site in OTHERS:
        loot.ask(site, OTHERS, [VICTIM])
    loot.masked[VICTIM] = consortium.send(VICTIM, loot.asked)
    loot.ask(VICTIM, HOSPITALS)
    return loot.open()


# --- which sum ---------------------------------------------------------------------------------------------
@attack("sum of one", HOSPITAL, "The sum is over 1 hospitals")
def sum_of_one(consortium: Consortium) -> str:
    """All but the victim are said to have dropped out."""
    loot = Loot(consortium)
    loot.ask(VICTIM, [VICTIM], OTHERS)
    return loot.open()


@attack("forged statement", HOSPITAL, "not pinned")
def forged_statement(consortium: Consortium) -> str:
    """The coordinator signs the victim's agreement to the terms."""
    loot, own = Loot(consortium), new_identity(consortium.folder / "attacker.key")
    reply = loot.masked[VICTIM]
    said = Statement(transcript=loot.asked.transcript, site=VICTIM, masked=digest_of(reply.octets))
    loot.masked[VICTIM] = replace(reply, header=reply.header.model_copy(update={"signed": sign(own, said)}))
    any_of([lambda site=site: loot.ask(site, HOSPITALS) for site in OTHERS])
    return "the hospitals took a forged statement"
