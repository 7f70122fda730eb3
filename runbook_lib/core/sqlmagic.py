"""ipython-sql for the notebooks' %%sql cells: read only, on a connection that the library made and has looked at.

Left to itself ipython-sql 0.5.0 prints SQL errors instead of raising them, stays silently on an old connection when
a new one fails, and finds connections by a part of their URL. So it is handed one connection, and no other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
from IPython.core.getipython import get_ipython
from psycopg.rows import tuple_row

from runbook_lib.core import db
from runbook_lib.core.names import spelled
from runbook_lib.params import Params

OPTIONS = {"short_errors": False, "feedback": False, "displaycon": False, "autopandas": False, "displaylimit": 50}
IDENTITY = "SELECT current_database(), inet_server_addr(), inet_server_port(), current_user"


def connect(params: Params, run_id: str, phases: Callable[[], db.Connection]) -> None:
    """Points %sql at the phase's server, from its first use on: it brings pandas, which takes a second to import. The
    cells find their objects by ``current_setting('runbook.table')``, ``runbook.index`` and ``runbook.ledger``. Does
    nothing outside IPython.

    phases: gives the phase's own connection, to compare with. Cells raise RuntimeError for as long as the display
    connection is not on the same database, server and role as that one.
    """
    shell = get_ipython()
    if shell is None:
        return
    let_go()
    shell.register_magic_function(partial(_first, params, run_id, phases), "line_cell", "sql")  # type: ignore[arg-type]


def let_go() -> None:
    """Ends the connections of %sql, where it was used in this kernel."""
    used = sys.modules.get("sql.connection")
    for old in list(used.Connection.connections.values()) if used else ():
        old.internal_connection.close()
        # Closed, it is back in the engine's pool, and its session still open.
        old.internal_connection.engine.dispose()
    if used:
        used.Connection.connections.clear()


def _first(
    params: Params, run_id: str, phases: Callable[[], db.Connection], line: str, cell: str | None = None
) -> Any:
    """The first %sql or %%sql of a phase: loads ipython-sql, which takes this one's place, and hands it on."""
    from sql.connection import Connection
    from sql.magic import SqlMagic

    shell = get_ipython()
    assert shell is not None
    display = Connection("postgresql+psycopg://", creator=lambda: display_connection(params, run_id))
    seen = tuple(display.internal_connection.exec_driver_sql(IDENTITY).one())
    wanted = tuple((phases().execute(IDENTITY).fetchone() or {}).values())
    if seen != wanted:
        # This one keeps its place, so that the next cell is refused as well.
        let_go()
        raise RuntimeError(f"the display connection is on {seen}, the phase on {wanted}")
    # The same in every phase of this kernel: %config reaches the one that was made first.
    magic = next((m for m in shell.configurables if isinstance(m, SqlMagic)), None) or SqlMagic(shell)
    for name, value in OPTIONS.items():
        setattr(magic, name, value)
    shell.register_magics(magic)
    return magic.execute(line, cell or "")


def display_connection(params: Params, run_id: str) -> psycopg.Connection[Any]:
    """A read-only connection, in the row format that SQLAlchemy expects.

    Autocommit: a cell that fails leaves no broken transaction to the next one, and SQLAlchemy has nothing to roll
    back on a session that the server has ended, which it would print a traceback about as the kernel leaves.
    """
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
    return connection
