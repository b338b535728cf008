"""A scenario file: which hospitals to set up here, and the plan they run."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cloister_shared.errors import PlanRefused
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_file import Source as Document
from cloister_shared.plan_file import load, parse
from cloister_shared.plan_rules import broken
from cloister_shared.terms import Positive
from cloister_simulations.hospitals import Source, Tables


class _Terms(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Simulation(_Terms):
    """What a simulation adds to a plan."""

    hospitals: Source
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """One repetition each: another split, another initial model, another batch order."""
    epsilons: tuple[Positive, ...] = ()
    """Privacy levels to compare; the plan's own if empty."""
    pretrained: str | None = None
    """The file of public weights that ``plan.task.pretrained`` names by its digest, seen from the scenario's."""


class Scenario(_Terms):
    """A plan and the hospitals to simulate it with."""

    simulation: Simulation
    plan: StudyPlan
    name: str


class _Parts(_Terms):
    simulation: dict[str, object]
    plan: dict[str, object]


def shipped() -> dict[str, Path]:
    """The scenarios that come with Cloister, by name."""
    folder = Path(str(files("cloister_simulations") / "scenarios"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_scenario(name_or_path: str) -> Scenario:
    """A shipped scenario by name, or a file.

    Raises:
        PlanRefused: there is no such scenario, or it is malformed: one sentence for each fault.
    """
    path = shipped().get(name_or_path, Path(name_or_path))
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise PlanRefused(
            f"There is no scenario {name_or_path}.", mend=f"Name a file, or one of {', '.join(shipped())}."
        ) from None
    except UnicodeDecodeError:
        raise PlanRefused(f"{path.name} is not UTF-8 text.", mend="Save it as plain UTF-8 YAML.") from None
    document: Document = load(text, path.name)
    parse(_Parts, document)
    simulation = parse(Simulation, document.below("simulation"))
    if isinstance(simulation.hospitals, Tables):
        seen_from_here = tuple(str(path.parent / site) for site in simulation.hospitals.sites)
        hospitals = simulation.hospitals.model_copy(update={"sites": seen_from_here})
        simulation = simulation.model_copy(update={"hospitals": hospitals})
    plan = parse(StudyPlan, document.below("plan"), broken)
    if (simulation.pretrained is None) != (plan.task.pretrained is None):
        raise PlanRefused(
            f"{path.name} gives one of simulation.pretrained and plan.task.pretrained.",
            mend="Give the file of public weights under simulation and its SHA-256 under plan.task, or neither.",
        )
    if simulation.pretrained:
        simulation = simulation.model_copy(update={"pretrained": str(path.parent / simulation.pretrained)})
    return Scenario(simulation=simulation, plan=plan, name=path.stem)
