"""The one rule for a hospital's name: in invites, certificates, rosters and ``site.yaml`` alike.

A name is for people to read, ``St Mary's`` or ``Hôpital Saint-Louis``; whoever makes a part of an address of it
escapes it there. Consortia and accounts are named by the same rule.
"""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

LONGEST = 60
"""Octets of UTF-8. The common name of a certificate holds 64."""

_MARKS = " -_.,'\u2019&()"


def site_name(text: str) -> str:
    """The name, its accents written in one way (NFC), so that equal names are equal strings.

    Raises:
        ValueError: it is too long, begins or ends with a space, or holds a sign that no name needs.
    """
    name = unicodedata.normalize("NFC", text)
    letters = {character for character in name if unicodedata.category(character)[0] in "LMN"}
    strange = set(name) - letters - set(_MARKS)
    if name[:1] not in letters or strange or name[-1] == " " or "  " in name or len(name.encode()) > LONGEST:
        raise PydanticCustomError(
            "site_name",
            "a name is letters and digits of any script, single spaces and - _ . , ' & ( ), begins with a letter or"
            " digit, and is at most 60 octets long",
        )
    return name


SiteName = Annotated[str, AfterValidator(site_name)]
"""A hospital's name as a term of a model."""
