"""A migrating role that is no superuser, as on managed services, with the least rights that docs/guide.md lists."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

# Older servers let everybody create in public and make temporary tables; the least is less.
RIGHTS = """
    REVOKE ALL ON DATABASE {database} FROM PUBLIC;
    GRANT CONNECT ON DATABASE {database} TO {role};
    ALTER TABLE articles OWNER TO {role};
    GRANT CREATE ON SCHEMA public TO {role};
    GRANT CREATE, TEMPORARY ON DATABASE {database} TO {role};
    GRANT pg_read_all_stats TO {role};
    CREATE EXTENSION vector;
"""


def create(connection: psycopg.Connection[Any], role: str) -> str:
    """Makes the role, and it the owner of the toy table; a superuser has installed pgvector. Returns its DSN."""
    name, database = sql.Identifier(role), sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("CREATE ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE").format(name))
    connection.execute(sql.SQL(RIGHTS).format(role=name, database=database))
    return make_conninfo(connection.info.dsn, user=role)


def copied(admin: psycopg.Connection[Any], origin: str, name: str, role: str) -> None:
    """A copy of such a database; rights on a database do not come with it."""
    names = {"name": sql.Identifier(name), "origin": sql.Identifier(origin), "role": sql.Identifier(role)}
    admin.execute(sql.SQL("CREATE DATABASE {name} TEMPLATE {origin}").format(**names))
    admin.execute(sql.SQL("REVOKE ALL ON DATABASE {name} FROM PUBLIC").format(**names))
    admin.execute(sql.SQL("GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {name} TO {role}").format(**names))
