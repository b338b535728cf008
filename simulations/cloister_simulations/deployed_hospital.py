"""A hospital of ``cloister-sim consortium``: the real agent; its training process can draw noise from a seed.

python -m cloister_simulations.deployed_hospital SITE_YAML            the agent
python -m cloister_simulations.deployed_hospital END FOLDER DIGEST    what the agent starts
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_client.site import Site

COMPARED = "-compared"
"""How the name of a study ends whose noise is drawn from ``SEED``: to be compared, without privacy."""
SEED = 1


def main() -> None:
    """One or the other."""
    if len(sys.argv) == 2:
        from cloister_client.consortium_commands import run

        return run(Path(sys.argv[1]), program="cloister_simulations.deployed_hospital")
    from cloister_client.child import main as serve

    end, folder, digest = sys.argv[1:]
    serve(int(end), Path(folder), digest, opened)


def opened(folder: Path, digest: str) -> Site:
    """The hospital in the study, as its people approved it."""
    from cloister_client.child import approved_site
    from cloister_client.offers import study_of

    seeded = study_of(folder / "agent", digest).plan.study.endswith(COMPARED)
    return approved_site(folder, digest, SEED if seeded else None)


if __name__ == "__main__":
    main()
