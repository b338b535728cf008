"""The pages: all studies and hospitals, one study, the audit log. They change nothing, load nothing, run no script.

Whatever comes from outside (names, titles, reasons) is escaped by the templates, and a policy that the browser keeps
(Content-Security-Policy) allows the one style sheet, by its hash, and nothing besides.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cloister_server.dashboard import curve, facts
from cloister_server.dashboard.visitors import visitors
from cloister_server.folder import open_records, read_settings, split
from cloister_server.records import Account, Role
from cloister_server.registry import Registry
from cloister_shared import audit
from cloister_shared.certificates import read_key
from cloister_shared.errors import AuditBroken, CloisterError, KeyBroken, LinkLost, StudyRefused

log = logging.getLogger("cloister")

AUDIT_READERS = (Role.OPERATOR, Role.PRIVACY_OFFICER, Role.AUDITOR)

ENTRIES = 200
"""Of the audit log: the newest are shown."""

REFRESH = 10
"""While a study is under way its page is loaded anew after these seconds."""

CONNECTIONS = 100
"""At the same time; one more is told to come back."""


def serve(folder: Path) -> None:
    """Show the pages at the address ``pages`` of ``coordinator.yaml``, under TLS, until SIGTERM.

    The certificate is ``coordinator.crt`` as it lies there; the authority's key and the coordinator's signing key are
    not read, so that no fault of a page can show them.

    Raises:
        PlanRefused: ``coordinator.yaml`` is missing, or a line of it is wrong.
        KeyBroken: ``coordinator.key`` and ``coordinator.crt`` do not serve.
        RegistryBroken: the records cannot be used.
        LinkLost: the address cannot be listened on.
    """
    import uvicorn

    settings = read_settings(folder)
    key, certificate = _certified(folder)
    listening = _listen(settings.pages)
    config = uvicorn.Config(
        app(open_records(folder, settings), folder),
        ssl_keyfile=key,
        ssl_certfile=certificate,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # or anybody on this machine could try tokens under ever new addresses
        server_header=False,
        lifespan="off",
        ws="none",
        limit_concurrency=CONNECTIONS,
    )
    log.info("The pages are at https://%s", settings.pages)
    uvicorn.Server(config).run(sockets=[listening])


def app(registry: Registry, folder: Path) -> Starlette:
    """The pages of the consortium in ``folder``."""
    visitor, name = visitors(registry, folder), read_settings(folder).name

    def page(template: str, account: Account | None, status: int = 200, /, **told: Any) -> Response:
        reader = account is not None and account.role in AUDIT_READERS
        body = (
            _templates()
            .get_template(template)
            .render(consortium=name, account=account, reader=reader, now=datetime.now(UTC), **told)
        )
        return Response(body, status, _headers(), "text/html")

    def shown(show: Callable[[Request, Account], Response]) -> Callable[[Request], Response]:
        return lambda request: show(request, visitor(request))

    def overview(request: Request, account: Account) -> Response:
        lines, members = facts.lines(registry), facts.members(registry)
        refresh = REFRESH if any(line.study.state in facts.UNDER_WAY for line in lines) else 0
        invites = registry.invites()
        return page("overview.html.j2", account, lines=lines, members=members, invites=invites, refresh=refresh)

    def study(request: Request, account: Account) -> Response:
        told = facts.told(registry, request.path_params["called"])
        refresh = REFRESH if told.study.state in facts.UNDER_WAY else 0
        held = facts.readiness_page(told.study, folder)
        return page("study.html.j2", account, told=told, curve=curve, refresh=refresh, readiness=held)

    def entries(request: Request, account: Account) -> Response:
        if account.role not in AUDIT_READERS:
            raise HTTPException(403, f"The role {account.role} does not read the audit log.")
        found, fault = list[audit.Entry](), ""
        try:
            found = audit.verify(folder / "audit.jsonl")
        except AuditBroken as broken:
            fault = broken.said
        head = found[-1].hash if found else audit.START
        newest = found[: -ENTRIES - 1 : -1]
        return page("audit.html.j2", account, refresh=0, entries=newest, count=len(found), head=head, fault=fault)

    def said(status: int, sentence: str, headers: dict[str, str] | None = None, refresh: int = 0) -> Response:
        response = page("said.html.j2", None, status, status=status, sentence=sentence, refresh=refresh)
        response.headers.update(headers or {})
        return response

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if request.method not in ("GET", "HEAD"):
            return said(405, "These pages are only read.", {"Allow": "GET, HEAD"})
        sentence = error.detail if error.status_code != 404 else "There is no such page."
        return said(error.status_code, sentence, dict(error.headers or {}))

    def unknown(request: Request, error: Exception) -> Response:
        return said(404, str(error))

    def broken(request: Request, error: Exception) -> Response:
        log.error("A page cannot be shown: %s", error)
        return said(503, "The page cannot be shown just now. The coordinator's log says why.", refresh=REFRESH)

    found = Starlette(
        routes=[
            Route("/", shown(overview)),
            Route("/study/{called}", shown(study)),
            Route("/audit", shown(entries)),
        ],
        exception_handlers={
            HTTPException: refused,
            StudyRefused: unknown,
            CloisterError: broken,
            Exception: lambda request, error: said(500, "Something broke. The coordinator's log says more."),
        },
    )
    found.router.redirect_slashes = False
    return found


def _certified(folder: Path) -> tuple[Path, Path]:
    """The files of the coordinator's key and certificate, once they were seen to belong together."""
    key, certificate = folder / "coordinator.key", folder / "coordinator.crt"
    read_key(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError:
        raise KeyBroken(
            f"{certificate} is not the certificate of coordinator.key beside it.",
            mend="Start the coordinator: it makes the certificate anew.",
        ) from None
    return key, certificate


def _listen(address: str) -> socket.socket:
    host, port = split(address)
    try:
        family, _, _, _, at = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(at, family=family)
    except OSError as error:
        raise LinkLost(
            f"{address} cannot be listened on: {error.strerror or error}.",
            mend="Stop what listens there already, or change `pages` in coordinator.yaml.",
        ) from None


@cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("cloister_server.dashboard"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["style"] = Markup(_style())
    found.globals["online_within"] = f"{facts.ONLINE.total_seconds():g}"
    found.filters["moment"] = _moment
    return found


@cache
def _style() -> str:
    return files("cloister_server.dashboard").joinpath("templates/style.css").read_text(encoding="utf-8")


@cache
def _headers() -> dict[str, str]:
    """What every answer tells the browser, whatever it answers."""
    style = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{style}'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'",
        "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def _moment(at: datetime | str) -> str:
    """A time in UTC, as ``21 Nov 2025, 22:42``."""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return f"{moment.astimezone(UTC):%d %b %Y, %H:%M}".lstrip("0")
