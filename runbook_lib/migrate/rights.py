"""What a role needs that is no superuser: each right that is missing is named, with the grant that provides it."""

from __future__ import annotations

from collections.abc import Iterator

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate, gate
from runbook_lib.core.ledger import may_not_write, require_ours
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("rights")


def check(connection: db.Connection, params: Params, server: db.Row, table: db.Row) -> Iterator[Gate]:
    """The rights that every migration needs; those that are hardly ever missing only where they are.

    server, table: the rows of the same names in ``inputs.sql``.
    """
    p, role = params, server["quoted_role"]
    may = db.one(
        connection,
        SQL["rights"],
        p,
        schema=p.target.schema_,
        ledger=p.ledger.schema_,
        grant_to=p.search.grant_to,
    )
    yield from _on_target(params, role, table, may)
    yield from _on_ledger(connection, params, server, may)
    yield from _on_server(server, role, may)


def _on_target(params: Params, role: str, table: db.Row, may: db.Row) -> Iterator[Gate]:
    subject, schema = spelled(params, "table"), spelled(params, "schema")
    yield _right(
        "inputs.owns_table",
        table["owned"],
        subject,
        f"owned by {table['owner']}, and {role} is {'a' if table['owned'] else 'not a'} member of it",
        "the table's owner, as ALTER TABLE and CREATE INDEX want it",
        f"GRANT {table['owner']} TO {role};",
    )
    yield _right(
        "inputs.may_create_in_schema",
        may["may_create_in_schema"],
        f"schema {schema}",
        f"{role} {'has' if may['may_create_in_schema'] else 'lacks'} CREATE",
        "CREATE, for the index and the search function",
        f"GRANT CREATE ON SCHEMA {schema} TO {role};",
    )
    if not may["may_use_schema"]:
        yield _right(
            "inputs.may_use_schema",
            False,
            f"schema {schema}",
            f"{role} lacks USAGE",
            "USAGE, to name anything in it",
            f"GRANT USAGE ON SCHEMA {schema} TO {role};",
        )


def _on_ledger(connection: db.Connection, params: Params, server: db.Row, may: db.Row) -> Iterator[Gate]:
    role, ledger = server["quoted_role"], params.ledger.schema_
    try:
        require_ours(connection, params)
    except BadInput as error:
        yield from error.problems
    ledger_grant = (
        f"GRANT USAGE, CREATE ON SCHEMA {may['quoted_ledger']} TO {role};"
        if may["ledger_there"]
        else f"GRANT CREATE ON DATABASE {server['quoted_database']} TO {role};"
    )
    yield _right(
        "inputs.may_make_ledger",
        may["may_make_ledger"],
        f"schema {ledger}",
        f"{'there' if may['ledger_there'] else 'not there yet'}; {role}"
        f" {'may' if may['may_make_ledger'] else 'may not'} create in it",
        "a schema of the runbook's own",
        ledger_grant,
    )
    if not may["may_write_ledger"]:
        yield may_not_write(connection, params)
    if may["without_ledger"]:
        callers = ", ".join(may["without_ledger"])
        yield gate(
            "inputs.callers_may_read_route",
            False,
            "search.grant_to",
            found=f"{callers}: no USAGE on schema {ledger}, which {role} may not pass on",
            needed="USAGE on it, or a role that may grant it",
            danger="PostgreSQL would only warn, and the application's calls would fail at the route table",
            do=f"have its owner or a superuser run: GRANT USAGE ON SCHEMA {may['quoted_ledger']} TO {callers};",
        )


def _on_server(server: db.Row, role: str, may: db.Row) -> Iterator[Gate]:
    for schema in may["hidden_extension_schemas"]:
        yield _right(
            "inputs.may_use_extension",
            False,
            f"schema {schema}",
            f"{role} lacks USAGE on the schema that pgvector is installed in",
            "USAGE, for its type and operators",
            f"GRANT USAGE ON SCHEMA {schema} TO {role};",
        )
    if not may["may_make_temporary_tables"]:
        yield _right(
            "inputs.may_make_temporary_tables",
            False,
            f"database {server['database']}",
            f"{role} lacks TEMPORARY",
            "TEMPORARY, for the keys that a load has seen",
            f"GRANT TEMPORARY ON DATABASE {server['quoted_database']} TO {role};",
        )


def _right(fact: str, held: bool, subject: str, found: str, needed: str, grant: str) -> Gate:
    return gate(
        fact,
        held,
        subject,
        found=found,
        needed=needed,
        danger="PostgreSQL would refuse a statement half-way through the migration",
        do=f"have the owner or a superuser run: {grant}",
    )
