"""Gene expression and genotypes at PROXY hospitals.

Expression: 700 blood cells of one donor (10x PBMC 68k, reduced by scanpy), dealt out at random, or invented ones. A
cell is not a patient: what is protected there is a cell, and no figure speaks for patients.

Genotypes: invented, with known effects, because no openly licensed set of usable size was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cloister_simulations.site_folder import Hospital, apportion, invented_names

Frame = Any  # what pandas' stubs say of these results is a union of everything
Matrix = NDArray[np.float64]

GENES, TYPES = 765, 10


class Expression(BaseModel):
    """Columns ``cell_id``, ``gene_0`` … ``gene_764`` (log counts), ``cell_type``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["expression"]
    records: Literal["pbmc", "generated"] = "pbmc"
    cells: Annotated[int, Field(ge=50)] = 3000
    """Of generated ones."""
    names: tuple[str, ...] = ()
    """Of generated cells: their types; ``type 1`` and so on if empty."""
    genes: Annotated[int, Field(ge=10, le=GENES)] = GENES
    """The first so many."""
    sites: Annotated[int, Field(ge=2, le=20)] = 3
    seed: Annotated[int, Field(ge=0)] = 0


class Genotypes(BaseModel):
    """Columns ``patient_id``, ``snp_0`` … (copies of the rarer allele), ``trait``, ``disease``, ``true_score``.

    ``trait`` is the score plus chance, of variance 1 together; ``disease`` is the tenth with the highest liability.
    ``true_score`` is for whoever judges a model, and in no plan.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    source: Literal["genotypes"]
    patients: Annotated[int, Field(ge=100)] = 6000
    variants: Annotated[int, Field(ge=10, le=5000)] = 200
    causal: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of variants with an effect."""
    heritability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the trait's variance that the true score explains."""
    sites: Annotated[int, Field(ge=2, le=20)] = 5
    seed: Annotated[int, Field(ge=0)] = 0


# --- expression --------------------------------------------------------------------------------------------
def expression(source: Expression) -> Iterator[Hospital]:
    """Cells dealt out at random."""
    rng = np.random.default_rng(source.seed)
    found, kinds = _blood() if source.records == "pbmc" else _cells(source, rng)
    genes = {f"gene_{at}": found[:, at].round(4) for at in range(source.genes)}
    ids = [f"C{number:05d}" for number in range(1, len(found) + 1)]
    table: Frame = pd.DataFrame({"cell_id": ids, **genes, "cell_type": kinds})
    site = rng.integers(source.sites, size=len(table))
    for at, name in enumerate(invented_names(source.sites)):
        yield Hospital(name, table[site == at])


def _blood() -> tuple[Matrix, list[str]]:
    from cloister_simulations.hospitals import data_folder

    with np.load(data_folder("pbmc68k_reduced") / "pbmc68k_reduced.npz") as file:
        return file["log_expr"].astype(float), file["label_names"][file["label"]].tolist()


def _cells(source: Expression, rng: np.random.Generator) -> tuple[Matrix, list[str]]:
    """Each type expresses one gene in twenty more than the others do."""
    names = source.names or tuple(f"type {number}" for number in range(1, TYPES + 1))
    usual = rng.gamma(1.0, 0.5, GENES)
    raised = rng.random((len(names), GENES)) < 1 / 20
    kind = rng.integers(len(names), size=source.cells)
    counts = rng.poisson(usual * np.where(raised[kind], 4.0, 1.0))
    return np.log1p(counts), [names[at] for at in kind]


# --- genotypes ---------------------------------------------------------------------------------------------
def effects(source: Genotypes) -> tuple[Matrix, Matrix]:
    """Frequency of each variant's rarer allele, and what a copy of it adds to the true score."""
    rng = np.random.default_rng([source.seed, 1])
    rarer = rng.uniform(0.05, 0.5, source.variants)
    has = np.zeros(source.variants)
    has[rng.permutation(source.variants)[: max(1, round(source.causal * source.variants))]] = 1
    size = has * rng.normal(size=source.variants)
    return rarer, size * np.sqrt(source.heritability / np.sum(size**2 * 2 * rarer * (1 - rarer)))


def genotypes(source: Genotypes) -> Iterator[Hospital]:
    """Hospitals differ in size, and a little in how frequent alleles are (Balding and Nichols 1995, F = 0.01)."""
    rng = np.random.default_rng(source.seed)
    rarer, effect = effects(source)
    centre, cut = float(2 * rarer @ effect), 1.2816  # of a normal liability a tenth lies above
    first = 1
    for name, size in zip(invented_names(source.sites), _sizes(source, rng), strict=True):
        own = rng.beta(rarer * 99, (1 - rarer) * 99)
        copies = rng.binomial(2, own, (size, source.variants))
        score = copies @ effect - centre
        trait = score + rng.normal(0, np.sqrt(1 - source.heritability), size)
        ids = [f"G{number:06d}" for number in range(first, first + size)]
        table: Frame = pd.DataFrame(
            {
                "patient_id": ids,
                **{f"snp_{at}": copies[:, at] for at in range(source.variants)},
                "trait": np.clip(trait, -8, 8).round(4),
                "disease": (trait > cut).astype(int),
                "true_score": score,
            }
        )
        first += size
        yield Hospital(name, table)


def _sizes(source: Genotypes, rng: np.random.Generator) -> list[int]:
    least = source.patients // (2 * source.sites)
    more = apportion(source.patients - least * source.sites, rng.dirichlet(np.full(source.sites, 2.0)))
    return [least + extra for extra in more]
