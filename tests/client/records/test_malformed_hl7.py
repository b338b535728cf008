"""HL7 messages and C-CDA documents broken in one way each end in a use or in one clear refusal."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "simulations" / "benchmarks"))
from malformed_hl7 import CASES, fault, sound  # pyright: ignore[reportMissingImports]
from malformed_records import Case  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}: {case.name}")
def test_a_broken_record(case: Case, tmp_path: Path):
    assert fault(case, tmp_path) == ""


@pytest.mark.parametrize("form", ["hl7", "ccda"])
def test_the_sound_records_are_sound(form, tmp_path):
    assert fault(Case("sound", form, lambda files: None), tmp_path) == ""


def test_each_is_broken():
    for case in CASES:
        files = sound(case.form)
        case.break_it(files)
        assert files != sound(case.form) or case.site, case.name
