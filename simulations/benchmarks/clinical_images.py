"""Pictures: pneumonia on chest X-rays, lesions that are drawn here, and DICOM files that are hard to read.

The X-rays' hospitals are proxies: all pictures are of one, and are dealt out. Both ways to train are the shipped
scenario's, and are judged on the official 624 test pictures, of which every seed sees the same.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
from figures import Figure, at_least, at_most, progress, told

from cloister_simulations.federation import Options, Result, compare
from cloister_simulations.hospitals import data_folder
from cloister_simulations.scenario import read_scenario

SEEDS = (0, 1)
POOLED, WITHIN = 0.93, 0.01


def figures() -> list[Figure]:
    return [*pneumonia(), *lesions(), *awkward()]


def pneumonia() -> list[Figure]:
    found = run("pneumonia", SEEDS, "pooled", "federated", "private")
    seen = {kind: [_value(result, "auroc") for result in results] for kind, results in found.items()}
    means = {kind: statistics.mean(values) for kind, values in seen.items()}
    apart = max(p - f for p, f in zip(seen["pooled"], seen["federated"], strict=True))
    said = f"AUROC {{:.4f}}, least of {len(SEEDS)} seeds"
    return [
        at_least("pneumonia.pooled", min(seen["pooled"]), POOLED, said),
        at_most("pneumonia.federated", apart, WITHIN, f"{means['federated']:.4f}, {{:.4f}} below pooled at most"),
        told("pneumonia.private", means["private"], "AUROC {:.4f} at epsilon 8"),
    ]


def lesions() -> list[Figure]:
    found = run("lesions", (0,), "pooled", "federated", "private")
    made: list[Figure] = []
    for kind, (result,) in found.items():
        met = _value(result, "lesion_sensitivity")
        made.append(told(f"lesions.{kind}", _value(result, "dice"), f"Dice {{:.3f}}, {met:.1%} of lesions met"))
    return made


def awkward() -> list[Figure]:
    """How many files end in a use or in a refusal, where the hospital allows everything and where it allows nothing."""
    from cloister_client.encoders.image import pixels
    from cloister_client.site_file import PictureTerms
    from cloister_shared.errors import DataRefused
    from cloister_shared.schema import ImageFeature

    files = sorted(data_folder("dicom_samples").glob("*.dcm"))
    everything = PictureTerms(identified=True, captures=True, private_tags=True)
    used = refused = 0
    for file in files:
        ways = [(terms, size) for terms in (everything, PictureTerms()) for size in ((64, 64), (8, 64, 64))]
        uses = 0
        for terms, size in ways:
            try:
                read = pixels(file.name, ImageFeature(name="a", kind="image", size=size), file.parent, terms)
                uses += bool(np.isfinite(read).all())
            except DataRefused:
                pass
        used, refused = used + (uses > 0), refused + (uses == 0)
    return [at_least("dicom.awkward", used + refused, len(files), f"{used} used, {refused} refused, {{:.0f}} in all")]


def run(name: str, seeds: tuple[int, ...], *arms: str) -> dict[str, list[Result]]:
    """A shipped scenario's results, by way and seed."""
    progress(f"{name}: {', '.join(arms)}, seeds {', '.join(map(str, seeds))}")
    found: dict[str, list[Result]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory(prefix="cloister-") as folder:
        for result in compare(read_scenario(name), Options(Path(folder), seeds=seeds, arms=arms)).results:
            found[result.arm.kind].append(result)
    return found


def _value(result: Result, metric: str) -> float:
    value = result.overall[metric].value
    return float("nan") if value is None else value


if __name__ == "__main__":
    for figure in figures():
        print(figure.line())
