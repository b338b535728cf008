"""What a study needs of a hospital's records: features and outcome. ``inputs`` has what features become."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Discriminator, Field, Tag

from cloister_shared.terms import Category, Code, Count, Name, Positive, Terms


# --- features that are one value -----------------------------------------------------------------------------
class Window(Terms):
    """Which of a patient's measurements a clinical connector takes: those around an encounter, and what of them.

    Hours are counted from the start of the encounter that the record is of (of a readmission, from its end); ``until``
    is not within the window. Without ``take``: the last, and of yes/no whether there was any.
    """

    since: float = -8760.0
    until: float = 24.0
    take: Literal["last", "first", "mean", "min", "max", "count", "any"] | None = None


class Anchor(Terms):
    """Of which encounters a clinical connector makes records: one record each. Of a table it says nothing.

    ``ages`` are years at the encounter's start, the upper one not included. ``having``: only encounters with one of
    these codes within ``window``.
    """

    encounter: Literal["inpatient", "emergency", "outpatient", "any"] = "inpatient"
    which: Literal["every", "first", "last"] = "every"
    """Of a patient's encounters that are left."""
    ages: tuple[float, float] | None = None
    having: tuple[Code, ...] = ()
    window: Window = Window()


class _Feature(Terms):
    name: Name
    code: Code | None = None
    """Meaning in a public vocabulary, such as ``LOINC:2093-3``; what FHIR and OMOP find it by.

    ``LOCAL:age`` (years), ``LOCAL:sex`` (male, female, other), ``LOCAL:stay`` (days), ``LOCAL:death`` and
    ``LOCAL:readmission`` are of the patient and of the encounter.
    """
    window: Window | None = None
    """For records that are made of dated measurements; of a table it says nothing."""


class NumberFeature(_Feature):
    """A measured quantity. ``range`` is what is plausible, in ``unit``; a value outside is a bad row."""

    kind: Literal["number"]
    unit: str | None = None
    range: tuple[float, float]
    mean: float | None = None
    sd: Positive | None = None
    missing: Literal["refuse", "drop", "fill", "indicator"] = "refuse"
    fill: float | None = None


class CategoryFeature(_Feature):
    """One of a closed list. One-hot encoded in the order given."""

    kind: Literal["category"]
    categories: tuple[Category, ...] = Field(min_length=2)
    missing: Literal["refuse", "drop", "fill", "indicator"] = "refuse"
    fill: Category | None = None


class BooleanFeature(_Feature):
    """Yes or no, written 1/0, true/false or yes/no."""

    kind: Literal["boolean"]
    missing: Literal["refuse", "drop", "fill", "indicator"] = "refuse"
    fill: bool | None = None


class VectorFeature(_Feature):
    """So many numbers of one kind in columns ``name_0``, ``name_1``, …: gene expression, genotypes."""

    kind: Literal["vector"]
    length: Annotated[int, Field(ge=1, le=100_000)]
    unit: str | None = None
    range: tuple[float, float]
    mean: float | None = None
    sd: Positive | None = None


# --- features that are many values ---------------------------------------------------------------------------
class Channel(Terms):
    """One quantity of a series. ``range`` is what is plausible, in ``unit``; values outside count as not measured."""

    name: Name
    code: Code | None = None
    unit: str | None = None
    range: tuple[float, float]
    mean: float | None = None
    sd: Positive | None = None


class SeriesFeature(Terms):
    """Quantities over time, from the start of the record's encounter, in steps of equal length.

    Of each channel the mean of what was measured within a step, centred and scaled by the channel's constants, 0 where
    nothing was; then of each channel whether it was measured. A block of shape [steps, 2 * channels].
    """

    name: Name
    kind: Literal["series"]
    channels: tuple[Channel, ...] = Field(min_length=1)
    steps: Annotated[int, Field(ge=2, le=20_000)]
    step_hours: Positive = 1.0
    required: bool = True
    """Whether a record without a single measurement is a bad row."""


class ImageFeature(Terms):
    """A picture or a volume, in a file that the record names: PNG, JPEG, NPY, DICOM or NIfTI.

    A block of shape [channels, *size], ``range`` scaled to [-1, 1]. DICOM files are held to ``modality`` and
    ``body_part``, and a CT is seen through ``window`` (centre and width in Hounsfield units).
    """

    name: Name
    kind: Literal["image"]
    channels: Literal[1, 3] = 1
    size: tuple[Count, ...] = Field(min_length=2, max_length=3)
    range: tuple[float, float] = (0.0, 255.0)
    modality: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    window: tuple[float, Positive] | None = None
    required: bool = True
    """Whether a record without the picture is a bad row; else its block is 0."""


class TextFeature(Terms):
    """A note. A block of ``tokens`` numbers, each the hash of a word or of words side by side, in [1, buckets].

    0 stands for nothing. Hashing needs no dictionary, and so none that patients' words would be in.
    """

    name: Name
    kind: Literal["text"]
    tokens: Annotated[int, Field(ge=1, le=10_000)] = 512
    buckets: Annotated[int, Field(ge=16, le=2**20)] = 16384
    grams: Annotated[int, Field(ge=1, le=3)] = 1
    """Up to so many words side by side count as one token as well."""
    distinct: bool = False
    """Each token counts once, as bags of words like it; else in the order of the text."""
    required: bool = True


class MoleculeFeature(Terms):
    """A molecule, written as SMILES.

    ``fingerprint``: Morgan's (Rogers and Hahn 2010) of ``radius``, a block of ``bits`` numbers that are 0 or 1.
    ``graph``: a block of shape [atoms, 32 + atoms]: what each atom is, and the bonds between them.
    """

    name: Name
    kind: Literal["molecule"]
    encoding: Literal["fingerprint", "graph"] = "fingerprint"
    bits: Annotated[int, Field(ge=64, le=16384)] = 2048
    radius: Annotated[int, Field(ge=0, le=6)] = 2
    atoms: Annotated[int, Field(ge=2, le=512)] = 64


ATOM = 32
"""Numbers that describe one atom of a molecule's graph."""

Scalar = NumberFeature | CategoryFeature | BooleanFeature | VectorFeature
Shaped = SeriesFeature | ImageFeature | TextFeature | MoleculeFeature
Feature = Annotated[
    NumberFeature
    | CategoryFeature
    | BooleanFeature
    | VectorFeature
    | SeriesFeature
    | ImageFeature
    | TextFeature
    | MoleculeFeature,
    Field(discriminator="kind"),
]


# --- the outcome ---------------------------------------------------------------------------------------------
class Binary(Terms):
    """The outcome: two values of one column. A row without either is a bad row."""

    kind: Literal["binary"] = "binary"
    name: Name
    positive: Category
    negative: Category
    code: Code | None = None
    window: Window | None = None


class Classes(Terms):
    """One of several: a column that holds one of the names."""

    kind: Literal["classes"]
    name: Name
    classes: tuple[Category, ...] = Field(min_length=2)
    code: Code | None = None
    window: Window | None = None


class Labels(Terms):
    """Any number of several: a column of names with ``separator`` between them; empty is none."""

    kind: Literal["labels"]
    name: Name
    labels: tuple[str, ...] = Field(min_length=2)
    separator: Annotated[str, Field(min_length=1, max_length=3)] = ";"


class Quantity(Terms):
    """A measured quantity, learned as (value - mean) / sd; without these the middle and a quarter of ``range``."""

    kind: Literal["quantity"]
    name: Name
    unit: str | None = None
    range: tuple[float, float]
    mean: float | None = None
    sd: Positive | None = None
    code: Code | None = None
    window: Window | None = None


class Survival(Terms):
    """Time to an event. ``name`` is the column of times, ``event`` that of whether it came or was not awaited.

    ``cuts`` end the periods in which the event's chance is learned, in the times' unit; after the last of them
    everyone counts as not awaited. From ``code`` a clinical connector makes both columns, in days.
    """

    kind: Literal["survival"]
    name: Name
    event: Name
    cuts: tuple[Positive, ...] = Field(min_length=2, max_length=200)
    code: Code | None = None


class Mask(Terms):
    """Which parts of the picture ``of`` are a lesion: a file with a mask of the picture's size."""

    kind: Literal["mask"]
    name: Name
    of: Name


class Itself(Terms):
    """No outcome: the model learns what is usual, from the inputs themselves.

    ``alarm`` may name a yes/no column of what an alarm should have been raised for; it is never learned from.
    """

    kind: Literal["itself"]
    name: Name = "itself"
    alarm: Name | None = None


class Effect(Terms):
    """What a treatment changes. ``name`` is the outcome, ``treatment`` the yes/no column of who was treated."""

    kind: Literal["effect"]
    name: Name
    treatment: Name
    range: tuple[float, float]
    larger_is_better: bool = True


def _kind(target: Any) -> str:
    """A plan that names no kind of outcome means one that comes or does not."""
    if isinstance(target, dict):
        return str(cast("dict[str, object]", target).get("kind", "binary"))
    return str(getattr(target, "kind", "binary"))


Target = Annotated[
    Annotated[Binary, Tag("binary")]
    | Annotated[Classes, Tag("classes")]
    | Annotated[Labels, Tag("labels")]
    | Annotated[Quantity, Tag("quantity")]
    | Annotated[Survival, Tag("survival")]
    | Annotated[Mask, Tag("mask")]
    | Annotated[Itself, Tag("itself")]
    | Annotated[Effect, Tag("effect")],
    Discriminator(_kind),
]


def target_columns(target: Target) -> tuple[str, ...]:
    """The columns that the outcome is read from."""
    match target:
        case Survival(name=name, event=other) | Effect(name=name, treatment=other):
            return name, other
        case Itself(alarm=alarm):
            return (alarm,) if alarm else ()
        case _:
            return (target.name,)


class Schema(Terms):
    """What every hospital's records must hold."""

    features: tuple[Feature, ...] = Field(min_length=1)
    target: Target
    anchor: Anchor = Anchor()
    patient_id: Name | None = None
    """Column that names the patient; without it each row is a patient of its own."""
    duplicates: Literal["refuse", "drop", "allow"] = "refuse"
    max_bad_rows: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of bad rows that are left out, by number, before the whole table is refused."""
