"""The index settings of a distributed table. A function's SET does not reach the workers of Citus: there they belong
to the roles that call it, and hold for their next sessions.
"""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, of_pgvector
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("citus")
OF_PGVECTOR = ("hnsw.", "ivfflat.")


def of(connection: db.Connection, params: Params, role: str | None = None) -> list[str]:
    """pgvector's settings of a role in this database, each as ``name=value``; this session's role if not given."""
    found = db.rows(connection, SQL["settings_of_role"], params, role=role)
    return [s for row in found for s in row["settings"] if s.startswith(OF_PGVECTOR)]


def roles(connection: db.Connection, params: Params) -> list[str]:
    """The roles whose settings this session may change: its own, and those of ``search.grant_to`` it administers."""
    found = db.rows(connection, SQL["may_alter"], params, roles=params.search.grant_to)
    return [row["role"] for row in found]


def statements(connection: db.Connection, params: Params, name: str, value: str | None) -> list[db.Statement]:
    """Gives these roles a setting, or takes it from them where the value is None."""
    parts: dict[str, sql.Composable] = {
        "database": identifier(connection.info.dbname),
        "setting": sql.SQL(name),
        "value": sql.Literal(value),
        "pgvectors_type": of_pgvector(params, "vector"),
    }
    block = SQL["reset_search_settings" if value is None else "set_search_settings"]
    return [db.statement(block, params, parts | {"role": identifier(role)}) for role in roles(connection, params)]


def gates(connection: db.Connection, params: Params, wanted: list[str]) -> Iterator[Gate]:
    """A gate a role of ``search.grant_to``: its next sessions search with the settings that were measured."""
    database = identifier(connection.info.dbname).as_string()
    for role in params.search.grant_to:
        found = of(connection, params, role)
        lacking = [s.split("=", 1) for s in wanted if s not in found]
        alter = f"ALTER ROLE {identifier(role).as_string()} IN DATABASE {database} SET"
        yield gate(
            "tune.role_carries_the_setting",
            not lacking,
            role,
            found=", ".join(found) or "no index setting",
            needed=", ".join(wanted),
            danger="the application would search with another setting than the one that was measured",
            do="have a superuser run on the coordinator: "
            + " ".join(f"{alter} {name} = {value};" for name, value in lacking),
        )
