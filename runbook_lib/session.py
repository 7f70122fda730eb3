"""What every session of the runbook begins with, whatever ALTER DATABASE and ALTER ROLE have set for it.

Left as the server has them, since they are properties of the server that the application sees as well: prices, sizes
and parallelism of the planner, jit, plan_cache_mode, the other planner switches, work_mem, maintenance_work_mem,
synchronous_commit, default_text_search_config, lc_messages and a role that ALTER ROLE … SET role gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import DictRow, dict_row

from runbook_lib import versions
from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.names import identifier
from runbook_lib.sql import load

SQL = load("session")

Connection = psycopg.Connection[DictRow]

CLIENT_ENCODING = "UTF8"
# Of settings that a server does not have yet, or not any more, nothing is set.
SETTINGS: Mapping[str, str] = {
    # The runbook bounds its own waits; these would end a session in the middle of a build or a pause.
    "statement_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "10min",
    # How values are written and read as text: keys, hashes, the ledger.
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "xmlbinary": "base64",
    "xmloption": "content",
    "array_nulls": "on",
    # How statements are parsed, and names written.
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "escape_string_warning": "on",
    "quote_all_identifiers": "off",
    "transform_null_equals": "off",
    "check_function_bodies": "on",
    # Notices are read: pgvector says there that a graph has outgrown its memory.
    "client_min_messages": "notice",
    "exit_on_error": "off",
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    # With row security off, PostgreSQL raises an error where a policy would hide a row.
    "row_security": "on",
    "restrict_nonsystem_relation_kind": "",
    # New tables and indexes go where the database is, whose room was looked at.
    "default_tablespace": "",
    "temp_tablespaces": "",
    "default_table_access_method": "heap",
    # Without it no vector index is read. Where the application has it off, checking/application_settings says so.
    "enable_indexscan": "on",
    "debug_parallel_query": "off",
    "force_parallel_mode": "off",
}
# Only a superuser may change these; where one is wrong and cannot be changed, the gates say so.
PRIVILEGED: Mapping[str, str] = {"session_replication_role": "origin", "track_counts": "on", "track_activities": "on"}
# A trial of the pooler looks at the server process so often.
LOOKS_AT_THE_POOLER = 3
# A pool with a single server session has none left for the second connection of the trial.
LONGEST_TRIAL_S = 5
STATEMENT_POOLING = "transaction blocks not allowed in statement pooling mode"


class Inherited(NamedTuple):
    """What a session came with: its search path, the schemas of it that exist, and its server process."""

    path: str
    schemas: list[str]
    pid: int


def begin(connection: Connection, schema: str, table: str, *, lock_timeout_ms: int) -> Inherited:
    """Puts the settings of a fresh session, in autocommit, into the runbook's hands. schema, table: the target's."""
    row = _one(connection, "inherited")
    found = Inherited(row["path"], list(row["schemas"]), row["pid"])
    taken = {"path": found.path, "schemas": found.schemas, "schema": schema, "table": table}
    connection.execute(SQL["take_path"].compose({}), taken | {"schemas": _array(connection, found.schemas)})
    settings = {**SETTINGS, "lock_timeout": f"{lock_timeout_ms}ms"}
    if versions.ends_statements_of_gone_clients(connection.info.server_version):
        # Ends the statement with the client that asked for it.
        settings |= {"client_connection_check_interval": "1s"}
    connection.execute(SQL["set"].compose({}), {"names": list(settings), "values": list(settings.values())})
    wanted = {"names": list(PRIVILEGED), "values": list(PRIVILEGED.values())}
    for wrong in connection.execute(SQL["privileged"].compose({}), wanted).fetchall():
        with suppress(psycopg.errors.InsufficientPrivilege):
            connection.execute(SQL["set"].compose({}), {"names": [wrong["name"]], "values": [wrong["value"]]})
    use_search_path(connection)
    return found


def use_search_path(connection: Connection) -> None:
    """The search path as it should be now: pg_catalog first, pg_temp last, between them what nobody else can shadow
    a name in; and pgvector's library loaded, with its settings as they were built.
    """
    own = pgvectors_schema(connection)
    # pgvector's schema stays, whoever may create in it: its type and operators are found by the path alone.
    closed_off = [row["schema"] for row in open_schemas(connection) if row["schema"] != own]
    path = _one(connection, "path", open=closed_off)["path"]
    connection.execute(SQL["use_path"].compose({}), {"path": path})
    if own:
        load = SQL["load_library"].compose({"vector_in_schema": identifier(own, "vector")})
        connection.execute(load, {})
        connection.execute(SQL["reset_of_pgvector"].compose({}), {})


def pgvectors_schema(connection: Connection) -> str:
    """The schema that pgvector is in, if it is there and may be used; empty otherwise."""
    found = connection.execute(SQL["library"].compose({})).fetchone()
    return str(found["schema"]) if found else ""


def open_schemas(connection: Connection, more: tuple[str, ...] = ()) -> list[DictRow]:
    """The schemas in use that others may create in, with who may, and what they have made there already."""
    return connection.execute(SQL["open_schemas"].compose({}), {"schemas": list(more)}).fetchall()


def inherited(connection: Connection) -> list[str]:
    """The schemas of the search path that the session came with, as far as they are there."""
    return list(_one(connection, "users_path")["schemas"])


@contextmanager
def users_path(connection: Connection) -> Iterator[None]:
    """For the application's own query: the search path that the session came with."""
    found = _one(connection, "users_path")
    connection.execute(SQL["use_path"].compose({}), {"path": found["path"]})
    try:
        yield
    finally:
        if connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
            connection.execute(SQL["use_path"].compose({}), {"path": found["own"]})


def refuse_pooler(connection: Connection, seen: Inherited, conninfo: str) -> None:
    """Raises BadInput where a pooler gives this session another server process for each transaction.

    A pooler answers the client with a process number of its own, so a server that is asked directly costs nothing
    more. Behind one, a session is only ours where its process stays, and goes to no other client meanwhile.
    """
    if connection.info.backend_pid == seen.pid:
        return
    if problem := _shared(connection, seen.pid, conninfo):
        raise BadInput([pooled(problem)])


def _shared(connection: Connection, pid: int, conninfo: str) -> str:
    """What shows that the server process is not this session's own; empty where it is."""
    another = "two transactions of one session were answered by two server processes"
    for _ in range(LOOKS_AT_THE_POOLER):
        if _one(connection, "pid")["pid"] != pid:
            return another
    try:
        second = psycopg.connect(conninfo, row_factory=dict_row, connect_timeout=LONGEST_TRIAL_S, autocommit=True)
    except psycopg.OperationalError:
        return ""  # the pool has no second session to give, so this one is ours
    with second:
        try:
            # Held in a transaction: what answers it is not free for the first one.
            second.execute("BEGIN")
            theirs = _one(second, "pid")["pid"]
            if theirs == pid:
                return "two sessions were answered by one server process"
            if _one(connection, "pid")["pid"] != pid:
                return another
        except psycopg.Error as error:
            return "it allows no transactions: it pools by statement" if STATEMENT_POOLING in str(error) else ""
    return ""


def pooled(found: str) -> Gate:
    """The gate that a pooler in transaction or statement mode does not pass."""
    return Gate(
        "db.session_is_its_own",
        Verdict.FAIL,
        "the server",
        f"a connection pooler in transaction or statement mode (PgBouncer, Odyssey, pgcat, Supavisor): {found}",
        "a direct connection to PostgreSQL, or a pool in session mode",
        "settings, advisory locks and claims would end, or reach other clients, between two statements",
        "put the server's own address and port into the DSN (often port 5432 instead of 6432), or a pool with"
        " pool_mode = session",
    )


def _array(connection: Connection, values: list[str]) -> str:
    """A list as PostgreSQL writes an array of text, for a setting that holds it."""
    row = connection.execute("SELECT %s::pg_catalog.text[]::pg_catalog.text AS written", [values]).fetchone()
    return str(row["written"]) if row else "{}"


def _one(connection: Connection, block: str, **values: Any) -> DictRow:
    row = connection.execute(SQL[block].compose({}), values).fetchone()
    if row is None:
        raise LookupError(f"session.{block} returned no row")
    return row
