"""A hospital of the figures: the real agent; its training process adds a fixed number to every parameter.

All else is as it is: the ticket is held against the plan, the answer is on disk before it is masked, signed and sent.

python -m unlearned_hospital SITE_YAML            the agent
python -m unlearned_hospital END FOLDER DIGEST    what the agent starts
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from cloister_client.privacy import Mechanism
    from cloister_shared.plan import Training

STEP = 0.001


def main() -> None:
    """One or the other."""
    if len(sys.argv) == 2:
        from cloister_client.consortium_commands import run

        return run(Path(sys.argv[1]), program="unlearned_hospital")
    from cloister_client import child, site

    with patch.object(site, "train", _step), patch.object(site, "at_a_glance", lambda *_: {}):
        child.main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])


def _step(mechanism: Mechanism, terms: Training, steps: int, **_: object) -> None:
    for parameter in mechanism.parameters:
        parameter.detach().add_(STEP)


if __name__ == "__main__":
    main()
