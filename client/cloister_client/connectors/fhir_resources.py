"""FHIR R4 resources to facts, by the few elements that are read of each (hl7.org/fhir/R4).

A resource arrives as orjson's plain values. One whose shape is not FHIR's makes these functions raise KeyError,
TypeError, ValueError or AttributeError, which the reader takes as doubt and asks fhir.resources what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from cloister_client.connectors.clinical import EMERGENCY, INPATIENT, OUTPATIENT
from cloister_client.connectors.gathering import Gathered, Words

_SYSTEMS = {
    "http://loinc.org": "LOINC",
    "http://snomed.info/sct": "SNOMED",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RXNORM",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9",
    "http://www.whocc.no/atc": "ATC",
}
_CLASSES = {"IMP": INPATIENT, "ACUTE": INPATIENT, "NONAC": INPATIENT, "EMER": EMERGENCY}
_NOT_SO = ("entered-in-error", "cancelled", "not-done", "planned", "refuted", "registered", "draft")
"""States of a resource that says of nothing that it was."""

Resource = dict[str, Any]


class Clinic:
    """What was read so far of one hospital's resources."""

    def __init__(self, wanted: Callable[[str], bool]) -> None:
        """``wanted`` says of a code whether facts under it are kept."""
        self.facts, self.people, self.stays = Gathered(), Words(), Words()
        self.patients: dict[int, tuple[str | None, str | None, str | None, bool]] = {}
        """By the number of the id: sex, birth, death, and whether dead."""
        self.encounters: dict[int, tuple[int, str | None, str | None, int]] = {}
        """By the number of the id: the patient's, start, end, and kind."""
        self.states = 0
        """Resources left out because they say that nothing was."""
        self._wanted = wanted
        self._known: dict[tuple[str | None, str | None], int] = {}
        self._medications: dict[str, Resource] = {}
        self._prescribed: list[tuple[Resource, str]] = []
        self._events = 0
        self._names: dict[str, str] | None = None
        self._people: dict[str, int] = {}
        self._stays: dict[str, int] = {}

    def take(self, resource: Resource, names: dict[str, str] | None = None) -> None:
        """One resource; ``names`` has what a bundle's own addresses stand for."""
        kind = resource["resourceType"]
        reader = _READERS.get(kind)
        if reader is None:
            return
        self._names = names
        unsure = resource.get("verificationStatus")
        if resource.get("status") in _NOT_SO or (unsure and _coded(unsure) in _NOT_SO):
            self.states += 1
        else:
            reader(self, resource)

    def finish(self) -> None:
        """Prescriptions of medicines that another resource describes."""
        for resource, medicine in self._prescribed:
            self._fact(resource, self._medications.get(medicine, {}).get("code"), resource.get("authoredOn"))
        self._prescribed = []

    # --- one function a kind of resource ----------------------------------------------------------------------
    def _patient(self, resource: Resource) -> None:
        death, dead = resource.get("deceasedDateTime"), resource.get("deceasedBoolean", False)
        sex = resource.get("gender")
        person = (
            _text(sex) if sex in ("male", "female", "other") else None,
            _text(resource.get("birthDate")),
            _text(death),
        )
        self.patients[self.people.place(_id(resource))] = (*person, bool(dead) or death is not None)

    def _encounter(self, resource: Resource) -> None:
        period = resource.get("period") or {}
        start, end = _text(period.get("start")), _text(period.get("end"))
        kind = _CLASSES.get(resource["class"]["code"], OUTPATIENT)
        patient = self._person(resource)
        self.encounters[self.stays.place(_id(resource))] = (patient, start, end, kind)

    def _observation(self, resource: Resource) -> None:
        time = resource.get("effectiveDateTime") or _time(resource, "effective") or resource.get("issued")
        event = self._event(resource)
        if "code" in resource:
            self._fact(resource, resource["code"], time, resource, event)
        for at, component in enumerate(resource.get("component") or (), start=1) if "component" in resource else ():
            self._fact(resource, component["code"], time, component, event + at)

    def _condition(self, resource: Resource) -> None:
        self._fact(resource, resource.get("code"), _time(resource, "onset") or resource.get("recordedDate"))

    def _procedure(self, resource: Resource) -> None:
        self._fact(resource, resource.get("code"), _time(resource, "performed"))

    def _report(self, resource: Resource) -> None:
        time, event = _time(resource, "effective") or resource.get("issued"), self._event(resource)
        self._fact(resource, resource["code"], time, None, event)
        for at, conclusion in enumerate(resource.get("conclusionCode") or (), start=1):
            self._fact(resource, conclusion, time, None, event + at)

    def _prescription(self, resource: Resource) -> None:
        if resource.get("doNotPerform"):
            self.states += 1
        elif "medicationCodeableConcept" in resource:
            self._fact(resource, resource["medicationCodeableConcept"], resource.get("authoredOn"))
        else:
            reference = resource["medicationReference"]["reference"]
            if reference.startswith("#"):
                held = next((c for c in resource.get("contained") or () if c.get("id") == reference[1:]), {})
                self._fact(resource, held.get("code"), resource.get("authoredOn"))
            else:
                self._prescribed.append((resource, self._local(reference)))

    def _medication(self, resource: Resource) -> None:
        self._medications[_id(resource)] = resource

    # --- what they share --------------------------------------------------------------------------------------
    def _fact(
        self,
        resource: Resource,
        concept: Resource | None,
        time: str | None,
        answered: Resource | None = None,
        event: int | None = None,
    ) -> None:
        if concept is None:
            return
        for coding in concept.get("coding") or ():
            code = self._known.get((coding.get("system"), coding.get("code")))
            if code is None:
                code = self._code(coding)
            if code < 0:
                continue
            value, unit, answer = _answer(answered) if answered else _NOTHING
            event = self._event(resource) if event is None else event
            units, answers = self.facts.units, self.facts.answers
            self.facts.add(
                (
                    event,
                    self._person(resource),
                    self._stay(resource),
                    _text(time),
                    code,
                    value,
                    units.place(unit) if unit else -1,
                    answers.place(answer) if answer else -1,
                )
            )

    def _code(self, coding: Resource) -> int:
        """The number of a code that was not met before, if it is wanted, or -1."""
        system, code = _text(coding.get("system")), _text(coding.get("code"))
        text = f"{_SYSTEMS.get(system or '', 'LOCAL')}:{code}"
        known = self.facts.codes.place(text) if code and self._wanted(text) else -1
        self._known[system, code] = known
        return known

    def _event(self, resource: Resource) -> int:
        """A number for a resource, the same for another copy of it; room for its parts beside it."""
        name = resource.get("id")
        if name is None:
            self._events += 1
            return self._events << 12
        return hash((resource["resourceType"], name)) >> 12 << 12

    def _person(self, resource: Resource) -> int:
        subject = resource.get("subject") or resource.get("patient")
        return self._place(subject, self.people, self._people) if subject else -1

    def _stay(self, resource: Resource) -> int:
        encounter = resource.get("encounter")
        return self._place(encounter, self.stays, self._stays) if encounter else -1

    def _place(self, named: Resource, words: Words, seen: dict[str, int]) -> int:
        """The number of what a reference means; ``seen`` has those that were met outside of bundles."""
        reference = named.get("reference") or ""
        if self._names is not None:
            return words.place(self._local(reference))
        place = seen.get(reference)
        if place is None:
            place = seen[reference] = words.place(self._local(reference))
        return place

    def _local(self, reference: str) -> str:
        """The id that a reference means."""
        if self._names and reference in self._names:
            return self._names[reference]
        if reference.startswith("urn:"):
            return reference.rpartition(":")[2]
        if "?" in reference:  # a search in place of an id: identifier=SYSTEM|VALUE
            return reference.rpartition("|")[2]
        return reference.partition("/_history/")[0].rpartition("/")[2]


_READERS: dict[str, Callable[[Clinic, Resource], None]] = {
    "Patient": Clinic._patient,
    "Encounter": Clinic._encounter,
    "Observation": Clinic._observation,
    "Condition": Clinic._condition,
    "Procedure": Clinic._procedure,
    "MedicationRequest": Clinic._prescription,
    "Medication": Clinic._medication,
    "DiagnosticReport": Clinic._report,
}
KINDS = tuple(_READERS)
_ELEMENTS = (
    "resourceType id status verificationStatus subject patient encounter code component gender birthDate period class"
    " deceasedDateTime deceasedBoolean effectiveDateTime effectivePeriod effectiveInstant issued onsetDateTime"
    " onsetPeriod recordedDate performedDateTime performedPeriod authoredOn medicationCodeableConcept"
    " medicationReference conclusionCode valueQuantity valueCodeableConcept valueString valueBoolean valueInteger"
)
READ = frozenset(_ELEMENTS.split())
"""Elements that are read; a fault of another one does no harm."""


_NOTHING = (math.nan, None, None)


def _id(resource: Resource) -> str:
    name = resource["id"]
    if not isinstance(name, str) or not name:
        raise ValueError
    return name


def _text(text: Any) -> str | None:
    if text is not None and not isinstance(text, str):
        raise TypeError
    return text


def _time(resource: Resource, of: str) -> str | None:
    if time := resource.get(f"{of}DateTime") or resource.get(f"{of}Instant"):
        return time
    period = resource.get(f"{of}Period")
    return period.get("start") if period else None


def _coded(concept: Resource | None) -> str | None:
    return next((coding.get("code") for coding in concept.get("coding") or ()), None) if concept else None


def _answer(answered: Resource) -> tuple[float, str | None, str | None]:
    """Number, unit, and words, of which there may be none."""
    if quantity := answered.get("valueQuantity"):
        value = quantity.get("value")
        if value is None:
            return math.nan, None, None
        if not isinstance(value, float | int) or isinstance(value, bool):
            raise TypeError
        return float(value), _text(quantity.get("code") or quantity.get("unit")), None
    if concept := answered.get("valueCodeableConcept"):
        return math.nan, None, _coded(concept) or _text(concept.get("text"))
    if (integer := answered.get("valueInteger")) is not None:
        return float(integer), None, None
    if (said := answered.get("valueBoolean")) is not None:
        return float(said), None, "true" if said else "false"
    return math.nan, None, _text(answered.get("valueString"))


def named_in(bundle: Resource) -> dict[str, str]:
    """What a bundle's own addresses (``fullUrl``) stand for."""
    entries: Iterable[Resource] = bundle.get("entry") or ()
    return {
        entry["fullUrl"]: entry["resource"]["id"]
        for entry in entries
        if "fullUrl" in entry and "id" in entry.get("resource", {})
    }
