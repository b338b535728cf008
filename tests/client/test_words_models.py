"""Models of notes, molecules and genomics: one step of DP is the definition's, and odd hospitals do no harm."""

import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save

from cloister_client.clipping import Clipper
from cloister_client.dataset import Rows
from cloister_client.encoders import molecule, text
from cloister_client.network import Network
from cloister_client.privacy import Units, dp_sgd
from cloister_client.quality import ColumnReport
from cloister_shared import charges
from cloister_shared.errors import PlanRefused
from cloister_shared.inputs import width
from cloister_shared.layout import PRETRAINED, initial_model, layout_of, untrained
from cloister_shared.noise import reproducible
from cloister_shared.objective import objective_of
from cloister_shared.outcomes.outcome import outcome_of
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.schema import MoleculeFeature, TextFeature

PLAN = """\
study: words
title: One model of the zoo
task: {TASK}
table:
  patient_id: patient
  target: {TARGET}
  features: [{FEATURE}]
cohort: {min_sites: 2, min_patients: 1}
rounds: 2
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 6, local_steps: 1}
privacy: {mechanism: site, unit: patient, epsilon: 3.0, delta: 1.0e-5, clip_norm: 0.3}
"""
CLASSES = "kind: classes, name: y, classes: [a, b, c]"
LABELS = "kind: labels, name: y, labels: [a, b, c]"
BINARY = "kind: binary, name: y, positive: 1, negative: 0"
QUANTITY = "kind: quantity, name: y, range: [-4, 4]"
NOTE = "name: note, kind: text, tokens: 12, buckets: 50"
GRAPH = "name: smiles, kind: molecule, encoding: graph, atoms: 9"
PRINT = "name: smiles, kind: molecule, bits: 64"
GENES = "name: gene, kind: vector, length: 7, range: [-4, 4]"
TRANSFORMER = "width: 8, heads: 2, depth: 2"
FROZEN = f"pretrained: {{sha256: {'a' * 64}, frozen: [trunk]}}"
MODELS = {
    "notes-linear": ("name: notes", CLASSES, NOTE),
    "notes-linear-labels": ("name: notes", LABELS, NOTE),
    "notes-linear-binary": ("name: notes", BINARY, NOTE),
    "notes-transformer": (f"name: notes, model: transformer, {TRANSFORMER}", CLASSES, NOTE),
    "notes-encoder": (f"name: notes, model: encoder, {TRANSFORMER}, {FROZEN}", LABELS, NOTE),
    "molecule-mlp": ("name: molecule, hidden: [5]", BINARY, PRINT),
    "molecule-linear": ("name: molecule", QUANTITY, PRINT),
    "molecule-messages": ("name: molecule, model: message-passing, width: 6, steps: 2", BINARY, GRAPH),
    "molecule-messages-quantity": ("name: molecule, model: message-passing, width: 6, steps: 2", QUANTITY, GRAPH),
    "genomics-linear": ("name: genomics", CLASSES, GENES),
    "genomics-mlp": ("name: genomics, model: mlp, hidden: [5]", QUANTITY, GENES),
}
WRITTEN = ["chest pain chest", "", "no pain of the chest today or the day before it was none", "x", "pain", "a b a b a"]
SMILES = ["CCO", "c1ccccc1", "C#N", "CC(=O)O", "C", "C[C@H](N)O"]


def plan_of(name: str) -> StudyPlan:
    task, target, feature = MODELS[name]
    return read_plan(PLAN.replace("TASK", task).replace("TARGET", target).replace("FEATURE", feature))


def rows_of(plan: StudyPlan) -> Rows:
    """Six records of five patients."""
    feature, report = plan.table.features[0], ColumnReport("x")
    match feature:
        case TextFeature():
            x = text.encode(feature, np.array(WRITTEN, dtype=object), report)
        case MoleculeFeature():
            x = molecule.encode(feature, np.array(SMILES, dtype=object), report)
        case _:
            x = np.random.default_rng(0).normal(size=(6, width(plan.table))).astype(np.float32)
    y: object = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    if plan.table.target.kind == "labels":
        y = np.random.default_rng(1).integers(0, 2, (6, 3))
    elif plan.table.target.kind == "classes":
        y = [0.0, 2.0, 1.0, 0.0, 1.0, 2.0]
    return Rows(torch.from_numpy(x), torch.tensor(np.asarray(y, dtype=np.float32)), np.array([0, 1, 2, 3, 4, 4]))


def begun(plan: StudyPlan) -> torch.nn.Module:
    """With weights all over, which a linear model's zeros are not."""
    model = untrained(plan)
    generator = torch.Generator().manual_seed(5)
    for name, part in model.named_parameters():
        if name == "words.weight":
            part.data = torch.randn(part.shape, generator=generator) / 3
            part.data[0] = 0
    return model


def one_gradient(plan: StudyPlan, rows: Rows) -> list[torch.Tensor]:
    model = begun(plan)
    event = charges.training_event(plan, len(Units.of(rows, "patient")))
    dp_sgd(model, objective_of(plan), rows, plan, event, reproducible("0")).gradient()
    return [part.grad for part in model.parameters() if part.requires_grad and part.grad is not None]


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charges, "calibrate", lambda *_: 1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("no_noise")
def test_a_step_is_that_of_patients_clipped_one_by_one(name: str) -> None:
    plan = plan_of(name)
    rows, model, loss = rows_of(plan), begun(plan), objective_of(plan).loss
    trained = [part for part in model.parameters() if part.requires_grad]
    total, shortened = [torch.zeros_like(part, dtype=torch.float64) for part in trained], 0
    for patient in np.unique(rows.patients):
        own = torch.from_numpy(rows.patients == patient)
        gradient = torch.autograd.grad(loss(model(rows.x[own]), rows.y[own]), trained)
        norm = float(torch.cat([part.flatten() for part in gradient]).norm())
        shortened += norm > 0.3
        for whole, part in zip(total, gradient, strict=True):
            whole += part.double() * min(1.0, 0.3 / norm)
    assert shortened
    got, want = one_gradient(plan, rows), [(part / 6).float() for part in total]
    for mine, right in zip(got, want, strict=True):
        assert mine == pytest.approx(right, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_clip_knows_every_layer(name: str) -> None:
    plan = plan_of(name)
    rows = rows_of(plan)
    clipper = Clipper(begun(plan), objective_of(plan).loss, 0.3, notice=pytest.fail)
    clipper.add(rows.x, rows.y, torch.arange(6), 6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("only", [[0], [0, 3], []], ids=["one patient", "one class", "nobody"])
def test_odd_hospitals_take_a_step_and_are_judged(name: str, only: list[int]) -> None:
    plan = plan_of(name)
    every = rows_of(plan)
    rows = Rows(every.x[only], every.y[only], every.patients[only]) if only else every
    if only:
        assert all(part.isfinite().all() for part in one_gradient(plan, rows))
    else:
        rows = Rows(every.x[:1], every.y[:1], every.patients[:1])
    outcome = outcome_of(plan.table)
    output = Network(begun(plan), objective_of(plan)).output(rows.x).numpy()
    truth, said = outcome.seen(output, rows.y.numpy())
    assert np.isfinite(said).all()
    assert not outcome.enough(truth, 5)


@pytest.mark.parametrize("name", MODELS)
def test_a_records_output_depends_on_that_record_alone(name: str) -> None:
    plan = plan_of(name)
    model, x = begun(plan).eval(), rows_of(plan).x
    whole = model(x).detach()
    for at in range(len(x)):
        assert model(x[at : at + 1]).detach() == pytest.approx(whole[at : at + 1], abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_weights_are_written_and_read_back(name: str, tmp_path) -> None:
    plan = plan_of(name)
    written = save({key: part.contiguous() for key, part in begun(plan).state_dict().items()})
    (tmp_path / PRETRAINED).write_bytes(written)
    frozen = plan.task.pretrained.frozen if plan.task.pretrained else ()
    public = {"sha256": hashlib.sha256(written).hexdigest(), "frozen": list(frozen)}
    read = initial_model(amend(plan, seed=9, task={"pretrained": public}), tmp_path)
    x = rows_of(plan).x
    assert torch.equal(read.eval()(x), begun(plan).eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_named(name: str) -> None:
    plan = plan_of(name)
    layers = {entry.split(".")[0] for entry, _ in layout_of(plan, untrained(plan)).shared}
    assert layers == {layer for layer in plan.task.layers if not layer.startswith(plan.frozen or ("-",))}


# --- what words weigh --------------------------------------------------------------------------------------
def test_a_word_that_comes_often_counts_by_the_logarithm_and_a_long_note_no_more() -> None:
    from cloister_shared.networks.notes import weighed

    words, counts = weighed(torch.tensor([[3, 7, 3, 0, 3], [0, 0, 0, 0, 0]]))
    by_word = {int(word): float(count) for word, count in zip(words[0], counts[0], strict=True) if count}
    length = np.hypot(1 + np.log(3), 1)
    assert by_word == {3: pytest.approx((1 + np.log(3)) / length), 7: pytest.approx(1 / length)}
    assert not counts[1].any()


def test_the_order_of_words_is_nothing_to_the_linear_model_and_something_to_the_transformer() -> None:
    moved: dict[str, bool] = {}
    for name in ("notes-linear", "notes-transformer"):
        plan = plan_of(name)
        said = [begun(plan).eval()(torch.tensor([words + [0.0] * 9])) for words in ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0])]
        moved[name] = not torch.allclose(*said, atol=1e-6)
    assert moved == {"notes-linear": False, "notes-transformer": True}


# --- molecules ---------------------------------------------------------------------------------------------
def test_the_order_of_atoms_is_nothing_to_the_network() -> None:
    plan = plan_of("molecule-messages")
    feature = plan.table.features[0]
    assert isinstance(feature, MoleculeFeature)
    both = molecule.encode(feature, np.array(["CCO", "OCC"], dtype=object), ColumnReport("x"))
    assert not np.array_equal(both[0], both[1])
    one, other = begun(plan).eval()(torch.from_numpy(both)).detach()
    assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("encoding", ["graph", "fingerprint"])
def test_what_is_no_molecule_is_a_bad_row_without_its_text(encoding: str, capfd: pytest.CaptureFixture[str]) -> None:
    feature = MoleculeFeature(name="m", kind="molecule", encoding=encoding, atoms=4, bits=64)  # type: ignore[arg-type]
    report = ColumnReport("m")
    cells = np.array(["CCO", "not-one", None, "C1CC", "CCCCCC"], dtype=object)
    x = molecule.encode(feature, cells, report)
    problems = {"no molecule that RDKit reads": [2, 3, 4]}
    assert report.problems == problems | ({"more than 4 atoms": [5]} if encoding == "graph" else {})
    assert not x[1:4].any()
    assert "not-one" not in "".join(capfd.readouterr())


def test_a_graph_says_what_atoms_and_bonds_are() -> None:
    feature = MoleculeFeature(name="m", kind="molecule", encoding="graph", atoms=4)
    graph = molecule.encode(feature, np.array(["C=CO"], dtype=object), ColumnReport("m")).reshape(4, 36)
    assert graph[:, 0].tolist() == [1, 1, 1, 0]
    assert graph[:, 1].tolist() == [1, 1, 0, 0]  # carbon
    assert graph[:3, 32:35].tolist() == [[0, 2, 0], [2, 0, 1], [0, 1, 0]]
    assert not graph[3].any()


# --- terms that do not go together -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "task", "wrong"),
    [
        ("notes-linear", {"depth": 2}, "belongs to a transformer"),
        ("notes-transformer", {"heads": 3}, "does not divide"),
        ("notes-transformer", {"model": "encoder"}, "from a public file"),
        ("molecule-mlp", {"model": "message-passing"}, "takes a molecule's graph"),
        ("molecule-mlp", {"steps": 2}, "is no term of model mlp"),
        ("genomics-linear", {"hidden": [4]}, "is the widths of model mlp"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(name: str, task: dict[str, object], wrong: str) -> None:
    with pytest.raises(PlanRefused, match=wrong):
        amend(plan_of(name), task=task)
