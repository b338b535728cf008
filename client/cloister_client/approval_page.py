"""A study as the people who approve it read it: what is asked, by whom, from which columns, at what cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING

from cloister_client.approvals import Standing
from cloister_client.membership import Consortium, spelled
from cloister_client.offers import Study
from cloister_client.site_file import Converted, SiteFile
from cloister_shared.envelope import key_id
from cloister_shared.plan_text import paragraphs, summary, turned_off
from cloister_shared.schema import Binary, SeriesFeature
from cloister_shared.schema_text import anchored, outcome, values

if TYPE_CHECKING:
    from cloister_client.quote import Quote

_WIDTH = 100

_SAID_ABOVE = ("Study", "Plan", "Privacy", "Approves")
"""Lines of a quote that the page says in another place."""

Page = Iterator[tuple[str, bool]]
"""Lines, and whether each is a warning, to be shown in red."""


def page(study: Study, known: Consortium, site: SiteFile, standing: Standing, quote: Quote | str) -> Page:
    """The whole page, at most 100 columns wide. ``quote`` may be the sentence that says why there is none.

    Raises:
        BudgetExceeded: no noise keeps the plan's promise.
    """
    for text, warns in _page(study, known, site, standing, quote):
        for line in text.split("\n"):
            yield plain(line), warns


def plain(text: str) -> str:
    """What others wrote, without signs that could move or hide what stands around it."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def _page(study: Study, known: Consortium, site: SiteFile, standing: Standing, quote: Quote | str) -> Page:
    offer, plan = study.offer, study.plan
    asked = f"{known.consortium}; submitted by {offer.submitted_by} on {offer.at[:10]} as {offer.file}"
    yield paragraphs({"Asked by": asked, "Here": where_it_stands(standing)}), False
    yield "\nWHAT IS ASKED\n", False
    yield summary(plan), False
    yield "\nFROM WHICH COLUMNS\n", False
    for line in _columns(study, site):
        yield line, False
    yield "\nWHO TAKES PART\n", False
    yield from _hospitals(study, known)
    yield "\nWHAT IT COSTS HERE\n", False
    if isinstance(quote, str):
        yield "\n".join(wrap(f"There is no quote, so it cannot be approved now. {quote}", _WIDTH)), True
    else:
        lines = {key: value for key, value in quote.lines.items() if key not in _SAID_ABOVE}
        yield replace(quote, lines=lines, refusal="").page, False
        if quote.refusal:
            yield "\n" + "\n".join(wrap(f"It would be refused now. {quote.refusal}", _WIDTH)), True
    if sentences := turned_off(plan):
        yield "\nWHAT IS TURNED OFF\n", False
        for sentence in sentences:
            yield sentence, True
    yield "\nWHAT AN APPROVAL BINDS\n", False
    bound = {"Plan": offer.digest, "Hospitals": study.roster}
    if not isinstance(quote, str):
        bound["Quote"] = f"{quote.digest} (these charges, and no others)" if quote.digest else "nothing is charged"
    yield paragraphs(bound), False


def where_it_stands(standing: Standing) -> str:
    """In a clause: who decided what, and who is still to."""
    said = "not decided yet"
    if standing.people:
        reason = f": {standing.reason}" if standing.reason else ""
        said = f"{standing.said} by {', '.join(standing.people)} on {standing.at[:10]}{reason}"
    return f"{said}; {', '.join(standing.waiting)} approved, too few so far" if standing.waiting else said


# --- columns -----------------------------------------------------------------------------------------------
_COLUMNS = (26, 12, 24, 18, 12)
_NOTHING = "-"


def _columns(study: Study, site: SiteFile) -> Iterator[str]:
    """Every column that is read: its name and meaning in the plan, and which one it is here."""
    schema, table, records = study.plan.table, site.table, site.coded
    yield from _row(("In the plan", "Kind", "Unit, range or values", "Code", "Here"))
    for feature in schema.features:
        here = _here(feature.name, site)
        if isinstance(feature, SeriesFeature) and not records:
            beside = table.series or table.waveforms
            here = f"in {beside.path}" if beside else "not in site.yaml"
        yield from _row((feature.name, feature.kind, values(feature), getattr(feature, "code", None) or _NOTHING, here))
        for channel in feature.channels if isinstance(feature, SeriesFeature) else ():
            low, high = channel.range
            said = f"{channel.unit or 'no unit'}, {low:g} to {high:g}"
            yield from _row((channel.name, "channel", said, channel.code or _NOTHING, _here(channel.name, site)))
    target = schema.target
    code = target.code if isinstance(target, Binary) else None
    here = _here(target.name, site)
    yield from _row((target.name, "OUTCOME", outcome(target), code or _NOTHING, here))
    for name, kind in ((schema.patient_id, "patient's id"), (study.plan.evaluation.split_column, "train/test")):
        if name:
            yield from _row((name, kind, _NOTHING, _NOTHING, table.columns.get(name, _NOTHING)))
    if records:
        yield f"Of each patient: {anchored(schema)}. '{_NOTHING}' under Here: found by the plan's own code."
    else:
        yield f"'{_NOTHING}' under Here: the column has the plan's own name."


def _here(name: str, site: SiteFile) -> str:
    """What the hospital calls it, and in which unit it writes it, where these are not the plan's."""
    records = site.coded
    if link := next((link for link in site.link if name in link.columns), None):
        given = link.units.get(name)
        unit = f" in {given.unit if isinstance(given, Converted) else given}" if given else ""
        return f"{link.columns[name]} of {link.path}{unit}"
    here = ", ".join(records.codes.get(name, ())) if records else site.table.columns.get(name)
    here, unit = here or _NOTHING, (records or site.table).units.get(name)
    return f"{here} in {unit.unit if isinstance(unit, Converted) else unit}" if unit else here


def _row(cells: Sequence[str]) -> Iterator[str]:
    """One line, or more where a cell is long; nothing is cut off."""
    wrapped = [wrap(plain(cell), width) or [""] for cell, width in zip(cells, _COLUMNS, strict=True)]
    for parts in zip_longest(*wrapped, fillvalue=""):
        yield "  ".join(f"{part:<{width}}" for part, width in zip(parts, _COLUMNS, strict=True)).rstrip()


# --- hospitals ---------------------------------------------------------------------------------------------
def _hospitals(study: Study, known: Consortium) -> Page:
    """Each with the fingerprint of its key; those that nobody here has compared stand out."""
    yield f"{'Hospital':<60}  Key", False
    for name, key in sorted(study.offer.roster.items()):
        mark = "this one" if name == known.site else "pinned" if name in known.roster else "NEW"
        if name in known.roster and known.roster[name] != key:
            mark = "OTHER KEY"
        yield f"{name:<60}  {spelled(key_id(key)):<19}  {mark}", mark.isupper()
    if new := sorted(set(study.offer.roster) - set(known.roster)):
        one = len(new) == 1
        said = f"{'is' if one else 'are'} new: compare the {'key' if one else 'keys'} by telephone before you approve."
        yield "\n".join(wrap(f"{', '.join(new)} {said} To approve is to pin {'it' if one else 'them'}.", _WIDTH)), True
