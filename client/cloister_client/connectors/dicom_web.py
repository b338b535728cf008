"""Pictures from the hospital's DICOMweb server into the folder that ``connectors/dicom`` reads: QIDO-RS, then WADO-RS.

Fetched beforehand, by a person's command, because the process that trains has no network. What is there already is
not fetched again, so that a fetch that was cut off goes on. Requests name patients: none is logged, none is quoted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_client.connectors.dicom import DicomConnector
from cloister_client.site_file import DicomWeb
from cloister_shared.durable import replace
from cloister_shared.errors import DataRefused, LinkLost

if TYPE_CHECKING:
    import requests

BUSY = (408, 429, 500, 502, 503, 504)
"""Answers after which a request is made again, after as long as the server says, or twice as long as before."""

PAGE = 500
"""Instances that one query asks for at a time."""

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_STUDY, _SERIES, _INSTANCE = "0020000D", "0020000E", "00080018"


def fetch(connector: DicomConnector, notice: Callable[[int, int], object] = lambda done, whole: None) -> int:
    """Fetch every instance that a row of the labels joins with; how many were new.

    ``notice`` is told after each key how many of all are done.

    Raises:
        DataRefused: site.yaml names no server, or the labels cannot be read.
        LinkLost: the server cannot be reached, or refuses.
    """
    web = connector.archive.web
    if web is None:
        raise DataRefused(
            f"site.yaml of {connector.site.site} names no DICOMweb server.", mend="Add dicom.web: {url: https://…}."
        )
    keys, new = connector.keys(), 0
    archive = connector.folder / connector.archive.folder
    archive.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _asking(web), _session(web, connector.folder) as session:
        from dicomweb_client.web import DICOMwebClient

        client: Any = DICOMwebClient(web.url, session=session, timeout=60)
        client.set_http_retry_params(retry=False)  # the session's own way minds what the server says
        for done, key in enumerate(keys, start=1):
            for study, series, instance in _found(client, connector.archive.join, key, web.modality):
                path = archive / f"{instance}.dcm"
                if path.exists():
                    continue
                data = client.retrieve_instance(study, series, instance, media_types=(("application/dicom", "*"),))
                beside = path.with_name(f".{path.name}.tmp")
                with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                    data.save_as(file)
                replace(beside, path)
                new += 1
            notice(done, len(keys))
    return new


def _found(client: Any, join: str, key: str, modality: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Study, series and instance of everything that joins with the key."""
    for kind in modality or (None,):
        filters = {join: key} | ({"Modality": kind} if kind else {})
        offset = 0
        while True:
            page = client.search_for_instances(search_filters=filters, limit=PAGE, offset=offset)
            for one in page:
                uids = [str(one.get(tag, {}).get("Value", [""])[0]) for tag in (_STUDY, _SERIES, _INSTANCE)]
                if all(map(_UID.fullmatch, uids)):  # one becomes the name of a file
                    yield uids[0], uids[1], uids[2]
            if len(page) < PAGE:
                break
            offset += PAGE


@contextlib.contextmanager
def _session(web: DicomWeb, folder: Path) -> Iterator[requests.Session]:
    """Connections that wait and try again, and that no proxy of the environment's sees."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    patience = Retry(total=web.tries - 1, backoff_factor=0.5, status_forcelist=BUSY, allowed_methods=("GET",))
    with requests.Session() as session:
        session.trust_env = False
        session.mount(web.url, HTTPAdapter(max_retries=patience))
        if web.ca:
            session.verify = str(folder / web.ca)
        if web.token:
            secret = (folder / web.token).read_text(encoding="utf-8").strip()
            name, colon, word = secret.partition(":")
            session.auth = (name, word) if colon else None
            if not colon:
                session.headers["Authorization"] = f"Bearer {secret}"
        yield session


@contextlib.contextmanager
def _asking(web: DicomWeb) -> Iterator[None]:
    """One sentence for whatever goes wrong; and silence, because addresses of requests hold patients' ids."""
    loggers = [logging.getLogger(name) for name in ("urllib3", "dicomweb_client", "pydicom")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except DataRefused:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = f"answered {status}" if status else f"could not be asked ({type(error).__name__})"
        raise LinkLost(
            f"The DICOMweb server at {web.url} {said}.",
            mend="What was fetched is kept; mend dicom.web in site.yaml or wait for the server, and fetch again.",
        ) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
