"""How fresh the vectors of a target are, by a look at a few of its pages: at once, however large the table is."""

from __future__ import annotations

import random
from typing import Any

import psycopg

from runbook_lib.core import db
from runbook_lib.core.names import names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL, WATCH = load("status"), load("watch")

# Pages of 8 kB that are read of a larger table than the second number, and rows of which the text is hashed.
PAGES_READ, PAGES_READ_WHOLE, ROWS_LOOKED_AT = 100, 500, 2000
# Each of the looks: on a server so busy that it takes longer, the answer is that nothing was seen.
LONGEST_LOOK = "2s"
MOST_CHANGES_COUNTED = 10_000


def look(params: Params) -> dict[str, Any]:
    """Rows missing and stale among those looked at, and changes that wait; ``why_not`` where nothing could be seen.

    rows: by the server's statistics, 0 where it has none. whole: every row was looked at.
    """
    with db.connect(params, "runbook status") as connection, db.bounded(connection, LONGEST_LOOK):
        try:
            extent = db.one(connection, SQL["extent"], params, table=spelled(params, "table"))
            captured = db.relation_exists(connection, spelled(params, "queue"))
            waiting = db.one(connection, SQL["queue"], params, most=MOST_CHANGES_COUNTED + 1) if captured else {}
            return extent | waiting | _freshness(connection, params, extent["pages"], captured)
        except psycopg.Error as error:
            db.raise_if_lost(connection, error)
            timed_out = isinstance(error, psycopg.errors.QueryCanceled)
            said = error.diag.message_primary or type(error).__name__
            return {"why_not": f"a check took longer than {LONGEST_LOOK}" if timed_out else said}


def _freshness(connection: db.Connection, params: Params, pages: int, captured: bool) -> dict[str, Any]:
    percent = 100.0 if pages <= PAGES_READ_WHOLE else 100.0 * PAGES_READ / pages
    keys = [row["key"] for row in db.rows(connection, SQL["some_keys"], params, percent=percent)]
    drawn = random.sample(keys, min(len(keys), ROWS_LOOKED_AT))
    own = names(params)
    own["looked_at"] = SQL["of_these_keys"].compose(own)
    if not captured:
        own["queue"] = WATCH["no_queue"].compose(own)
    found = connection.execute(WATCH["freshness"].compose(own), {"keys": drawn}).fetchone()
    assert found is not None
    return {**found, "whole": percent == 100.0 and len(drawn) == len(keys)}
