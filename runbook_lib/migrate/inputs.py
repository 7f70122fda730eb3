"""Everything that makes a run impossible, found before anything is started: parameters against server and files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.benchmark import query_set
from runbook_lib.core import db, session
from runbook_lib.core.gates import BadInput, Gate, Gates, Verdict, collect, gate
from runbook_lib.migrate import (
    application_settings,
    citus,
    consent,
    dependents,
    encoding,
    extension,
    filter_checks,
    partition_checks,
    pgvector_releases,
    policies,
    privileges,
    rights,
    row_security_recall,
    table_checks,
)
from runbook_lib.params import Params
from runbook_lib.search import free_names, statements
from runbook_lib.sql import load

SQL = load("inputs")

# Roles that managed services let install extensions instead of a superuser: Amazon, Google, Microsoft.
ADMINISTRATORS = ["rds_superuser", "cloudsqlsuperuser", "azure_pg_admin"]
LEGACY_TIMEOUT = "10s"


def input_problems(params: Params) -> Gates:
    """Every input checked, all problems at once, on a connection of its own; ``failed`` names what must be fixed.

    A server that cannot be reached is one of the problems, not an exception; files are checked all the same.
    """
    gates = list(_files(params))
    try:
        connection = db.connect(params, "runbook preflight")
    except BadInput as error:
        return collect([*error.problems, *gates])
    with connection:
        return collect([*_server(connection, params), *gates])


def check(connection: db.Connection, params: Params) -> Gates:
    """The same checks on a connection that already exists."""
    return collect([*_server(connection, params), *_files(params)])


def _files(params: Params) -> Iterator[Gate]:
    """What can be checked without a server: release, model, queries and judgements."""
    # Imported here: both modules load numerical libraries, which the checks of the server do without.
    from runbook_lib.embeddings import embedding, splitting

    yield pgvector_releases.check_wanted(params)
    try:
        yield embedding.check_dimension(params)
        yield embedding.check_distance(params)
        splitting.splitter(params)
    except BadInput as error:
        yield from error.problems
    try:
        queries = query_set.read_queries(params)
        query_set.read_judgements(params)
        if params.queries.embeddings is not None or not params.embeddings.has_model:
            # Found now rather than in 70_tune, hours later.
            embedding.query_vectors(params, queries)
    except BadInput as error:
        yield from error.problems
    else:
        yield gate(
            "inputs.queries_are_readable",
            bool(queries),
            str(params.queries.file),
            found=f"{len(queries)} queries",
            needed="at least one",
            danger="nothing would show whether the new search is better or worse",
            do="write down what users search for, one query a line",
        )


def _server(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """What can be read first; what must be tried only where all of that is sound, so that one fault is named once."""
    # Imported here: it knows every phase, and phases know these checks.
    from runbook_lib.migrate import fulltext_check, trials

    for check_more in (_looked_at, fulltext_check.check_words_query, trials.gates):
        found = list(check_more(connection, params))
        yield from found
        if any(g.verdict is not Verdict.PASS for g in found):
            return


def _looked_at(connection: db.Connection, params: Params) -> Iterator[Gate]:
    server = db.one(connection, SQL["server"], params, administrators=ADMINISTRATORS)
    yield pgvector_releases.check_server(connection.info.server_version)
    yield _takes_writes(server)
    yield from encoding.check(connection, params)
    yield from extension.check(connection, params, server)
    found = table_checks.find_table(connection, params)
    yield table_checks.table_exists(connection, params, found)
    if found is None or found["kind"] not in ("r", "p"):
        return
    columns = {c["name"]: c for c in db.rows(connection, SQL["columns"], params, oid=found["oid"])}
    look = table_checks.Look(connection, params, found, columns)
    yield from partition_checks.check(connection, params, found)
    yield from citus.check(connection, params)
    yield from table_checks.columns_fit(look)
    yield from filter_checks.check(connection, params)
    yield from rights.check(connection, params, server, found)
    yield from policies.check(connection, params)
    yield from row_security_recall.can_be_measured(connection, params)
    yield privileges.check(connection, params)
    yield from free_names.check(connection, params, columns)
    yield from consent.check(connection, params)
    yield from application_settings.check(connection, params)
    yield privileges.check_open_schemas(connection, params)
    yield from dependents.check(connection, params, columns)
    yield from _search(connection, params, columns)
    yield legacy_query_runs(connection, params)
    yield from table_checks.rows_fit(look)


def _takes_writes(server: db.Row) -> Gate:
    standby = server["in_recovery"]
    return gate(
        "inputs.server_takes_writes",
        not standby and not server["read_only"],
        f"database {server['database']}",
        found="a standby" if standby else "read only by default" if server["read_only"] else "a primary",
        needed="a primary that takes writes",
        danger=table_checks.NOTHING_STARTED,
        do="name the primary in the DSN" if standby else "unset default_transaction_read_only for this role",
    )


def _search(connection: db.Connection, params: Params, columns: dict[str, db.Row]) -> Iterator[Gate]:
    # Imported here: it compares searches, which loads numerical libraries.
    from runbook_lib.migrate import fulltext_check

    s = params.search
    yield from fulltext_check.check(connection, params, columns)
    roles = list(dict.fromkeys([*s.grant_to, *(caller.role for caller in s.seen_as)]))
    unknown = [r["role"] for r in db.rows(connection, SQL["unknown_roles"], params, roles=roles)]
    if roles:
        yield gate(
            "inputs.granted_roles_exist",
            not unknown,
            "search.grant_to and search.seen_as",
            found=f"no such role: {', '.join(unknown)}" if unknown else f"{len(roles)} roles",
            needed="roles of this server",
            danger="the application could not call the function, nor could recall be measured as it sees the table",
            do="correct their names, or CREATE ROLE first",
        )


def legacy_query_runs(connection: db.Connection, p: Params) -> Gate:
    """Has PostgreSQL parse and plan the legacy query, which fetches nothing, and looks at the columns it returns."""
    values: dict[str, Any] = {"query": "word", "k": 1} | dict.fromkeys(p.target.filters)
    # LIMIT 0 stops the executor before it reads a row, whatever the query costs.
    legacy = statements.legacy_statement(connection, p)
    probe = sql.SQL("SELECT * FROM (\n{}\n) AS legacy LIMIT 0").format(legacy)
    problem, columns = "", list[str]()
    remedy = "fix legacy.query; try it in psql with values in place of :query and :k"
    try:
        with session.users_path(connection), connection.transaction(force_rollback=True):
            connection.execute("SET TRANSACTION READ ONLY")
            connection.execute("SELECT pg_catalog.set_config('statement_timeout', %s::text, true)", [LEGACY_TIMEOUT])
            cursor = connection.execute(probe, values, prepare=False)
            columns = [c.name for c in cursor.description or []]
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        problem = str(error).split("\nLINE")[0].strip()
        if isinstance(error, psycopg.errors.IndeterminateDatatype):
            remedy = "name its type in legacy.query, as in :query::text"
    key = p.target.key_columns
    return gate(
        "inputs.legacy_query_runs",
        not problem and set(key) <= set(columns),
        "legacy.query",
        found=f"PostgreSQL says: {problem}" if problem else f"it returns {', '.join(columns)}",
        needed=f"a SELECT that returns {'a column' if len(key) == 1 else 'columns'} named {', '.join(key)}",
        danger="there would be no search of today to compare with, nor to go back to",
        do=remedy,
    )
