"""Studies as they arrive: held against what is pinned, and kept in ``agent/studies``, one folder a study.

offer.json      the coordinator's envelope: plan and hospitals
news.json       what the coordinator last said of the study: at its end the agent frees what is left of its budget
decision.json   what this hospital says (see ``approvals``)
roster.json     the hospitals that it approved
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cloister_client.membership import Consortium, consortium_of, hold_against, tell
from cloister_shared import audit, durable
from cloister_shared.agreement import Offer, read_offer, roster_digest
from cloister_shared.control_pb2 import StudyNews
from cloister_shared.envelope import key_id, read_identity
from cloister_shared.errors import EnvelopeRefused, Refusal, StudyRefused
from cloister_shared.plan import StudyPlan


class News(BaseModel):
    """What the coordinator last said of a study."""

    model_config = ConfigDict(frozen=True, strict=True)

    state: str = ""
    reason: str = ""
    round: int = 0
    rounds: int = 0
    took_part: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """An offer that was held against what is pinned."""

    folder: Path
    offer: Offer
    plan: StudyPlan

    @property
    def digest(self) -> str:
        """Of the plan."""
        return self.offer.digest

    @property
    def roster(self) -> str:
        """Digest of the hospitals."""
        return roster_digest(self.offer.roster)

    @property
    def news(self) -> News:
        """What the coordinator last said of it."""
        return news_in(self.folder)


def news_in(folder: Path) -> News:
    """What the coordinator last said of the study that is kept here."""
    try:
        return News.model_validate_json((folder / "news.json").read_bytes())
    except (OSError, ValidationError):
        return News()


def study_folder(agent: Path, digest: str) -> Path:
    """Where a study is kept: the start of the digest is name enough."""
    return agent / "studies" / digest[:16]


def study_of(agent: Path, digest: str) -> Study:
    """The study of this plan, its offer verified anew: the coordinator's signature, the digest, our own name and key.

    Raises:
        StudyRefused: no such study was offered.
        EnvelopeRefused: the offer on disk is not what the coordinator signed for this hospital.
    """
    folder = study_folder(agent, digest)
    envelope = _text(folder / "offer.json")
    if not envelope:
        raise StudyRefused(f"No study {digest[:12]} was offered here.", mend=_LIST)
    offer, plan = _checked(agent, consortium_of(agent), envelope)
    if offer.digest != digest:
        raise EnvelopeRefused(f"{folder / 'offer.json'} is the offer of another study, {offer.digest[:12]}.")
    return Study(folder, offer, plan)


_LIST = "cloister-site studies lists those that were."


def studies_of(agent: Path) -> tuple[list[Study], list[str]]:
    """The studies on disk, the newest last; and a sentence for each whose files cannot be used.

    Raises:
        EnrolmentRefused: this hospital is not enrolled.
        KeyBroken: a file of its enrolment is damaged.
    """
    known, found, broken = consortium_of(agent), list[Study](), list[str]()
    for path in sorted((agent / "studies").glob("*/offer.json")):
        try:
            offer, plan = _checked(agent, known, _text(path))
            if study_folder(agent, offer.digest) != path.parent:
                raise EnvelopeRefused(f"It is the offer of another study, {offer.digest[:12]}.")
            found.append(Study(path.parent, offer, plan))
        except Refusal as error:
            broken.append(f"{path}: {error.said} Nothing of it runs here.")
    return sorted(found, key=lambda study: study.offer.at), broken


def called(agent: Path, name: str) -> Study:
    """The study with this name, or whose plan's digest begins so.

    Raises:
        StudyRefused: there is none, or more than one.
    """
    found = studies_of(agent)[0]
    fit = [s for s in found if s.plan.study == name or (len(name) >= 6 and s.digest.startswith(name))]
    if len(fit) == 1:
        return fit[0]
    if fit:
        several = ", ".join(study.digest[:12] for study in fit)
        raise StudyRefused(f"{len(fit)} studies are called {name}.", mend=f"Give the start of a digest: {several}.")
    raise StudyRefused(f"No study called {name[:80]!r} was offered here.", mend=_LIST)


# --- arrival -----------------------------------------------------------------------------------------------
def receive(agent: Path, news: StudyNews) -> Study:
    """Keep what the coordinator says of a study; a new offer is verified first, and the audit log told.

    Raises:
        Refusal: the offer is not the coordinator's, not for this hospital, or shows a hospital with another key than
            the pinned one; nothing is kept of it, and the audit log is told once.
    """
    try:
        return _received(agent, consortium_of(agent), news)
    except Refusal as error:
        _tell_once(agent, {"plan": news.digest[:64], "why": str(error)})
        raise


def _received(agent: Path, known: Consortium, news: StudyNews) -> Study:
    offer, plan = _checked(agent, known, news.offer)
    if offer.digest != news.digest:
        raise EnvelopeRefused(f"The offer said to be of study {news.digest[:12]} is of {offer.digest[:12]}.")
    study = Study(study_folder(agent, offer.digest), offer, plan)
    path = study.folder / "offer.json"
    if _text(path) != news.offer:
        hold_against(known.roster, offer.roster)
    study.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with durable.locked(path):
        if (held := _text(path)) != news.offer:
            _hold_against_held(agent, known, held, study)
            hospitals = {name: key_id(key) for name, key in offer.roster.items()}
            said = {"plan": offer.digest, "study": plan.study, "hospitals": hospitals, "by": offer.submitted_by}
            tell(agent, "study.offered", said)
            durable.save_text(path, news.offer)
        found = News(
            state=news.state,
            reason=news.reason,
            round=news.round,
            rounds=news.rounds,
            took_part=tuple(news.took_part),
        )
        if found != study.news:
            durable.save_text(study.folder / "news.json", found.model_dump_json())
    return study


def _text(path: Path) -> str:
    """What lies there, "" for nothing; octets that are no text make no signature."""
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _checked(agent: Path, known: Consortium, envelope: str) -> tuple[Offer, StudyPlan]:
    """An offer that the coordinator made, to this hospital among others."""
    offer, plan = _read(envelope, known.signing)
    if offer.consortium != known.consortium:
        raise EnvelopeRefused(f"The offer of {plan.study} is of {offer.consortium}, not of {known.consortium}.")
    own = read_identity(agent / "identity.key").public
    if offer.roster.get(known.site) != own:
        shown = offer.roster.get(known.site)
        how = f"with the key {key_id(shown)}, which is not its own" if shown else "not at all"
        raise EnvelopeRefused(
            f"The offer of {plan.study} names {known.site} {how}.",
            mend=f"Tell the consortium: this hospital's key is {key_id(own)}.",
        )
    return offer, plan


@lru_cache(maxsize=64)
def _read(envelope: str, signing: str) -> tuple[Offer, StudyPlan]:
    """Kept: the agent asks at every message, and a plan takes long to parse. The same octets are the same offer."""
    return read_offer(envelope, signing)


def _hold_against_held(agent: Path, known: Consortium, held: str, study: Study) -> None:
    """A second offer of a study may replace the first only if it is newer, and the first was not approved."""
    if not held:
        return
    try:
        before, _ = _checked(agent, known, held)
    except Refusal:
        return  # what lies there was edited: the coordinator's own takes its place
    if datetime.fromisoformat(study.offer.at) <= datetime.fromisoformat(before.at):
        raise EnvelopeRefused(f"The offer of {study.plan.study} is older than the one that was received before.")
    if (study.folder / "roster.json").exists() and before.roster != study.offer.roster:
        raise EnvelopeRefused(
            f"The offer of {study.plan.study} names other hospitals than the one that was approved here.",
            mend="Revoke the study (cloister-site revoke) to see the new offer.",
        )


def _tell_once(agent: Path, said: dict[str, str]) -> None:
    """A refusal is logged once, so that a coordinator that keeps repeating itself does not fill the disk."""

    def missing(entries: list[audit.Entry]) -> list[tuple[str, Mapping[str, Any]]]:
        return [] if any(e.what == "study.refused" and e.said == said for e in entries) else [("study.refused", said)]

    audit.append_where(agent.parent / "audit.jsonl", missing)
