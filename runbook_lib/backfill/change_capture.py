"""Does the capture of changes work? Looked up in the catalogue, and tried on tables of the runbook's own.

Nothing of the target is written: its columns may be generated, full or checked, its key an identity, and its own
triggers may do more than the transaction that is rolled back can take back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, key_of, names, spelled, trigger_name
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("capture")
SCHEMA = load("schema")

NOT_ALWAYS = {"O": "not for rows that replication brings", "R": "only for rows that replication brings", "D": "never"}
# What the made-up row must have queued: when it was inserted, when its text changed, when nothing changed.
RIGHT = (1, 1, 0)


def gate_of(connection: db.Connection, params: Params) -> Gate:
    """Gate: both triggers and their function are as they were made, fire, and queue what they should."""
    with db.rolled_back(connection):
        made: list[str] | None = None
        counts: tuple[int, ...] | None = None
        said = ""
        try:
            with connection.transaction():
                made = list(_differences(connection, params))
            with connection.transaction():
                counts = _try(connection, params)
        except psycopg.Error as error:
            db.raise_if_lost(connection, error)
            said = f"could not be tried: {error.diag.message_primary or error}"
    problems = [*(made or []), *([_counted(counts)] if counts not in (None, RIGHT) else [])]
    return gate(
        "schema.changes_are_captured",
        False if problems else None if said else True,
        spelled(params, "table"),
        found="; ".join(problems) or said or f"both triggers as made; {_counted(counts)}",
        needed="both triggers and their function as made, firing always; a made-up row queued once when inserted,"
        " once when its text changed, and not when written again",
        danger="rows that are written from now on would keep no vector or an old one",
        do="run 30_expand_schema again with execute: true, which makes triggers that are missing or switched off"
        " again; where a definition differs, run undo/schema first",
    )


def _counted(counts: tuple[int, ...] | None) -> str:
    inserted, changed, unchanged = counts or (0, 0, 0)
    return (
        f"a made-up row was queued {inserted} × when inserted, {changed} × when its text changed, {unchanged} × else"
    )


def _differences(connection: db.Connection, params: Params) -> Iterator[str]:
    """How the triggers and the function differ from those that would be made now."""
    probe, body = _own(params, "probe"), _own(params, "probe_capture")
    columns = sql.SQL(", ").join(identifier("t", c) for c in _columns(params))
    connection.execute(SQL["shape"].compose(names(params) | {"probe": probe, "probe_columns": columns}), {})
    connection.execute(SCHEMA["create_triggers"].compose(names(params) | {"table": probe}), {})
    connection.execute(SCHEMA["create_capture_function"].compose(names(params) | {"capture_function": body}), {})
    wanted = {row["name"]: row for row in _triggers(connection, params, _shown(probe))}
    there = {row["name"]: row for row in _triggers(connection, params, spelled(params, "table"))}
    for name, want in wanted.items():
        found = there.get(name)
        if found is None:
            yield f"no trigger {name}"
        elif found["definition"] != want["definition"]:
            yield f"trigger {name} is not as made: {found['definition']}"
        elif found["enabled"] != want["enabled"]:
            yield f"trigger {name} fires {NOT_ALWAYS.get(found['enabled'], found['enabled'])}"
    served = {"function": spelled(params, "capture_function"), "probe": _shown(body)}
    functions = db.rows(connection, SQL["functions"], params, **served)
    as_made = [{k: v for k, v in row.items() if k != "serves"} for row in functions]
    if len(as_made) != 2 or as_made[0] != as_made[1]:
        yield f"function {served['function']} is not as made"


def _try(connection: db.Connection, params: Params) -> tuple[int, ...]:
    """What a made-up row queues, in a table whose columns take any text; function and queue are the real ones."""
    table = identifier(params.ledger.schema_, f"{params.target.name}_probe_row")
    key, n = params.target.key_columns, names(params)
    found = db.rows(connection, SQL["columns"], params, table=spelled(params, "table"), columns=list(key))
    of_key = {row["name"]: row for row in found}
    typed = sql.SQL(", ").join(
        sql.SQL("NULL::{} AS {}").format(sql.SQL(of_key[c]["type"] if c in of_key else "text"), identifier(c))
        for c in _columns(params)
    )
    # A text may be in the key itself: then the key changes with it.
    changed = next((c for c in params.target.text_columns if c not in key), key[0])
    own = n | {"probe": table, "table": table, "changed": identifier(changed)}
    made_up = [
        sql.SQL("{}::{}").format(sql.Placeholder(str(i)), sql.SQL(of_key[c]["type"])) for i, c in enumerate(key)
    ]
    conditions = [
        sql.SQL("{} IN ({})").format(column, sql.SQL("{}, 'a'").format(value) if changed == c else value)
        for c, column, value in zip(key, key_of(params).own, made_up, strict=True)
    ]
    own |= {"made_up_key": sql.SQL(", ").join(made_up), "is_the_row": sql.SQL(" AND ").join(conditions)}
    shape = n | {"probe": table, "probe_columns": typed}
    values = {str(i): of_key[c]["value"] for i, c in enumerate(key)}
    connection.execute(SQL["shape"].compose(shape), {})
    connection.execute(SCHEMA["create_triggers"].compose(own), {})

    def queued() -> int:
        row = connection.execute(SQL["arrived"].compose(own), values).fetchone()
        return int(row["queued"]) if row else 0

    counts, before = [], queued()
    for block in ("insert", "change_text", "write_again"):
        connection.execute(SQL[block].compose(own), values)
        counts.append(queued() - before)
        before = queued()
    return tuple(counts)


def _columns(params: Params) -> list[str]:
    return list(dict.fromkeys((*params.target.key_columns, *params.target.text_columns)))


def _own(params: Params, name: str) -> sql.Composable:
    return identifier(params.ledger.schema_, f"{params.target.name}_{name}")


def _shown(name: sql.Composable) -> str:
    return name.as_string().replace("%%", "%")


def _triggers(connection: db.Connection, params: Params, relation: str) -> list[dict[str, Any]]:
    own = [trigger_name(params, event) for event in ("insert", "update")]
    return db.rows(connection, SQL["triggers_of"], params, relation=relation, triggers=own)
