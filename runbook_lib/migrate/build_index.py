"""Phase 60: the vector index, built concurrently, watched while it grows, and proved by the catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.core import db, row_counts
from runbook_lib.core.display import Table, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import as_indexed, identifier, index_name, names, operator_class, spelled, unquoted
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.session import register_vector
from runbook_lib.indexes import forecast, partition_indexes
from runbook_lib.indexes.building import Built
from runbook_lib.indexes.building import concurrently as concurrently
from runbook_lib.sql import load

SQL = load("index")

KNOWN_ROWS = 20
FEWEST_KNOWN_ROWS_A_PARTITION = 2
# Rows looked at for each one that is asked for: pages without a vector are passed over.
SAMPLED_FOR_ONE = 100
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
    if partition_indexes.is_needed(phase):
        return partition_indexes.plan(phase)
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


@changes
def apply(phase: Phase) -> Table:
    """Builds what is not there, saying phase, blocks and time left; an interrupt cancels the build in the server."""
    if partition_indexes.is_needed(phase):
        return partition_indexes.apply(phase)
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
            # What the age of its lists is told by.
            **({"rows": _rows(phase)} if phase.params.index.method == "ivfflat" else {}),
        },
    )


def verify(phase: Phase) -> Gates:
    """Valid and ready by pg_index, the right operator class and column, built in memory, and it finds known rows."""
    if partition_indexes.is_needed(phase):
        return _verify_partitions(phase)
    found = state(phase)
    gates = [_is_valid(phase, found)]
    if found and found["valid"]:
        gates += [_has_right_class(phase, found), _was_built_in_memory(phase), _finds_known_rows(phase)]
    return collect(gates)


def _verify_partitions(phase: Phase) -> Gates:
    now = partition_indexes.standing(phase)
    gates = [partition_indexes.is_valid(phase, now)]
    if now.is_whole:
        gates += [partition_indexes.has_right_class(phase, now), _was_built_in_memory(phase)]
        gates.append(_finds_known_rows(phase, [identifier(part.schema, part.name) for part in now.leaves]))
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
    indexed, wanted = unquoted(p, found["indexed"]), unquoted(p, spelled(p, "indexed"))
    is_ours = (found["method"], found["operator_class"], indexed, found["on_target"])
    return gate(
        "index.has_the_right_operator_class",
        is_ours == (p.index.method, operator_class(p), wanted, True),
        _subject(phase),
        found=f"{found['method']} with {found['operator_class']} on {indexed}",
        needed=f"{p.index.method} with {operator_class(p)} on {wanted}",
        danger="queries with the distance that was asked for cannot use it",
        do="drop the index of this name, or name another column, and run 60_build_index again"
        if indexed == wanted
        else "put index.storage back, or go over to another one with operate/rebuild_index",
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
        " undo/index, and build again",
        figures={"warnings": len(warned)},
    )


def _finds_known_rows(phase: Phase, relations: Sequence[sql.Composable] = ()) -> Gate:
    """Asks the index for rows that are known to be there: each one's nearest row must be as near as itself.

    relations: partitions that are asked one by one, each through its own index.
    """
    register_vector(phase.connection)
    n = names(phase.params)
    value = sql.SQL("%(embedding)s::{}").format(n["vector_type"])
    n |= {"query_indexed": as_indexed(phase.params, value)}
    known: list[db.Row] = []
    lost: list[Any] = []
    rows_each = max(FEWEST_KNOWN_ROWS_A_PARTITION, KNOWN_ROWS // max(len(relations), 1))
    for relation in relations or [n["vectors"]]:
        here = n | {"vectors": relation}
        rows = _known_rows(phase, here, rows_each)
        known += rows
        with phase.connection.transaction():
            phase.connection.execute("SET LOCAL enable_seqscan = off")
            lost += [row["key"] for row in rows if not _is_found(phase, here, row)]
    return gate(
        "index.finds_known_rows",
        bool(known) and not lost,
        _subject(phase),
        found=f"{len(known) - len(lost)} of {len(known)} rows found by their own vector"
        + (f"; not {lost[:3]}" if lost else ""),
        needed=f"all of them, {min(KNOWN_ROWS, len(known)) or 1} at least",
        danger="rows that are in the table are not in the index",
        do="drop the index with undo/index and build it again",
        figures={"asked": len(known), "lost": len(lost)},
    )


def _known_rows(phase: Phase, n: Mapping[str, sql.Composable], most: int) -> list[db.Row]:
    """So many rows of a sample of pages; of all pages where the relation is small, or the sample holds too few."""
    relation = n["vectors"].as_string(phase.connection).replace("%%", "%")
    believed = row_counts.estimated(phase.connection, phase.params, relation)
    percent = 100 * SAMPLED_FOR_ONE * most / believed if believed else 100
    samples = (
        [sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(sql.Literal(percent))] if percent < 100 else []
    )
    rows: list[db.Row] = []
    for sampled in (*samples, sql.SQL("")):
        query = SQL["known_row"].compose({**n, "sampled": sampled})
        rows = phase.connection.execute(query, {"n": most}).fetchall()
        if len(rows) == most:
            break
    return rows


def _is_found(phase: Phase, n: Mapping[str, sql.Composable], row: db.Row) -> bool:
    """Is the nearest row, through the index, as near as the row itself?"""
    asked = {"embedding": row["embedding"]}
    own, near = (
        phase.connection.execute(SQL[block].compose(n), asked).fetchone() for block in ("own_distance", "nearest")
    )
    return own is not None and near is not None and near["distance"] <= own["distance"] + SAME_DISTANCE


def undo_plan(phase: Phase) -> db.Plan:
    """DROP INDEX CONCURRENTLY, if the index is there; the index of a partitioned table by a short lock."""
    if partition_indexes.is_needed(phase):
        return partition_indexes.undo_plan(phase)
    return db.Plan((drop_statement(phase),) if state(phase) else (), phase.connection)


@changes
def undo(phase: Phase) -> Table:
    """Drops the index without blocking reads or writes; does nothing where it is not there."""
    if partition_indexes.is_needed(phase):
        return partition_indexes.undo(phase)
    if not phase.execute:
        return phase.carry_out(undo_plan(phase))
    return Table(
        ("what", "seconds"), [(s.purpose, round(concurrently(phase, s).seconds, 2)) for s in undo_plan(phase)]
    )


def verify_undone(phase: Phase) -> Gates:
    """No index of that name is left, valid or not."""
    if partition_indexes.is_needed(phase):
        return collect([partition_indexes.is_gone(phase, partition_indexes.standing(phase))])
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
                do="run undo/index again; a drop that timed out leaves an invalid index",
            )
        ]
    )
