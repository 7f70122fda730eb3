"""Phase 50: staging to table in short transactions, resumable, never giving a row the vector of an older text."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from psycopg import sql

from runbook_lib import db, refresh
from runbook_lib.display import Table, number
from runbook_lib.gates import Gates, collect, gate
from runbook_lib.names import names
from runbook_lib.phase import Phase
from runbook_lib.progress import Progress
from runbook_lib.sql import load

SQL = load("backfill")


def plan(phase: Phase) -> db.Plan:
    """The UPDATE of one batch, as often as there are batches."""
    example = {"last": None, "last_of_window": None}
    update = db.statement(SQL["update"], phase.params, {"after": sql.SQL("true")}, **example)
    return db.Plan((update,), phase.connection)


def apply(phase: Phase) -> Table:
    """Moves every staged vector into the table, then drains the queue of rows that changed meanwhile.

    Rows that have their vector already are passed over, so a run that was stopped goes on where it was.
    """
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan(phase)])
    seconds = _move_staged(phase)
    phase.do(db.statement(SQL["clear_textless"], phase.params))
    drained = refresh.drain(phase)
    batches = len(seconds)
    return Table(
        ("batches", "p50 ms", "p95 ms", "changed meanwhile and embedded again"),
        [(batches, *(np.round(np.percentile(seconds or [0], [50, 95]) * 1000, 1).tolist()), drained.updated)],
    )


def _move_staged(phase: Phase) -> list[float]:
    """Window after window in key order, a commit each; returns the seconds of each batch."""
    p = phase.params
    left = db.one(phase.connection, SQL["left"], p)
    after, values = sql.SQL("true"), {"last": None, "batch_rows": p.backfill.batch_rows}
    seconds: list[float] = []
    started = time.perf_counter()
    with Progress("backfilled", total=left["missing"] + left["stale"]) as progress:
        while window := _next_window(phase, after, values):
            begun = time.perf_counter()
            update = SQL["update"].compose(names(p) | {"after": after})
            updated, _ = db.in_short_tries(
                phase.connection,
                p,
                "backfill.update",
                SQL["update"].lock,
                lambda update=update, window=window: phase.connection.execute(update, values | window).rowcount,  # type: ignore[misc]
            )
            seconds.append(time.perf_counter() - begun)
            progress.add(updated)
            values["last"] = window["last_of_window"]
            after = sql.SQL("s.key > %(last)s")
            time.sleep(p.backfill.pause_between_batches_ms / 1000)
    total = time.perf_counter() - started
    example = db.statement(SQL["update"], p, {"after": sql.SQL("s.key > …")}, last_of_window="…")
    phase.note_statement(db.Done(example, progress.done, total, 1))
    p50, p95 = np.percentile(seconds or [0.0], [50, 95]) * 1000
    phase.note(
        "backfill",
        {
            "rows": progress.done,
            "seconds": round(total, 3),
            "batches": len(seconds),
            "batch_p50_ms": round(float(p50), 2),
            "batch_p95_ms": round(float(p95), 2),
            "samples": progress.samples,
        },
    )
    return seconds


def _next_window(phase: Phase, after: sql.Composable, values: dict[str, Any]) -> dict[str, Any] | None:
    query = SQL["window"].compose(names(phase.params) | {"after": after})
    row = phase.connection.execute(query, values).fetchone()
    return {"last_of_window": row["last"]} if row and row["staged"] else None


def verify(phase: Phase) -> Gates:
    """missing = 0 and stale = 0, counted by the database over the texts as they are now."""
    p = phase.params
    left = db.one(phase.connection, SQL["left"], p)
    queued = db.one(phase.connection, SQL["queued"], p)
    table = f"{p.target.schema_}.{p.target.table}"
    waiting = f"; {number(queued['rows'])} rows are queued" if queued["rows"] else ""
    return collect(
        [
            gate(
                "backfill.nothing_is_missing",
                left["missing"] == 0,
                table,
                found=f"{number(left['missing'])} of {number(left['with_text'])} with text lack a vector{waiting}",
                needed="0",
                danger="the new search never finds these rows",
                do="run 40_load_embeddings and this phase again; both go on where they were",
                figures={"missing": left["missing"], "with_text": left["with_text"], "queued": queued["rows"]},
            ),
            gate(
                "backfill.nothing_is_stale",
                left["stale"] == 0,
                table,
                found=f"{number(left['stale'])} rows have the vector of an older text{waiting}",
                needed="0",
                danger="the new search ranks these rows by words that they no longer hold",
                do="run this phase again; it drains the queue of changed rows",
                figures={"stale": left["stale"], "queued": queued["rows"]},
            ),
        ]
    )
