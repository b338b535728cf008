"""Clinical records broken in one way each end in a use or in one clear refusal, without a value of a patient."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "simulations" / "benchmarks"))
from malformed_records import CASES, Case, fault, sound, written  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.form}: {case.name}")
def test_a_broken_record(case: Case, tmp_path: Path):
    assert fault(case, tmp_path) == ""


@pytest.mark.parametrize("form", ["fhir", "omop", "table"])
def test_the_sound_records_are_sound(form, tmp_path):
    assert fault(Case("sound", form, lambda files: None), tmp_path) == ""


def test_there_are_forty_of_them_and_each_is_broken(tmp_path):
    assert len(CASES) >= 40
    for number, case in enumerate(CASES):
        files = sound(case.form)
        case.break_it(files)
        assert files != sound(case.form) or case.site, case.name
        assert written(case, tmp_path / str(number)).exists()
