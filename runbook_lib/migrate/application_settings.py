"""Settings of the database or of a role that the application's sessions have and the runbook's own do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import psycopg

from runbook_lib.benchmark import prepared
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.session import SQL
from runbook_lib.params import Params
from runbook_lib.sql import load

SEARCH = load("search")

SUBJECT = "settings of the database and of the application's roles"
# What no search by a vector index survives, and what it must be.
NEEDED = {"enable_indexscan": "on"}
OF_PGVECTOR = ("hnsw.", "ivfflat.")
SWITCHES = "enable_"


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Index scans are on where the runbook measures; are they on for the application? And where the application holds
    the query itself, does it search with the settings that were measured?
    """
    own_query = params.search.mode == "application"
    asked = {"roles": params.search.grant_to, "readers": own_query, "table": spelled(params, "table")}
    found = db.rows(connection, SQL["application_settings"], params, **asked)
    off = [row for row in found if row["name"] in NEEDED and _written_out(connection, row) != NEEDED[row["name"]]]
    remedy = "; ".join(f"ALTER {row['owner']} RESET {row['name']}" for row in off)
    yield gate(
        "inputs.application_uses_the_index",
        not off,
        SUBJECT,
        found=_written(off) or "none that keeps a search from the index",
        needed="; ".join(f"{name} = {value}" for name, value in NEEDED.items()),
        danger="every search of the application would read the whole table, which no figure measured here shows",
        do=f"let their owner run: {remedy}",
    )
    if own_query:
        yield _as_measured(connection, params, found)


def _as_measured(connection: db.Connection, params: Params, found: Sequence[db.Row]) -> Gate:
    """The search function carries its settings; a query of the application has those of its session."""
    told = [r for r in found if r["name"].startswith((*OF_PGVECTOR, SWITCHES)) and r["name"] not in NEEDED]
    measured = _measured(connection, params, [r["name"] for r in told if r["name"].startswith(SWITCHES)])
    other = [r for r in told if r["name"] in measured and _written_out(connection, r) != measured[r["name"]]]
    wanted = [f"ALTER {row['owner']} SET {row['name']} = {measured[row['name']]}" for row in other]
    return gate(
        "inputs.application_searches_as_measured",
        not other,
        SUBJECT,
        found=_written(other or told) or "none of pgvector's, and no switch of the planner",
        needed="; ".join(f"{name} = {value}" for name, value in measured.items())
        or "to be known: 70_tune will say with which settings it measured",
        danger="the application's own query has these settings, and with them another recall and another time than"
        " those that were measured",
        do=f"let their owner run: {'; '.join(wanted)}",
    )


def _measured(connection: db.Connection, params: Params, switches: Sequence[str]) -> dict[str, str]:
    """pgvector's settings as 70_tune gave them to the search function, and these switches of the planner as the
    runbook's own session has them; empty before 70_tune.
    """
    asked = {"schema": spelled(params, "schema"), "function": params.function_name}
    lines = [
        line
        for row in db.rows(connection, SEARCH["function_state"], params, **asked)
        for line in row["settings"] or []
    ]
    given = dict(line.split("=", 1) for line in lines if line.startswith(OF_PGVECTOR))
    own = {row["name"]: row["setting"] for row in db.rows(connection, SQL["settings"], params, names=list(switches))}
    return given | own if given else {}


def _written_out(connection: db.Connection, row: db.Row) -> str:
    """The value as the server writes it, ``off`` for ``no``; as it is told where the server refuses it."""
    try:
        with db.rolled_back(connection):
            return prepared.use_setting(connection, row["name"], row["value"], local=True)
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        return str(row["value"])


def _written(found: Sequence[db.Row]) -> str:
    return "; ".join(f"ALTER {row['owner']} SET {row['name']} = {row['value']}" for row in found)
