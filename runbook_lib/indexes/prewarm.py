"""The finished index read into the server's cache on request: the first searches need not wait for the disk."""

from __future__ import annotations

import time
from collections.abc import Iterator

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.display import Table, duration, size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes.forecast import PAGE
from runbook_lib.sql import load

SQL = load("prewarm")

# The rest stays for what the application reads meanwhile.
SHARE_OF_BUFFERS = 0.75


def gates(phase: Phase) -> Iterator[Gate]:
    """Ahead of the migration: can the index be prewarmed? Nothing where nobody asked for it."""
    if phase.params.index.prewarm:
        found = db.one(phase.connection, SQL["extension"], phase.params)
        offered = "offered by the server, not installed here" if found["offered"] else "not on the server"
        yield gate(
            "preflight.prewarm_is_possible",
            found["schema"] is not None,
            found["database"],
            found="pg_prewarm is installed" if found["schema"] else f"pg_prewarm is {offered}",
            needed="the extension pg_prewarm, since index.prewarm is true",
            danger="the first searches after the build would read the index from disk",
            do="CREATE EXTENSION pg_prewarm; the runbook does not do it by itself; or set index.prewarm: false"
            if found["offered"]
            else "install PostgreSQL's contrib modules on the server, or set index.prewarm: false",
        )


def plan(phase: Phase) -> db.Plan:
    """A read of each part of the index that stands, as far as shared_buffers hold it; empty where nobody asked."""
    if not phase.params.index.prewarm:
        return db.Plan((), phase.connection)
    schema = db.one(phase.connection, SQL["extension"], phase.params)["schema"] or "public"
    prewarm = {"prewarm": identifier(schema, "pg_prewarm")}
    return db.Plan(tuple(_read(phase, prewarm, part, last) for part, last in _parts(phase)), phase.connection)


def _read(phase: Phase, prewarm: dict[str, sql.Composable], part: str, last: int) -> db.Statement:
    return db.statement(SQL["read"], phase.params, prewarm, part=part, last=last)


def _parts(phase: Phase) -> list[tuple[str, int]]:
    """Each part of the index with the last of its blocks that is to be read."""
    index = spelled(phase.params, "qualified_index")
    left, parts = None, list[tuple[str, int]]()
    for row in db.rows(phase.connection, SQL["index"], phase.params, index=index):
        left = round(row["buffers"] * SHARE_OF_BUFFERS) if left is None else left
        blocks = min(row["blocks"], left)
        left -= blocks
        if blocks:
            parts.append((row["part"], blocks - 1))
    return parts


@changes
def apply(phase: Phase) -> Table:
    """Reads the index in; warns where shared_buffers are too small to hold it."""
    if not phase.params.index.prewarm:
        return Table(("prewarm",), [("not asked for: index.prewarm is false",)])
    if not phase.execute:
        return phase.carry_out(plan(phase))
    if db.one(phase.connection, SQL["extension"], phase.params)["schema"] is None:
        return Table(("prewarm",), [("not done: pg_prewarm is not installed; CREATE EXTENSION pg_prewarm;",)])
    found = db.rows(phase.connection, SQL["index"], phase.params, index=spelled(phase.params, "qualified_index"))
    blocks, buffers = sum(r["blocks"] for r in found), found[0]["buffers"] if found else 0
    todo, started = plan(phase), time.perf_counter()
    for statement in todo:
        phase.do(statement)
    read = sum(s.values["last"] + 1 for s in todo)
    seconds = time.perf_counter() - started
    phase.note("prewarm", {"index_bytes": blocks * PAGE, "read_bytes": read * PAGE, "seconds": round(seconds, 3)})
    warning = (
        "all of it"
        if read == blocks
        else f"the index does not fit into {SHARE_OF_BUFFERS:.0%} of shared_buffers: the rest is read from disk"
    )
    return Table(
        ("prewarm: index", "shared_buffers", "read in", "seconds", ""),
        [(size(blocks * PAGE), size(buffers * PAGE), size(read * PAGE), duration(seconds), warning)],
    )
