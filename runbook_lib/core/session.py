"""What every session of the runbook begins with, whatever ALTER DATABASE and ALTER ROLE have set for it.

Left as the server has them, since they are properties of the server that the application sees as well: prices, sizes
and parallelism of the planner, jit, plan_cache_mode, the other planner switches, work_mem, maintenance_work_mem,
synchronous_commit, default_text_search_config, lc_messages and a role that ALTER ROLE … SET role gives.
"""

from __future__ import annotations

import selectors
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg
from pgvector.psycopg.bit import register_bit_info
from pgvector.psycopg.halfvec import register_halfvec_info
from pgvector.psycopg.sparsevec import register_sparsevec_info
from pgvector.psycopg.vector import register_vector_info
from psycopg.rows import DictRow, dict_row
from psycopg.types import TypeInfo

from runbook_lib.core import conninfo_masking, versions
from runbook_lib.core.gates import BadInput, Gate, RunbookError, Verdict
from runbook_lib.core.names import identifier
from runbook_lib.sql import load

SQL = load("session")

Connection = psycopg.Connection[DictRow]

CLIENT_ENCODING = "UTF8"
READ_ONLY = "SELECT set_config('default_transaction_read_only', %s, false)"
# Of settings that a server does not have yet, or not any more, nothing is set.
SETTINGS: Mapping[str, str] = {
    # The runbook bounds its own waits; these would end a session in the middle of a build or a pause.
    "statement_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "10min",
    # A client that is gone with its machine or its network loses its session, locks and claim in a minute.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60s",
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
REGISTER = {
    "vector": register_vector_info,
    "halfvec": register_halfvec_info,
    "sparsevec": register_sparsevec_info,
    "bit": register_bit_info,
}
# So often each session of a trial of the pooler looks at its server process.
LOOKS_AT_THE_POOLER = 3
# A pool that is used up has none left for the second session of the trial.
LONGEST_TRIAL_S = 5


def begin(connection: Connection, schema: str, table: str, *, lock_timeout_ms: int) -> None:
    """Puts the settings of a fresh session, in autocommit, into the runbook's hands. schema, table: the target's."""
    came_with = _one(connection, "inherited")
    taken = {"path": came_with["path"], "schemas": came_with["schemas"], "schema": schema, "table": table}
    connection.execute(SQL["take_path"].compose({}), taken)
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


def use_search_path(connection: Connection) -> None:
    """The search path as it should be now: pg_catalog first, pg_temp last, between them what nobody else can shadow
    a name in; and pgvector's library loaded, with its settings as they were built.
    """
    closed_off = [row["schema"] for row in open_schemas(connection)]
    path = _one(connection, "path", open=closed_off)["path"]
    connection.execute(SQL["use_path"].compose({}), {"path": path})
    if own := pgvectors_schema(connection):
        load = SQL["load_library"].compose({"vector_in_schema": identifier(own, "vector")})
        connection.execute(load, {})
        connection.execute(SQL["reset_of_pgvector"].compose({}), {})


def pgvectors_schema(connection: Connection) -> str:
    """The schema that pgvector is in, if it is there and may be used; empty otherwise."""
    found = connection.execute(SQL["library"].compose({})).fetchone()
    return str(found["schema"]) if found and found["usable"] else ""


def register_vector(connection: Connection) -> None:
    """Teaches this connection pgvector's types by the schema that they are in; pgvector-python looks on the path.

    Raises RunbookError where pgvector is not installed, or this role may not use its schema.
    """
    found = connection.execute(SQL["library"].compose({})).fetchone()
    if not found or not found["usable"]:
        raise _no_types(connection, found)
    rows = connection.execute(SQL["types"].compose({}), {"schema": found["schema"]}).fetchall()
    types = {row["name"]: TypeInfo(row["name"], row["oid"], row["array_oid"]) for row in rows}
    for name, register in REGISTER.items():
        if name not in types:
            raise psycopg.ProgrammingError(f"type {name} is not there")
        register(connection, types[name])


def _no_types(connection: Connection, found: DictRow | None) -> RunbookError:
    danger = "no vector can be sent or read; nothing was changed"
    if found is None:
        where = f"database {connection.info.dbname}"
        return RunbookError(
            f"{where} has no pgvector", "the extension", danger, "run 20_extension with execute: true"
        )
    return RunbookError(
        f"{found['role']} lacks USAGE on schema {found['schema']}, which pgvector is installed in",
        "USAGE, for its types and operators",
        danger,
        f"have its owner or a superuser run: GRANT USAGE ON SCHEMA {found['quoted']} TO {found['role']};",
    )


def open_schemas(connection: Connection) -> list[DictRow]:
    """The schemas in use that others may create in, with who may, and what they have made there already."""
    return connection.execute(SQL["open_schemas"].compose({}), {}).fetchall()


def inherited(connection: Connection) -> list[str]:
    """The schemas of the search path that the session came with, as far as they are there."""
    return list(_one(connection, "users_path")["schemas"])


@contextmanager
def fixed_path(connection: Connection) -> Iterator[None]:
    """For what the catalogue spells out and is compared later, when other schemas may be open to others: every name
    with its schema.
    """
    with connection.transaction(force_rollback=True):
        connection.execute(SQL["fixed_path"].compose({}))
        yield


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


def server_pid(connection: Connection) -> int:
    """The server process that answers this session. A pooler gives the client a number of its own instead, which is
    what ``connection.info`` has.
    """
    return int(_one(connection, "pid")["pid"])


def refuse_pooler(connection: Connection, pid: int, conninfo: str) -> None:
    """Raises BadInput where a pooler gives this session another server process for each transaction.

    pid: of :func:`server_pid`. A pooler answers the client with a number of its own, so a server that is asked
    directly costs nothing more. Behind one, a session is only ours where its process stays, and goes to no other
    client meanwhile. Nothing is set before that is known: settings of a shared process would reach the application.
    """
    if connection.info.backend_pid == pid:
        return
    try:
        problem = _shared(connection, conninfo)
    except (psycopg.Error, TimeoutError) as error:
        said = conninfo_masking.masked(str(error), conninfo).strip()
        found = f"a connection pooler, whose mode could not be found out: {said}"
        raise BadInput([pooled(Verdict.UNKNOWN, found)]) from None
    if problem:
        raise BadInput([pooled(Verdict.FAIL, f"a connection pooler in transaction or statement mode: {problem}")])


def _shared(connection: Connection, conninfo: str) -> str:
    """What shows that the server process is not this session's own; empty where it is. Changes nothing.

    Raises psycopg.Error and TimeoutError where no second session is to be had to compare with.
    """
    ours = _processes(connection)
    again = psycopg.connect(conninfo, row_factory=dict_row, connect_timeout=LONGEST_TRIAL_S, autocommit=True)
    with closing(again) as second:
        _wait_for_a_process(second)
        # Several looks, each a transaction: a pool gives out the process that was used last, or first, or any.
        theirs = _processes(second)
        ours += _processes(connection)
    if {pid for pid, _ in ours} & {pid for pid, _ in theirs}:
        return "two sessions were answered by one server process"
    for seen in (ours, theirs):
        if len({pid for pid, _ in seen}) > 1:
            return "transactions of one session were answered by different server processes"
        numbers = [number for _, number in seen]
        if numbers != list(range(numbers[0], numbers[0] + len(seen))):
            return "other sessions' transactions ran in this session's server process, between its own"
    return ""


def _processes(connection: Connection) -> list[tuple[int, int]]:
    """The server process of some transactions, and the number that each has among the transactions of its process."""
    # A prepared statement would stay behind in the pool.
    looks = (connection.execute(SQL["process"].compose({}), prepare=False) for _ in range(LOOKS_AT_THE_POOLER))
    return [(row["pid"], row["number"]) for look in looks for row in look.fetchall()]


def _wait_for_a_process(connection: Connection) -> None:
    """Waits for the first answer: a pool that is used up takes the client, and lets its first statement wait."""
    connection.pgconn.send_query(b"SELECT 1")
    connection.pgconn.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(connection.fileno(), selectors.EVENT_READ)
        if not selector.select(LONGEST_TRIAL_S):
            raise TimeoutError(f"it gave no second session within {LONGEST_TRIAL_S} s")
    for result in iter(connection.pgconn.get_result, None):
        if result.status != psycopg.pq.ExecStatus.TUPLES_OK:
            raise psycopg.OperationalError(result.error_message.decode(errors="replace"))


def pooled(verdict: Verdict, found: str) -> Gate:
    """The gate that a pooler does not pass which shares its server processes, or may do so."""
    return Gate(
        "db.session_is_its_own",
        verdict,
        "the server",
        found,
        "a direct connection to PostgreSQL, or a pool in session mode with sessions to spare",
        "settings, advisory locks and claims would end, or reach other clients, between two statements",
        "put the server's own address and port into the DSN (often port 5432 instead of 6432), or a pool with"
        " pool_mode = session",
    )


def _one(connection: Connection, block: str, **values: Any) -> DictRow:
    row = connection.execute(SQL[block].compose({}), values).fetchone()
    if row is None:
        raise LookupError(f"session.{block} returned no row")
    return row
