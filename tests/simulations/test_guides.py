"""The scenario in the researcher's guide is run as written."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cloister_shared.errors import PlanRefused, QuorumLost
from cloister_simulations.federation import Options, compare
from cloister_simulations.scenario import read_scenario

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "researcher.md"
SITE = re.findall(r"```yaml\n(site: north.*?)```", GUIDE.read_text(), flags=re.S)[0]


def write_tables(folder: Path) -> None:
    draw = np.random.default_rng(1)
    for name in ("north", "south", "east"):
        age, systolic = draw.integers(30, 90, 300), draw.normal(130, 20, 300).round().clip(70, 240)
        risk = 1 / (1 + np.exp(6 - 0.05 * age - 0.015 * systolic))
        table = pd.DataFrame({"patient": [f"{name}-{i}" for i in range(300)], "age": age, "systolic": systolic})
        table["smoker"] = draw.integers(0, 2, 300)
        table["readmitted"] = (draw.random(300) < risk).astype(int)
        table.to_csv(folder / f"{name}.csv", index=False)
        (folder / f"{name}.yaml").write_text(SITE.replace("north", name))


def test_the_researchers_scenario_runs(tmp_path):
    blocks = re.findall(r"```yaml\n(simulation:.*?)```", GUIDE.read_text(), flags=re.S)
    assert len(blocks) == 1
    (tmp_path / "mine.yaml").write_text(blocks[0])
    write_tables(tmp_path)
    comparison = compare(read_scenario(str(tmp_path / "mine.yaml")), Options(tmp_path / "run", seeds=(0,)))
    by_arm = {result.arm.kind: result for result in comparison.results}
    assert set(by_arm) == {"pooled", "alone", "federated", "private"}
    pooled, federated = by_arm["pooled"].overall["auroc"].value, by_arm["federated"].overall["auroc"].value
    assert pooled
    assert federated == pytest.approx(pooled, abs=0.03)
    assert set(by_arm["private"].epsilon) == {"north", "south", "east"}
    assert all(2.9 < epsilon <= 3.0 for epsilon in by_arm["private"].epsilon.values())


def test_a_hospitals_own_minimum_is_kept(tmp_path):
    """Three hospitals with a minimum of three each: none can be missed; one of four takes part in no sum."""
    blocks = re.findall(r"```yaml\n(simulation:.*?)```", GUIDE.read_text(), flags=re.S)
    (tmp_path / "mine.yaml").write_text(blocks[0])
    write_tables(tmp_path)
    south = tmp_path / "south.yaml"
    south.write_text(south.read_text().replace("policy: {", "policy: {min_cohort: 4, "))
    with pytest.raises(QuorumLost, match="south: takes part with 4 hospitals or more"):
        compare(read_scenario(str(tmp_path / "mine.yaml")), Options(tmp_path / "run", seeds=(0,), arms=("federated",)))


def test_the_guides_mistake_says_what_the_guide_says(tmp_path):
    text = GUIDE.read_text()
    said = re.search(r"(mine\.yaml line \d+: .*)", text)
    block = re.search(r"```yaml\n(simulation:.*?)```", text, flags=re.S)
    assert said
    assert block
    (tmp_path / "mine.yaml").write_text(block[1].replace("epsilon: 3.0,", "epsilom: 3.0,"))
    with pytest.raises(PlanRefused) as refused:
        read_scenario(str(tmp_path / "mine.yaml"))
    assert str(refused.value) == said[1]
