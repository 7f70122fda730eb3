"""Names that the runbook is about to take in the target's schema: free, or already its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import psycopg

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, Verdict, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import has_side_table, side_table_name, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("inputs")

KINDS = {
    "r": "a table",
    "p": "a partitioned table",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "S": "a sequence",
    "i": "an index",
    "I": "an index",
    "c": "a composite type",
}


def check(connection: db.Connection, params: Params, columns: Collection[str]) -> Iterator[Gate]:
    """The gates of what phase 30 makes. columns: those that the table has."""
    yield _new_columns(connection, params, columns)
    if has_side_table(params):
        yield _side_table(connection, params)
    yield _function(connection, params, params.function_name)


def require(connection: db.Connection, params: Params) -> None:
    """Raises BadInput where what phase 30 makes is another's by now, though preflight found it free."""
    found = db.rows(connection, SQL["columns_of"], params, table=spelled(params, "table"))
    refused = [g for g in check(connection, params, [c["name"] for c in found]) if g.verdict == Verdict.FAIL]
    if refused:
        raise BadInput(refused)


def require_function(connection: db.Connection, params: Params, name: str) -> None:
    """Raises BadInput where somebody else has made a function of this name in the table's schema."""
    if (found := _function(connection, params, name)).verdict == Verdict.FAIL:
        raise BadInput([found])


def _function(connection: db.Connection, params: Params, name: str) -> Gate:
    """A function that is replaced keeps its owner, and another with our name may fit a call better than ours."""
    found = db.rows(connection, SQL["functions_of_others"], params, schema=spelled(params, "schema"), name=name)
    return gate(
        "inputs.function_is_nobody_elses",
        not found,
        spelled(params, "schema") + f".{name}",
        found="; ".join(f"{row['function']} of {row['owner']}" for row in found) or "no function of anybody else",
        needed="no function of that name whose owner could not change the table",
        danger="its owner can change what the application calls by that name",
        do="name another in search.function; or, if nobody calls it: "
        + " ".join(f"DROP ROUTINE {row['function']};" for row in found),
    )


def _new_columns(connection: db.Connection, params: Params, columns: Collection[str]) -> Gate:
    vector = params.vector.column
    taken = [c for c in (vector, f"{vector}_updated_at", f"{vector}_hash") if c in columns]
    ours = bool(taken) and _made_by_runbook(connection, params, "schema.add_columns", "schema.drop_columns")
    return gate(
        "inputs.new_columns_are_free",
        not taken or ours,
        spelled(params, "table"),
        found=f"{', '.join(taken)} {'made by this runbook' if ours else 'there, not made by this runbook'}"
        if taken
        else "free",
        needed=f"{vector}, {vector}_updated_at and {vector}_hash free, or made by this runbook",
        danger="the backfill would overwrite, and undo would drop, what somebody else keeps there",
        do="name another column in vector.column",
    )


def _side_table(connection: db.Connection, params: Params) -> Gate:
    """The side table's name, since the promotion and the rollback drop what has it."""
    name, schema = side_table_name(params), params.target.schema_
    found = db.rows(connection, SQL["table"], params, schema=schema, table=name)
    ours = bool(found) and _made_by_runbook(connection, params, "sidetable.create", "sidetable.drop")
    kind = KINDS[found[0]["kind"]] if found else ""
    return gate(
        "inputs.side_table_is_free",
        not found or ours,
        spelled(params, "vectors"),
        found=f"{kind}, {'made by this runbook' if ours else 'not made by this runbook'}" if found else "free",
        needed="no relation by that name, or the one that this runbook made",
        danger="the backfill would put vectors into it, and undo would drop what somebody else keeps there",
        do=f"name another column in vector.column: the side table is called {params.target.table}_<column>;"
        " or set vector.layout: column",
    )


def _made_by_runbook(connection: db.Connection, params: Params, made: str, dropped: str) -> bool:
    """Does the ledger have the statement that made it, and none after it that took it away?"""
    try:
        if not Ledger(connection, params, "", "").exists():
            return False
        return bool(db.one(connection, SQL["made_by_runbook"], params, made=made, dropped=dropped)["made"])
    except psycopg.errors.InsufficientPrivilege:
        # A ledger that this role cannot read, which a gate of its own says.
        return False
