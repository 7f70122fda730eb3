"""Filters that are given together: what the strategies call them, and how they write their values."""

from __future__ import annotations

import json
from collections.abc import Sequence

from psycopg import sql

from runbook_lib.core.names import literal

# Between the names of filters, and between their values where a person reads them.
AND = " & "


def name(columns: Sequence[str]) -> str:
    """The name of one filter, or of several together, in the order of the parameters."""
    return AND.join(columns)


def given_name(columns: Sequence[str], given: Sequence[sql.Composable]) -> sql.Composable:
    """The same as an expression, of those of the columns whose value is not NULL."""
    case = sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END")
    named = [case.format(value, literal(column)) for column, value in zip(columns, given, strict=True)]
    return sql.SQL("concat_ws({}, {})").format(literal(AND), sql.SQL(", ").join(named))


def given_value(given: Sequence[sql.Composable]) -> sql.Composable:
    """An expression: one value as text, several as a JSON array of texts; those that are NULL are left out."""
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(each) for each in given)
    return sql.SQL(
        "CASE num_nonnulls({texts}) WHEN 1 THEN coalesce({texts})"
        " ELSE array_to_json(array_remove(ARRAY[{texts}], NULL))::text END"
    ).format(texts=texts)


def parts(columns: Sequence[str], value: str) -> list[str]:
    """The value of each column, from the one that :func:`given_value` wrote."""
    return list(json.loads(value)) if len(columns) > 1 else [value]


def array_of(elements: Sequence[object]) -> str:
    """An array literal; None is NULL, a list an array inside."""
    return "{" + ",".join(map(_element, elements)) + "}"


def _element(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return array_of(value)
    return '"' + text_of(value).replace("\\", "\\\\").replace('"', '\\"') + '"'


def text_of(value: object) -> str:
    """A value of JSON as PostgreSQL reads it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return array_of(value) if isinstance(value, list) else str(value)
