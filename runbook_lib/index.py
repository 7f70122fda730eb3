"""Phase 60: the vector index, built concurrently, watched while it grows, and proved by the catalogue."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg import sql

from runbook_lib import db, forecast
from runbook_lib.display import Table, duration, number, size
from runbook_lib.gates import Gate, Gates, collect, gate
from runbook_lib.names import index_name, operator_class, spelled
from runbook_lib.phase import Phase
from runbook_lib.sql import load

SQL = load("index")

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 10.0
KNOWN_ROWS = 20
# Distances are float4 sums; a row is itself if it comes out this near.
SAME_DISTANCE = 1e-4


def state(phase: Phase) -> db.Row | None:
    """The index as pg_index has it; None where there is none."""
    found = db.rows(
        phase.connection,
        SQL["state"],
        phase.params,
        index=spelled(phase.params, "qualified_index"),
        table=spelled(phase.params, "vectors"),
    )
    return found[0] if found else None


def plan(phase: Phase) -> db.Plan:
    """Nothing if the index is whole; otherwise the build, after dropping what an unfinished one left."""
    found = state(phase)
    if found and found["valid"] and found["ready"]:
        return db.Plan((), phase.connection)
    drop = (drop_statement(phase),) if found else ()
    return db.Plan((*drop, build_statement(phase)), phase.connection)


def build_statement(phase: Phase, other: Mapping[str, sql.Composable] | None = None) -> db.Statement:
    """The build by the parameters; ``other`` puts another name or other options in their place."""
    i = phase.params.index
    lists = i.lists or forecast.lists_rule(_rows(phase)) if i.method == "ivfflat" else 0
    options = {
        "m": sql.Literal(i.m),
        "ef_construction": sql.Literal(i.ef_construction),
        "lists": sql.Literal(lists),
    }
    return db.statement(SQL[f"create_{i.method}"], phase.params, options | dict(other or {}))


def _rows(phase: Phase) -> int:
    """Rows with a vector; the estimate of the table where the column is not there yet (a plan made ahead)."""
    try:
        return int(db.one(phase.connection, SQL["rows"], phase.params)["rows"])
    except psycopg.errors.UndefinedColumn:
        return 0


def drop_statement(phase: Phase) -> db.Statement:
    """DROP INDEX CONCURRENTLY of the runbook's index."""
    return db.statement(SQL["drop"], phase.params)


def in_the_way(phase: Phase) -> Table:
    """Open transactions that the build will wait for at its end, longest first."""
    return Table.of(
        db.rows(phase.connection, SQL["in_the_way"], phase.params), "transactions that the build waits for"
    )


def apply(phase: Phase) -> Table:
    """Builds what is not there, saying phase, blocks and time left; an interrupt cancels the build in the server."""
    todo = plan(phase)
    if not phase.execute:
        return phase.carry_out(todo)
    rows = []
    for statement in todo:
        built = concurrently(phase, statement)
        rows.append((statement.purpose, statement.lock, round(built.seconds, 2)))
        if statement.name != "index.drop":
            found = state(phase)
            note_built(phase, built, found["bytes"] if found else 0)
    return Table(("what", "lock", "seconds"), rows)


def note_built(phase: Phase, built: Built, size_bytes: int) -> None:
    """A ledger row of what a build took, and of what it warned of."""
    phase.note(
        "index",
        {
            "name": index_name(phase.params),
            "method": phase.params.index.method,
            "seconds": round(built.seconds, 3),
            "bytes": size_bytes,
            "notices": built.notices,
            "samples": built.samples,
        },
    )


@dataclass
class Built:
    """What a statement took: seconds, the server's notices, and samples of seconds, blocks done and blocks in all."""

    seconds: float = 0.0
    notices: list[str] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)


def concurrently(phase: Phase, statement: db.Statement) -> Built:
    """Runs a CONCURRENTLY statement on a connection of its own, with lock and statement timeouts off.

    A timeout would let a build run to its end and then fail it, leaving an invalid index that every write pays for.
    """
    i = phase.params.index
    built = Built()
    with db.connect(phase.params, f"runbook {phase.run_id} {phase.name} build") as connection:
        connection.execute(
            SQL["settings"].compose({}),
            {"memory": f"{i.maintenance_work_mem_mb}MB", "workers": str(i.parallel_workers)},
        )
        connection.add_notice_handler(lambda notice: built.notices.append(notice.message_primary or ""))
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(phase, connection.info.backend_pid, built, stop), daemon=True)
        started = time.perf_counter()
        watcher.start()
        try:
            connection.execute(statement.query, statement.values)
        finally:
            stop.set()
            watcher.join()
    built.seconds = time.perf_counter() - started
    print(f"  {statement.name}: done in {duration(built.seconds)}")
    for notice in built.notices:
        print(f"  NOTICE: {notice}")
    phase.note_statement(db.Done(statement, -1, built.seconds, 1))
    return built


def _watch(phase: Phase, pid: int, built: Built, stop: threading.Event) -> None:
    """Samples the build's progress from a session of its own until told to stop."""
    started = last_line = time.perf_counter()
    with db.connect(phase.params, f"runbook {phase.run_id} {phase.name} watch") as connection:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            row = connection.execute(SQL["progress"].compose({}), {"pid": pid}).fetchone()
            if row is None:
                continue
            now = time.perf_counter()
            built.samples.append([round(now - started, 2), row["blocks_done"], row["blocks_total"]])
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                done, total = row["blocks_done"], row["blocks_total"]
                left = f", about {duration((now - started) * (total - done) / done)} left" if done else ""
                print(f"  {row['phase']}: {number(done)} of {number(total)} blocks{left}")


def verify(phase: Phase) -> Gates:
    """Valid and ready by pg_index, the right operator class and column, built in memory, and it finds known rows."""
    found = state(phase)
    gates = [_is_valid(phase, found)]
    if found and found["valid"]:
        gates += [_has_right_class(phase, found), _was_built_in_memory(phase), _finds_known_rows(phase)]
    return collect(gates)


def _subject(phase: Phase) -> str:
    return f"{index_name(phase.params)} on {phase.params.target.schema_}.{phase.params.target.table}"


def _is_valid(phase: Phase, found: db.Row | None) -> Gate:
    whole = found is not None and found["valid"] and found["ready"]
    left_over = "an earlier concurrent build did not finish"
    return gate(
        "index.is_valid",
        whole,
        _subject(phase),
        found="no such index"
        if found is None
        else f"valid, {size(found['bytes'])}"
        if whole
        else f"invalid ({left_over})",
        needed="valid",
        danger="no query can use it, yet every write still pays for it"
        if found
        else "every search reads the whole table",
        do="run 60_build_index again with execute: true; it drops this index concurrently and builds anew"
        if found
        else "run 60_build_index with execute: true",
        figures={"bytes": found["bytes"]} if found else {},
    )


def _has_right_class(phase: Phase, found: db.Row) -> Gate:
    p = phase.params
    is_ours = (found["method"], found["operator_class"], found["column_name"], found["on_target"])
    return gate(
        "index.has_the_right_operator_class",
        is_ours == (p.index.method, operator_class(p), p.vector.column, True),
        _subject(phase),
        found=f"{found['method']} with {found['operator_class']} on {found['column_name']}",
        needed=f"{p.index.method} with {operator_class(p)} on {p.vector.column}",
        danger="queries with the distance that was asked for cannot use it",
        do="drop the index of this name, or name another column, and run 60_build_index again",
    )


def _was_built_in_memory(phase: Phase) -> Gate:
    built = phase.ledger.latest("index") or {"notices": []}
    warned = [n for n in built["notices"] if "no longer fits" in n or "little data" in n]
    return gate(
        "index.was_built_without_warning",
        not warned,
        _subject(phase),
        found="; ".join(warned) or "no NOTICE about memory or too little data",
        needed="none",
        danger="past maintenance_work_mem a build slows down tenfold; lists made of too little data lose recall",
        do="raise index.maintenance_work_mem_mb to the forecast (or load more rows first), drop the index with"
        " undo/20_remove_index, and build again",
        figures={"warnings": len(warned)},
    )


def _finds_known_rows(phase: Phase) -> Gate:
    """Asks the index for rows that are known to be there: each one's nearest row must be as near as itself."""
    register_vector(phase.connection)
    known = db.rows(phase.connection, SQL["known_row"], phase.params, n=KNOWN_ROWS)
    lost: list[Any] = []
    with phase.connection.transaction():
        phase.connection.execute("SET LOCAL enable_seqscan = off")
        for row in known:
            own = db.one(phase.connection, SQL["own_distance"], phase.params, embedding=row["embedding"])
            near = db.rows(phase.connection, SQL["nearest"], phase.params, embedding=row["embedding"])
            if not near or near[0]["distance"] > own["distance"] + SAME_DISTANCE:
                lost.append(row["key"])
    return gate(
        "index.finds_known_rows",
        bool(known) and not lost,
        _subject(phase),
        found=f"{len(known) - len(lost)} of {len(known)} rows found by their own vector"
        + (f"; not {lost[:3]}" if lost else ""),
        needed=f"all of them, {min(KNOWN_ROWS, len(known)) or 1} at least",
        danger="rows that are in the table are not in the index",
        do="drop the index with undo/20_remove_index and build it again",
        figures={"asked": len(known), "lost": len(lost)},
    )


def undo_plan(phase: Phase) -> db.Plan:
    """DROP INDEX CONCURRENTLY, if the index is there."""
    return db.Plan((drop_statement(phase),) if state(phase) else (), phase.connection)


def undo(phase: Phase) -> Table:
    """Drops the index without blocking reads or writes; does nothing where it is not there."""
    if not phase.execute:
        return phase.carry_out(undo_plan(phase))
    return Table(
        ("what", "seconds"), [(s.purpose, round(concurrently(phase, s).seconds, 2)) for s in undo_plan(phase)]
    )


def verify_undone(phase: Phase) -> Gates:
    """No index of that name is left, valid or not."""
    found = state(phase)
    return collect(
        [
            gate(
                "index.is_gone",
                found is None,
                _subject(phase),
                found="no such index" if found is None else "still there" + ("" if found["valid"] else ", invalid"),
                needed="no such index",
                danger="every write still pays for it",
                do="run undo/20_remove_index again; a drop that timed out leaves an invalid index",
            )
        ]
    )
