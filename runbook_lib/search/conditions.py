"""The filters of a search as SQL: what each lets through, and the types of their values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import identifier, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.params.filters import Filter, pieces
from runbook_lib.sql import load

SQL = load("conditions")

# In the first line of a plan: how many rows the planner expects.
EXPECTED_ROWS = r"rows=(\d+)"


def types(connection: db.Connection, params: Params) -> dict[str, str]:
    """Types of the key's columns, by their names, and of each filter's value, by the filter's; with their schemas,
    but for PostgreSQL's own.
    """
    return {name: row["type"] for name, row in _types(connection, params).items()}


def of_columns(connection: db.Connection, params: Params, columns: Sequence[str]) -> dict[str, str]:
    """Types of these columns of the table, likewise."""
    found = db.rows(connection, SQL["column_types"], params, table=spelled(params, "table"), columns=list(columns))
    return {row["name"]: row["type"] for row in found}


def _types(connection: db.Connection, params: Params) -> dict[str, db.Row]:
    """The same with the operator of equality of each."""
    t = params.target
    columns = [*t.key_columns, *t.filter_columns]
    found = db.rows(connection, SQL["column_types"], params, table=spelled(params, "table"), columns=columns)
    own = {f.name: f.type for f in t.each_filter if f.column is None}
    given = db.rows(connection, SQL["types"], params, names=list(own), types=list(own.values())) if own else []
    return {row["name"]: row for row in (*given, *found)}


def holds(connection: db.Connection, params: Params, f: Filter, value: sql.Composable) -> sql.Composable:
    """The condition of one filter on the row ``t``. value: an expression, of whatever type; it is cast."""
    return _holds(f, _types(connection, params)[f.name], value, "t")


def filter_is(connection: db.Connection, params: Params, column: str, value: sql.Composable) -> sql.Composable:
    """The condition of an index on the rows of one value of a column, as the search function compares them."""
    return _holds(Filter(column, column=column), _types(connection, params)[column], value)


def each(
    connection: db.Connection, params: Params, places: Mapping[str, sql.Composable]
) -> dict[str, sql.Composable]:
    """The condition of each filter that has a place for its value, by its name."""
    found = _types(connection, params)
    asked = [f for f in params.target.each_filter if f.name in places]
    return {f.name: _holds(f, found[f.name], places[f.name], "t") for f in asked}


def where(
    connection: db.Connection,
    params: Params,
    places: Mapping[str, sql.Composable],
    given: Collection[str] | None = None,
) -> sql.Composable:
    """What every filter lets through, and the condition of every search.

    given: the filters that have a value, the others let every row through. If not given, that is asked of each value,
    and one that is NULL lets every row through; the planner then knows less of a subquery.
    """
    own = each(connection, params, places)
    parts: list[sql.Composable]
    if given is None:
        kinds = _types(connection, params)
        template = sql.SQL("({}::{} IS NULL OR {})")
        parts = [template.format(places[n], verbatim(kinds[n]["type"]), c) for n, c in own.items()]
    else:
        parts = [c for name, c in own.items() if name in given]
    if params.target.always:
        parts.append(names(params)["always"])
    return sql.SQL(" AND ").join(parts) if parts else sql.SQL("true")


def are_expressions(params: Params) -> bool:
    """Do names of the user's stand in what the parameters write as conditions?"""
    return params.target.always is not None or any(f.column is None for f in params.target.each_filter)


def _holds(f: Filter, kind: db.Row, value: sql.Composable, *alias: str) -> sql.Composable:
    """A column is compared by the operator of its type, named with its schema: that of citext may be in none of a
    search path, and what is found in its place compares upper and lower case.
    """
    cast = sql.SQL("{}::{}").format(value, verbatim(kind["type"]))
    if f.column is not None:
        return sql.SQL("{} {} {}").format(identifier(*alias, f.column), verbatim(kind["equals"]), cast)
    # In brackets, since a cast binds closer than most of what may stand next to it.
    put = [sql.SQL("({})").format(cast) if is_name else verbatim(piece) for is_name, piece in pieces(f)]
    return sql.SQL("({})").format(sql.Composed(put))
