"""What the owner of the table agrees to, by name."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from runbook_lib.params.section import Name, Section


class Accept(Section):
    """Consent, by name, to what the migration does to this table beyond its own columns; nothing is agreed to unless
    it is named here."""

    triggers: list[Name] = Field(
        [], description="Triggers of the table that may fire for every row that the backfill updates."
    )
    rules: list[Name] = Field([], description="Rules of the table that may apply to every UPDATE of the backfill.")
    publications: list[Name] = Field(
        [], description="Publications whose subscribers have, or will get, the new columns before they are written."
    )
    open_schemas: list[Name] = Field(
        [],
        description="Schemas that legacy.query finds its names in, though other roles may create there.",
    )

    @model_validator(mode="after")
    def each_name_once(self) -> Self:
        for key in type(self).model_fields:
            given = getattr(self, key)
            if len(set(given)) < len(given):
                raise ValueError(f"{key}: a name is given twice")
        return self
