"""Connections with known settings, and statements carried out with a bound wait, a progress line and a record."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from runbook_lib.core import closed, conninfo_masking, redaction, session, table_kind
from runbook_lib.core.display import duration, frame, statement_html
from runbook_lib.core.gates import BadInput, Gate, LockNotObtained, Verdict
from runbook_lib.core.names import changing, names, spelled
from runbook_lib.params import Params
from runbook_lib.params.section import LONE_SURROGATE
from runbook_lib.sql import Block

if TYPE_CHECKING:
    import pandas

Row = dict[str, Any]
Connection = psycopg.Connection[Row]
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
# As the server's, in session.SETTINGS; what the connection string says goes before.
KEEPALIVES = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
REACHABLE = "db.server_is_reachable"
FIRST_WAIT_BETWEEN_TRIES_S = 0.1
# Between the statements of a transaction that holds locks nothing happens: a session that rests there is frozen.
FROZEN_MS = 15_000
LONGEST_STATEMENT = "SELECT set_config('statement_timeout', %s, false)"
GIVE_UP_WHERE_FROZEN = "SELECT set_config('idle_in_transaction_session_timeout', %s, true)"

# What passes by itself: a lock that others hold, or a row that an update of its partition key has just moved.
NOT_NOW = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)

# PostgreSQL manual, "Explicit Locking": what each level keeps others from doing.
BLOCKED_BY = {
    "ACCESS EXCLUSIVE": "every read and write",
    "SHARE ROW EXCLUSIVE": "writes",
    "SHARE": "writes",
    "SHARE UPDATE EXCLUSIVE": "vacuum and other DDL; no read, no write",
    "ROW EXCLUSIVE": "a write to the same rows",
}


def lock_level(lock: str) -> str:
    """The level that a block's lock begins with: SHARE UPDATE EXCLUSIVE is not SHARE. Empty where it names none."""
    return max((level for level in BLOCKED_BY if lock.startswith(level)), key=len, default="")


def dsn(params: Params) -> str:
    """The connection string, from the place that the parameters name. Raises BadInput where it is not set."""
    c = params.connection
    return make_conninfo(service=c.service, passfile=c.passfile) if c.dsn_env is None else _from(params, c.dsn_env)


def read_dsn(params: Params) -> str | None:
    """The connection string of the replica that is measured on, likewise; None where the parameters name none."""
    variable = params.search.read_dsn_env
    return None if variable is None else _from(params, variable)


def _from(params: Params, variable: str) -> str:
    value, passfile = os.environ.get(variable, "").strip(), params.connection.passfile
    redaction.remember_conninfo(value)
    if not value:
        raise BadInput([_unreachable(f"environment variable {variable}", "not set", f"export {variable}=…")])
    try:
        return make_conninfo(value, passfile=passfile) if passfile else make_conninfo(value)
    except psycopg.ProgrammingError:
        # Without its cause: libpq quotes the string in its message, and a password may stand in it.
        problem = _unreachable(variable, "not a connection string", "write it as postgresql://… or key=value")
        raise BadInput([problem]) from None


def connect(
    params: Params, application_name: str, *, autocommit: bool = True, conninfo: str | None = None
) -> Connection:
    """A connection that names itself, ends its statement with the client, and never waits for a lock for long.

    conninfo: of another server than the target's. Raises BadInput where the server cannot be reached; the message
    holds no password.
    """
    connection = opened(conninfo or dsn(params), application_name, params)
    connection.autocommit = autocommit
    return connection


def beside(
    connection: Connection, params: Params, purpose: str, *, conninfo: str | None = None, trial: bool = False
) -> Connection:
    """Another session of this session's run, read-only and with the same time limits in the server. trial: it rolls
    back everything it does. conninfo: of another server than the target's.
    """
    run = " ".join(connection.info.get_parameters()["application_name"].split()[:2])
    further = connect(params, f"{run} {purpose}", conninfo=conninfo)
    further.execute(LONGEST_STATEMENT, [_setting(connection, "statement_timeout")])
    if _setting(connection, "default_transaction_read_only") == "on" and not trial:
        further.execute(session.READ_ONLY, ["on"])
    return further


@contextmanager
def bounded(connection: Connection, longest: str) -> Iterator[None]:
    """No statement of this session, or of one that is opened :func:`beside` it meanwhile, takes longer than that."""
    before = _setting(connection, "statement_timeout")
    connection.execute(LONGEST_STATEMENT, [longest])
    try:
        yield
    finally:
        if connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE:
            connection.execute(LONGEST_STATEMENT, [before])


def _setting(connection: Connection, name: str) -> str:
    row = connection.execute("SELECT current_setting(%s) AS value", [name]).fetchone()
    return str(row["value"]) if row else ""


def opened(conninfo: str, application_name: str, params: Params) -> Connection:
    """A session in autocommit that has the settings of :mod:`session`, and is its own.

    Raises BadInput where the server cannot be reached, or a pooler shares the session with others.
    """
    try:
        connection = psycopg.connect(
            make_conninfo(conninfo, **{k: v for k, v in KEEPALIVES.items() if k not in conninfo_to_dict(conninfo)}),
            autocommit=True,
            row_factory=dict_row,
            application_name=application_name[:63],
            connect_timeout=CONNECT_TIMEOUT_S,
            client_encoding=session.CLIENT_ENCODING,
        )
        # A pooler takes the client by itself, and looks for a server only for the first statement.
        pid = session.server_pid(connection)
    except psycopg.OperationalError as error:
        found = conninfo_masking.masked(str(error), conninfo)
        raise BadInput([_unreachable("the server", found, _what_to_do(error))]) from None
    # Also one that libpq found in a password file or a service.
    redaction.remember(connection.info.password)
    try:
        target = params.target.schema_, params.target.table
        session.refuse_pooler(connection, pid, conninfo)
        session.begin(connection, *target, lock_timeout_ms=params.locks.timeout_ms)
        for name, value in table_kind.of(params).session.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, value])
        if len(params.target.key_columns) > 1:
            # Values of several columns are written with their types; PostgreSQL infers that of one.
            params.target.found_key_types(key_types(connection, params))
    except BaseException:
        connection.close()
        raise
    return connection


def key_types(connection: Connection, params: Params) -> tuple[str, ...]:
    """The types of the key's columns as PostgreSQL spells them, without lengths; none of one that is not there."""
    columns = list(params.target.key_columns)
    found = rows(connection, session.SQL["key_types"], params, table=spelled(params, "table"), columns=columns)
    return tuple(row["type"] for row in found)


def _what_to_do(error: psycopg.OperationalError) -> str:
    # PgBouncer's own words, in every version.
    if "unsupported startup parameter" in str(error):
        return "a pooler (PgBouncer) is there: connect to PostgreSQL directly, or take options out of the DSN"
    return "check the address, the server and pg_hba.conf"


def use_search_path(connection: Connection) -> None:
    """Puts pgvector's schema on the search path and loads its library, where the extension came meanwhile."""
    session.use_search_path(connection)


def server_pid(connection: Connection) -> int:
    """The server process of this session, as pg_stat_activity knows it."""
    return session.server_pid(connection)


def _unreachable(subject: str, found: str, do: str) -> Gate:
    return Gate(
        REACHABLE,
        Verdict.FAIL,
        subject,
        found,
        "a connection to the target's server",
        "nothing can be looked at, so nothing was started",
        do,
    )


def reading(block: Block, params: Params, extra: Mapping[str, sql.Composable] | None = None) -> sql.Composed:
    """A block that reads, as the kind of table takes it. ``extra`` adds names that only this block knows."""
    kind = table_kind.of(params)
    return kind.block(block).compose(names(params) | kind.names(params, block, extra) | dict(extra or {}))


def rows(connection: Connection, block: Block, params: Params, **values: Any) -> list[Row]:
    """All rows of a reading block."""
    return connection.execute(reading(block, params), values).fetchall()


def one(connection: Connection, block: Block, params: Params, **values: Any) -> Row:
    """The single row of a reading block."""
    row = connection.execute(reading(block, params), values).fetchone()
    if row is None:
        raise LookupError(f"{block.name} returned no row")
    return row


def relation_exists(connection: Connection, name: str) -> bool:
    """Is there a relation of this name, as SQL spells it?"""
    row = connection.execute("SELECT pg_catalog.to_regclass(%s) IS NOT NULL AS there", [name]).fetchone()
    return bool(row and row["there"])


# What a plan cannot know, as it is shown there.
NOT_KNOWN_YET = {"keys": "'{the keys of one batch}'"}


@dataclass(frozen=True)
class Statement:
    """A statement that changes something: what, under which lock, and how it is undone.

    announced: printed before it begins, if it may take minutes.
    """

    name: str
    purpose: str
    lock: str
    undo: str
    query: sql.Composed
    values: Mapping[str, Any]
    announced: str = ""

    @property
    def blocks(self) -> str:
        """Whom the lock keeps waiting, from PostgreSQL's table of lock conflicts."""
        return BLOCKED_BY[level] if (level := lock_level(self.lock)) else "nobody"

    def text(self, connection: Connection) -> str:
        """The statement as it can be pasted into psql; in a plan, what is not known yet by its name."""
        query = self.query.as_string(connection)
        for name, meant in NOT_KNOWN_YET.items():
            if name in self.values and self.values[name] is None:
                query = query.replace(f"%({name})s", meant)
        text = psycopg.ClientCursor(connection).mogrify(query.encode(), self.values) + ";"
        return f"{text}\n{closed.MARK}" if closed.makes(text) and closed.MARK not in text else text


def statement(
    block: Block, params: Params, extra: Mapping[str, sql.Composable] | None = None, **values: Any
) -> Statement:
    """A block with this target's names in it. ``extra`` adds names that only this statement knows."""
    kind = table_kind.of(params)
    own = names(params) | changing(params) | kind.names(params, block, extra) | dict(extra or {})
    block = kind.block(block)
    query = block.compose(own)
    lock = block.lock.replace("{table}", f"{params.target.schema_}.{params.target.table}")
    lock = lock.replace("{vectors}", spelled(params, "vectors"))
    return Statement(block.name, block.purpose, lock, block.undo, query, values)


class Done(NamedTuple):
    """A statement that was carried out: rows affected (-1 where PostgreSQL does not say), seconds, tries."""

    statement: Statement
    rows: int
    seconds: float
    tries: int


@dataclass(frozen=True)
class Plan:
    """Statements in the order in which they will be carried out; an empty plan means that nothing is left to do."""

    statements: tuple[Statement, ...]
    connection: Connection

    def __iter__(self) -> Iterator[Statement]:
        return iter(self.statements)

    def __str__(self) -> str:
        if not self.statements:
            return "Nothing is left to do here."
        return "\n\n".join(
            f"-- {s.purpose}\n-- lock: {s.lock or 'none'}; blocks {s.blocks}; undo: {s.undo}\n"
            f"{s.text(self.connection)}"
            for s in self.statements
        )

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def to_frame(self) -> pandas.DataFrame:
        """One row per statement: name, purpose, lock, blocks, undo, sql."""
        heads = ("name", "purpose", "lock", "blocks", "undo", "sql")
        told = [(s.name, s.purpose, s.lock, s.blocks, s.undo, s.text(self.connection)) for s in self.statements]
        return frame(heads, told)

    def _repr_html_(self) -> str:
        if not self.statements:
            return "<p>Nothing is left to do here.</p>"
        return "".join(
            statement_html(
                n,
                s.purpose,
                [("lock", s.lock or "none"), ("blocks", s.blocks), ("undo", s.undo)],
                s.text(self.connection),
            )
            for n, s in enumerate(self.statements, 1)
        )


def carry_out(
    connection: Connection,
    params: Params,
    what: Statement,
    *,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> Done:
    """Runs one statement in a transaction of its own, waiting for its lock in short, bounded tries."""
    if what.announced:
        say(f"  {what.announced}")
    started = time.perf_counter()
    affected, tries = in_short_tries(
        connection,
        params,
        what.name,
        what.lock,
        lambda: _run(connection, params, what),
        say=say,
        sleep=sleep,
    )
    done = Done(what, affected, time.perf_counter() - started, tries)
    say(f"  {what.name}: done in {duration(done.seconds)}" + (f", {tries} tries" if tries > 1 else ""))
    return done


def _run(connection: Connection, params: Params, what: Statement) -> int:
    for name, value in table_kind.of(params).of_a_change.items():
        connection.execute("SELECT set_config(%s, %s, true)", [name, value])
    return closed.run(connection, what.query, what.values)


def in_short_tries(
    connection: Connection,
    params: Params,
    name: str,
    lock: str,
    work: Callable[[], T],
    *,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[T, int]:
    """Does the work in one transaction, again until it gets its locks; returns its result and the tries.

    A waiting DDL statement queues every later reader behind it, so each try waits at most ``locks.timeout_ms`` and
    then lets the queue pass. Raises LockNotObtained, naming who holds the table, after ``locks.tries`` tries.
    """
    wait_s = FIRST_WAIT_BETWEEN_TRIES_S
    for tries in range(1, params.locks.tries + 1):
        try:
            with connection.transaction():
                connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{params.locks.timeout_ms}ms"])
                connection.execute(GIVE_UP_WHERE_FROZEN, [f"{FROZEN_MS}ms"])
                return work(), tries
        except NOT_NOW:
            say(f"  {name}: try {tries} of {params.locks.tries} did not get its lock; {holders(connection, params)}")
            if tries < params.locks.tries:
                sleep(wait_s)
                wait_s = min(wait_s * 2, params.locks.longest_wait_between_tries_s)
    raise LockNotObtained(
        found=f"{name} did not get its lock in {params.locks.tries} tries; {holders(connection, params)}",
        needed=f"{lock}, waiting at most {params.locks.timeout_ms} ms a try",
        danger="waiting longer would queue every reader and writer of the table behind this statement",
        do="end that session, or run this phase again at a quieter time: what was done before stays done",
    )


def set_local(connection: Connection, settings: Mapping[str, str]) -> None:
    """Gives settings a value for this transaction, by the command that reaches the workers of Citus too."""
    for name, value in settings.items():
        setting = sql.Identifier(*name.split("."))
        connection.execute(sql.SQL("SET LOCAL {} = {}").format(setting, sql.Literal(value)))


@contextmanager
def rolled_back(connection: Connection) -> Iterator[None]:
    """A transaction that tries something and is rolled back, on a session that is read-only otherwise."""
    with connection.transaction(force_rollback=True):
        connection.execute("SET TRANSACTION READ WRITE")
        connection.execute(GIVE_UP_WHERE_FROZEN, [f"{FROZEN_MS}ms"])
        yield


def missing_characters(connection: Connection, text: str) -> set[str]:
    """Those characters of a text that the database's encoding does not have; none in UTF8."""
    if connection.info.parameter_status("server_encoding") in ("UTF8", "SQL_ASCII"):
        return set()
    missing = set[str]()
    for character in sorted({c for c in text if not c.isascii() and not LONE_SURROGATE.match(c)}):
        try:
            with connection.transaction():
                connection.execute("SELECT %s::text", [character])
        except psycopg.errors.UntranslatableCharacter:
            missing.add(character)
    return missing


def raise_if_lost(connection: Connection, error: psycopg.Error) -> None:
    """Raises the error again where the session has ended: that is no answer of the server's to what was tried."""
    if connection.closed:
        raise error


def holders(connection: Connection, params: Params) -> str:
    """The sessions that hold a lock on the table, those with the oldest transaction first, as one line."""
    held = connection.execute(
        """
        WITH RECURSIVE part AS (
            SELECT to_regclass(%s)::oid AS oid
            UNION ALL SELECT i.inhrelid FROM part JOIN pg_inherits i ON i.inhparent = part.oid
        )
        SELECT a.pid, a.usename, a.application_name, a.state,
               extract(epoch FROM now() - a.xact_start)::int AS seconds,
               string_agg(DISTINCT l.mode, ', ') AS modes
        FROM pg_locks l JOIN pg_stat_activity a USING (pid)
        WHERE l.granted AND l.relation IN (SELECT oid FROM part) AND a.pid <> pg_backend_pid()
        GROUP BY 1, 2, 3, 4, 5 ORDER BY seconds DESC NULLS LAST LIMIT 3
        """,
        [spelled(params, "table")],
    ).fetchall()
    return (
        "; ".join(
            f"pid {h['pid']} ({h['usename']}, {h['application_name'] or 'no application name'}, {h['state']} for"
            f" {h['seconds']} s) holds {h['modes']}"
            for h in held
        )
        or "its holder is gone by now"
    )


def rendered(plan: Iterable[Statement], connection: Connection) -> list[dict[str, str]]:
    """A plan as plain data: what, under which lock, whom it blocks, how it is undone."""
    return [
        {
            "name": s.name,
            "purpose": s.purpose,
            "lock": s.lock,
            "blocks": s.blocks,
            "undo": s.undo,
            "sql": s.text(connection),
        }
        for s in plan
    ]
