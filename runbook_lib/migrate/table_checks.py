"""The target against its table: does the table have what ``target`` names, and can its rows be identified and
read?"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
from psycopg import sql

from runbook_lib.benchmark import query_set
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import some
from runbook_lib.core.gates import BadInput, Gate, Verdict, gate
from runbook_lib.core.names import spelled
from runbook_lib.migrate import partition_checks
from runbook_lib.params import Params
from runbook_lib.search import free_names
from runbook_lib.sql import load

SQL = load("inputs")

NOTHING_STARTED = "nothing was started; the run would fail half-way"
FIX_PARAMS = "fix the params file and rerun the same command"
KEY_TYPES = ("bigint", "integer", "uuid", "text", "character varying")
# Rows are deleted during a migration; if more than this are missing, the judgements belong to another table.
MOST_JUDGED_ROWS_GONE = 0.05
SHOWN = 5


@dataclass(frozen=True)
class Look:
    """An existing table, with its columns by name."""

    connection: db.Connection
    params: Params
    table: db.Row
    columns: dict[str, db.Row]

    @property
    def subject(self) -> str:
        return spelled(self.params, "table")


def columns_fit(look: Look) -> Iterator[Gate]:
    """The key, the texts and the filters that the parameters name."""
    key = look.params.target.key_columns
    for column in key:
        yield _key_is_supported(look, column)
    if look.columns.keys() >= set(key):
        yield _key_is_unique(look)
    for column in look.params.target.text_columns:
        yield _text_column(look, column)
    for column in look.params.target.filter_columns:
        yield _filter_column(look, column)
    for column in look.params.search.returns:
        yield _returned_column(look, column)


def rows_fit(look: Look) -> Iterator[Gate]:
    """The judged rows exist, and some row has text."""
    if look.columns.keys() >= set(look.params.target.key_columns):
        yield _judged_keys(look)
    if look.table["readable"] and set(look.params.target.text_columns) <= set(look.columns):
        yield _some_row_has_text(look)


def require_table(connection: db.Connection, params: Params) -> None:
    """Raises BadInput where the target is not a table."""
    found = table_exists(connection, params, find_table(connection, params))
    if found.verdict is not Verdict.PASS:
        raise BadInput([found])


def find_table(connection: db.Connection, params: Params) -> db.Row | None:
    target = params.target
    found = db.rows(connection, SQL["table"], params, schema=target.schema_, table=target.table)
    return found[0] if found else None


def table_exists(connection: db.Connection, params: Params, found: db.Row | None) -> Gate:
    do = "name the table behind it" if found else FIX_PARAMS
    if found is None:
        tables = [(r["schema"], r["table"]) for r in db.rows(connection, SQL["tables"], params)]
        do = _nearest_table(connection, params, tables) or FIX_PARAMS
    return gate(
        "inputs.table_exists",
        found is not None and found["kind"] in ("r", "p"),
        spelled(params, "table"),
        found=free_names.KINDS[found["kind"]] if found else "no such table",
        needed="a table that columns can be added to",
        danger=NOTHING_STARTED,
        do=do,
    )


def _nearest_table(connection: db.Connection, params: Params, tables: list[tuple[str, str]]) -> str:
    target = params.target
    # The right name in another schema is a better guess than a similar name in the same schema.
    exact = [t for t in tables if t[1] == target.table]
    here = difflib.get_close_matches(target.table, [t for s, t in tables if s == target.schema_], n=1, cutoff=0.5)
    near = exact[0] if exact else (target.schema_, here[0]) if here else None
    return f"did you mean {sql.Identifier(*near).as_string(connection)}?" if near else ""


def _missing(look: Look, fact: str, column: str, needed: str) -> Gate:
    near = difflib.get_close_matches(column, list(look.columns), n=1, cutoff=0.5)
    return gate(
        fact,
        False,
        f"{column} of {look.subject}",
        found="no such column",
        needed=needed,
        danger=NOTHING_STARTED,
        do=f"did you mean {near[0]}?" if near else f"the table has: {', '.join(look.columns)}",
    )


def _key_is_supported(look: Look, column: str) -> Gate:
    needed = f"a column of type {', '.join(KEY_TYPES)}"
    if column not in look.columns:
        return _missing(look, "inputs.key_is_supported", column, needed)
    kind = look.columns[column]["type"]
    return gate(
        "inputs.key_is_supported",
        kind in KEY_TYPES,
        f"{column} of {look.subject}",
        found=kind,
        needed=needed,
        danger="the backfill walks the table by ranges of this key",
        do="name another unique column in target.key, or add one: GENERATED ALWAYS AS IDENTITY, with a unique index",
    )


def _key_is_unique(look: Look) -> Gate:
    key = look.params.target.key_columns
    one = len(key) == 1
    found = db.rows(look.connection, SQL["unique_key"], look.params, oid=look.table["oid"], columns=list(key))
    nullable = [sql.Identifier(c).as_string(look.connection) for c in key if not look.columns[c]["not_null"]]
    not_null = not nullable
    if not found and look.table["kind"] == "p" and one:
        return partition_checks.key_is_unique(look.connection, look.params, look.table, not_null)
    lacking = "this column alone" if one else "these columns alone, in this order"
    unique = f"unique by {found[0]['index']}" if found else f"no valid unique index on {lacking}"
    quoted = ", ".join(sql.Identifier(c).as_string(look.connection) for c in key)
    wanted = [f"ALTER TABLE {look.subject} ALTER COLUMN {c} SET NOT NULL;" for c in nullable]
    if not found:
        wanted.append(f"CREATE UNIQUE INDEX CONCURRENTLY ON {look.subject} ({quoted});")
    if not found and not one:
        wanted.append("or name the columns in target.key in the order in which their index has them")
    return gate(
        "inputs.key_identifies_rows",
        bool(found) and not_null,
        f"{look.params.target.key_shown} of {look.subject}",
        found=f"{unique}, {'NOT NULL' if not_null else 'NULL allowed'}",
        needed="NOT NULL, with its own primary key or unique index, without a condition",
        danger="a vector could reach two rows, or none",
        do=" ".join(wanted),
    )


def _text_column(look: Look, column: str) -> Gate:
    if column not in look.columns:
        return _missing(look, "inputs.text_column_exists", column, "a column of text")
    return gate(
        "inputs.text_column_exists",
        look.columns[column]["is_text"],
        f"{column} of {look.subject}",
        found=look.columns[column]["type"],
        needed="a column of text",
        danger="the model embeds text; how it would embed this type is unknown",
        do="leave the column out of target.text_columns, or add a text column that holds what should be found",
    )


def _some_row_has_text(look: Look) -> Gate:
    """An empty table cannot be staged, measured or tuned."""
    columns = ", ".join(look.params.target.text_columns)
    try:
        there = db.one(look.connection, row_counts.SQL["texts"], look.params)
    except psycopg.Error as error:
        db.raise_if_lost(look.connection, error)
        holds, there, found = None, {}, f"could not be read: {str(error).splitlines()[0]}"
    else:
        holds = there["texts"]
        found = "rows with text" if holds else f"rows, and no text in {columns}" if there["rows"] else "no row"
    return gate(
        "inputs.some_row_has_text",
        holds,
        look.subject,
        found=found,
        needed=f"a row with text in {columns}",
        danger="there would be nothing to embed or to measure a search with",
        do="resolve what the server reports, then rerun the same command"
        if holds is None
        else "name the columns that hold text in target.text_columns"
        if there["rows"]
        else "load the rows first",
    )


def _filter_column(look: Look, column: str) -> Gate:
    if column not in look.columns:
        return _missing(look, "inputs.filter_column_exists", column, "a column to filter by")
    kind = look.columns[column]["type"]
    return gate("inputs.filter_column_exists", True, f"{column} of {look.subject}", found=kind, needed="a column")


def _returned_column(look: Look, column: str) -> Gate:
    name = "inputs.returned_column_exists"
    if column not in look.columns:
        return _missing(look, name, column, "a column for the search function to return")
    kind = look.columns[column]["type"]
    return gate(name, True, f"{column} of {look.subject}", found=kind, needed="a column")


def _judged_keys(look: Look) -> Gate:
    try:
        judgements = query_set.read_judgements(look.params)
        unknown = query_set.unknown_keys(look.connection, look.params, judgements)
    except BadInput as error:
        return error.problems.gates[0]
    except psycopg.Error as error:
        db.raise_if_lost(look.connection, error)
        return _judgement_gate(look, None, f"could not be compared: {str(error).splitlines()[0]}")
    judged = len({key for of_query in judgements.values() for key in of_query})
    holds = len(unknown) <= MOST_JUDGED_ROWS_GONE * judged
    return _judgement_gate(
        look, holds, f"not in the table: {some(unknown, SHOWN)}" if unknown else "all in the table"
    )


def _judgement_gate(look: Look, holds: bool | None, found: str) -> Gate:
    return gate(
        "inputs.judged_keys_exist",
        holds,
        str(look.params.queries.judgements or "queries.judgements"),
        found=found,
        needed=f"every judged key a {look.params.target.key_shown} of {look.subject}, but for"
        f" {MOST_JUDGED_ROWS_GONE:.0%} that may have been deleted since",
        danger="a relevant row that does not exist would count against every search",
        do="remove the unknown keys from the file, or judge this database's rows",
    )
