"""Schemas in which roles that nobody need trust may create what an inexact call would find (CVE-2018-1058).

The runbook's own SQL finds nothing there. What is left are the application's statements, which need its search path.
"""

from __future__ import annotations

from runbook_lib.core import db, session
from runbook_lib.core.display import some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.params import Params

SHOWN = 3


def check(connection: db.Connection, params: Params) -> Gate:
    """Who else may create, or has created, in a schema that ``legacy.query`` finds its names in?"""
    in_path = {*session.inherited(connection), params.target.schema_}
    found = [row for row in session.open_schemas(connection) if row["schema"] in in_path]
    open_now = [row for row in found if row["schema"] not in params.accept.open_schemas]
    agreed = [row["schema"] for row in found if row["schema"] in params.accept.open_schemas]
    # The list takes the place of the one in the file, so that it holds what was agreed to before.
    names = ", ".join(dict.fromkeys([*params.accept.open_schemas, *(row["schema"] for row in open_now)]))
    return gate(
        "inputs.only_the_trusted_create_on_the_path",
        not open_now,
        "schemas that legacy.query finds its names in",
        found="; ".join(map(_described, open_now))
        or ("others may create in none" + (f", but for {', '.join(agreed)}: agreed to" if agreed else "")),
        needed="CREATE held by superusers, this role, and the owners of database and table alone",
        danger=f"what is made in {', '.join(row['schema'] for row in open_now)} and fits a call of legacy.query"
        f" better than PostgreSQL's own function or operator runs as {connection.info.user}, and in the search"
        " function as its caller",
        do=" ".join([*filter(None, map(_remedy, open_now)), f"or agree to it: accept.open_schemas: [{names}]"]),
    )


def _described(row: db.Row) -> str:
    facts = []
    if row["creators"]:
        facts.append(f"{some(row['creators'], SHOWN)} may create in {row['schema']}")
    if row["planted"]:
        facts.append(f"in {row['schema']} is {some(row['planted'], SHOWN)}")
    return ", ".join(facts)


def _remedy(row: db.Row) -> str:
    revoke = f"REVOKE CREATE ON SCHEMA {row['quoted']} FROM {', '.join(row['grantees'])};" if row["grantees"] else ""
    return " ".join(filter(None, [revoke, "look at what was made there, and drop it;" if row["planted"] else ""]))
