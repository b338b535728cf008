"""Beats of one real ECG, record 100 of the MIT-BIH arrhythmia database (Moody and Mark 2001), half an hour of it.

There is one patient. Stretches of the recording of equal length stand in for hospitals, and each beat stands in for a
patient: these are PROXIES that show how waveforms are watched, and no figure here says how well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from cloister_client.connectors.waveforms import beats
from cloister_client.site_file import WaveformFiles
from cloister_simulations.site_folder import Hospital, invented_names

BEATS = "NLRBAaJSVrFejnE/fQ?"
"""Annotations that are beats (PhysioNet's table of codes); others tell of rhythm and noise. N is a normal one."""
BEFORE = 0.9
"""Seconds before a beat where its row begins, so that an early beat brings the one before it into view."""


class Ecg(BaseModel):
    """Beats of one patient; PROXY sites are stretches of the recording, PROXY patients its beats.

    Every fourth minute of the recording is held out.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["ecg"]
    sites: Annotated[int, Field(ge=2, le=5)] = 3


def ecg(source: Ecg, folder: Path) -> Iterator[Hospital]:
    """A table of beats for each site, and the recording beside it. ``folder`` holds the records."""
    seconds, symbols = beats(folder / "100")
    kept = [at for at, symbol in enumerate(symbols) if symbol in BEATS and seconds[at] >= 2 * BEFORE]
    minute = (seconds[kept] // 60).astype(int)
    table = pd.DataFrame(
        {
            "recording": "100",
            "begins": (seconds[kept] - BEFORE).round(4),
            "part": np.where(minute % 4 == 3, "test", "train"),
            "unusual": [int(symbols[at] != "N") for at in kept],
        }
    )
    recording = {f"recordings/100.{kind}": (folder / f"100.{kind}").read_bytes() for kind in ("hea", "dat")}
    terms = WaveformFiles(path="recordings", record="recording", seconds="begins")
    stretches = np.array_split(np.unique(minute), source.sites)
    for name, own in zip(invented_names(source.sites), stretches, strict=True):
        yield Hospital(name, table[np.isin(minute, own)], measured=terms, files=recording)
