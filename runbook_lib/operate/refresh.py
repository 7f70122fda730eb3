"""Embeds again what was inserted or changed: drains the queue that the triggers fill."""

from __future__ import annotations

from datetime import datetime

from runbook_lib.backfill import change_queue, vector_store
from runbook_lib.core import db
from runbook_lib.core.display import Table, duration, number
from runbook_lib.core.gates import BadInput, Gate, Gates, LockNotObtained, Verdict, collect, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.search import word_statistics
from runbook_lib.sql import load

SQL = load("refresh")


def plan(phase: Phase) -> db.Plan:
    """The UPDATE that a drain sends for each row, where one waits; the count of the words, where that is due.

    Raises BadInput where there is no queue to drain, unless it only plans.
    """
    connection, params = phase.connection, phase.params
    there = _queue_is_there(connection, params, phase.execute)
    if there and not (state := change_queue.waiting(connection, params)).waiting + state.set_aside:
        return db.Plan(tuple(_count(connection, params)), connection)
    block = SQL[vector_store.of(params).write_row]
    values = dict.fromkeys(("key", "text_hash", "embedding", "starts", "lengths", "embeddings"))
    update = db.statement(block, params, **values)
    return db.Plan((update, *_count(connection, params)), connection)


def _count(connection: db.Connection, params: Params) -> list[db.Statement]:
    return word_statistics.due(connection, params) if word_statistics.tables_are_there(connection, params) else []


def _queue_is_there(connection: db.Connection, params: Params, execute: bool) -> bool:
    queue = spelled(params, "queue")
    there = bool(db.one(connection, SQL["queue_is_there"], params, queue=queue)["there"])
    if not there and execute:
        raise BadInput(
            [
                Gate(
                    "refresh.changes_are_captured",
                    Verdict.FAIL,
                    f"{params.target.schema_}.{params.target.table}",
                    f"no queue {queue}",
                    "the queue that the triggers on the table fill",
                    "texts that changed since the capture was removed keep the vector of their former text",
                    "if operate/retire_legacy removed the capture on purpose, take operate/refresh off the schedule;"
                    " undo/retire_legacy brings the capture back",
                )
            ]
        )
    return there


@changes
def apply(phase: Phase) -> Table:
    """Drains the queue; what was set aside by an earlier drain gets one more try."""
    if not phase.execute:
        return Table(("not carried out (execute is false)",), [(s.purpose,) for s in plan(phase)])
    began = db.one(phase.connection, SQL["clock"], phase.params)["now"]
    phase.do(db.statement(SQL["one_more_try"], phase.params, tries=phase.params.embeddings.refresh_tries))
    drained = change_queue.drain(phase)
    try:
        for count in _count(phase.connection, phase.params):
            phase.do(count)
    except LockNotObtained:
        print("  another worker is counting the words")
    phase.note("refresh", {"began": began.isoformat(), **vars(drained)})
    shown = {"changes": drained.changes, "rows embedded": drained.updated, "set aside": drained.refused}
    return Table.of([shown | {"put off, since another session holds the row": drained.put_off}])


def verify(phase: Phase) -> Gates:
    """What was queued when the drain began is done; what is not says why."""
    noted = phase.ledger.latest("refresh")
    state = change_queue.waiting(
        phase.connection, phase.params, datetime.fromisoformat(noted["began"]) if noted else None
    )
    e, queue = phase.params.embeddings, spelled(phase.params, "queue")
    return collect(
        [
            gate(
                "refresh.queue_is_drained",
                state.since_before == 0,
                queue,
                found=f"{number(state.since_before)} rows wait since before this drain, the oldest for"
                f" {duration(state.oldest_s)}: {state.why}"
                if state.since_before
                else f"nothing waits from before this drain; {number(state.waiting)} rows changed since",
                needed="0 from before this drain",
                danger="the search ranks these rows by words that they no longer hold",
                do="run this notebook again; another worker may hold their claims, or a session their rows"
                if e.has_model
                else "make vectors of these rows' texts, run 40_load_embeddings and 50_backfill, and this again",
                figures={"waiting": state.waiting, "since_before": state.since_before},
            ),
            gate(
                "refresh.no_row_is_set_aside",
                state.set_aside == 0,
                queue,
                found=f"{number(state.set_aside)} rows after {e.refresh_tries} tries each, for instance {state.error}"
                if state.set_aside
                else "none",
                needed="none",
                danger="these rows keep the vector of their older text, or none",
                do="read column error of the queue; fix text or model, and run this again: each gets one more try",
                figures={"set_aside": state.set_aside},
            ),
        ]
    )
