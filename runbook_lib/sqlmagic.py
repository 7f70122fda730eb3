"""ipython-sql for the notebooks' %%sql cells: read only, on a connection that the library made and has looked at.

Left to itself ipython-sql 0.5.0 prints SQL errors instead of raising them, stays silently on an old connection when
a new one fails, and finds connections by a part of their URL. So it is handed one connection, and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg
from IPython.core.getipython import get_ipython
from psycopg.rows import tuple_row

from runbook_lib import db
from runbook_lib.names import spelled

if TYPE_CHECKING:
    from runbook_lib.phase import Phase

OPTIONS = {"short_errors": False, "feedback": False, "displaycon": False, "autopandas": False, "displaylimit": 50}
IDENTITY = "SELECT current_database(), inet_server_addr(), inet_server_port(), current_user"


def connect(phase: Phase) -> None:
    """Points %sql at the phase's server. The cells find their objects by ``current_setting('runbook.table')``,
    ``runbook.index`` and ``runbook.ledger``. Does nothing outside IPython.

    Raises RuntimeError if the display connection is not on the same database, server and role as the phase.
    """
    shell = get_ipython()
    if shell is None:
        return
    from sql.connection import Connection

    shell.run_line_magic("load_ext", "sql")
    for name, value in OPTIONS.items():
        shell.run_line_magic("config", f"SqlMagic.{name} = {value}")
    for old in list(Connection.connections.values()):
        old.internal_connection.close()
    Connection.connections.clear()
    display = Connection("postgresql+psycopg://", creator=lambda: _display_connection(phase))
    seen = tuple(display.internal_connection.exec_driver_sql(IDENTITY).one())
    wanted = tuple((phase.connection.execute(IDENTITY).fetchone() or {}).values())
    if seen != wanted:
        raise RuntimeError(f"the display connection is on {seen}, the phase on {wanted}")


def _display_connection(phase: Phase) -> psycopg.Connection[Any]:
    """A read-only connection, in the row format that SQLAlchemy expects.

    Autocommit: a cell that fails leaves no broken transaction to the next one, and SQLAlchemy has nothing to roll
    back on a session that the server has ended, which it would print a traceback about as the kernel leaves.
    """
    connection: psycopg.Connection[Any] = db.connect(phase.params, f"runbook {phase.run_id} display")
    connection.row_factory = tuple_row
    settings = {
        "runbook.table": spelled(phase.params, "table"),
        "runbook.index": spelled(phase.params, "qualified_index"),
        # As the catalogue has it, without quotes: cells compare it with pg_stat_user_tables.schemaname.
        "runbook.ledger": phase.params.ledger.schema_,
        "default_transaction_read_only": "on",
    }
    for name, value in settings.items():
        connection.execute("SELECT set_config(%s, %s, false)", [name, value])
    return connection
