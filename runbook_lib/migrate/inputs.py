"""Everything that makes a run impossible, found before anything is started: parameters against server and files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.benchmark import query_set
from runbook_lib.core import db, row_counts, session
from runbook_lib.core.display import some
from runbook_lib.core.gates import BadInput, Gate, Gates, Verdict, collect, gate
from runbook_lib.core.names import spelled
from runbook_lib.migrate import (
    application_settings,
    citus,
    consent,
    dependents,
    encoding,
    extension,
    filter_checks,
    open_schemas,
    partition_checks,
    pgvector_releases,
    policies,
    privileges,
    rights,
)
from runbook_lib.params import Params
from runbook_lib.search import free_names, statements
from runbook_lib.sql import load

SQL = load("inputs")

NOTHING_STARTED = "nothing was started; the run would break half-way"
FIX_PARAMS = "fix the params file and rerun the same command"
KEY_TYPES = ("bigint", "integer", "uuid", "text", "character varying")
# Roles that managed services let install extensions instead of a superuser: Amazon, Google, Microsoft.
ADMINISTRATORS = ["rds_superuser", "cloudsqlsuperuser", "azure_pg_admin"]
LEGACY_TIMEOUT = "10s"
# Rows are deleted while a migration is under way; more than this and the judgements are of another table.
MOST_JUDGED_ROWS_GONE = 0.05
SHOWN = 5


@dataclass(frozen=True)
class _Look:
    """What several checks need: who and where, and the table with its columns by name."""

    connection: db.Connection
    params: Params
    server: db.Row
    table: db.Row
    columns: dict[str, db.Row]

    @property
    def subject(self) -> str:
        return spelled(self.params, "table")


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
    """The same checks on a connection that is there already."""
    return collect([*_server(connection, params), *_files(params)])


def require_table(connection: db.Connection, params: Params) -> None:
    """Raises BadInput where the target is not a table."""
    found = _table_gate(connection, params, _find_table(connection, params))
    if found.verdict is not Verdict.PASS:
        raise BadInput([found])


def _files(params: Params) -> Iterator[Gate]:
    """What can be checked without a server: release, model, queries and judgements."""
    # Imported here: both modules load numerical libraries, which the checks of the server do without.
    from runbook_lib.embeddings import embedding

    yield pgvector_releases.check_wanted(params)
    for check_model in (embedding.check_dimension, embedding.check_distance):
        try:
            yield check_model(params)
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
    from runbook_lib.migrate import trials

    looked_at = list(_looked_at(connection, params))
    yield from looked_at
    if all(g.verdict is Verdict.PASS for g in looked_at):
        yield from trials.gates(connection, params)


def _looked_at(connection: db.Connection, params: Params) -> Iterator[Gate]:
    server = db.one(connection, SQL["server"], params, administrators=ADMINISTRATORS)
    yield pgvector_releases.check_server(connection.info.server_version)
    yield _takes_writes(server)
    yield from encoding.check(connection, params)
    yield from extension.check(connection, params, server)
    found = _find_table(connection, params)
    yield _table_gate(connection, params, found)
    if found is None or found["kind"] not in ("r", "p"):
        return
    columns = {c["name"]: c for c in db.rows(connection, SQL["columns"], params, oid=found["oid"])}
    look = _Look(connection, params, server, found, columns)
    yield from partition_checks.check(connection, params, found)
    yield from citus.check(connection, params)
    yield _key_is_supported(look)
    if params.target.key in columns:
        yield _key_is_unique(look)
    for column in params.target.text_columns:
        yield _text_column(look, column)
    for column in params.target.filter_columns:
        yield _filter_column(look, column)
    if not params.target.distributed:
        yield from filter_checks.check(connection, params)
    yield from rights.check(look.connection, look.params, look.server, look.table)
    yield from policies.check(connection, params)
    yield privileges.check(connection, params)
    yield from free_names.check(connection, params, columns)
    yield from consent.check(connection, params)
    yield from application_settings.check(connection, params)
    yield open_schemas.check(connection, params)
    yield from dependents.check(connection, params, columns)
    yield from _search(look)
    yield legacy_query_runs(connection, params)
    if params.target.key in columns:
        yield _judged_keys(look)
    if found["readable"] and set(params.target.text_columns) <= set(columns):
        yield _some_row_has_text(look)


def _takes_writes(server: db.Row) -> Gate:
    standby = server["in_recovery"]
    return gate(
        "inputs.server_takes_writes",
        not standby and not server["read_only"],
        f"database {server['database']}",
        found="a standby" if standby else "read only by default" if server["read_only"] else "a primary",
        needed="a primary that takes writes",
        danger=NOTHING_STARTED,
        do="name the primary in the DSN" if standby else "unset default_transaction_read_only for this role",
    )


def _find_table(connection: db.Connection, params: Params) -> db.Row | None:
    target = params.target
    found = db.rows(connection, SQL["table"], params, schema=target.schema_, table=target.table)
    return found[0] if found else None


def _table_gate(connection: db.Connection, params: Params, found: db.Row | None) -> Gate:
    do = "name the table behind it" if found else FIX_PARAMS
    if found is None:
        tables = [(r["schema"], r["table"]) for r in db.rows(connection, SQL["tables"], params)]
        do = _nearest_table(connection, params, tables) or FIX_PARAMS
    return gate(
        "inputs.table_exists",
        found is not None and found["kind"] in ("r", "p"),
        spelled(params, "table"),
        found=free_names.KINDS[found["kind"]] if found else "no such table",
        needed="a table that columns can be added to",
        danger=NOTHING_STARTED,
        do=do,
    )


def _nearest_table(connection: db.Connection, params: Params, tables: list[tuple[str, str]]) -> str:
    target = params.target
    # The right name in another schema is nearer than a similar name in the same one.
    exact = [t for t in tables if t[1] == target.table]
    here = difflib.get_close_matches(target.table, [t for s, t in tables if s == target.schema_], n=1, cutoff=0.5)
    near = exact[0] if exact else (target.schema_, here[0]) if here else None
    return f"did you mean {sql.Identifier(*near).as_string(connection)}?" if near else ""


def _missing(look: _Look, fact: str, column: str, needed: str) -> Gate:
    near = difflib.get_close_matches(column, list(look.columns), n=1, cutoff=0.5)
    return gate(
        fact,
        False,
        f"{column} of {look.subject}",
        found="no such column",
        needed=needed,
        danger=NOTHING_STARTED,
        do=f"did you mean {near[0]}?" if near else f"the table has: {', '.join(look.columns)}",
    )


def _key_is_supported(look: _Look) -> Gate:
    key = look.params.target.key
    needed = f"a column of type {', '.join(KEY_TYPES)}"
    if key not in look.columns:
        return _missing(look, "inputs.key_is_supported", key, needed)
    kind = look.columns[key]["type"]
    return gate(
        "inputs.key_is_supported",
        kind in KEY_TYPES,
        f"{key} of {look.subject}",
        found=kind,
        needed=needed,
        danger="the backfill walks the table by ranges of this key",
        do="name another unique column in target.key, or add one: GENERATED ALWAYS AS IDENTITY, with a unique index",
    )


def _key_is_unique(look: _Look) -> Gate:
    key = look.params.target.key
    found = db.rows(look.connection, SQL["unique_key"], look.params, oid=look.table["oid"], key=key)
    not_null = bool(look.columns[key]["not_null"])
    if not found and look.table["kind"] == "p":
        return partition_checks.key_is_unique(look.connection, look.params, look.table, not_null)
    unique = f"unique by {found[0]['index']}" if found else "no valid unique index on this column alone"
    column = sql.Identifier(key).as_string(look.connection)
    wanted = [] if not_null else [f"ALTER TABLE {look.subject} ALTER COLUMN {column} SET NOT NULL;"]
    if not found:
        wanted.append(f"CREATE UNIQUE INDEX CONCURRENTLY ON {look.subject} ({column});")
    return gate(
        "inputs.key_identifies_rows",
        bool(found) and not_null,
        f"{key} of {look.subject}",
        found=f"{unique}, {'NOT NULL' if not_null else 'NULL allowed'}",
        needed="NOT NULL, with a primary key or unique index of its own, without a condition",
        danger="a vector could reach two rows, or none",
        do=" ".join(wanted),
    )


def _text_column(look: _Look, column: str) -> Gate:
    if column not in look.columns:
        return _missing(look, "inputs.text_column_exists", column, "a column of text")
    return gate(
        "inputs.text_column_exists",
        look.columns[column]["is_text"],
        f"{column} of {look.subject}",
        found=look.columns[column]["type"],
        needed="a column of text",
        danger="the model embeds text; how it would embed this type is unknown",
        do="leave the column out of target.text_columns, or add a text column that holds what should be found",
    )


def _some_row_has_text(look: _Look) -> Gate:
    """Of an empty table nothing can be staged, measured or tuned."""
    columns = ", ".join(look.params.target.text_columns)
    try:
        there = db.one(look.connection, row_counts.SQL["texts"], look.params)
    except psycopg.Error as error:
        db.raise_if_lost(look.connection, error)
        holds, there, found = None, {}, f"could not be read: {str(error).splitlines()[0]}"
    else:
        holds = there["texts"]
        found = "rows with text" if holds else f"rows, and no text in {columns}" if there["rows"] else "no row"
    return gate(
        "inputs.some_row_has_text",
        holds,
        look.subject,
        found=found,
        needed=f"a row with text in {columns}",
        danger="there would be nothing to embed, and nothing to measure a search by",
        do="resolve what the server reports, then rerun the same command"
        if holds is None
        else "name the columns that hold text in target.text_columns"
        if there["rows"]
        else "load the rows first",
    )


def _filter_column(look: _Look, column: str) -> Gate:
    if column not in look.columns:
        return _missing(look, "inputs.filter_column_exists", column, "a column to filter by")
    kind = look.columns[column]["type"]
    return gate("inputs.filter_column_exists", True, f"{column} of {look.subject}", found=kind, needed="a column")


def _search(look: _Look) -> Iterator[Gate]:
    # Imported here: it compares searches, which loads numerical libraries.
    from runbook_lib.migrate import fulltext_check

    s = look.params.search
    yield from fulltext_check.check(look.connection, look.params, look.columns)
    roles = list(dict.fromkeys([*s.grant_to, *(caller.role for caller in s.seen_as)]))
    unknown = [r["role"] for r in db.rows(look.connection, SQL["unknown_roles"], look.params, roles=roles)]
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
    probe = sql.SQL("SELECT * FROM (\n{}\n) AS legacy LIMIT 0").format(statements.legacy_statement(p))
    problem, columns = "", list[str]()
    try:
        with session.users_path(connection), connection.transaction(force_rollback=True):
            connection.execute("SET TRANSACTION READ ONLY")
            connection.execute("SELECT pg_catalog.set_config('statement_timeout', %s::text, true)", [LEGACY_TIMEOUT])
            cursor = connection.execute(probe, values, prepare=False)
            columns = [c.name for c in cursor.description or []]
    except psycopg.Error as error:
        db.raise_if_lost(connection, error)
        problem = str(error).split("\nLINE")[0].strip()
    key = p.target.key
    return gate(
        "inputs.legacy_query_runs",
        not problem and key in columns,
        "legacy.query",
        found=f"PostgreSQL says: {problem}" if problem else f"it returns {', '.join(columns)}",
        needed=f"a SELECT that returns a column named {key}",
        danger="there would be no search of today to compare with, nor to go back to",
        do="fix legacy.query; try it in psql with values in place of :query and :k",
    )


def _judged_keys(look: _Look) -> Gate:
    try:
        judgements = query_set.read_judgements(look.params)
        unknown = query_set.unknown_keys(look.connection, look.params, judgements)
    except BadInput as error:
        return error.problems.gates[0]
    except psycopg.Error as error:
        db.raise_if_lost(look.connection, error)
        return _judgement_gate(look, None, f"could not be compared: {str(error).splitlines()[0]}")
    judged = len({key for of_query in judgements.values() for key in of_query})
    holds = len(unknown) <= MOST_JUDGED_ROWS_GONE * judged
    return _judgement_gate(
        look, holds, f"not in the table: {some(unknown, SHOWN)}" if unknown else "all in the table"
    )


def _judgement_gate(look: _Look, holds: bool | None, found: str) -> Gate:
    return gate(
        "inputs.judged_keys_exist",
        holds,
        str(look.params.queries.judgements or "queries.judgements"),
        found=found,
        needed=f"every judged key a {look.params.target.key} of {look.subject}, but for"
        f" {MOST_JUDGED_ROWS_GONE:.0%} that may have been deleted since",
        danger="a right answer that cannot be found would count against every search",
        do="take the unknown keys out of the file, or make the judgements on this database's rows",
    )
