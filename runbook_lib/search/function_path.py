"""The search path of the search function, by which the names in expressions of the parameters resolve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runbook_lib.core import db, session
from runbook_lib.core.names import identifier
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("conditions")


def function_path(connection: db.Connection, params: Params) -> list[str]:
    """pg_catalog first, pg_temp last. Between them, for an expression or a condition of the parameters, the table's
    schema and those that the session sees; none of them where others may create.
    """
    t = params.target
    if not (params.search.fulltext_expression or t.always or any(f.column is None for f in t.each_filter)):
        return ["pg_catalog", "pg_temp"]
    row = connection.execute("SELECT current_schemas(false) AS seen").fetchone()
    wanted = [params.target.schema_, *(row["seen"] if row else [])]
    closed_off = [row["schema"] for row in session.open_schemas(connection)]
    between = [schema for schema in wanted if schema not in (*closed_off, "pg_catalog", "pg_temp")]
    return ["pg_catalog", *dict.fromkeys(between), "pg_temp"]


@contextmanager
def as_in_the_function(connection: db.Connection, params: Params) -> Iterator[None]:
    """A transaction in which names mean what they mean in the search function; rolled back."""
    path = ", ".join(identifier(schema).as_string() for schema in function_path(connection, params))
    with db.rolled_back(connection):
        connection.execute(SQL["path"].compose({}), {"path": path.replace("%%", "%")})
        yield
