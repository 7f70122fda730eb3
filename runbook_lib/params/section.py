"""What every section of a params file is: its model and the types of its values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Name = Annotated[str, Field(min_length=1, max_length=63)]
# YAML has no paths: these alone are made from text; no other value changes its type.
AnyPath = Annotated[Path, Strict(False)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]
ShortName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
