"""FHIR Bulk Data ``$export`` from the hospital's own server into the folder that ``fhir.path`` names.

HL7 FHIR Bulk Data Access 2.0, hl7.org/fhir/uv/bulkdata/export.html: kick off, ask for the status with the patience
that the server asks for, download each file. What was reached is kept beside the files, so that a fetch that broke
off goes on with the same export and the same octet. HTTPS alone, and nothing is ever sent but the request.
"""

from __future__ import annotations

import email.utils
import hashlib
import http.client
import json
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlencode, urljoin, urlsplit

from cloister_client.connectors.fhir_resources import KINDS
from cloister_client.proxy import opened, proxy_to
from cloister_client.site_file import ExportTerms, SiteFile
from cloister_shared import durable
from cloister_shared.errors import CloisterError, DataRefused, LinkLost

STATE = "export.state"
"""Beside the files: the export's address, and its files when they are known."""
_FETCHED = re.compile(r"[A-Za-z]+\.\d+\.[0-9a-f]{8}\.ndjson(\.part)?")
_PATIENCE = 120.0
"""Seconds of silence after which a connection is given up."""
_LEAST, _LONGEST = 1.0, 600.0
"""Seconds between two questions."""
_TRIES = 6
"""Times in a row that one request may fail."""
_PIECE = 1 << 20
_BUSY = (429, 500, 502, 503, 504)

Say = Callable[[str], object]


@dataclass(frozen=True)
class _Server:
    """Where the export is asked for, and with what."""

    site: SiteFile
    terms: ExportTerms
    headers: Mapping[str, str]
    context: ssl.SSLContext
    wait: Callable[[float], object]

    @contextmanager
    def get(self, url: str, **headers: str) -> Iterator[http.client.HTTPResponse]:
        """One request, tried again with growing patience where the server is busy or does not answer."""
        connection, answer = self._answered(urlsplit(url), headers)
        try:
            yield answer
        finally:
            connection.close()

    def _answered(
        self, parts: SplitResult, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPSConnection, http.client.HTTPResponse]:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        for tried in range(1, _TRIES + 1):
            connection, pause = None, 2.0**tried
            try:
                connection = self._connected(parts.hostname or "", parts.port or 443)
                connection.request("GET", path, headers={**self.headers, **headers})
                answer = connection.getresponse()
                if answer.status not in _BUSY:
                    return connection, answer
                pause = asked_pause(answer.headers.get("Retry-After"), pause)
                why = f"is too busy ({answer.status})"
            except (OSError, http.client.HTTPException, LinkLost) as fault:
                why = f"does not answer ({type(fault).__name__})"
                if isinstance(fault, ssl.SSLCertVerificationError):
                    raise self.lost("shows a certificate that nobody here vouches for") from None
            if connection is not None:
                connection.close()
            if tried < _TRIES:
                self.wait(min(pause, _LONGEST) * random.uniform(1.0, 1.2))  # so that many do not ask at one moment
        raise self.lost(why)

    def _connected(self, host: str, port: int) -> http.client.HTTPSConnection:
        bare = opened(host, port, proxy_to(host, self.site.proxy), _PATIENCE)
        try:
            connection = http.client.HTTPSConnection(host, port, context=self.context)
            bare.settimeout(_PATIENCE)
            connection.sock = self.context.wrap_socket(bare, server_hostname=host)
        except BaseException:
            bare.close()
            raise
        return connection

    def lost(self, why: str) -> LinkLost:
        host = urlsplit(self.terms.url).hostname
        return LinkLost(
            f"The FHIR server {host} of {self.site.site} {why}.",
            mend="Check fhir.export in site.yaml (url, token, ca), then run cloister-site fetch again: it goes on.",
        )


def fetch_export(
    site: SiteFile, folder: Path, say: Say = lambda said: None, wait: Callable[[float], object] = time.sleep
) -> list[Path]:
    """Bring an export to the folder, from where an earlier attempt ended; the files.

    Raises:
        DataRefused: ``site.yaml`` does not say how, or the server refuses the export.
        LinkLost: the server cannot be reached, or took longer than ``hours``.
    """
    server = _server(site, folder, wait)
    assert site.fhir is not None
    into = folder / site.fhir.path
    into.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = _state(into / STATE)
    if "status" not in state:
        state = {"status": _kicked_off(server)}
        durable.save_text(into / STATE, json.dumps(state))
        say("The server makes the export.")
    if "output" not in state:
        if (output := _finished(server, str(state["status"]), say)) is None:
            (into / STATE).unlink()  # it forgot this export: begin anew
            return fetch_export(site, folder, say, wait)
        state["output"] = output
        durable.save_text(into / STATE, json.dumps(state))
    mark = hashlib.sha256(str(state["status"]).encode()).hexdigest()[:8]
    made = [into / f"{kind}.{number:03d}.{mark}.ndjson" for number, (kind, _) in enumerate(state["output"])]
    for path, (_, url) in zip(made, state["output"], strict=True):
        if not path.exists():
            _download(server, url, path)
            say(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    for path in into.iterdir():
        if _FETCHED.fullmatch(path.name) and path not in made:
            path.unlink()  # of an earlier export: with two of them, what was withdrawn since would still be there
    (into / STATE).unlink()
    return made


def _server(site: SiteFile, folder: Path, wait: Callable[[float], object]) -> _Server:
    terms = site.fhir.export if site.fhir else None
    if terms is None:
        raise DataRefused(
            f"site.yaml of {site.site} names no FHIR server.",
            mend="Add export: {url: https://..., token: FILE} under fhir; or put the export's files there by hand.",
        )
    headers = {"Accept": "application/fhir+json", "Accept-Encoding": "identity"}
    try:
        if terms.token:
            headers["Authorization"] = f"Bearer {(folder / terms.token).read_text(encoding='ascii').strip()}"
        context = ssl.create_default_context(cafile=str(folder / terms.ca) if terms.ca else None)
    except (OSError, UnicodeDecodeError) as error:
        raise DataRefused(
            f"The token or the ca of {site.site}'s FHIR server cannot be read ({type(error).__name__}).",
            mend="Correct fhir.export in site.yaml; both are files beside it.",
        ) from None
    return _Server(site, terms, headers, context, wait)


def _state(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kicked_off(server: _Server) -> str:
    """Ask for the export; where its status is told."""
    terms = server.terms
    of = f"Group/{terms.group}/" if terms.group else "Patient/"
    query = urlencode({"_type": ",".join(KINDS), "_outputFormat": "application/fhir+ndjson"})
    url = f"{terms.url.rstrip('/')}/{of}$export?{query}"
    with server.get(url, Prefer="respond-async") as answer:
        if answer.status != 202:
            raise _refused(server, answer, "the export")
        place = answer.headers.get("Content-Location", "")
    return _own(server, urljoin(url, place))


def _finished(server: _Server, status: str, say: Say) -> list[tuple[str, str]] | None:
    """Wait; each file's kind and address. None where the server knows of no such export any more."""
    waited, pause = 0.0, _LEAST
    while waited <= server.terms.hours * 3600:
        with server.get(status) as answer:
            if answer.status == 200:
                return _manifest(server, status, answer.read(_PIECE * 16))
            if answer.status in (404, 410):
                return None
            if answer.status != 202:
                raise _refused(server, answer, "the export's status")
            pause = min(max(asked_pause(answer.headers.get("Retry-After"), pause * 2), _LEAST), _LONGEST)
            if progress := answer.headers.get("X-Progress"):
                say(f"The server is at work: {progress[:60]}")
        server.wait(pause)
        waited += pause
    raise server.lost(f"has not finished the export in {server.terms.hours:g} hours")


def _manifest(server: _Server, status: str, body: bytes) -> list[tuple[str, str]]:
    try:
        listed = [(str(entry["type"]), urljoin(status, entry["url"])) for entry in json.loads(body)["output"]]
    except (ValueError, KeyError, TypeError):
        raise server.lost("lists the export's files in no form that is known") from None
    return [(kind, _own(server, url)) for kind, url in listed if kind in KINDS]


def _own(server: _Server, url: str) -> str:
    """The address, if it is on the server that the hospital named: the token goes nowhere else.

    Raises:
        LinkLost: it is elsewhere.
    """
    here, there = urlsplit(server.terms.url), urlsplit(url)
    if (here.scheme, here.hostname, here.port or 443) != (there.scheme, there.hostname, there.port or 443):
        raise server.lost("names files on another server, to which the token is not sent")
    return url


def _download(server: _Server, url: str, path: Path) -> None:
    """A file, from the octet at which an earlier attempt ended; there under its name only when it is whole."""
    beside = path.with_name(path.name + ".part")
    for tried in range(1, _TRIES + 1):
        have = beside.stat().st_size if beside.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        with server.get(url, Accept="application/fhir+ndjson", **headers) as answer:
            if have and answer.status == 416 and answer.headers.get("Content-Range", "").endswith(f"/{have}"):
                break  # it was whole already
            if answer.status not in (200, 206):
                raise _refused(server, answer, "a file of the export")
            if _received(answer, beside, append=answer.status == 206):
                break
        if tried == _TRIES:
            raise server.lost("breaks off each time in the same file")
        server.wait(2.0**tried)
    durable.replace(beside, path)


def _received(answer: http.client.HTTPResponse, beside: Path, *, append: bool) -> bool:
    """Whether all of it came; what came is kept either way."""
    wanted = answer.length
    how = os.O_APPEND if append else os.O_TRUNC
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | how, 0o600), "wb") as file:
        came = 0
        try:
            while piece := answer.read(_PIECE):
                came += file.write(piece)
        except (OSError, http.client.HTTPException):
            return False
    return wanted is None or came == wanted


def _refused(server: _Server, answer: http.client.HTTPResponse, what: str) -> CloisterError:
    mend = "Ask whoever runs it for the right to Bulk Data export, and put the token into the file that token names."
    if answer.status not in (401, 403):
        mend = "Check url and group under fhir.export; the server must offer Bulk Data export."
    host = urlsplit(server.terms.url).hostname
    return DataRefused(f"The FHIR server {host} of {server.site.site} refuses {what} ({answer.status}).", mend=mend)


def asked_pause(said: str | None, otherwise: float) -> float:
    """Seconds that a server asks to be left alone, as a number or as a date (RFC 9110 section 10.2.3)."""
    if not said:
        return otherwise
    if said.strip().isdigit():
        return float(said)
    try:
        until = email.utils.parsedate_to_datetime(said)
        return max(until.timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return otherwise
