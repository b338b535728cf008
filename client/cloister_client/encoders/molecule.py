"""A molecule, written as SMILES, to its fingerprint or its graph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_client.quality import ColumnReport, note
from cloister_shared.schema import ATOM, MoleculeFeature


def encode(feature: MoleculeFeature, cells: NDArray[Any], report: ColumnReport) -> NDArray[np.float32]:
    """Cells of SMILES, to [n, bits] or [n, atoms * (32 + atoms)]; see ``MoleculeFeature``."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import rdFingerprintGenerator

    RDLogger.DisableLog("rdApp.*")  # it would write the molecule to the log  # pyright: ignore[reportAttributeAccessIssue]
    size = feature.bits if feature.encoding == "fingerprint" else feature.atoms * (ATOM + feature.atoms)
    x, unread, large = (np.zeros((len(cells), size), np.float32), *np.zeros((2, len(cells)), bool))
    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=feature.radius, fpSize=feature.bits)
    for row, cell in enumerate(cells):
        read = Chem.MolFromSmiles(cell) if isinstance(cell, str) and cell else None
        if read is None:
            unread[row] = True
        elif feature.encoding == "fingerprint":
            x[row] = morgan.GetFingerprintAsNumPy(read)
        elif read.GetNumAtoms() > feature.atoms:
            large[row] = True
        else:
            x[row] = _graph(read, feature.atoms).reshape(-1)
    note(report, "no molecule that RDKit reads", unread)
    note(report, f"more than {feature.atoms} atoms", large)
    return x


_ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I", "B")


def _graph(read: Any, atoms: int) -> NDArray[np.float32]:
    """[atoms, 32 + atoms]: the numbers of each atom, the first of which is 1; then the order of its bond to each."""
    from rdkit.Chem import ChiralType, HybridizationType, rdmolops  # pyright: ignore[reportAttributeAccessIssue]

    found = np.zeros((atoms, ATOM + atoms), np.float32)
    hybrids = (HybridizationType.SP, HybridizationType.SP2, HybridizationType.SP3)
    for at, atom in enumerate(read.GetAtoms()):
        symbol = atom.GetSymbol()
        found[at, :ATOM] = [
            1.0,
            *(symbol == element for element in _ELEMENTS),
            symbol not in _ELEMENTS,
            *(min(atom.GetDegree(), 5) == degree for degree in range(6)),
            *(min(atom.GetTotalNumHs(), 4) == hydrogens for hydrogens in range(5)),
            *(atom.GetHybridization() == hybrid for hybrid in hybrids),
            atom.GetIsAromatic(),
            atom.IsInRing(),
            atom.GetFormalCharge(),
            atom.GetChiralTag() == ChiralType.CHI_TETRAHEDRAL_CW,
            atom.GetChiralTag() == ChiralType.CHI_TETRAHEDRAL_CCW,
            atom.GetMass() / 100,
        ]
    bonds = rdmolops.GetAdjacencyMatrix(read, useBO=True)
    found[: len(bonds), ATOM : ATOM + len(bonds)] = bonds
    return found
