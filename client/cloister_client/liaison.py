"""The hospital's side of the control service while the agent runs: hear of studies, tell decisions, renew in time.

It decides nothing. The agent obeys what lies on disk, whether the coordinator can be reached or not.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread

from cloister_client.approvals import Approvals
from cloister_client.control import Control
from cloister_client.decisions import decided
from cloister_client.enrolment import due, renew
from cloister_client.membership import calling, own_certificate, running
from cloister_client.offers import receive, study_folder
from cloister_client.outage import apart
from cloister_shared.control_pb2 import StudyNews
from cloister_shared.errors import CloisterError, LinkLost, Refusal
from cloister_shared.versions import agree

log = logging.getLogger("cloister.site")

_LOOK = 1.0
"""Seconds between looks at what was decided here."""
_LONGEST = 60.0
"""Seconds at most between attempts to reach the coordinator."""
_FIRST, _QUIET = 3.0, 1.0
"""Seconds in which the coordinator begins to tell, and seconds of silence after which it has told all there is."""
_RENEW_AGAIN = 3600.0
"""Seconds between looks at the certificate; there are weeks to renew it."""

_News = SimpleQueue[StudyNews | CloisterError | None]


@dataclass
class _Heard:
    """What the coordinator last knew of our decision upon a study, and the file that was looked at since."""

    decision: str
    file: int = -1


def keep_in_touch(agent: Path, stop: Event) -> None:
    """Stay connected until ``stop``; what fails is logged, waited for longer and longer, and tried again."""
    failures, said = 0, ""
    while not stop.is_set():
        try:
            with calling(agent) as control:
                _meet(control)
                log.info("hears of studies from %s", control.address)
                failures, said = 0, ""
                _converse(agent, control, stop)
        except CloisterError as error:
            log.log(logging.WARNING if str(error) != said else logging.DEBUG, "control: %s", error)
            said = str(error)
        except Exception:  # a mistake of ours must not end the agent's hearing
            log.exception("control: something broke")
        failures += 1
        stop.wait(min(_LONGEST, 2.0 ** min(failures, 10)) * random.uniform(0.5, 1.0))


def _meet(control: Control) -> None:
    """Versions fit; a clock that is far off is told, for certificates and dates of decisions hang on it.

    Raises:
        VersionRefused: they do not.
    """
    met = control.hello()
    agree(met.version, "the coordinator", "this hospital's cloister-site")
    if wrong := apart(time.time() - met.time):
        log.warning("%s", wrong)


def _converse(agent: Path, control: Control, stop: Event) -> None:
    heard, looked = dict[str, _Heard](), -_RENEW_AGAIN
    with _listening(control) as news:
        while not stop.is_set():
            try:
                found = news.get(timeout=_LOOK)
            except Empty:
                found = Empty
            if found is None:
                raise LinkLost("The coordinator ended the connection.", mend="It is tried again.")
            if isinstance(found, CloisterError):
                raise found
            if isinstance(found, StudyNews):
                _hear(agent, found, heard)
            _deliver(agent, control, heard)
            if time.monotonic() - looked > _RENEW_AGAIN:
                looked = time.monotonic()
                if due(own_certificate(agent)) and _renewed(agent):
                    return  # to come back with the new one


def _renewed(agent: Path) -> bool:
    try:
        log.info("certificate renewed until %s", renew(agent).not_after.date())
        return True
    except CloisterError as error:
        log.warning("certificate not renewed: %s", error)
        return False


@contextmanager
def _listening(control: Control) -> Iterator[_News]:
    """What the coordinator says, as it says it; an error or None is the last of it."""
    news: _News = SimpleQueue()

    def listen() -> None:
        try:
            for one in control.studies():
                news.put(one)
            news.put(None)
        except CloisterError as error:
            news.put(error)

    thread = Thread(target=listen, name="control-news", daemon=True)
    thread.start()
    try:
        yield news
    finally:
        control.close()
        thread.join(5)


def _hear(agent: Path, news: StudyNews, heard: dict[str, _Heard]) -> str:
    """Keep what is said of one study; why it was refused, "" if it was not, or if it is over anyway."""
    try:
        study = receive(agent, news)
    except Refusal as error:
        over = news.state in ("finished", "stopped")
        log.log(logging.DEBUG if over else logging.WARNING, "study %s refused: %s", news.digest[:12], error)
        return "" if over else str(error)
    if study.digest not in heard:
        log.info("study %s (%s) is %s", study.plan.study, study.digest[:12], news.state)
    heard[study.digest] = _Heard(news.decision)
    return ""


def _deliver(agent: Path, control: Control, heard: dict[str, _Heard]) -> None:
    """Tell what was decided here and the coordinator has not heard.

    Raises:
        LinkLost: it cannot be told now.
    """
    for digest, known in heard.items():
        if (file := _changed(agent, digest)) == known.file:
            continue
        said = Approvals(agent).standing(digest)
        if said in (known.decision, "offered", "unknown"):
            known.file = file
            continue
        try:
            tell_decision(agent, control, digest)
            log.info("study %s: told the coordinator that it is %s", digest[:12], said)
        except LinkLost:
            raise
        except CloisterError as error:
            log.warning("study %s: %s could not be told: %s", digest[:12], said, error)
        known.decision, known.file = said, file


def _changed(agent: Path, digest: str) -> int:
    """When the decision upon a study was last written, in ns; 0 before the first."""
    try:
        return (study_folder(agent, digest) / "decision.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def tell_decision(agent: Path, control: Control, digest: str) -> str:
    """Send what this hospital says of a study, as it is on disk at this moment; the study's state after it.

    Raises:
        LinkLost: the coordinator cannot be reached.
        StudyRefused: it knows of no such study, or it is over.
        ConsentRefused: what lies here is not what was signed.
    """
    _, envelope = decided(agent, digest)
    return control.decide(envelope)


def catch_up(agent: Path) -> list[str]:
    """Once, for a person who asks: hear of every study, and tell what was not told; a sentence for each refused.

    Raises:
        LinkLost: the coordinator cannot be reached.
        VersionRefused: its release does not work with this one.
    """
    refused, heard, patience = list[str](), dict[str, _Heard](), _FIRST
    with calling(agent) as control:
        _meet(control)
        if running(agent):  # it hears everything itself, and a second listener would take its place
            return []
        with _listening(control) as news:
            while True:
                try:
                    found, patience = news.get(timeout=patience), _QUIET
                except Empty:
                    break
                if found is None or (isinstance(found, LinkLost) and running(agent)):  # one began, and took over
                    break
                if isinstance(found, CloisterError):
                    raise found
                if why := _hear(agent, found, heard):
                    refused.append(why)
            _deliver(agent, control, heard)
    return refused
