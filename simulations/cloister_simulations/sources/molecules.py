"""Molecules at PROXY companies: MoleculeNet's BBBP and ESOL (MIT), or molecules put together here.

Neither set names who measured what. Molecules are split and dealt by their Bemis-Murcko scaffold, so that a proxy has
chemical series that no other has, and held-out molecules have scaffolds that no model has seen. A random split would
flatter every model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, invented_names

Frame = Any  # what pandas' stubs say of these results is a union of everything


class Molecules(BaseModel):
    """Molecules with ``permeable`` (into the brain, 1 or 0) or ``log_solubility`` (log10 mol/L)."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["molecules"]
    target: Literal["barrier", "solubility"] = "barrier"
    records: Literal["moleculenet", "generated"] = "moleculenet"
    molecules: Annotated[int, Field(ge=50)] | None = None
    """So many, drawn at random, or all of them; 600 if generated."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    sites: Annotated[int, Field(ge=2, le=20)] = 4
    seed: Annotated[int, Field(ge=0)] = 0


def molecules(source: Molecules) -> Iterator[Hospital]:
    """Columns ``molecule_id``, ``smiles``, the property, and ``split``."""
    rng = np.random.default_rng(source.seed)
    table = _measured(source) if source.records == "moleculenet" else _invented(source, rng)
    if source.molecules is not None and source.molecules < len(table):
        table = table.iloc[np.sort(rng.permutation(len(table))[: source.molecules])]
    series = scaffolds(table["smiles"].tolist())
    split = scaffold_split(series, source.held_out, rng)
    table = table.assign(split=np.where(split, "test", "train"))
    site = np.zeros(len(table), dtype=int)
    for part in (split, ~split):
        site[part] = dealt([series[at] for at in np.flatnonzero(part)], source.sites)
    for at, name in enumerate(invented_names(source.sites)):
        yield Hospital(name, table[site == at])


def scaffolds(smiles: list[str]) -> list[str]:
    """Each molecule's Bemis-Murcko scaffold: its rings and what links them; of those without rings the empty one."""
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return [MurckoScaffold.MurckoScaffoldSmiles(smiles=one) for one in smiles]


def scaffold_split(series: list[str], held_out: float, rng: np.random.Generator) -> np.ndarray:
    """Which molecules are held out: whole scaffolds in a drawn order, those too large for half a test set never.

    Chemprop's balanced scaffold split (Yang et al. 2019). MoleculeNet's own holds out the rarest scaffolds, one way
    only; this can be drawn again, and so gives an interval.
    """
    names, of = np.unique(series, return_inverse=True)
    sizes = np.bincount(of)
    wanted, taken, chosen = held_out * len(series), 0, np.zeros(len(names), dtype=bool)
    for at in rng.permutation(len(names)):
        if sizes[at] <= wanted / 2 and taken + sizes[at] <= wanted:
            chosen[at], taken = True, taken + sizes[at]
    return chosen[of]


def dealt(series: list[str], sites: int) -> np.ndarray:
    """A site for each molecule: whole scaffolds, the largest first, each to the site that has the fewest molecules."""
    names, of = np.unique(series, return_inverse=True)
    sizes = np.bincount(of)
    held, at = np.zeros(sites), np.zeros(len(names), dtype=int)
    for name in np.argsort(-sizes, kind="stable"):
        at[name] = int(held.argmin())
        held[at[name]] += sizes[name]
    return at[of]


# --- MoleculeNet -------------------------------------------------------------------------------------------
def _measured(source: Molecules) -> Frame:
    """One row a molecule; what RDKit does not read stays out, and so do molecules measured twice with two answers."""
    from rdkit import Chem, RDLogger

    from cloister_simulations.hospitals import data_folder

    RDLogger.DisableLog("rdApp.*")  # pyright: ignore[reportAttributeAccessIssue]
    folder = data_folder("moleculenet")
    if source.target == "barrier":
        raw: Frame = pd.read_csv(folder / "BBBP.csv")
        name, said = "permeable", raw["p_np"].astype(int)
    else:
        raw = pd.read_csv(folder / "ESOL_delaney-processed.csv")
        name, said = "log_solubility", raw["measured log solubility in mols per litre"]
    read = [Chem.MolFromSmiles(one) for one in raw["smiles"]]
    table: Frame = pd.DataFrame(
        {
            "molecule_id": [f"M{number:04d}" for number in range(1, len(raw) + 1)],
            "smiles": [Chem.MolToSmiles(one) if one else "" for one in read],
            name: said.to_numpy(),
        }
    )
    table = table[table["smiles"] != ""]
    several = table.groupby("smiles")[name].transform("nunique") > 1
    return table[~several].drop_duplicates("smiles")


# --- put together ------------------------------------------------------------------------------------------
_CORES = ("c1ccc({})cc1", "c1ccnc({})c1", "C1CCN({})CC1", "c1ccc2[nH]cc({})c2c1", "C1CC1C{}", "O=C1NC(=O)C({})N1",
          "CC{}", "c1csc({})n1", "C1CCC({})CC1", "c1ccc2ncc({})cc2c1", "C1COCCN1{}", "O=C1CCCN1{}")  # fmt: skip
_LINKS = ("", "C", "CC", "CO", "C(=O)N", "CNC", "CS", "CC(=O)O")
_ENDS = ("C", "CC", "O", "N", "F", "Cl", "C#N", "C(=O)O", "OC", "C(F)(F)F", "c1ccccc1", "C1CCNC1", "S(=O)(=O)N")


def _invented(source: Molecules, rng: np.random.Generator) -> Frame:
    """Cores with a link and an end, and properties by rules of thumb with noise."""
    from rdkit import Chem
    from rdkit.Chem import Crippen, Descriptors, rdMolDescriptors

    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    every = list(product(_CORES, _LINKS, _ENDS))
    for at in rng.permutation(len(every)):
        core, link, end = every[at]
        read = Chem.MolFromSmiles(core.format(link + end))
        smiles = Chem.MolToSmiles(read) if read else ""
        if read is None or smiles in seen:
            continue
        seen.add(smiles)
        area, oil = rdMolDescriptors.CalcTPSA(read), Crippen.MolLogP(read)  # pyright: ignore[reportAttributeAccessIssue]
        weight = Descriptors.MolWt(read)  # pyright: ignore[reportAttributeAccessIssue]
        row: dict[str, object] = {"molecule_id": f"M{len(rows) + 1:04d}", "smiles": smiles}
        if source.target == "barrier":  # polar molecules stay outside: Clark 1999
            row["permeable"] = int(0.152 * oil - 0.0148 * area + 0.139 + rng.normal(0, 0.15) > -0.3)
        else:  # the size of ESOL's own terms: Delaney 2004
            row["log_solubility"] = round(0.16 - 0.63 * oil - 0.0062 * weight + rng.normal(0, 0.3), 3)
        rows.append(row)
        if len(rows) == (source.molecules or 600):
            break
    return pd.DataFrame(rows)
