"""What went wrong on the way to the coordinator's rounds, in a sentence, with its mend.

A certificate that is over or revoked ends the agent: no patience helps. Everything else is ``LinkLost``, and is tried
again.
"""

from __future__ import annotations

import http.client
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cloister_client.https import Answer
from cloister_client.membership import own_certificate
from cloister_shared.errors import CloisterError, EnrolmentRefused, LinkLost, VersionRefused

APART = 300.0
"""Seconds between two clocks from which on a person has to set one: certificates and time limits hang on them."""


def refused(answer: Answer, where: str) -> CloisterError:
    """An answer that is none. Its own words, in plain text, say it best."""
    plain = answer.headers.get("content-type", "").startswith("text/plain")
    said = answer.body[:500].decode("utf-8", "replace").strip() if plain else ""
    match answer.status:
        case http.client.FORBIDDEN:
            return EnrolmentRefused(
                f"The coordinator at {where} refuses this hospital{f': {said}' if said else '.'}",
                mend="Ask the consortium; with a new invite, cloister-site enrol FILE --again begins anew.",
            )
        case http.client.UPGRADE_REQUIRED:
            return VersionRefused(said or f"The coordinator at {where} speaks another version.", mend="")
    return unable(where, f"answered {answer.status}{f': {said}' if said else ''}")


def lost(error: Exception, where: str, agent: Path) -> CloisterError:
    """No answer. ``agent`` is the folder of this hospital's certificate."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _untrusted(error, where)
    if isinstance(error, ssl.SSLError | ConnectionResetError | http.client.HTTPException):
        # In TLS 1.3 a certificate is looked at when the connection stands, and not every server says why it ends it.
        until, now = own_certificate(agent).not_after, datetime.now(UTC)
        if until < now or "EXPIRED" in _reason(error):
            return EnrolmentRefused(
                f"This hospital's certificate ended on {until:%Y-%m-%d at %H:%M} UTC, and the coordinator at {where}"
                f" ended the connection; this machine's clock says {now:%Y-%m-%d %H:%M}.",
                mend="Ask the consortium for an invite, and type cloister-site enrol FILE --again.",
            )
    if isinstance(error, TimeoutError):
        return unable(where, "does not answer")
    why = _reason(error).replace("_", " ") or getattr(error, "strerror", None) or str(error) or type(error).__name__
    return unable(where, f"ended the connection: {why.lower()}")


def apart(seconds: float) -> str:
    """A sentence where two clocks are too far from each other; ``seconds``: by which this machine's is ahead."""
    if abs(seconds) < APART:
        return ""
    ahead = "ahead of" if seconds > 0 else "behind"
    return (
        f"This machine's clock is {abs(seconds) / 60:.0f} minutes {ahead} the coordinator's."
        " Have IT set it (chrony or systemd-timesyncd)."
    )


def unable(where: str, what: str) -> LinkLost:
    """The coordinator did something that it should not, or did not do what it should."""
    return LinkLost(f"The coordinator at {where} {what.rstrip('.')}.")


def _untrusted(error: ssl.SSLCertVerificationError, where: str) -> CloisterError:
    """The certificate that the other end showed will not do. The codes are OpenSSL's X509_V_ERR."""
    match error.verify_code:
        case 9 | 10:  # not yet valid, and no longer
            when = "has expired" if error.verify_code == 10 else "is not valid yet"
            now = f"this machine's clock says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
            return LinkLost(
                f"The coordinator at {where} shows a certificate that {when}; {now}.",
                mend="Have IT set the clock, if it is wrong; otherwise tell the consortium.",
            )
        case 62 | 64:  # another host, another address
            return LinkLost(
                f"The coordinator at {where} shows a certificate for another address.", mend="Tell the consortium."
            )
    return LinkLost(
        f"The coordinator at {where} shows a certificate that is not the consortium's ({error.verify_message}).",
        mend="If a proxy of the hospital opens TLS, have IT exempt this address; otherwise tell the consortium.",
    )


def _reason(error: Exception) -> str:
    """OpenSSL's word for it."""
    return ((isinstance(error, ssl.SSLError) and error.reason) or "").upper()
