"""What a search is filtered by: columns compared for equality, and the user's conditions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from runbook_lib.params.placeholders import TOKEN, is_one_expression, split, written
from runbook_lib.params.section import Name, Section

# What :name may mean in legacy.query and search.application_query, besides the filters.
PLACEHOLDERS = frozenset({"query", "embedding", "k"})
# In a mapping, this word or nothing says that the filter is a column.
COLUMN = "column"
# Names, dots, quotes, lengths and brackets, as types are spelled. The server has the last word.
TYPE = re.compile(r'[\w .,"()\[\]]+')


@dataclass(frozen=True)
class Filter:
    """One filter: rows whose ``column`` equals the value, or rows for which ``where`` holds, of alias ``t``.

    where mentions the value as ``:name``; type is that of the value. Exactly one of column and where is there.
    """

    name: str
    column: str | None = None
    type: str = ""
    where: str = ""


def _expression(value: str) -> str:
    if any(match[0].startswith(("--", "/*")) for match in TOKEN.finditer(value)):
        raise ValueError("a comment could hide what follows; write it as a YAML comment in this file")
    if not is_one_expression(value):
        raise ValueError("one condition is needed, with closed brackets and quotes, without a semicolon")
    return value.strip()


def _type(value: str) -> str:
    if not TYPE.fullmatch(value):
        raise ValueError("a type is needed as PostgreSQL spells it, such as numeric or text[]")
    return value


Expression = Annotated[str, AfterValidator(_expression)]
Type = Annotated[str, AfterValidator(_type)]


class Condition(Section):
    """A filter other than a comparison with a column."""

    type: Type = Field(description="Type of its value, such as numeric, text[] or public.mood.")
    where: Expression = Field(
        description="Condition on a row t of the table, with the value as :name; subqueries are allowed."
    )


def placeholders_of(text: str) -> list[str]:
    """The names of all placeholders in a piece of SQL, in their order."""
    found = [m["plain"] or (m["quoted"] or "").replace('""', '"') for m in TOKEN.finditer(text)]
    return list(dict.fromkeys(filter(None, found)))


def has_subquery(text: str) -> bool:
    """Does a condition read another table?"""
    return re.search(r"\bselect\b", TOKEN.sub(" ", text), re.I) is not None


def _as_mapping(value: Any) -> Any:
    """The short form, a list of columns, as a mapping."""
    if isinstance(value, list):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("a list of columns is needed, or a mapping: name: {type: …, where: …}")
        if len(set(value)) < len(value):
            raise ValueError("a column is named twice")
        return dict.fromkeys(value)
    if isinstance(value, dict):
        if wrong := [name for name, given in value.items() if not _is_a_filter(given)]:
            raise ValueError(f"{wrong[0]}: nothing is needed, for a column of this name, or {{type: …, where: …}}")
        return {name: None if given == COLUMN else given for name, given in value.items()}
    return value


def _is_a_filter(given: Any) -> bool:
    return given is None or given == COLUMN or isinstance(given, dict | Condition)


def _names_are_free(value: dict[str, Condition | None]) -> dict[str, Condition | None]:
    # psycopg's own placeholders end at the first closing bracket.
    if bracketed := [name for name in value if ")" in name]:
        raise ValueError(
            f"{bracketed[0]} holds a closing bracket, which no placeholder can; use a generated column of another"
            " name"
        )
    if taken := sorted(PLACEHOLDERS.intersection(value)):
        raise ValueError(
            f":{taken[0]} already means something else in the statements; use a generated column of another name"
        )
    problems = [said for name, condition in value.items() if condition for said in _wrong(name, condition)]
    if problems:
        raise ValueError("; ".join(problems))
    return value


def _wrong(name: str, condition: Condition) -> list[str]:
    used = placeholders_of(condition.where)
    wrong = [
        f"{name}: {written(other)} is not its value; a condition may only mention its own, {written(name)}"
        for other in used
        if other != name
    ]
    return wrong if name in used else [*wrong, f"{name}: the condition does not mention {written(name)}"]


def _as_given(value: dict[str, Condition | None]) -> Any:
    """Columns alone as the list that they were: what a ledger knows of a file stays the same."""
    if not any(value.values()):
        return list(value)
    return {name: condition and condition.model_dump() for name, condition in value.items()}


Filters = Annotated[
    dict[Name, Condition | None],
    BeforeValidator(_as_mapping),
    AfterValidator(_names_are_free),
    PlainSerializer(_as_given),
]


def filters_of(given: dict[str, Condition | None]) -> tuple[Filter, ...]:
    """The filters of a file, in its order, which is that of the search function's arguments."""
    return tuple(
        Filter(name, type=c.type, where=c.where) if c else Filter(name, column=name) for name, c in given.items()
    )


def pieces(condition: Filter) -> list[tuple[bool, str]]:
    """The condition of a filter in pieces: (True, its name) for its value, else (False, SQL)."""
    return split(condition.where, [condition.name])
