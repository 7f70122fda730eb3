"""How many rows the target has. One place for it, so that every message means the same rows.

The rows that count are those with text (``{has_text}`` in :mod:`runbook_lib.core.names`): they get a vector, and
of them none may be missing. Sizes, forecasts and samples of pages go by all rows, with text or without, as estimated
here.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("row_counts")

# Below so many times the rows that are wanted, a sample of pages could come back empty.
SAMPLE_PAGES_FROM = 20


@dataclass(frozen=True)
class Rows:
    """All rows of a table. counted: one by one, since it was never analyzed; else as the last ANALYZE estimated, but
    for partitions that were never analyzed, or were emptied, whose rows are counted.
    """

    n: int
    counted: bool


def estimated(connection: db.Connection, params: Params, relation: str) -> int:
    """Rows of a relation by the planner's estimate, as ``regclass`` spells it; 0 where nothing was estimated yet."""
    return int(db.one(connection, SQL["estimated"], params, relation=relation)["rows"])


def of(connection: db.Connection, params: Params, which: str = "table") -> Rows:
    """All rows of the ``table``, or of the ``vectors`` where they have one of their own; 0 where it is not there."""
    found = db.one(connection, SQL["estimated"], params, relation=spelled(params, which))
    if not found["there"]:
        return Rows(0, counted=False)
    if not found["analyzed"]:
        return Rows(_counted(connection, names(params)[which]), counted=True)
    others = sum(_counted(connection, verbatim(part)) for part in found["not_estimated"])
    return Rows(int(found["rows"]) + others, counted=False)


def _counted(connection: db.Connection, relation: sql.Composable) -> int:
    row = connection.execute(SQL["counted"].compose({"relation": relation}), {}).fetchone()
    return int(row["rows"]) if row else 0


def some_pages(n: int, wanted: int) -> sql.Composable:
    """TABLESAMPLE for about so many of n rows, to be cut by LIMIT; empty for a table that is as cheap to read from
    its beginning."""
    if n < SAMPLE_PAGES_FROM * wanted:
        return sql.SQL("")
    # Twice the share that is wanted, since pages are not equally full.
    return sql.SQL("TABLESAMPLE SYSTEM ({})").format(sql.Literal(min(100.0, 200.0 * wanted / n)))
