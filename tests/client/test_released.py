"""A released model at a hospital: verified, made whole, scored, calibrated, explained; for every kind of outcome."""

import csv
import json
import stat

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cloister_client import calibrate, explain, unusual
from cloister_client.cli import app
from cloister_client.predict import predict, told
from cloister_client.released import open_released, read_new
from cloister_shared import model_file
from cloister_shared.envelope import new_identity, save_roster
from cloister_shared.errors import EnvelopeRefused, WeightsBroken
from cloister_shared.layout import gathered, initial_model, layout_of
from cloister_shared.plan_file import read_plan

TARGETS = {
    "binary": {"name": "ill", "positive": 1, "negative": 0},
    "classes": {"kind": "classes", "name": "ward", "classes": ["a", "b", "c"]},
    "labels": {"kind": "labels", "name": "codes", "labels": ["x", "y"]},
    "quantity": {"kind": "quantity", "name": "stay", "unit": "day", "range": [0, 40]},
    "survival": {"kind": "survival", "name": "days", "event": "died", "cuts": [10, 20, 30]},
}
COLUMNS = {
    "binary": ["risk of ill"],
    "classes": ["a", "b", "c"],
    "labels": ["x", "y"],
    "quantity": ["stay [day]"],
    "survival": ["outlives 10", "outlives 20", "outlives 30"],
}


def a_plan(kind, **changes):
    terms = {
        "study": "scores",
        "title": "Scores",
        "task": {"name": "tabular", "model": "mlp", "hidden": [4], "norm": "layer"},
        "table": {
            "patient_id": "patient",
            "target": TARGETS[kind],
            "features": [
                {"name": "age", "kind": "number", "unit": "year", "range": [18, 110]},
                {"name": "weight", "kind": "number", "unit": "kg", "range": [30, 250]},
                {"name": "smoker", "kind": "boolean"},
            ],
        },
        "cohort": {"min_sites": 2, "min_patients": 20},
        "rounds": 2,
        "strategy": {"name": "fedavg"},
        "training": {"learning_rate": 0.1, "batch_size": 16, "local_steps": 2},
        "privacy": {"mechanism": "none"},
        **changes,
    }
    return read_plan(yaml.safe_dump(terms), "plan.yaml")


def a_table(rows=400, seed=0):
    draw = np.random.default_rng(seed)
    table = pd.DataFrame({"patient": [f"p{at}" for at in range(rows)], "age": draw.normal(60, 10, rows).round(1)})
    table["WT_LB"], table["smoker"] = draw.normal(170, 20, rows).round(), draw.integers(0, 2, rows)
    table["ill"] = (draw.random(rows) < 1 / (1 + np.exp((60 - table["age"]) / 8))).astype(int)
    table["ward"], table["codes"] = draw.choice(list("abc"), rows), draw.choice(["x", "y", "x;y", ""], rows)
    table["stay"], table["days"], table["died"] = draw.uniform(0, 40, rows), draw.uniform(1, 40, rows), table["ill"]
    return table


@pytest.fixture
def hospital(tmp_path):
    """A folder with a site.yaml, whose weights are in pounds and under another name."""
    a_table().to_csv(tmp_path / "table.csv", index=False)
    mapped = {"path": "table.csv", "columns": {"weight": "WT_LB"}, "units": {"weight": "lb"}}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({"site": "north", "table": mapped}))
    a_table(30, seed=1)[["patient", "age", "WT_LB", "smoker"]].to_csv(tmp_path / "new.csv", index=False)
    return tmp_path


@pytest.fixture
def release(tmp_path):
    """Exports a plan's untrained model; the roster that its key is pinned in."""

    def made(plan):
        model = initial_model(plan)
        vector = gathered(model, layout_of(plan, model).shared)
        key = new_identity(tmp_path / "signing.key")
        told = {"metrics": {"auroc": 0.7}, "metrics_of": "Invented"}
        model_file.write(tmp_path / "model", plan, vector, None, key, at=2, **told)
        return {"consortium": key.public}

    return made


def opened(hospital, roster):
    return open_released(model_file.read(hospital / "model", roster), hospital / "site.yaml")


def lines(path):
    return list(csv.DictReader(path.read_text().splitlines()))


# --- scores ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", TARGETS)
def test_every_kind_of_outcome_is_scored_and_explained(hospital, release, kind):
    released = opened(hospital, release(a_plan(kind)))
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table)
    done = predict(released, rows, hospital / "out.csv")
    assert (done.rows, done.scored) == (30, 30)
    found = lines(hospital / "out.csv")
    assert list(found[0]) == ["row", "patient", *COLUMNS[kind], "unusual", "note"]
    assert [line["row"] for line in found] == [str(at) for at in range(1, 31)]
    values = np.array([[float(line[name]) for name in COLUMNS[kind]] for line in found])
    assert np.isfinite(values).all()
    if kind == "classes":
        assert values.sum(axis=1) == pytest.approx(1, abs=1e-4)
    if kind == "survival":
        assert (np.diff(values, axis=1) <= 0).all()
    assert stat.S_IMODE((hospital / "out.csv").stat().st_mode) == 0o600
    assert explain.of_rows(released, rows).shape == (30, 3)
    assert set(explain.of_model(released)) == {"age", "weight", "smoker"}


def test_scores_are_the_networks_own_with_the_hospitals_units(hospital, release):
    released = opened(hospital, release(a_plan("quantity")))
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table)
    table = pd.read_csv(hospital / "new.csv")
    age, weight = (table["age"] - 64) / 23, (table["WT_LB"] * 0.45359237 - 140) / 55
    x = torch.tensor(np.stack([age, weight, table["smoker"]], axis=1), dtype=torch.float32)
    with torch.no_grad():
        expected = released.network.model(x)[:, 0].numpy() * 10 + 20
    predict(released, rows, hospital / "out.csv")
    assert [float(line["stay [day]"]) for line in lines(hospital / "out.csv")] == pytest.approx(expected, rel=1e-4)


def test_a_row_outside_the_plan_is_not_scored_and_says_why(hospital, release):
    table = pd.read_csv(hospital / "new.csv").astype({"age": float})
    table.loc[4, "age"] = 400
    table.drop(columns="patient").to_csv(hospital / "new.csv", index=False)  # and nobody's id is needed
    released = opened(hospital, release(a_plan("binary")))
    done = predict(
        released, read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table), hospital / "out.csv"
    )
    assert done.scored == 29
    line = lines(hospital / "out.csv")[4]
    assert line == {"row": "5", "risk of ill": "", "unusual": "", "note": "age: outside the plan's range"}


def test_a_row_unlike_any_is_marked(hospital, release):
    table = pd.read_csv(hospital / "new.csv").astype({"age": float})
    table.loc[0, ["age", "WT_LB"]] = 19, 500
    table.to_csv(hospital / "new.csv", index=False)
    released = opened(hospital, release(a_plan("binary")))
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table)
    predict(released, rows, hospital / "out.csv")
    marks = [line["unusual"] for line in lines(hospital / "out.csv")]
    assert marks[0] == "yes"
    assert marks.count("yes") <= 3


def test_wide_tables_and_pictures_are_held_by_four_numbers(hospital):
    terms = {"name": "film", "kind": "image", "size": [8, 8]}
    plan = a_plan("binary")
    from cloister_shared.schema import ImageFeature

    schema = plan.table.model_copy(
        update={"features": (*plan.table.features, ImageFeature(**terms | {"size": (8, 8)}))}
    )
    draw = np.random.default_rng(0)
    x = draw.normal(0, 1, (300, 3 + 64)).astype(np.float32)
    found = unusual.usual(x, schema)
    assert found
    dark = x[:2].copy()
    dark[1, 3:] = -1.0
    assert found.far(dark).tolist() == [False, True]
    assert unusual.usual(x[:20], schema) is None


def test_a_hospital_without_rows_of_its_own_is_told_what_it_cannot_have(hospital, release):
    pd.read_csv(hospital / "table.csv").head(10).to_csv(hospital / "table.csv", index=False)
    released = opened(hospital, release(a_plan("binary")))
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table)
    said = " ".join(told(released, predict(released, rows, hospital / "out.csv")))
    assert "30 of 30 rows are scored" in said
    assert "Not calibrated here: north has" in said
    assert "Nobody can say which rows are unusual" in said
    assert explain.of_model(released) == {}


# --- calibration --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "how"), [(200, "platt"), (3000, "isotonic")])
def test_risks_that_are_too_bold_are_made_right(rows, how):
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 1.5, rows).astype(np.float32)
    y = (draw.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    made = calibrate._line_or_steps(3 * logits, y)
    assert made.how == how
    right = 1 / (1 + np.exp(-made(3 * logits[:, None])[:, 0]))
    assert abs(right - 1 / (1 + np.exp(-logits))).mean() < 0.05


def test_a_temperature_is_found_again(hospital, release):
    released = opened(hospital, release(a_plan("classes")))
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 1, (2000, 3)).astype(np.float32)
    powers = np.exp(logits.astype(float))
    y = np.array([draw.choice(3, p=p) for p in powers / powers.sum(axis=1, keepdims=True)], np.float32)
    made = calibrate._temperature(released.network, 2.5 * logits, y)
    assert made.numbers[0] == pytest.approx(2.5, rel=0.15)


def test_too_few_held_out_rows_are_not_calibrated_on():
    y = np.array([1.0] * 19 + [0.0] * 300, np.float32)
    made = calibrate._line_or_steps(np.zeros(319, np.float32), y)
    assert (made.how, made.why) == ("none", "19 held-out rows of the rarer outcome; it takes 20 or more")


def test_the_calibration_stays_at_the_hospital_and_is_nobody_elses(hospital, release):
    released = opened(hospital, release(a_plan("binary")))
    assert released.calibration.how == "platt"
    (path,) = (hospital / "agent" / "models").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert calibrate.Calibration.model_validate_json(path.read_text()) == released.calibration


# --- what is refused -----------------------------------------------------------------------------------------
def test_another_key_than_the_pinned_one_signs_nothing(hospital, release, tmp_path):
    release(a_plan("binary"))
    other = new_identity(tmp_path / "other.key")
    with pytest.raises(EnvelopeRefused, match="not pinned here"):
        model_file.read(hospital / "model", {"consortium": other.public})


@pytest.mark.parametrize("name", ["model.safetensors", "model.onnx"])
def test_a_file_that_was_changed_is_found_out(hospital, release, name):
    roster = release(a_plan("binary"))
    path = hospital / "model" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsBroken, match="is not the file that was signed"):
        model_file.read(hospital / "model", roster)


def test_a_manifest_that_was_changed_is_found_out(hospital, release):
    import base64

    roster, path = release(a_plan("binary")), hospital / "model" / "manifest.json"
    envelope = json.loads(path.read_text())
    said = json.loads(base64.b64decode(envelope["payload"])) | {"privacy": {"Promise": "everything"}}
    envelope["payload"] = base64.b64encode(json.dumps(said).encode()).decode()
    path.write_text(json.dumps(envelope))
    with pytest.raises(EnvelopeRefused, match="a signature that its key did not make"):
        model_file.read(hospital / "model", roster)


def test_layers_that_hospitals_keep_are_not_invented(hospital, release):
    plan = a_plan("binary", personalisation={"local_layers": ["norm"]})
    roster = release(plan)
    with pytest.raises(WeightsBroken, match="this one kept none"):
        opened(hospital, roster)
    from cloister_client.answers import LocalState

    kept = np.full(8, 0.5, np.float32)
    LocalState(hospital / "study").save(plan.digest, 2, {"layers": kept})
    released = open_released(model_file.read(hospital / "model", roster), hospital / "site.yaml", hospital / "study")
    state = released.network.model.state_dict()
    assert (state["norm_0.weight"].numpy() == 0.5).all()
    assert released.model.manifest.portable.startswith("none: layers")


# --- what other programs read ---------------------------------------------------------------------------------
def test_onnx_says_what_the_network_says(hospital, release):
    import onnxruntime

    released = opened(hospital, release(a_plan("classes")))
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(hospital / "model" / "model.onnx")
    said = session.run(None, {"inputs": x})[0]
    assert said == pytest.approx(released.network.output(torch.from_numpy(x)).numpy(), abs=1e-5)


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = torch.nn.GRU(2, 4, batch_first=True), torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.gru(x.unflatten(1, (3, 2)))[0][:, -1])


def test_what_onnx_cannot_say_for_any_number_of_rows_torchscript_says(tmp_path):
    from cloister_shared.networks.portable import written

    path, why = written(Recurrent().eval(), torch.randn(3, 6), tmp_path / "model")
    assert (path, why) == (tmp_path / "model.ts", "")
    assert list(tmp_path.iterdir()) == [path]


def test_what_neither_form_can_say_is_said_and_not_left_lying(tmp_path):
    from cloister_shared.networks.portable import written

    class Odd(torch.nn.Module):
        def forward(self, x):
            return x.sum(dim=1, keepdim=True) * len(x)  # a graph that was traced holds the example's number of rows

    path, why = written(Odd(), torch.ones(3, 2), tmp_path / "model")
    assert path is None
    assert why.startswith("onnx: ")
    assert list(tmp_path.iterdir()) == []


# --- commands ----------------------------------------------------------------------------------------------
def test_the_commands_score_and_explain(hospital, release, monkeypatch):
    save_roster(hospital / "pinned.json", release(a_plan("binary")))
    monkeypatch.chdir(hospital)
    done = CliRunner().invoke(app, ["predict", "model", "new.csv", "--pinned", "pinned.json"])
    assert done.exit_code == 0, done.output
    assert "signed by consortium: 30 of 30 rows are scored." in done.output
    assert "Calibrated on" in done.output
    assert len(lines(hospital / "predictions.csv")) == 30
    done = CliRunner().invoke(app, ["explain", "model", "new.csv", "--pinned", "pinned.json"])
    assert done.exit_code == 0, done.output
    assert "is worse by so much without a feature" in done.output
    assert max(map(len, done.output.splitlines())) <= 100
    assert list(lines(hospital / "explanation.csv")[0]) == ["row", "patient", "age", "weight", "smoker"]


def test_attributions_add_up_to_what_the_score_moved(hospital, release):
    """Integrated gradients' completeness, from the mean training row."""
    released = opened(hospital, release(a_plan("quantity")))
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", released.plan.table)
    assert released.train
    base = released.network.output(released.train.x.mean(dim=0, keepdim=True))[:, 0]
    moved = (released.network.output(released.scaled(rows))[:, 0] - base).numpy()
    assert explain.of_rows(released, rows).sum(axis=1) == pytest.approx(moved, abs=0.02)


# --- harmonised numbers -------------------------------------------------------------------------------------
@pytest.mark.parametrize("took_part", [True, False])
def test_a_hospitals_own_effects_stay_there_and_where_none_are_known_it_is_said(hospital, took_part):
    plan = a_plan("quantity", normalisation={"method": "combat"})
    model = initial_model(plan)
    key, constants = new_identity(hospital / "signing.key"), ((60.0, 10.0), (75.0, 9.0))
    vector = gathered(model, layout_of(plan, model).shared)
    model_file.write(hospital / "model", plan, vector, constants, key, at=2, metrics={}, metrics_of="Invented")
    state = hospital / "state"
    state.mkdir()
    if took_part:  # a hundred patients of 65 years and of 80 kg, of the common spread
        told = {"count": 100.0, "sum age": 100 / 46, "sum weight": -100 * 60 / 110}
        told |= {
            "square age": 99 * (10 / 46) ** 2 + 100 / 46**2,
            "square weight": 99 * (9 / 110) ** 2 + 100 * (6 / 11) ** 2,
        }
        (state / f"{plan.digest}.moments.json").write_text(json.dumps(told))
    found = model_file.read(hospital / "model", {"consortium": key.public})
    released = open_released(found, hospital / "site.yaml", state)
    rows = read_new(hospital / "new.csv", hospital / "site.yaml", plan.table)
    assert "what each hospital adds to them and multiplies" in (hospital / "model" / "MODEL_CARD.md").read_text()
    said = " ".join(told_of(released, rows, hospital / "out.csv"))
    notes = {line["note"] for line in lines(hospital / "out.csv")}
    assert ("Not harmonised: this hospital has no sums" in said, notes) == (
        (False, {""}) if took_part else (True, {"not harmonised"})
    )
    age = (rows.x[:, 0].numpy() - 60) / 10
    shift = age - released.scaled(rows)[:, 0].numpy()
    assert shift == pytest.approx(0.5 if took_part else 0.0, abs=0.05)  # shrunk to what weight has: 5/9


def told_of(released, rows, out):
    return told(released, predict(released, rows, out))
