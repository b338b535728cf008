"""A final model as a folder to carry away: weights, a signed manifest, a card, and a file that other programs run.

Whoever reads it holds the manifest's signature against a key that was pinned beforehand, and every file against the
manifest. A model holds no record; what it may tell of one is what its plan's privacy says.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cloister_shared import durable, envelope
from cloister_shared.combat import Constants
from cloister_shared.envelope import Identity, Roster
from cloister_shared.errors import EnvelopeRefused, WeightsBroken
from cloister_shared.inputs import columns
from cloister_shared.layout import layout_of, trained, weights_of
from cloister_shared.model_card import card
from cloister_shared.plan import StudyPlan
from cloister_shared.plan_text import guarantee, privacy
from cloister_shared.tally import Numbers
from cloister_shared.terms import Terms

WEIGHTS, MANIFEST, CARD, PORTABLE = "model.safetensors", "manifest.json", "MODEL_CARD.md", "model"
PURPOSE = "model"
"""Of the manifest's signature."""


class Manifest(Terms):
    """What is signed."""

    form: Literal[1] = 1
    study: str
    plan: str
    """The plan's canonical form, from which everything else follows: inputs, network, meaning of the outputs."""
    digest: str
    """Of the plan."""
    layout: str
    """Digest of the order of parameters that was trained."""
    round: int
    files: dict[str, str]
    """SHA-256 of each file."""
    constants: Constants | None
    """Centre and scale of each number input, in order; None where each hospital takes its own. With ``combat`` and
    covariates an intercept and slopes follow; what a hospital adds and multiplies is never in the file."""
    kept: tuple[str, ...]
    """Parameters that stayed at the hospitals, and so are not in the file."""
    privacy: dict[str, str]
    metrics: Numbers
    metrics_of: str
    """Of which model, and judged on what."""
    calibration: str
    portable: str
    """The file for other programs, or why there is none."""
    versions: dict[str, str]
    made: str


@dataclass(frozen=True)
class Model:
    """A model whose manifest a pinned key signed and whose files are those of the manifest."""

    manifest: Manifest
    plan: StudyPlan
    weights: dict[str, NDArray[np.float32]]
    signer: str


def write(
    folder: Path,
    plan: StudyPlan,
    vector: NDArray[np.float32],
    constants: Constants | None,
    identity: Identity,
    *,
    at: int,
    metrics: Mapping[str, float | None],
    metrics_of: str,
    public: Path | None = None,
) -> Manifest:
    """Make ``folder`` of the model that ``vector`` stands for after round ``at``; ``public`` has public weights.

    Raises:
        WeightsBroken: the vector is of another model, or public weights are missing.
    """
    from cloister_shared.networks.portable import examples, written

    model = trained(plan, vector, public)
    layout = layout_of(plan, model)
    folder.mkdir(parents=True, exist_ok=True)
    durable.save(folder / WEIGHTS, {"plan": plan.digest}, weights_of(model, layout.local))
    if layout.local:
        portable, why = None, "layers of it are kept at the hospitals"
    else:
        portable, why = written(model, examples(plan.table), folder / PORTABLE)
    names = [WEIGHTS, *([portable.name] if portable else [])]
    manifest = Manifest(
        study=plan.study,
        plan=plan.canonical().decode(),
        digest=plan.digest,
        layout=layout.digest,
        round=at,
        files={name: _sha256(folder / name) for name in names},
        constants=_constants(plan, constants),
        kept=tuple(name for name, _ in layout.local),
        privacy={"Promise": privacy(plan), **guarantee(plan)},
        metrics=dict(metrics),
        metrics_of=metrics_of,
        calibration="none in the file: each hospital calibrates on held-out rows of its own",
        portable=portable.name if portable else f"none: {why}",
        versions=_versions(),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    durable.save_text(folder / CARD, card(plan, manifest.model_dump()))
    durable.save_text(folder / MANIFEST, identity.sign(PURPOSE, manifest.model_dump_json().encode()))
    return manifest


def weights_digest(plan: StudyPlan, vector: NDArray[np.float32], public: Path | None = None) -> str:
    """SHA-256 of the weights' file that ``write`` makes of a vector, without making it: the manifest names it.

    Raises:
        WeightsBroken: as ``write``.
    """
    model = trained(plan, vector, public)
    written = durable.octets({"plan": plan.digest}, weights_of(model, layout_of(plan, model).local))
    return hashlib.sha256(written).hexdigest()


def read(folder: Path, roster: Roster) -> Model:
    """The model in ``folder``, if one of the pinned keys in ``roster`` signed for it.

    Raises:
        EnvelopeRefused: the manifest is not signed by a pinned key, or is none.
        WeightsBroken: a file is missing, or is not the one that was signed.
    """
    try:
        signed = (folder / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise WeightsBroken(f"{folder} holds no {MANIFEST}.", mend="Give the folder that was exported.") from None
    signer, payload = envelope.verify(signed, PURPOSE, roster)
    try:
        manifest = Manifest.model_validate_json(payload)
        plan = StudyPlan.model_validate_json(manifest.plan)
    except ValidationError:
        raise EnvelopeRefused(
            "The manifest is of a form that this version of Cloister does not know.", mend="Use a newer one."
        ) from None
    if plan.digest != manifest.digest:
        raise EnvelopeRefused(
            "The manifest's plan has another digest here: another version of Cloister made it.",
            mend=f"Use Cloister {manifest.versions.get('cloister', 'of that time')}, or have the model exported again.",
        )
    for name, digest in manifest.files.items():
        path = folder / Path(name).name
        if not path.is_file() or _sha256(path) != digest:
            raise WeightsBroken(f"{path} is not the file that was signed.", mend="Ask for the model again.")
    _, weights = durable.load(folder / WEIGHTS)
    return Model(manifest, plan, weights, signer)


def _constants(plan: StudyPlan, found: Constants | None) -> Constants | None:
    match plan.normalisation.method:
        case "site":
            return None
        case "federated" | "combat":
            return found
        case "plan":
            at = (column for column in columns(plan.table) if column.kind == "number" and not column.absent)
            return tuple((column.centre, column.scale) for column in at)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("cloister", "torch", "opacus", "onnx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
