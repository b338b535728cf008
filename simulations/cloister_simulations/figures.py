"""The report's figures as SVG inside the page: text stays text, in the page's own font and colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cloister_shared.outcomes.judging import Estimate
from cloister_shared.outcomes.outcome import title
from cloister_simulations.federation import Arm, Result

_SHARES = {"auroc", "macro_auroc", "accuracy", "c_index", "dice"}
"""Metrics that end at 0 and 1, as their axes do."""
_INK, _FAINT = "#010203", "#010204"  # stand-ins: the page's own colours take their place
_PRIVATE = ("#c2410c", "#9d4edd", "#b8860b", "#be185d", "#4d7c0f")
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that a drawing is the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "grid.color": _FAINT,
    "axes.edgecolor": _FAINT,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def curves(arms: Mapping[Arm, Sequence[Result]], metric: str = "auroc") -> str:
    """A metric by round: mean over seeds, and the band from the least to the greatest seed. Empty without any."""
    drawn = {arm: seen for arm, results in arms.items() if (seen := _by_round(results, metric))}
    if not drawn:
        return ""
    with _style("curves"):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for arm, seen in drawn.items():
            least, mean, most = ([float(f(values)) for values in seen.values()] for f in (np.min, np.mean, np.max))
            look = _look(arm, list(arms))
            mark = look["marker"] if len(seen) == 1 else ""  # judged at the end alone: a point is no line
            axes.plot(list(seen), mean, color=look["color"], linestyle=look["linestyle"], marker=mark, label=arm.name)
            axes.fill_between(list(seen), least, most, color=look["color"], alpha=0.15, linewidth=0)
        # The untrained model may do no better than chance, and would press the curves flat.
        trained = [value for seen in drawn.values() for number, values in seen.items() if number for value in values]
        if trained and metric in _SHARES:
            pad = max(0.02, (1 - min(trained)) * 0.1)
            axes.set_ylim(max(0.0, min(trained) - pad), min(1.0, max(axes.get_ylim()[1], min(trained) + pad)))
        elif trained:
            pad = max((max(trained) - min(trained)) * 0.1, abs(max(trained)) * 0.01, 1e-6)
            axes.set_ylim(min(trained) - pad, max(trained) + pad)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        axes.set_xlabel("round")
        axes.set_ylabel(f"{title(metric)}, mean over hospitals")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, f"Learning curves: {title(metric)} by round for each way to train")


def _by_round(results: Sequence[Result], metric: str) -> dict[int, list[float]]:
    """Each seed's value after so many rounds."""
    seen: dict[int, list[float]] = {}
    for point in (point for result in results for point in result.curve if metric in point):
        seen.setdefault(int(point["round"]), []).append(point[metric])
    return dict(sorted(seen.items()))


def calibration(arm: Arm, arms: Sequence[Arm], results: Sequence[Result]) -> str:
    """Predicted risk against observed share in tenths of the patients, for every seed."""
    with _style(f"calibration {arm.folder}"):
        figure = Figure(figsize=(2.5, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
        points = np.array([point for result in results for point in result.reliability]).reshape(-1, 3)
        most = max(points[:, 2], default=1)
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=8 + 40 * points[:, 2] / most,
            color=_look(arm, arms)["color"],
            alpha=0.6,
            linewidths=0,
            clip_on=False,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="predicted risk", ylabel="observed share")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        return _svg(figure, f"Calibration of: {arm.name}")


def forest(hospitals: Mapping[str, Mapping[Arm, Estimate]], metric: str = "auroc") -> str:
    """Each hospital's value of a metric with its interval, one mark for each way to train."""
    arms = list(dict.fromkeys(arm for found in hospitals.values() for arm in found))
    with _style("forest"):
        height = 0.8 + len(hospitals) * (0.14 + 0.09 * len(arms)) + 0.1 * len(arms)
        figure = Figure(figsize=(5.2, height), layout="constrained")
        axes = figure.add_subplot()
        for at, arm in enumerate(arms):
            look = _look(arm, arms)
            offset = (at - (len(arms) - 1) / 2) * 0.8 / max(len(arms), 2)
            shown = [(y + offset, found[arm]) for y, found in enumerate(hospitals.values()) if arm in found]
            shown = [(y, e) for y, e in shown if e.value is not None]
            for y, estimate in shown:
                if estimate.low is not None and estimate.high is not None:
                    axes.plot([estimate.low, estimate.high], [y, y], color=look["color"], linewidth=1.3)
            mark: dict[str, Any] = {
                "marker": look["marker"],
                "markersize": 5,
                "linestyle": "",
                "clip_on": False,
            }
            values = np.array([estimate.value for _, estimate in shown], dtype=float)
            axes.plot(values, [y for y, _ in shown], color=look["color"], label=arm.name, **mark)
        axes.set_yticks(range(len(hospitals)), list(hospitals))
        axes.set_ylim(len(hospitals) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        if metric in _SHARES:
            axes.set_xlim(right=min(1.0, axes.get_xlim()[1]))
        axes.set_xlabel(f"{title(metric)} on the hospital's own held-out patients")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, f"{title(metric)} of each hospital with its interval, for each way to train")


def received_and_learned(glimpse: Mapping[str, Any], bits: int) -> str:
    """One hospital's masked update as it arrived, beside the mean that the coordinator learned from the sum."""
    with _style("glimpse"):
        figure = Figure(figsize=(9.2, 2.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = np.arange(1, len(glimpse["received"]) + 1)
        look: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3}
        left.plot(at, np.array(glimpse["received"]) / 2.0 ** (bits - 1), color=_PRIVATE[0], **look)
        left.set(title=f"received from {glimpse['site']}", ylabel="integer, −1 to 1 is the ring", ylim=(-1.05, 1.05))
        right.vlines(at, 0, glimpse["learned"], color="#2f6fdb", linewidth=1)
        right.plot(at, glimpse["learned"], color="#2f6fdb", **look)
        right.set(title="learned: the mean of all hospitals", ylabel="change of the parameter")
        for axes in (left, right):
            axes.set_xlabel("parameter")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "What the coordinator received from one hospital, and what it learned from all")


def _style(salt: str) -> AbstractContextManager[None]:
    """``salt`` makes the ids of a drawing its own, and the same ones each time."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": salt}
    return mpl.rc_context(style)


def _look(arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """Colour, line and mark of an arm: told apart without colour too."""
    if arm.kind == "private":
        at = [other for other in arms if other.kind == "private"].index(arm)
        return {
            "color": _PRIVATE[at % len(_PRIVATE)],
            "linestyle": ("-.", ":")[at % 2],
            "marker": "^vDPX"[at % 5],
        }
    return {
        "pooled": {"color": "#7c8594", "linestyle": "--", "marker": "x"},
        "alone": {"color": "#0f8a70", "linestyle": ":", "marker": "s"},
        "federated": {"color": "#2f6fdb", "linestyle": "-", "marker": "o"},
    }[arm.kind]


def _svg(figure: Figure, said: str) -> str:
    """The bare ``<svg>``: no metadata, no addresses, no ids that another figure of the page might have."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', svg[: svg.index(">")])
    points = f'role="img" aria-label="{said}" style="max-width: {float(width) / 72:.2f}in"'
    return svg.replace(f'width="{width}pt"', points, 1).replace(f'height="{height}pt"', "", 1)
