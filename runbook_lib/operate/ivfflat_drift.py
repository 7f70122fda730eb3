"""Have the lists of an IVFFlat index aged? They are made once, of the rows that are there when it is built.

Rows that come later are put into the list whose centre is nearest, however far that is. What is new then lies
scattered over lists that were made for something else, and few probes miss it; or it fills one list, and every probe
of that reads much of the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from psycopg import sql

from runbook_lib.benchmark import index_recall, query_set, replica
from runbook_lib.benchmark.prepared import vector_indexes
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import as_indexed, names, spelled
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import apart, at_least, at_most, plain, score
from runbook_lib.indexes import partitions
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL, WATCH = load("drift"), load("watch")

# Fewer rows than these say nothing of their kind.
FEWEST_ROWS = 10
# Rows whose list is measured.
LISTS_LOOKED_AT = 20
# lists where the index was built without them.
DEFAULT_LISTS = 100
REBUILD = "run operate/rebuild_index, which makes the lists of the rows of today; then 70_tune"


def gates(connection: db.Connection, ledger: Ledger, params: Params) -> Iterator[Gate]:
    """The gates of the lists' age; none for another method, or where the ledger knows of no build.

    How new rows are found is judged from FEWEST_ROWS of them on.
    """
    if params.index.method != "ivfflat" or not ledger.exists():
        return
    built = next(iter(db.rows(ledger.connection, SQL["built"], params)), None)
    if built is None:
        return
    with replica.connect(connection, params, "drift") as reader:
        register_vector(reader)
        sides = _look(connection, params, reader, "sides", built)[0]
        newer, older = (
            _look(connection, params, reader, "some_rows", built, newer=n, n=params.watch.queries)
            for n in (True, False)
        )
        held = _rows_held(connection, params, reader, [*newer, *older])
    enough = len(newer) >= FEWEST_ROWS
    if enough:
        yield _new_rows_are_found(connection, params, built, sides, newer, older)
    if held:
        not_judged = "" if enough else f"; {_newer(sides)}, too few to judge how they are found"
        yield _lists_are_even(connection, params, held, not_judged)


def _look(
    primary: db.Connection, params: Params, connection: db.Connection, block: str, built: db.Row, **values: Any
) -> list[db.Row]:
    """Rows of a block; on a large table of a sample of its pages."""
    there = row_counts.of(primary, params).n
    whole = there <= params.watch.count_up_to_rows
    looked_at = sql.SQL("true") if whole else WATCH["sampled"].compose(names(params))
    percent = 100.0 * params.watch.count_up_to_rows / max(there, 1)
    query = SQL[block].compose(names(params) | {"looked_at": looked_at})
    return connection.execute(query, {**values, "began_at": built["began_at"], "percent": percent}).fetchall()


def _recall(connection: db.Connection, params: Params, rows: Sequence[db.Row]) -> float:
    """Recall on these rows as queries."""
    return index_recall.as_the_application(connection, params, query_set.of_rows(rows, counted=True))


def _newer(sides: db.Row) -> str:
    return f"{number(sides['newer'])} of {number(sides['rows'])} rows are newer than the index"


def _new_rows_are_found(
    connection: db.Connection,
    params: Params,
    built: db.Row,
    sides: db.Row,
    newer: Sequence[db.Row],
    older: Sequence[db.Row],
) -> Gate:
    """Where old rows are missed as often as new ones, age is not the cause; watch.recall_holds says so."""
    grown = sides["rows"] / built["rows"] if built["rows"] else None
    new = _recall(connection, params, newer)
    old = _recall(connection, params, older) if len(older) >= FEWEST_ROWS else None
    shown, least = apart(new, params.lowest_recall, score)
    size = "" if grown is None else f", and the table holds {grown:.1f} × the rows of which its lists were made"
    beside = "" if old is None else f", {apart(old, new, score)[0]} on {len(older)} older ones"
    return gate(
        "drift.new_rows_are_found",
        at_least(new, params.lowest_recall) or (old is not None and at_least(new, old)),
        f"{spelled(params, 'index')} on {params.target.schema_}.{params.target.table}",
        found=f"recall@{params.queries.k} {shown} on {len(newer)} of them{beside}; {_newer(sides)}{size}",
        needed=f"{least} on rows newer than the index, or no less than on older ones",
        danger="the lists were made of other rows than these: searches for what is new miss it, the more so the more"
        " of it comes",
        do=REBUILD,
        figures={"newer": new, "older": old, "rows_newer": sides["newer"], "rows": sides["rows"], "growth": grown},
    )


def _rows_held(
    primary: db.Connection, params: Params, connection: db.Connection, rows: Sequence[db.Row]
) -> list[int]:
    """Rows in the list of each of some rows; none for a partitioned index, each part of which has its own lists."""
    if len(partitions.tree(primary, params, spelled(params, "vectors"))) > 1:
        return []
    chosen = [rows[i * len(rows) // LISTS_LOOKED_AT] for i in range(LISTS_LOOKED_AT)] if rows else []
    most = row_counts.of(primary, params, "vectors").n
    n = names(params)
    asked = sql.SQL("%(embedding)s::{}").format(n["vector_type"])
    query = SQL["rows_of_the_list"].compose(n | {"query_indexed": as_indexed(params, asked)})
    with connection.transaction():
        connection.execute(SQL["one_list"].compose({}))
        values = {"most": max(most, 1)}
        found = [
            connection.execute(query, values | {"embedding": row["embedding"]}, prepare=False).fetchone()
            for row in chosen
        ]
    return [row["rows"] for row in found if row]


def _lists_are_even(connection: db.Connection, params: Params, held: Sequence[int], not_judged: str) -> Gate:
    """By the list that a row lies in: one that holds half the table is met by half of the rows."""
    there = row_counts.of(connection, params, "vectors").n
    lists = next((row["lists"] for row in vector_indexes(connection, params) if row["lists"]), None) or DEFAULT_LISTS
    even = max(there / lists, 1.0)
    mean = float(np.mean(held))
    limit = params.watch.list_unevenness
    times, most = apart(mean / even, limit, plain)
    return gate(
        "drift.lists_are_even",
        at_most(mean / even, limit),
        f"{spelled(params, 'index')} on {params.target.schema_}.{params.target.table}",
        found=f"a row's list holds {number(round(mean))} rows on average, {times} × an even one" + not_judged,
        needed=f"at most {most} × (watch.list_unevenness)",
        danger="a probe of a crowded list reads much of the table, and the others find little",
        do=REBUILD,
        figures={"rows_of_a_list": round(mean, 1), "even": round(even, 1), "lists": lists},
    )
