"""What every part of a plan is made of: frozen, strict terms, and the words that they use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.\- ]*$", max_length=80)]
Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9\-]*$", max_length=60)]
Code = Annotated[str, StringConstraints(pattern=r"^(LOINC|SNOMED|ICD9|ICD10|RXNORM|ATC|OMOP|LOCAL):\S+$")]
Category = str | int
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Terms(BaseModel):
    """A section of a plan or of a hospital's own file: unknown keys and loose types are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Broken:
    """One fault of a plan: the path of the key, what is wrong with it, and what to write instead."""

    path: Path
    wrong: str
    mend: str
