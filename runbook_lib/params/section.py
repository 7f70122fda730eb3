"""What every section of a params file is: its model and the types of its values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

# NAMEDATALEN less the zero that ends it; PostgreSQL cuts what is longer, with a NOTICE.
LONGEST_NAME_BYTES = 63
# More columns, and indexes, get names that are made of it.
LONGEST_NEW_COLUMN_BYTES = 40

# Half of a character outside the first 65,536: JSON and YAML can spell it, UTF-8 cannot.
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def unsound(text: str) -> str:
    """What keeps PostgreSQL, or any encoder, from taking this text; empty where nothing does."""
    if "\0" in text:
        return f"a NUL character at position {text.index(chr(0)) + 1}, which PostgreSQL stores in no text"
    if half := LONE_SURROGATE.search(text):
        return f"half of a surrogate pair, \\u{ord(half[0]):04x}, at position {half.start() + 1}: no character"
    return ""


def _fits(most_bytes: int) -> AfterValidator:
    def fits(name: str) -> str:
        if (found := len(name.encode())) > most_bytes:
            raise ValueError(f"{found} bytes, at most {most_bytes}: PostgreSQL would cut the name, or one made of it")
        return name

    return AfterValidator(fits)


Name = Annotated[str, Field(min_length=1), _fits(LONGEST_NAME_BYTES)]
NewColumn = Annotated[str, Field(min_length=1), _fits(LONGEST_NEW_COLUMN_BYTES)]
# YAML has no paths: these alone are made from text; no other value changes its type.
AnyPath = Annotated[Path, Strict(False)]
Minutes = Annotated[float, Field(gt=0, le=100_000)]
ShortName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
