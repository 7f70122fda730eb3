"""What the owner of the table agrees to, by name."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from runbook_lib.params.section import Name, Section


class Accept(Section):
    """Side effects beyond our own columns that you agree to, by name."""

    triggers: list[Name] = Field([], description="Triggers that may fire for every updated row.")
    rules: list[Name] = Field([], description="Rules that may apply to every update.")
    publications: list[Name] = Field(
        [], description="Publications whose subscribers have the new columns, or get them before they are written."
    )
    open_schemas: list[Name] = Field(
        [],
        description="Schemas on legacy.query's path in which other roles may create objects.",
    )

    @model_validator(mode="after")
    def each_name_once(self) -> Self:
        for key in type(self).model_fields:
            given = getattr(self, key)
            if len(set(given)) < len(given):
                raise ValueError(f"{key}: a name is given twice")
        return self
