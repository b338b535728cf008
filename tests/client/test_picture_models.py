"""Tasks ``image`` and ``segmentation``: clipped gradients are those taken one by one."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional

from cloister_client.clipping import Clipper
from cloister_client.privacy import refuse_running_statistics
from cloister_shared.networks.images import varied
from cloister_shared.noise import reproducible
from cloister_shared.objective import objective_of
from cloister_shared.plan_file import amend, read_plan
from cloister_shared.tasks.task import Augment

PLAN = """\
study: pictures
title: Pictures
task: {name: image, widths: [8, 16]}
table:
  target: {name: ill, positive: 1, negative: 0}
  features: [{name: scan, kind: image, size: [8, 8]}]
cohort: {min_sites: 2, min_patients: 4}
rounds: 1
strategy: {name: fedavg}
training: {learning_rate: 0.1, batch_size: 4, local_steps: 1}
privacy: {mechanism: none}
"""


def plan_of(size, task, *, target=None, channels=1):
    import yaml

    terms = yaml.safe_load(PLAN)
    terms["table"]["features"][0] |= {"size": size, "channels": channels}
    terms["table"]["target"] = target or terms["table"]["target"]
    terms["task"] = task
    return read_plan(yaml.safe_dump(terms))


DRAWN = {"kind": "mask", "name": "lesions", "of": "scan"}
MODELS = {
    "cnn": lambda: plan_of([12, 9], {"name": "image", "widths": [8, 16, 16]}),
    "cnn in colour": lambda: plan_of(
        [8, 8],
        {"name": "image", "widths": [8]},
        target={"kind": "classes", "name": "c", "classes": [0, 1, 2]},
        channels=3,
    ),
    "cnn 3D": lambda: plan_of([6, 8, 8], {"name": "image", "widths": [8, 16]}),
    "unet": lambda: plan_of([32, 32], {"name": "segmentation"}, target=DRAWN),
    "unet 3D": lambda: plan_of([16, 16, 16], {"name": "segmentation"}, target=DRAWN),
    "densenet121": lambda: plan_of([32, 32], {"name": "image", "model": "densenet121"}),
    "efficientnet-b0": lambda: plan_of([32, 32], {"name": "image", "model": "efficientnet-b0"}),
}
SLOW = ("unet 3D", "densenet121", "efficientnet-b0")


def all_models():
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [], id=name) for name in MODELS]


def made(name, records=4):
    """A plan, its model in double precision, and records of three patients."""
    plan = MODELS[name]()
    torch.manual_seed(1)
    model = plan.task.network(plan.table).double()
    (block,) = plan.table.features
    width = block.channels * int(np.prod(block.size))
    x = torch.randn(records, width, dtype=torch.float64)
    match plan.table.target.kind:
        case "mask":
            y = (torch.rand(records, width) < 0.1).double()
        case "classes":
            y = torch.arange(records).double() % 3
        case _:
            y = torch.arange(records).double() % 2
    return SimpleNamespace(plan=plan, model=model, x=x, y=y, patients=torch.tensor([0, 1, 1, 2])[:records])


@pytest.mark.parametrize("name", all_models())
def test_clipped_gradients_are_those_taken_one_by_one(name):
    it = made(name)
    refuse_running_statistics(it.model)
    loss = objective_of(it.plan).loss
    said, reference = [], [torch.zeros_like(p) for p in it.model.parameters()]
    norms = []
    for patient in range(3):
        own = it.patients == patient
        grads = torch.autograd.grad(loss(it.model(it.x[own]), it.y[own]), list(it.model.parameters()))
        norms.append(float(torch.sqrt(sum(g.square().sum() for g in grads))))
        reference = [held + min(1, 0.01 / norms[-1]) * g for held, g in zip(reference, grads, strict=True)]
    clipper = Clipper(it.model, loss, 0.01, notice=said.append)
    found = clipper.add(it.x, it.y, it.patients, 3)
    assert said == [], "no layer fell back to Opacus's hooks"
    assert found.tolist() == pytest.approx(norms, rel=1e-5)
    assert min(norms) > 0.01, "the clip has something to do"
    for total, expected in zip(clipper.take(), reference, strict=True):
        assert torch.allclose(total.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", all_models())
def test_a_model_says_the_same_once_its_state_has_travelled(name):
    it = made(name)
    other = it.plan.task.network(it.plan.table).double()
    other.load_state_dict(load(save(it.model.state_dict())))
    it.model.eval()
    other.eval()
    with torch.no_grad():
        said = it.model(it.x)
        assert torch.equal(said, other(it.x))
        assert torch.allclose(said[:1], it.model(it.x[:1])), "no record is seen through another"
    names = {name.split(".")[0] for name in it.model.state_dict()}
    assert all(any(full.startswith(layer) for full in it.model.state_dict()) for layer in it.plan.task.layers)
    assert names


def test_pictures_move_by_whole_pixels_and_each_by_itself():
    pictures = torch.arange(2 * 5 * 6, dtype=torch.float32).view(1, 2, 5, 6).expand(300, -1, -1, -1)
    changed = varied(pictures, Augment(copies=2, jitter=0.0, shift=1, flip=True), reproducible("s"))
    assert changed.shape == pictures.shape
    kinds = {tuple(one.flatten().tolist()) for one in changed}
    assert len(kinds) == 3 * 3 * 2
    padded = functional.pad(pictures[:1], (1, 1, 1, 1), mode="replicate")[0]
    expected = set()
    for down in range(3):
        for right in range(3):
            part = padded[:, down : down + 5, right : right + 6]
            mirrored = functional.pad(pictures[:1].flip(3), (1, 1, 1, 1), mode="replicate")[0]
            other = mirrored[:, down : down + 5, right : right + 6]
            expected |= {tuple(part.flatten().tolist()), tuple(other.flatten().tolist())}
    assert kinds == expected


def test_brightness_and_contrast_are_each_pictures_own():
    pictures = torch.ones(2000, 1, 4, 4, 4)
    changed = varied(pictures, Augment(copies=2, jitter=0.1), reproducible("j"))
    assert float(changed.std(dim=0).mean()) == pytest.approx(0.1 * 2**0.5, rel=0.05)
    assert float(changed[0].std()) == 0
    assert changed[0, 0, 0, 0, 0] != changed[1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("size", "task", "said"),
    [
        ([8, 8], {"name": "image", "widths": [12]}, "cannot part 12 channels into groups of eight"),
        ([8, 8], {"name": "image", "model": "densenet121"}, "needs 32 pixels along each side, and scan has 8"),
        ([8, 8], {"name": "image", "widths": [8, 8, 8, 8, 8]}, "needs 16 pixels along each side"),
    ],
)
def test_impossible_models_are_refused(size, task, said):
    from cloister_shared.errors import PlanRefused

    with pytest.raises(PlanRefused, match=said):
        plan_of(size, task)


def test_a_network_with_batch_norm_is_refused():
    from cloister_shared.errors import PlanRefused

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.networks.nets.densenet import DenseNet121
    with pytest.raises(PlanRefused, match="BatchNorm2d"):
        refuse_running_statistics(DenseNet121(2, 1, 1))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in made("densenet121", 1).model.modules())


def test_augment_of_pictures_alone(plan_with):
    from cloister_shared.errors import PlanRefused

    with pytest.raises(PlanRefused, match="moves pictures, and the table has none"):
        plan_with(dp=True, training={"augment": {"copies": 2, "jitter": 0.0, "shift": 2}})


def test_public_layers_of_a_picture_model_stand_still():
    from cloister_shared.layout import layout_of, untrained

    task = {"name": "image", "widths": [8, 16], "pretrained": {"sha256": "0" * 64, "frozen": ["conv", "norm"]}}
    plan = plan_of([8, 8], task)
    assert layout_of(plan, untrained(plan)).shared == (("head.weight", 16), ("head.bias", 1))


def test_a_step_takes_each_picture_several_times_and_moved():
    from cloister_client.privacy import _augmented

    plan = plan_of([8, 8], {"name": "image", "widths": [8]})
    private = {"mechanism": "site", "unit": "record", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    augment = {"copies": 3, "jitter": 0.0, "shift": 2, "flip": True}
    copies, changed = _augmented(amend(plan, privacy=private, training={"augment": augment}))
    x = torch.arange(64.0).repeat(30, 1)
    moved = changed(x, reproducible("m"))
    assert copies == 3
    assert moved.shape == x.shape
    assert len({tuple(row.tolist()) for row in moved}) > 10
