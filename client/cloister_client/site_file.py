"""``site.yaml``: who a hospital is, what it takes part in, and where its records are. It never leaves the hospital.

    site: st-marys
    population: patients               # whose privacy budget studies on this table are paid from
    policy:
      min_cohort: 3                    # the fewest hospitals in a sum that this one helps to open
      mechanisms: [site, shared]       # of privacy; none must be named to be accepted
      approvals: 2                     # people who must approve a study, 1 or 2
      memory_gb: 8                     # of a study's training process
      hours: 12                        # in which it answers a message
      sandbox: on                      # off: train where the network cannot be taken away from it
    proxy: http://proxy.local:3128     # the way out, where HTTPS_PROXY does not say it
    pictures: {identified: true}       # DICOM files that tell who the patient is may be used, inside
    table:
      path: table.csv                  # beside this file
      columns: {age: AGE_YEARS}        # a feature's name in the plan: its column here, where they differ
      units: {weight: lb, creatinine: {unit: umol/L, factor: 0.0113}}   # where the unit is not the plan's
      series: {path: vitals.csv, row: STAY, minutes: OFFSET, name: PARAMETER, value: VALUE}

In the place of ``table``, clinical records, an archive of pictures, or a source that an installed package reads:

    fhir: {path: export}               # NDJSON or bundles; export: {url: https://ehr.local/fhir} fills it
    omop: {database: postgresql://reader@db.local/omop, schema: cdm}      # or sqlite, duckdb, folder: of CSVs
    hl7: {path: messages}              # of HL7 version 2 messages (.hl7) and C-CDA documents (.xml)
    opt_outs: opt_outs.txt             # patients whose records are not used, one id a line
    dicom:
      folder: archive                  # of DICOM files; web: {url: https://pacs.local/dicom-web} fills it
      labels: {path: reports.csv, columns: {pneumonia: FINDING}}
      join: AccessionNumber            # the labels' column of that name, and the tag
    connector: {name: json-lines, path: visits.jsonl}   # the connector's name, and its own terms

Beside any of these but an archive, further sources, joined inside the hospital by patient, encounter or a column:

    link:
      - {path: notes.csv, key: MRN, columns: {note: TEXT}}      # by: patient, unless it says otherwise
      - {path: labs.csv, key: STAY, by: encounter, columns: {crp: CRP}, units: {crp: mg/dL}, several: last}
    dicom: {folder: archive, join: PatientID}   # without labels: of the plan's pictures those of the records' patients

Each section is a class below.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cloister_client.consent import MIN_COHORT, Policy
from cloister_shared.errors import DataRefused
from cloister_shared.names import SiteName
from cloister_shared.plan import Mechanism
from cloister_shared.plan_file import load, parse
from cloister_shared.terms import Broken, Code, Name, Positive, Slug, Terms


class Converted(Terms):
    """A unit that dimensions alone cannot convert (mmol/L to mg/dL needs a molar mass): value * factor."""

    unit: str
    factor: Positive


class SeriesFile(Terms):
    """A file beside the table with one measurement a row: of which record, when, what, and how much.

    ``row`` is the column that names the record, here and in the table. ``hours`` or ``minutes`` is that of the time
    since the record's start. A channel's name and unit are told as a column's are, by ``columns`` and ``units``.
    """

    path: str
    row: str
    hours: str | None = None
    minutes: str | None = None
    name: str
    value: str


class WaveformFiles(Terms):
    """WFDB records (PhysioNet's format) in a folder, of which each row of the table is a stretch.

    ``record`` is the table's column of the record's name, ``seconds`` that of where in it the stretch begins; a row is
    of the record's start without it. A channel is a signal of that name, or of the one that ``columns`` gives.
    """

    path: str
    record: str
    seconds: str | None = None


class TableFile(Terms):
    """One file and how its columns differ from the plan's."""

    path: str
    columns: dict[Name, str] = Field(default_factory=dict[str, str])
    units: dict[Name, Annotated[str | Converted, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict[str, "str | Converted"]
    )
    series: SeriesFile | None = None
    waveforms: WaveformFiles | None = None


class ThirdParty(BaseModel):
    """A source that a package of another maker reads; only that package knows the terms beside ``name``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow", allow_inf_nan=False)

    name: Slug

    @property
    def terms(self) -> dict[str, object]:
        """What is written beside the name."""
        return dict(self.model_extra or {})


class PictureTerms(Terms):
    """What of DICOM files a hospital allows to be used, inside it. Only pixels are; every switch that is on is logged.

    Files with writing in their pixels are refused whatever is allowed.
    """

    identified: bool = False
    """Files that tell who the patient is, as in an archive whose patient ids link pictures with reports."""
    captures: bool = False
    """Secondary captures that do not say whether there is writing in them; somebody has looked at them."""
    private_tags: bool = False
    """Files with makers' own tags, as every scanner's are. None of them is read."""


class DicomWeb(Terms):
    """The DICOMweb server that ``cloister-site fetch`` fills the archive's folder from."""

    url: Annotated[
        str, StringConstraints(pattern=r"^(https://[^\s@?#]+|http://(127\.0\.0\.1|localhost)[:/][^\s@?#]*)$")
    ]
    """HTTPS; without it on this very machine alone."""
    modality: tuple[str, ...] = ()
    """What is fetched; everything, if empty."""
    token: str | None = None
    """A file beside site.yaml that holds a bearer token, or ``name:password``."""
    ca: str | None = None
    """A file with the certificate of the hospital's own authority."""
    tries: Annotated[int, Field(ge=1, le=20)] = 6
    """How often a request is made that the server is too busy for; each waits twice as long as the one before."""


class DicomArchive(Terms):
    """DICOM files, and a table of what was found in them."""

    folder: str
    """Of the files, and of folders of them."""
    web: DicomWeb | None = None
    labels: TableFile | None = None
    """A row for each picture; its column called like ``join``, or as ``columns`` says, tells which. None beside other
    records, which say what was found.
    """
    by: str = "patient"
    """Beside other records, what of them ``join`` is: patient, encounter, or a table's column."""
    join: Literal["PatientID", "StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber", "SOPInstanceUID"] = (
        "AccessionNumber"
    )


class LinkedFile(Terms):
    """A CSV or Parquet file with more about the same patients or encounters."""

    path: str
    key: str
    """Its column that says of whom a row is."""
    by: str = "patient"
    """What of the records that is: patient, encounter (of clinical records), or a table's column."""
    columns: dict[Name, str] = Field(min_length=1)
    """What it gives: a name of the plan, and its column here."""
    units: dict[Name, Annotated[str | Converted, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict[str, "str | Converted"]
    )
    several: Literal["refuse", "first", "last"] = "refuse"
    """Which row counts, in the file's order, where a key has several that differ."""


class Coded(Terms):
    """How clinical records differ from the plan, by a feature's name; a channel's is ``series.channel``."""

    codes: dict[Name, tuple[Code, ...]] = Field(default_factory=dict[str, tuple[str, ...]])
    units: dict[Name, Annotated[str | Converted, Field(union_mode="left_to_right")]] = Field(
        default_factory=dict[str, "str | Converted"]
    )
    """Of values that come without a unit; with a factor, of those in that unit too."""


class ExportTerms(Terms):
    """The FHIR server whose Bulk Data ``$export`` fills the folder."""

    url: Annotated[str, StringConstraints(pattern=r"^https://[^\s@?#]+$")]
    group: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9\-.]{1,64}$")] | None = None
    """Its patients alone; without it, all patients."""
    token: str | None = None
    """A file beside site.yaml that holds the bearer token."""
    ca: str | None = None
    """A file with the certificate of the hospital's own authority."""
    hours: Positive = 24.0
    """How long the server may take."""


class FhirFolder(Coded):
    """FHIR R4 from disk."""

    path: str
    export: ExportTerms | None = None


class OmopSource(Coded):
    """An OMOP common data model, version 5.4."""

    database: Annotated[str, StringConstraints(pattern=r"^(postgresql|sqlite|duckdb):///?\S+$")] | None = None
    schema_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")] | None = Field(None, alias="schema")
    vocabulary: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """The schema of the vocabulary's tables, where it is another."""
    folder: str | None = None
    """Of CSVs. Beside a database: where ``cloister-site fetch`` copies it to, and what is read once it is there."""


class Hl7Folder(Coded):
    """HL7 version 2 messages and C-CDA documents from disk."""

    path: str
    authority: str | None = None
    """Who gave out the patients' numbers that are meant, where a patient has several (in PID-3, or as id)."""


class PolicyTerms(Terms):
    """What the hospital takes part in, whatever a plan says: see ``Policy``."""

    min_cohort: Annotated[int, Field(ge=2)] = MIN_COHORT
    mechanisms: tuple[Mechanism, ...] = Field(default=Policy().mechanisms, min_length=1)
    approvals: Annotated[int, Field(ge=1, le=2)] = 1
    memory_gb: Annotated[float, Field(ge=0.5)] = 8.0
    """What a study's training process may take; torch alone takes 0.3."""
    hours: Positive = 12.0
    """How long it may work on one message."""
    sandbox: Literal["on", "off"] = "on"
    """Whether it must be kept from the network; without that no study trains here."""


SOURCES = ("table", "fhir", "omop", "hl7", "dicom", "connector")
"""Sections that say where records are, of which there is one."""


class SiteFile(Terms):
    """``site.yaml``: who this hospital is and where its records are. It never leaves the hospital."""

    site: SiteName
    population: Slug = "patients"
    """Of whom the rows are: studies on the same patients share one privacy budget."""
    policy: PolicyTerms = PolicyTerms()
    proxy: Annotated[str, StringConstraints(pattern=r"^http://\S+$")] | None = None
    """Of the agent's connections to the coordinator; its password, if it has one, stays in this file."""
    pictures: PictureTerms = PictureTerms()
    table: TableFile = TableFile(path="")
    dicom: DicomArchive | None = None
    connector: ThirdParty | None = None
    fhir: FhirFolder | None = None
    omop: OmopSource | None = None
    hl7: Hl7Folder | None = None
    link: tuple[LinkedFile, ...] = ()
    """Files that are joined to the records."""
    opt_outs: str | None = None
    """A file beside this one with one patient's id a line: none of their records is used."""

    @property
    def coded(self) -> Coded | None:
        """The section of clinical records, if there is one."""
        return self.fhir or self.omop or self.hl7

    @property
    def linked(self) -> bool:
        """Whether anything is joined to the records."""
        return bool(self.link) or bool(self.dicom and self.dicom.labels is None)

    @property
    def accepts(self) -> Policy:
        """What this hospital takes part in."""
        return Policy(self.policy.min_cohort, self.policy.mechanisms, self.policy.approvals)


def read_site(site_yaml: Path) -> SiteFile:
    """What a ``site.yaml`` says.

    Raises:
        DataRefused: there is no such file, or it is not text.
        PlanRefused: it is malformed.
    """
    try:
        text = site_yaml.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataRefused(f"{site_yaml} is not there.", mend="Give the path of the hospital's site.yaml.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataRefused(
            f"{site_yaml} cannot be read ({type(error).__name__}).", mend="Give a site.yaml in UTF-8 that you may read."
        ) from None
    return parse(SiteFile, load(text, site_yaml.name), _broken)


def _broken(site: SiteFile) -> Iterator[Broken]:
    """One source of records, and one place of it."""
    beside = ("dicom",) if site.dicom and site.dicom.labels is None else ()
    sources = [name for name in SOURCES if name in site.model_fields_set and name not in beside]
    yield from _linked(site, sources)
    if not sources and not beside:
        yield Broken(("table",), "is missing", f"Add table: {{path: FILE}}, or {' or '.join(SOURCES[1:])}.")
    for name in sources[1:]:
        yield Broken((name,), f"stands beside {sources[0]}", "Name one source of records.")
    series = site.table.series
    if series and (series.hours is None) == (series.minutes is None):
        yield Broken(
            ("table", "series"), "names no column of the time, or two", "Give the column as hours: or as minutes:."
        )
    if site.omop and site.omop.database is None and site.omop.folder is None:
        yield Broken(("omop",), "names no place", "Write database: URL or folder: PATH.")


def _linked(site: SiteFile, sources: list[str]) -> Iterator[Broken]:
    """What is joined has something to be joined to, and gives each name once."""
    if site.dicom and site.dicom.labels is None:
        if not sources:
            yield Broken(("dicom", "labels"), "is missing", "Add labels: {path: FILE}, or the records beside dicom.")
        if site.dicom.web:
            yield Broken(
                ("dicom", "web"), "stands without labels", "Name labels, by whose keys pictures are fetched, or no web."
            )
    if site.link and sources == ["dicom"]:
        yield Broken(("link",), "stands beside dicom's labels", "Name the labels as table:, and dicom without labels.")
    seen: set[str] = set()
    for at, link in enumerate(site.link):
        for name in link.columns:
            if name in seen:
                yield Broken(("link", at, "columns", name), "is given by two files", "Take it from one of them.")
            seen.add(name)
