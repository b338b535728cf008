"""What a model says of a record, in the units of whoever reads it."""

import numpy as np
import pytest

from cloister_shared.outcomes.answers import answers, names
from cloister_shared.schema import Effect, ImageFeature, Itself, Mask, NumberFeature, Schema

AGE = NumberFeature(kind="number", name="age", range=(0.0, 100.0))


def test_an_effect_is_in_the_outcomes_unit():
    target = Effect(kind="effect", name="pressure", treatment="given", range=(80.0, 200.0))
    schema = Schema(features=(AGE,), target=target)
    said = answers(schema, np.array([[0.0, -1.0, 3.0]], np.float32), np.zeros((1, 1), np.float32))
    assert names(schema) == ("pressure untreated", "pressure treated", "difference")
    assert said.tolist() == [[140.0, 110.0, -30.0]]


def test_what_is_unusual_is_an_error():
    schema = Schema(features=(AGE, AGE.model_copy(update={"name": "bmi"})), target=Itself(kind="itself"))
    said = answers(schema, np.array([[1.0, 1.0]], np.float32), np.array([[1.0, 3.0]], np.float32))
    assert names(schema) == ("error",)
    assert float(said[0, 0]) == pytest.approx(2.0)


def test_of_a_mask_the_share_that_is_drawn_is_said():
    picture = ImageFeature(kind="image", name="scan", size=(2, 2))
    schema = Schema(features=(picture,), target=Mask(kind="mask", name="lesion", of="scan"))
    said = answers(schema, np.array([[[5.0, -1.0], [-1.0, -1.0]]], np.float32), np.zeros((1, 4), np.float32))
    assert names(schema) == ("share of lesion",)
    assert said.tolist() == [[0.25]]
