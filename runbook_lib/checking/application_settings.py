"""Settings of the database or of a role that the application's sessions have and the runbook's own do not."""

from __future__ import annotations

from collections.abc import Iterator

from runbook_lib import db
from runbook_lib.gates import Gate, gate
from runbook_lib.params import Params
from runbook_lib.session import SQL

# What no search by a vector index survives, and what it must be.
NEEDED = {"enable_indexscan": "on"}
ON = {"on", "true", "yes", "1"}


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """Index scans are on where the runbook measures; are they on for the application?"""
    found = db.rows(connection, SQL["application_settings"], params, roles=params.search.grant_to)
    off = [row for row in found if row["name"] in NEEDED and row["value"].lower() not in ON]
    remedy = "; ".join(f"ALTER {row['owner']} RESET {row['name']}" for row in off)
    yield gate(
        "inputs.application_uses_the_index",
        not off,
        "settings of the database and of the application's roles",
        found="; ".join(f"ALTER {row['owner']} SET {row['name']} = {row['value']}" for row in off)
        or "none that keeps a search from the index",
        needed="; ".join(f"{name} = {value}" for name, value in NEEDED.items()),
        danger="every search of the application would read the whole table, which no figure measured here shows",
        do=f"let their owner run: {remedy}",
    )
