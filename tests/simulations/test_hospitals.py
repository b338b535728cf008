"""Hospitals on disk are the same each time, differ as intended, and hold what the plans ask for."""

import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from cloister_client.connectors.connector import open_records
from cloister_client.dataset import load_dataset
from cloister_shared.errors import DataRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import load, parse
from cloister_shared.plan_rules import broken
from cloister_simulations.generated import GeneratedEhr
from cloister_simulations.hospitals import (
    BreastCancer,
    HeartDisease,
    Readmission,
    Source,
    build,
)

SCENARIOS = sorted(Path(str(files("cloister_simulations") / "scenarios")).glob("*.yaml"))
NAMES = [path.stem for path in SCENARIOS]
RECORDS = {
    "barrier": "moleculenet",
    "coding": "mtsamples",
    "ecg": "wfdb_samples",
    "expression": "pbmc68k_reduced",
    "heart-disease": "fed_heart_disease",
    "monitoring": "eicu_demo",
    "mortality": "physionet2012",
    "readmission": "diabetes130",
    "solubility": "moleculenet",
    "specialty": "mtsamples",
}
SMALL: dict[str, dict[str, Any]] = {
    "barrier": {"molecules": 300},
    "clinical-forms": {"patients": 120},
    "dicom": {"sites": 2},
    "generated-ehr": {"patients": 1200},
    "generated-stays": {"stays": 300},
    "mortality": {"max_stays": 300},
    "polygenic": {"patients": 600},
    "readmission": {"max_rows": 3000},
    "solubility": {"molecules": 300},
}

Built = Callable[[str], list[Path]]
Frame = Any  # pandas ships no stubs, and what pyright infers of its results is a union of everything


def source_of(terms: dict[str, Any]) -> Source:
    return TypeAdapter[Source](Source).validate_json(json.dumps(terms))


def scenario(name: str) -> tuple[Source, StudyPlan]:
    path = next(path for path in SCENARIOS if path.stem == name)
    document = load(path.read_text(encoding="utf-8"), path.name)
    hospitals = yaml.safe_load(path.read_text(encoding="utf-8"))["simulation"]["hospitals"]
    return source_of(hospitals | SMALL.get(name, {})), parse(StudyPlan, document.below("plan"), broken)


@pytest.fixture(scope="module")
def builder(
    tmp_path_factory: pytest.TempPathFactory, data_dir: Callable[[str], Path]
) -> Iterator[Callable[[str], list[Path]]]:
    """Build a scenario's hospitals anew; skipped where its records are absent."""
    with pytest.MonkeyPatch.context() as patch:

        def fresh(name: str) -> list[Path]:
            if name in RECORDS:
                patch.setenv("CLOISTER_DATA", str(data_dir(RECORDS[name]).parent))
            return build(scenario(name)[0], tmp_path_factory.mktemp(name))

        yield fresh


@pytest.fixture(scope="module")
def built(builder: Built) -> Built:
    """The same, built once for the tests that only read."""
    done: dict[str, list[Path]] = {}

    def once(name: str) -> list[Path]:
        if name not in done:
            done[name] = builder(name)
        return done[name]

    return once


def table(site_yaml: Path) -> Frame:
    terms = yaml.safe_load(site_yaml.read_text(encoding="utf-8"))
    terms = terms["dicom"]["labels"] if "dicom" in terms else terms["table"]
    path = site_yaml.parent / terms["path"]
    frame: Frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return frame.rename(columns={own: name for name, own in terms.get("columns", {}).items()})


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "pneumonia" else name for name in NAMES]
)
def test_the_same_terms_give_the_same_bytes(name: str, built: Built, builder: Built) -> None:
    first, again = built(name), builder(name)
    folder = again[0].parents[1]
    assert bytes_below(first[0].parents[1]) == bytes_below(folder)
    assert [path.parent.name for path in again] == sorted(path.name for path in folder.iterdir())


def test_another_seed_gives_other_hospitals(tmp_path: Path) -> None:
    for seed in (0, 1):
        build(BreastCancer(source="breast-cancer", seed=seed), tmp_path / f"cancer{seed}")
        build(GeneratedEhr(source="generated-ehr", patients=300, seed=seed), tmp_path / f"ehr{seed}")
    assert bytes_below(tmp_path / "cancer0") != bytes_below(tmp_path / "cancer1")
    assert bytes_below(tmp_path / "ehr0") != bytes_below(tmp_path / "ehr1")


def test_building_again_in_the_same_folder_changes_nothing(tmp_path: Path) -> None:
    source = GeneratedEhr(source="generated-ehr", patients=300)
    build(source, tmp_path)
    before = bytes_below(tmp_path)
    build(source, tmp_path)
    assert bytes_below(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_no_patient_is_at_two_hospitals(name: str, built: Built) -> None:
    schema, split = scenario(name)[1].table, scenario(name)[1].evaluation.split_column
    if schema.patient_id is None:
        pytest.skip("each row is a patient of its own")
    also = (split,) if split else ()
    patients = [set(open_records(path).rows(schema, also)[schema.patient_id]) for path in built(name)]
    assert len(set[object]().union(*patients)) == sum(map(len, patients))


@pytest.mark.parametrize("name", NAMES)
def test_every_hospital_holds_what_the_plan_asks_for(name: str, built: Built) -> None:
    plan = scenario(name)[1]
    plan = plan.model_copy(update={"cohort": plan.cohort.model_copy(update={"min_patients": 1})})  # they are made small
    for path in built(name):
        dataset = load_dataset(open_records(path), plan)
        assert len(dataset.train)
        assert len(dataset.test)


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_says_what_to_simulate(name: str) -> None:
    path = next(path for path in SCENARIOS if path.stem == name)
    terms = yaml.safe_load(path.read_text(encoding="utf-8"))
    plan = scenario(name)[1]
    assert list(terms) == ["simulation", "plan"]
    assert set(terms["simulation"]) == {"hospitals", "seeds", "epsilons"}
    assert plan.study == name
    assert plan.privacy.epsilon in terms["simulation"]["epsilons"]
    assert plan.aggregation.secure_sum


def test_heart_disease_has_flambys_rows_at_each_centre(built: Built) -> None:
    split = {path.parent.name: table(path)["split"].value_counts() for path in built("heart-disease")}
    assert {site: (int(n["train"]), int(n["test"])) for site, n in split.items()} == {
        "cleveland": (199, 104),
        "hungarian": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }
    features = scenario("heart-disease")[1].table.features
    assert len(features) == 13
    assert {feature.kind for feature in features} == {"number"}  # FLamby centres and scales all thirteen


def test_breast_cancer_hospitals_differ_in_size_and_in_outcome(built: Built) -> None:
    tables = [table(path) for path in built("breast-cancer")]
    sizes = [len(own) for own in tables]
    share = [own["malignant"].mean() for own in tables]
    assert sum(sizes) == 569
    assert sum(own["malignant"].sum() for own in tables) == 212
    assert min(sizes) >= 60
    assert max(sizes) > 2 * min(sizes)
    assert max(share) - min(share) > 0.1
    assert all(own["malignant"].value_counts().min() >= 25 for own in tables)


@pytest.mark.parametrize("sites", [2, 8])
def test_any_allowed_number_of_breast_cancer_hospitals_is_large_enough(sites: int, tmp_path: Path) -> None:
    tables = [table(path) for path in build(BreastCancer(source="breast-cancer", sites=sites), tmp_path)]
    assert len(tables) == sites
    assert min(map(len, tables)) >= 60
    assert all(own["malignant"].value_counts().min() >= 15 for own in tables)


def test_readmission_keeps_all_encounters_of_the_patients_it_takes(built: Built) -> None:
    tables = [table(path) for path in built("readmission")]
    assert 4 <= len(tables) <= 6
    assert 2900 < sum(map(len, tables)) <= 3000
    everyone: Frame = pd.concat(tables)
    assert everyone["patient_id"].value_counts().max() > 1
    assert 0.05 < everyone["readmitted_30d"].mean() < 0.2


def test_generated_hospitals_differ_as_asked(tmp_path: Path) -> None:
    def shares(folder: str, **shift: float) -> tuple[Frame, Frame, Frame]:
        """By hospital: rows, ill, and age."""
        source = source_of({"source": "generated-ehr", "patients": 3000, "missing": 0.0} | shift)
        tables = [table(path) for path in build(source, tmp_path / folder)]
        ill = pd.Series([own["deteriorated"].mean() for own in tables])
        return pd.Series(map(len, tables)), ill, pd.Series([own["age"].mean() for own in tables])

    rows, alike_ill, alike_age = shares("alike", label_shift=0.0, feature_shift=0.0)
    _, ill, _ = shares("label", label_shift=1.0, feature_shift=0.0)
    _, _, age = shares("feature", label_shift=0.0, feature_shift=1.0)
    assert rows.max() > 2 * rows.min()
    assert ill.std() > 3 * alike_ill.std()
    assert age.std() > 3 * alike_age.std()


def test_generated_hospitals_leave_laboratory_values_out(built: Built, tmp_path: Path) -> None:
    absent = [table(path)["creatinine"].isna().mean() for path in built("generated-ehr")]
    assert max(absent) > 0.05
    assert max(absent) - min(absent) > 0.03
    complete = build(GeneratedEhr(source="generated-ehr", patients=300, missing=0.0), tmp_path)
    assert not any(table(path).isna().any(axis=None) for path in complete)


def test_generated_values_agree_between_hospitals_once_converted(tmp_path: Path) -> None:
    """Without shift, typical values agree in the plan's units, and are far apart in the hospitals' own."""
    source = GeneratedEhr(source="generated-ehr", sites=3, feature_shift=0.0, label_shift=0.0)
    schema = scenario("generated-ehr")[1].table
    medians: dict[str, list[float]] = {"creatinine": [], "glucose": [], "haemoglobin": [], "weight": []}
    own: dict[str, list[float]] = {name: [] for name in medians}
    for path in build(source, tmp_path):
        connector = open_records(path)
        rows, factors = connector.rows(schema), connector.factors(schema)
        for name, found in medians.items():
            scale, offset = factors.get(name, (1.0, 0.0))
            values: Frame = pd.to_numeric(rows[name])
            own[name].append(float(values.median()))
            found.append(own[name][-1] * scale + offset)
    for name, found in medians.items():
        assert max(found) < 1.1 * min(found), name
        assert max(own[name]) > 2 * min(own[name]), name


@pytest.mark.parametrize(
    "source",
    [HeartDisease(source="heart-disease"), Readmission(source="readmission")],
    ids=lambda s: s.source,
)
def test_absent_records_end_in_a_sentence_that_names_the_mend(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOISTER_DATA", str(tmp_path))
    with pytest.raises(DataRefused) as refused:
        build(source, tmp_path / "hospitals")
    said = str(refused.value)
    assert str(tmp_path / RECORDS[source.source]) in said
    for word in ("CLOISTER_DATA", "generated-ehr", "breast-cancer"):
        assert word in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "terms",
    [
        {"source": "breast-cancer", "sites": 9},
        {"source": "breast-cancer", "hospitals": 3},
        {"source": "generated-ehr", "missing": 1.5},
        {"source": "generated-ehr", "patients": "many"},
        {"source": "somewhere"},
    ],
)
def test_odd_sources_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        source_of(terms)
