"""Clinical notes at PROXY hospitals: MTSamples' transcriptions (CC0), or notes of invented words.

MTSamples names no hospital. Each proxy is dealt a share of every specialty, drawn anew for each, so that proxies
differ in what they treat; nothing here speaks for a real one. More than half of its rows are the text of another row
under another specialty: each text is kept once, under the first, with the keywords of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, invented_names

Frame = Any  # what pandas' stubs say of these results is a union of everything

SPECIALTIES, CODES = 16, 40
"""How many of the most frequent ones make a target."""


class ClinicalNotes(BaseModel):
    """Notes with their ``specialty``, or with ``codes``: the transcribers' keywords, which stand in for codes."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["notes"]
    target: Literal["specialty", "codes"] = "specialty"
    records: Literal["mtsamples", "generated"] = "mtsamples"
    names: tuple[str, ...] = ()
    """Of generated notes: the specialties or codes that they are of; ``topic 1`` and so on if empty."""
    notes: Annotated[int, Field(ge=20)] | None = None
    """So many, drawn at random, or all of them; 800 if generated."""
    sites: Annotated[int, Field(ge=2, le=20)] = 4
    seed: Annotated[int, Field(ge=0)] = 0


def clinical_notes(source: ClinicalNotes) -> Iterator[Hospital]:
    """Columns ``note_id``, ``note``, and ``specialty`` or ``codes`` with ``;`` between them."""
    rng = np.random.default_rng(source.seed)
    table = _transcriptions(source) if source.records == "mtsamples" else _invented(source, rng)
    if source.notes is not None and source.notes < len(table):
        table = table.iloc[np.sort(rng.permutation(len(table))[: source.notes])]
    kind = table["kind"].to_numpy()
    site = np.zeros(len(table), dtype=int)
    for name in sorted(set(kind)):
        shares = rng.dirichlet(np.full(source.sites, 3.0))
        site[kind == name] = rng.choice(source.sites, int((kind == name).sum()), p=shares)
    for at, name in enumerate(invented_names(source.sites)):
        yield Hospital(name, table[site == at].drop(columns="kind"))


# --- MTSamples ---------------------------------------------------------------------------------------------
def _transcriptions(source: ClinicalNotes) -> Frame:
    from cloister_simulations.hospitals import data_folder

    raw: Frame = pd.read_csv(data_folder("mtsamples") / "mtsamples.csv.gz").dropna(subset=["transcription"])
    raw["medical_specialty"] = raw["medical_specialty"].str.strip()
    first = raw.drop_duplicates("transcription")
    table: Frame = pd.DataFrame(
        {
            "note_id": [f"N{number:04d}" for number in first["note_id"]],
            "note": first["transcription"].to_numpy(),
            "kind": first["medical_specialty"].to_numpy(),
        }
    )
    if source.target == "specialty":
        frequent = table["kind"].value_counts().index[:SPECIALTIES]
        table["specialty"] = table["kind"]
        return table[table["kind"].isin(frequent)]
    listed = table["note"].map(_keywords(raw))
    counts = Counter(word for words in listed for word in sorted(words))
    codes = {word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:CODES]}
    table["codes"] = [";".join(sorted(words & codes)) for words in listed]
    return table[[bool(words) for words in listed]]


def _keywords(raw: Frame) -> dict[str, set[str]]:
    """Each text's keywords, of all rows that have it: no specialty's name, and no sentence that slipped in."""
    specialties = {name.lower() for name in raw["medical_specialty"]}
    found: dict[str, set[str]] = {}
    for text, written in zip(raw["transcription"], raw["keywords"], strict=True):
        words = {word.strip().lower() for word in str(written).split(",")} if isinstance(written, str) else set[str]()
        kept = {word for word in words if 1 < len(word) <= 40 and word not in specialties}
        found.setdefault(text, set()).update(kept)
    return found


# --- invented ----------------------------------------------------------------------------------------------
def _invented(source: ClinicalNotes, rng: np.random.Generator) -> Frame:
    """Notes of words that everybody uses, the frequent ones most, and of words that belong to a topic."""
    names = source.names or tuple(f"topic {number}" for number in range(1, 9))
    rows: list[dict[str, str]] = []
    for number in range(source.notes or 800):
        many = 1 if source.target == "specialty" else int(rng.integers(0, min(4, len(names) - 1)))
        topics = rng.choice(len(names), many, replace=False)
        kind = names[int(topics[0])] if many else "none"
        said = "specialty" if source.target == "specialty" else "codes"
        listed = ";".join(sorted(names[int(topic)] for topic in topics))
        rows.append({"note_id": f"N{number:05d}", "note": _written(topics.tolist(), rng), "kind": kind, said: listed})
    return pd.DataFrame(rows)


def _written(topics: Sequence[int], rng: np.random.Generator) -> str:
    ordinary = [f"word{int(at)}" for at in np.minimum(rng.zipf(1.3, int(rng.integers(30, 90))), 2000)]
    telling = [f"sign{topic}x{int(rng.integers(12))}" for topic in topics for _ in range(int(rng.integers(2, 7)))]
    words = ordinary + telling
    return " ".join(words[at] for at in rng.permutation(len(words)))
