"""The search paths of the functions: what names of the user's mean in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runbook_lib.core import db, session
from runbook_lib.core.names import identifier
from runbook_lib.params import Params
from runbook_lib.search import conditions
from runbook_lib.search.statements import Route
from runbook_lib.sql import load

SQL = load("search_function")

CLOSED = ("pg_catalog", "pg_temp")


def of_route(connection: db.Connection, params: Params, route: Route) -> list[str]:
    """The search path of a route's function. Legacy's names resolve as they do for the application, temporary ones
    last; an expression's as in :func:`expression_path`.
    """
    if route == "legacy":
        return list(dict.fromkeys([params.target.schema_, *session.inherited(connection), "pg_temp"]))
    if conditions.are_expressions(params) or route == "hybrid":
        return expression_path(connection, params)
    return list(CLOSED)


def expression_path(connection: db.Connection, params: Params) -> list[str]:
    """The path of what the parameters write as SQL, conditions and the words half: pg_catalog first, pg_temp last.
    Between them the table's schema and those that the session sees; none of them where others may create.
    """
    s = params.search
    if not (s.fulltext_expression or s.words_query or conditions.are_expressions(params)):
        return list(CLOSED)
    row = connection.execute("SELECT current_schemas(false) AS seen").fetchone()
    wanted = [params.target.schema_, *(row["seen"] if row else [])]
    closed_off = [row["schema"] for row in session.open_schemas(connection)]
    between = [schema for schema in wanted if schema not in (*closed_off, *CLOSED)]
    return ["pg_catalog", *dict.fromkeys(between), "pg_temp"]


@contextmanager
def as_in_the_function(connection: db.Connection, params: Params) -> Iterator[None]:
    """A transaction in which the names of expressions mean what they mean in the functions; rolled back."""
    path = ", ".join(identifier(schema).as_string() for schema in expression_path(connection, params))
    with db.rolled_back(connection):
        connection.execute(SQL["path"].compose({}), {"path": path.replace("%%", "%")})
        yield
