"""%sql and %%sql of the notebooks: ad-hoc reads on a connection of the phase's own, which the server keeps read-only.

ipython-sql 0.5.0 splits the text and binds the variables. By default it prints SQL errors instead of raising them,
drops NOTICEs, fetches whole results, silently stays on an old connection when a new one fails, and takes ``:word``
inside a string for a variable. So it gets a prepared connection, and text in which only variables look like
variables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import psycopg
from IPython.core.getipython import get_ipython
from IPython.core.magic import no_var_expand
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from runbook_lib.core import db
from runbook_lib.core.display import frame, number
from runbook_lib.core.names import spelled
from runbook_lib.params import Params

if TYPE_CHECKING:
    import pandas

# autolimit: rows fetched of a result at most; users may change it by %config.
OPTIONS = {"autolimit": 1000, "feedback": False, "autocommit": False}
IDENTITY = "SELECT current_database(), inet_server_addr(), inet_server_port(), current_user"
MOST_ERROR_LINES = 5
# What a cell cannot do: begin or end a transaction, COPY to a client, psql's own commands.
NO_READ = re.compile(r"\s*((BEGIN|START|COMMIT|END|ROLLBACK|ABORT|SAVEPOINT|RELEASE|COPY)\b|\\)", re.I)
COMMENT = r"--[^\n]*|/\*.*?\*/"
# Statements that may return many rows: they are read row by row, only as far as needed.
LONG = re.compile(rf"([\s(]|{COMMENT})*(SELECT|WITH|TABLE|VALUES)\b", re.I | re.S)
# Where a colon does not begin a variable: strings, quoted names, dollar-quoted bodies, comments, and casts.
NO_VARIABLES = re.compile(
    rf"""\b[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
    | (\$(?:[^\W\d]\w*)?\$).*?\1 | {COMMENT} | ::""",
    re.S | re.X,
)
# The current display connection; this kernel's former one is closed first.
_open: list[psycopg.Connection[Any]] = []


class ReadFailed(RuntimeError):
    """A refused %sql, in the server's words; a traceback through the driver would not help a DBA."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


def connect(params: Params, run_id: str, phases: Callable[[], db.Connection]) -> None:
    """Points %sql at the phase's server. The first use connects, and loads ipython-sql and pandas, which takes a
    second. The cells find their objects by ``current_setting('runbook.table')``, ``runbook.index`` and
    ``runbook.ledger``. Does nothing outside IPython.

    phases: gives the phase's own connection, to compare with. Cells raise ReadFailed while the display connection is
    on another database, server or role than that one.
    """
    shell = get_ipython()
    if shell is None:
        return
    let_go()

    def read(line: str, cell: str = "") -> Any:
        return _read(f"{line}\n{cell}", lambda: _connection(params, run_id, phases))

    shell.register_magic_function(no_var_expand(read), "line_cell", "sql")  # type: ignore[arg-type]


def let_go() -> None:
    """Closes the connection of %sql, if this kernel used it."""
    while _open:
        _open.pop().close()


def _connection(params: Params, run_id: str, phases: Callable[[], db.Connection]) -> psycopg.Connection[Any]:
    if _open and not _open[0].closed:
        return _open[0]
    let_go()
    wanted = tuple((phases().execute(IDENTITY).fetchone() or {}).values())
    opened = display_connection(params, run_id)
    seen = opened.execute(IDENTITY).fetchone()
    if seen != wanted:
        opened.close()
        raise ReadFailed(f"the display connection is on {seen}, the phase on {wanted}")
    opened.add_notice_handler(lambda said: print(f"{said.severity}:  {said.message_primary}"))
    _open.append(opened)
    return opened


def display_connection(params: Params, run_id: str) -> psycopg.Connection[Any]:
    """A connection whose transactions are read-only in the server, whatever a cell sets."""
    connection: psycopg.Connection[Any] = db.connect(params, f"runbook {run_id} display")
    connection.row_factory = tuple_row
    settings = {
        "runbook.table": spelled(params, "table"),
        "runbook.index": spelled(params, "qualified_index"),
        # As the catalogue has it, without quotes: cells compare it with pg_stat_user_tables.schemaname.
        "runbook.ledger": params.ledger.schema_,
        "default_transaction_read_only": "on",
    }
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", [name, value])
    # For the transactions begun here: a cell may SET the default, but not change an open transaction.
    connection.read_only = True
    return connection


def _read(cell: str, connect_: Callable[[], psycopg.Connection[Any]]) -> pandas.DataFrame | None:
    """Reads, says where and how many rows, and returns them as a DataFrame, or into a variable with ``name <<``. A
    plan is printed unless it goes into a variable.
    """
    from sql.magic import SqlMagic
    from sql.parse import parse
    from sql.run import run

    shell = get_ipython()
    assert shell is not None
    magic = next((m for m in shell.configurables if isinstance(m, SqlMagic)), None)
    if magic is None:
        magic = SqlMagic(shell)
        for name, value in OPTIONS.items():
            setattr(magic, name, value)
    parsed = parse(cell, magic)
    if parsed["connection"] or _is_empty(parsed["sql"]):
        raise ReadFailed("%sql takes only SQL: no options, and no connection other than this step's")
    _refuse_what_is_no_read(parsed["sql"])
    reading = _Reading(connect_(), magic.autolimit or None)
    result = run(reading, NO_VARIABLES.sub(_without_variables, parsed["sql"]), magic, shell.user_ns)
    if result.pretty is None:
        return None
    found = frame(result.field_names, [tuple(row) for row in result])
    print(reading.said(len(found)))
    if not parsed["result_var"]:
        if list(found.columns) != ["QUERY PLAN"] or not all(isinstance(line, str) for line in found["QUERY PLAN"]):
            return found
        # As in psql: a DataFrame would cut the lines of a plan and drop their indentation.
        print(*found["QUERY PLAN"], sep="\n")
        return None
    shell.user_ns[parsed["result_var"]] = found
    return None


def _refuse_what_is_no_read(text: str) -> None:
    if NO_READ.match(text):
        raise ReadFailed("each %sql runs in its own read-only transaction, without BEGIN, COMMIT, COPY or \\d")


def _is_empty(text: str) -> bool:
    return not re.sub(COMMENT, "", text, flags=re.S).strip(" \n\t;")


def _without_variables(literal: re.Match[str]) -> str:
    """With literal colons escaped for SQLAlchemy."""
    return literal[0].replace(":", r"\:")


@dataclass
class _Reading:
    """Stands in for ipython-sql's connection. most: rows to fetch; None for all. cut: were there more?"""

    connection: psycopg.Connection[Any]
    most: int | None
    cut: bool = False
    last: _Result | None = None
    dialect: str = ""

    @property
    def internal_connection(self) -> _Reading:
        return self

    def said(self, rows: int) -> str:
        """The line above a result."""
        info = self.connection.info
        n = f"the first {number(rows)} rows of more" if self.cut else f"{number(rows)} row{'s' * (rows != 1)}"
        way_out = "; narrow it down, or %config SqlMagic.autolimit = 0 for all" if self.cut else ""
        return f"Read only, database {info.dbname}, role {info.user}: {n}{way_out}"

    def execute(self, clause: Any, namespace: Mapping[str, Any]) -> _Result:
        """One statement, in a read-only transaction of its own. Raises ReadFailed."""
        from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

        if self.last and _is_empty(clause.text):
            # A comment behind the last statement.
            return self.last
        compiled = clause.compile(dialect=PGDialect_psycopg())  # type: ignore[no-untyped-call]
        statement, names = str(compiled), list(compiled.params)
        _refuse_what_is_no_read(statement)
        if unknown := [name for name in names if name not in namespace]:
            raise ReadFailed(f"no variable {', '.join(unknown)} in this notebook. Write a literal colon as \\:")
        try:
            with self.connection.transaction():
                self.last = self._rows(statement, {name: namespace[name] for name in names})
                return self.last
        except psycopg.Error as error:
            if self.connection.info.transaction_status != TransactionStatus.IDLE:
                self.connection.close()
            raise ReadFailed(_said(error)) from None

    def _rows(self, statement: str, values: Mapping[str, Any]) -> _Result:
        cursor = self.connection.cursor()
        if not LONG.match(statement):
            cursor.execute(statement, values)
            return _Result(_columns(cursor), cursor.fetchall() if cursor.description else [])
        # Row by row, so that a large table is neither sent nor held whole; closing the stream cancels the rest.
        stream = cursor.stream(statement, values)
        rows = list(islice(stream, self.most and self.most + 1))
        columns = _columns(cursor)
        self.cut = self.most is not None and len(rows) > self.most
        stream.close()  # type: ignore[attr-defined]
        if not rows:
            columns = self._columns_of_nothing(statement, values)
        return _Result(columns, rows[: self.most])

    def _columns_of_nothing(self, statement: str, values: Mapping[str, Any]) -> list[str]:
        """The driver does not report them if it streams no row."""
        with suppress(psycopg.Error), self.connection.transaction():
            inner = sql.SQL(statement.rstrip().rstrip(";"))
            nothing = sql.SQL("SELECT * FROM (\n{}\n) AS nothing LIMIT 0").format(inner)
            return _columns(self.connection.execute(nothing, values))
        return []


@dataclass(frozen=True)
class _Result:
    """Stands in for a result of SQLAlchemy."""

    columns: list[str]
    rows: list[tuple[Any, ...]]

    @property
    def returns_rows(self) -> bool:
        return bool(self.columns)

    def keys(self) -> list[str]:
        return self.columns

    def fetchall(self) -> list[tuple[Any, ...]]:
        return self.rows

    def fetchmany(self, size: int) -> list[tuple[Any, ...]]:
        return self.rows[:size]


def _columns(cursor: psycopg.Cursor[Any]) -> list[str]:
    return [column.name for column in cursor.description or ()]


def _said(error: psycopg.Error) -> str:
    """The server's words, the position in the statement, and what to do if the words do not say it."""
    lines = f"{error.diag.severity or 'ERROR'}:  {error}".splitlines()[:MOST_ERROR_LINES]
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        lines = [
            lines[0],
            "%sql only reads, with execute = True as well; nothing was changed.",
            "To carry out this step, set execute = True and run its cells, which record what they do.",
            "For anything else use psql; the runbook neither records nor rolls back what you change there.",
        ]
    elif isinstance(error, psycopg.OperationalError) and error.diag.sqlstate in (None, "57P01"):
        lines = [lines[0], "The session has ended. Run the cell again to open another."]
    elif isinstance(error, psycopg.DataError) and error.diag.sqlstate is None:
        lines = [lines[0], "Python has no such value. Cast the column to read it: ::text"]
    return "\n".join(lines)
