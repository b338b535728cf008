"""A model's probabilities set right at one hospital, on rows that it held out; what is fitted stays there.

An outcome that comes or not: Platt's line on the logit (Platt 1999), or isotonic regression where there are many rows.
Classes, labels and survival: one temperature (Guo et al. 2017). Other outcomes are no probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_client.dataset import Rows
from cloister_client.network import Network
from cloister_shared import durable
from cloister_shared.outcomes.binary import sigmoid
from cloister_shared.schema import Binary, Classes, Labels, Survival, Target
from cloister_shared.terms import Terms

LEAST, MANY, ROWS = 20, 100, 50
"""Held-out rows of either outcome for a line, and for isotonic regression; and of all kinds for a temperature."""

Raw = NDArray[np.float32]


class Calibration(Terms):
    """How outputs are changed, and on how many held-out rows that was found."""

    how: Literal["none", "platt", "isotonic", "temperature"]
    numbers: tuple[float, ...] = ()
    """Of a line: slope and intercept; of a temperature itself; of steps: from each of these risks on ..."""
    levels: tuple[float, ...] = ()
    """... to these."""
    rows: int = 0
    why: str = ""
    """Why there is none."""

    def __call__(self, output: Raw) -> Raw:
        """Outputs set right; a network's outputs come in and such come out."""
        match self.how:
            case "platt":
                slope, intercept = self.numbers
                return (slope * output + intercept).astype(np.float32)
            case "isotonic":
                risk = np.interp(sigmoid(output.astype(np.float64)), self.numbers, self.levels)
                risk = np.clip(risk, 1e-4, 1 - 1e-4)
                return np.log(risk / (1 - risk)).astype(np.float32)
            case "temperature":
                return (output / self.numbers[0]).astype(np.float32)
            case "none":
                return output


def fitted(network: Network, held_out: Rows, target: Target) -> Calibration:
    """From held-out rows, centred and scaled; none where there are too few to tell."""
    output, y = network.output(held_out.x).numpy(), held_out.arrays[1]
    match target:
        case Binary():
            return _line_or_steps(output[:, 0], y)
        case Classes() | Labels() | Survival():
            return _temperature(network, output, y)
        case _:
            return Calibration(how="none", why=f"an answer of the kind {target.kind} is no probability")


def kept(path: Path, make: Calibration) -> Calibration:
    """Keep it in a file that its owner alone can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.save_secret(path, make.model_dump_json())
    return make


def _line_or_steps(logits: Raw, y: Raw) -> Calibration:
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    ill = int(y.sum())
    least = min(ill, len(y) - ill)
    if least < LEAST:
        return Calibration(
            how="none", rows=len(y), why=f"{least} held-out rows of the rarer outcome; it takes {LEAST} or more"
        )
    if least >= MANY and len(y) >= 10 * MANY:
        steps = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(sigmoid(logits.astype(np.float64)), y)
        x, levels = (tuple(map(float, part)) for part in (steps.X_thresholds_, steps.y_thresholds_))
        return Calibration(how="isotonic", numbers=x, levels=levels, rows=len(y))
    line = LogisticRegression(C=1e4).fit(logits[:, None].astype(np.float64), y)
    return Calibration(how="platt", numbers=(float(line.coef_[0, 0]), float(line.intercept_[0])), rows=len(y))


def _temperature(network: Network, output: Raw, y: Raw) -> Calibration:
    from scipy.optimize import minimize_scalar

    if len(y) < ROWS:
        return Calibration(how="none", rows=len(y), why=f"{len(y)} held-out rows; it takes {ROWS} or more")
    said, truth = torch.from_numpy(output), torch.from_numpy(y)

    def cost(log_temperature: float) -> float:
        return float(network.objective.loss(said / float(np.exp(log_temperature)), truth))

    best = minimize_scalar(cost, bounds=(-3.0, 3.0), method="bounded")
    return Calibration(how="temperature", numbers=(float(np.exp(best.x)),), rows=len(y))
