"""Settings of the database or of a role that the application's sessions have and the runbook's own do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
ON = {"on", "true", "yes", "1"}
OF_PGVECTOR = ("hnsw.", "ivfflat.")


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Index scans are on where the runbook measures; are they on for the application? And where the application holds
    the query itself, does it search with the settings that were measured?
    """
    own_query = params.search.mode == "application"
    asked = {"roles": params.search.grant_to, "readers": own_query, "table": spelled(params, "table")}
    found = db.rows(connection, SQL["application_settings"], params, **asked)
    off = [row for row in found if row["name"] in NEEDED and row["value"].lower() not in ON]
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
    measured = _measured(connection, params)
    told = [row for row in found if row["name"].startswith((*OF_PGVECTOR, "enable_"))]
    other = [row for row in told if row["value"] != measured.get(str(row["name"]), row["value"])]
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


def _measured(connection: db.Connection, params: Params) -> dict[str, str]:
    """pgvector's settings as 70_tune gave them to the search function; empty before that."""
    asked = {"schema": spelled(params, "schema"), "function": params.function_name}
    lines = [
        line
        for row in db.rows(connection, SEARCH["function_state"], params, **asked)
        for line in row["settings"] or []
    ]
    return dict(line.split("=", 1) for line in lines if line.startswith(OF_PGVECTOR))


def _written(found: Sequence[db.Row]) -> str:
    return "; ".join(f"ALTER {row['owner']} SET {row['name']} = {row['value']}" for row in found)
