"""Every figure of clinical records and models: what was measured, the bar, and whether it holds.

    make figures TOPIC=clinical                              all of them, some fifty minutes
    make figures TOPIC=clinical ARGS="--only records images" some families, or figures by the start of their name
    make figures TOPIC=clinical ARGS=--json                  as a list for a program

Exits 1 when a figure falls short. Real records are read from the folder that CLOISTER_DATA names.
"""

from __future__ import annotations

import signal
import sys

import suite

FAMILIES = {
    "records": "clinical_records",
    "series": "clinical_series",
    "images": "clinical_images",
    "words": "clinical_words",
    "life": "clinical_life",
    "agents": "clinical_agents",
}

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was begun is ended
    sys.exit(suite.run("Measure clinical records and models against their bars.", FAMILIES))
