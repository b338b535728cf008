"""The models that a simulation trained, each in a folder as a consortium would hand it out.

The key that signs them is thrown away with the simulation: it proves nothing to anybody but the simulation itself.
"""

from __future__ import annotations

from pathlib import Path

from cloister_server.store import Store
from cloister_shared import model_file
from cloister_shared.envelope import new_identity, read_identity, save_roster
from cloister_simulations.federation import Comparison, plan_for

ROSTER = "models.roster.json"


def export(comparison: Comparison) -> list[Path]:
    """Of each arm that hospitals trained together, with the first seed, ``models/ARM``; where they were written."""
    folder, written = comparison.folder, list[Path]()
    key = folder / "models.key"
    identity = read_identity(key) if key.exists() else new_identity(key)
    save_roster(folder / ROSTER, {"simulation": identity.public})
    for result in comparison.results:
        out = folder / "models" / result.arm.folder
        if result.arm.kind not in ("federated", "private") or out in written:
            continue
        plan, run = plan_for(comparison.scenario.plan, result.arm, result.seed), f"seed-{result.seed}"
        store = Store(folder / run / result.arm.folder)
        checkpoint = store.load(plan.digest)
        if checkpoint is None:
            continue
        model_file.write(
            out,
            plan,
            checkpoint.model,
            checkpoint.normalisation,
            identity,
            at=checkpoint.round,
            metrics={name: estimate.value for name, estimate in result.overall.items()},
            metrics_of=f"On the held-out rows of all simulated hospitals together, seed {result.seed}",
            public=store.folder,
        )
        written.append(out)
    return written
