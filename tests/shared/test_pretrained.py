"""Public weights: those that the plan names by digest and no others, and layers that stand still."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from cloister_shared.errors import WeightsBroken
from cloister_shared.layout import PRETRAINED, gathered, initial_model, layout_of, untrained
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.plan_text import summary

ROOT = Path(__file__).resolve().parents[2]
PLAN = read_plan((ROOT / "tests/vectors/plan/sound.yaml.txt").read_text(encoding="utf-8").partition("---\n")[2])


def public() -> dict[str, Tensor]:
    """Weights for the hidden layer of the plan above, other than any seed's."""
    state = untrained(PLAN).state_dict()
    return {name: torch.full_like(state[name], 0.25) for name in ("hidden_0.weight", "hidden_0.bias")}


def naming(folder: Path, weights: bytes, frozen: tuple[str, ...] = ("hidden",)) -> StudyPlan:
    """A plan that names these bytes, which lie in the folder."""
    (folder / PRETRAINED).write_bytes(weights)
    digest = hashlib.sha256(weights).hexdigest()
    return amend(PLAN, task={"pretrained": {"sha256": digest, "frozen": list(frozen)}})


def test_the_model_begins_from_the_public_weights_and_the_rest_from_the_seed(tmp_path):
    plan = naming(tmp_path, save(public()))
    model, seeded = initial_model(plan, tmp_path).state_dict(), untrained(plan).state_dict()
    assert (model["hidden_0.weight"] == 0.25).all()
    assert torch.equal(model["head.weight"], seeded["head.weight"])


def test_a_frozen_layer_is_neither_sent_nor_kept_nor_moved(tmp_path):
    plan = naming(tmp_path, save(public()))
    model = initial_model(plan, tmp_path)
    layout = layout_of(plan, model)
    assert layout.shared == (("head.weight", 16), ("head.bias", 1))
    assert layout.local == ()
    assert layout.digest != layout_of(PLAN, untrained(PLAN)).digest
    assert [name for name, part in model.named_parameters() if part.requires_grad] == ["head.weight", "head.bias"]
    gathered(model, layout.shared)[:] = 7.0
    assert (model.state_dict()["head.weight"] == 7).all()
    assert (model.state_dict()["hidden_0.weight"] == 0.25).all()


def test_without_frozen_layers_all_are_sent_and_trained(tmp_path):
    plan = naming(tmp_path, save(public()), frozen=())
    model = initial_model(plan, tmp_path)
    assert layout_of(plan, model) == layout_of(PLAN, untrained(PLAN))
    assert all(part.requires_grad for part in model.parameters())


def test_the_digest_of_the_plan_fixes_the_weights(tmp_path):
    plan = naming(tmp_path, save(public()))
    other = naming(tmp_path, save({**public(), "hidden_0.bias": torch.zeros(16)}))
    assert plan.digest != other.digest
    assert other.task.pretrained
    said = " ".join(summary(other).split())
    assert f"SHA-256 {other.task.pretrained.sha256}; layers hidden are neither trained nor sent" in said


def test_other_bytes_than_the_plan_names_are_refused(tmp_path):
    plan = naming(tmp_path, save(public()))
    path = tmp_path / PRETRAINED
    written = bytearray(path.read_bytes())
    written[-1] ^= 1
    path.write_bytes(written)
    with pytest.raises(WeightsBroken, match=r"is not what the plan names: its SHA-256 is .* Put the file with") as said:
        initial_model(plan, tmp_path)
    assert str(tmp_path) not in said.value.abroad


def test_missing_weights_are_refused(tmp_path):
    plan = naming(tmp_path, save(public()))
    assert plan.task.pretrained
    mend = f"Put the file with SHA-256 {plan.task.pretrained.sha256} there, as pretrained.safetensors."
    (tmp_path / PRETRAINED).unlink()
    for folder in (tmp_path, tmp_path / "nowhere", None):
        with pytest.raises(WeightsBroken, match=f"cannot be read in .* {mend}"):
            initial_model(plan, folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_0.weight": torch.zeros(16, 3)}, "has hidden_0.weight, which does not fit"),
        ({"hidden_0.bias": torch.zeros(16, dtype=torch.float64)}, "has hidden_0.bias, which does not fit"),
        ({"elsewhere": torch.zeros(16)}, "has elsewhere, which does not fit"),
        ({"hidden_0.bias": torch.full((16,), torch.nan)}, "a number in hidden_0.bias that is not finite"),
        ({"hidden_0.bias": None}, "lacks hidden_0.bias, which the plan freezes"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, said):
    weights = {name: weight for name, weight in {**public(), **change}.items() if weight is not None}
    with pytest.raises(WeightsBroken, match=f"{said}.* Have a plan approved"):
        initial_model(naming(tmp_path, save(weights)), tmp_path)


def test_a_file_of_something_else_is_refused(tmp_path):
    with pytest.raises(WeightsBroken, match="is no safetensors file"):
        initial_model(naming(tmp_path, b"a picture"), tmp_path)
