"""What goes wrong on the way is told apart, waited out, and said once."""

import errno
import http.client
import logging
import random
import ssl
import threading
import time
from datetime import timedelta

import pytest

from cloister_client.https import Answer
from cloister_client.outage import apart, lost, refused
from cloister_client.patience import Patience, Stopped
from cloister_shared.certificates import Kind
from cloister_shared.errors import EnrolmentRefused, LinkLost, VersionRefused


def untrusted(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError("verify failed")
    error.verify_code, error.verify_message = code, "why"
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (untrusted(10), "has expired; this machine's clock says"),
        (untrusted(9), "is not valid yet; this machine's clock says"),
        (untrusted(19), "not the consortium's"),
        (untrusted(62), "for another address"),
        (TimeoutError("timed out"), "does not answer"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "connection reset by peer"),
        (http.client.RemoteDisconnected("Remote end closed connection without response"), "remote end closed"),
    ],
)
def test_each_fault_has_its_sentence_and_is_tried_again(hospital, error, words):
    found = lost(error, "there:1", hospital.agent)
    assert isinstance(found, LinkLost)
    assert words in str(found)


def test_a_connection_that_ends_after_our_certificate_did_is_a_stop(consortium, hospital):
    over = consortium.certificate(hospital.key, Kind.SITE, hospital.name, timedelta(seconds=-5))
    (hospital.agent / "agent.crt").write_bytes(over)
    found = lost(http.client.RemoteDisconnected("Remote end closed"), "there:1", hospital.agent)
    assert isinstance(found, EnrolmentRefused)
    silent = lost(TimeoutError("timed out"), "there:1", hospital.agent)
    assert isinstance(silent, LinkLost), "the certificate is not why"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, EnrolmentRefused), (426, VersionRefused), (401, LinkLost), (429, LinkLost), (500, LinkLost)],
)
def test_an_answer_that_is_none_says_why_in_its_own_words(status, kind):
    plain = {"content-type": "text/plain; charset=utf-8"}
    found = refused(Answer(status, plain, b"The certificate of X is revoked."), "there:1")
    assert type(found) is kind
    assert "The certificate of X is revoked" in str(found)


def test_a_page_of_somebody_elses_is_not_quoted():
    found = refused(Answer(502, {"content-type": "text/html"}, b"<h1>Bad gateway</h1>"), "there:1")
    assert "502" in str(found)
    assert "gateway" not in str(found)


def test_clocks_that_are_far_apart_are_told():
    assert apart(299) == ""
    assert "10 minutes ahead of" in apart(600)
    assert "10 minutes behind" in apart(-600)


# --- patience ----------------------------------------------------------------------------------------------
@pytest.fixture
def patience(monkeypatch) -> Patience:
    monkeypatch.setattr(random, "uniform", lambda low, high: 0.01)
    return Patience(threading.Event())


def failing(times: int, error: Exception):
    left = [error] * times

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    return work


def test_it_tries_until_it_works_and_says_so_once(patience, caplog):
    caplog.set_level(logging.INFO)
    assert patience.persist("rounds", failing(5, LinkLost("There is no way."))) == "done"
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("rounds: There is no way.")
    assert said[1].startswith("rounds: in order again")


def test_a_full_disk_is_waited_out(patience, caplog):
    full = OSError(errno.ENOSPC, "No space left on device", "egress.jsonl")
    assert patience.persist("study", failing(2, full)) == "done"
    assert "egress.jsonl cannot be written: No space left on device." in caplog.text


def test_a_certificate_that_is_of_no_use_ends_the_agent(patience):
    with pytest.raises(Stopped):
        patience.persist("rounds", failing(1, EnrolmentRefused("It was revoked.")))
    assert patience.stop.is_set()
    assert isinstance(patience.failed, EnrolmentRefused)


def test_what_waits_is_woken_when_something_works_again(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: 30.0 if high >= 1 else low)
    patience, done = Patience(threading.Event()), threading.Event()
    waiting = failing(1, LinkLost("No way."))
    threading.Thread(target=lambda: (patience.persist("rounds", waiting), done.set()), daemon=True).start()
    time.sleep(0.2)
    patience._trouble("study", "No way.")
    patience._well("study")
    assert done.wait(5)
