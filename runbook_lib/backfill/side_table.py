"""Vectors in a table of their own beside the table: made, filled by giving the staging table its name, taken away."""

from __future__ import annotations

import time

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import identifier, names, side_table_name, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("sidetable")
SCHEMA = load("schema")

AFTER_PROMOTION = ("delete_orphans", "delete_stale", "validate", "analyze")


def _extra(phase: Phase) -> dict[str, sql.Composable]:
    p = phase.params
    name = side_table_name(p)
    return {
        "foreign_key": _foreign_key(p),
        "vectors_name": identifier(name),
        "moved": identifier(p.target.schema_, f"{p.target.name}_staging"),
        "grants": _grants(phase),
    }


def _foreign_key(params: Params) -> sql.Composable:
    return identifier(f"runbook_{params.target.name}_vector_of_row")


def _grants(phase: Phase) -> sql.Composable:
    """Whoever may read the table may read its vectors: the search function runs with the caller's rights."""
    found = db.rows(phase.connection, SQL["readers"], phase.params, table=spelled(phase.params, "table"))
    grant = sql.SQL("GRANT SELECT ON {} TO {}")
    everybody = sql.SQL("PUBLIC")
    vectors = names(phase.params)["vectors"]
    return sql.SQL("; ").join(
        grant.format(vectors, everybody if r["role"] is None else identifier(r["role"])) for r in found
    )


def statement(phase: Phase, name: str) -> db.Statement:
    """One of the blocks without values."""
    return db.statement(SQL[name], phase.params, _extra(phase))


def _promotion(phase: Phase) -> db.Statement:
    create_staging = SCHEMA["create_staging"].compose(names(phase.params))
    extra = {"renames": _renames(phase), "create_staging": create_staging}
    return db.statement(SQL["promote"], phase.params, _extra(phase) | extra)


def _renames(phase: Phase) -> sql.Composable:
    """The staging table's columns and primary key take the names that they have in the table beside."""
    p = phase.params
    column, staging = p.vector.column, names(p)["staging"]
    pairs = {
        "key": p.target.key,
        "text_hash": f"{column}_hash",
        "embedding": column,
        "staged_at": f"{column}_updated_at",
    }
    rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
    parts = [rename.format(staging, identifier(a), identifier(b)) for a, b in pairs.items() if a != b]
    key = db.rows(phase.connection, SQL["primary_key"], p, staging=spelled(p, "staging"))
    new = identifier(f"runbook_{p.target.name}_vector_key")
    parts += [
        sql.SQL("ALTER TABLE {} RENAME CONSTRAINT {} TO {}").format(staging, identifier(row["name"]), new)
        for row in key
    ]
    return sql.SQL("; ").join(parts)


def plan(phase: Phase) -> list[db.Statement]:
    """The promotion while the table beside is empty; after it, one upsert a batch. What was begun is finished."""
    if not phase.execute:
        return [_promotion(phase), *(statement(phase, name) for name in AFTER_PROMOTION)]
    there = db.one(phase.connection, SQL["sizes"], phase.params)
    if there["empty"] and there["staged"]:
        return [_promotion(phase), *(statement(phase, name) for name in AFTER_PROMOTION)]
    if not _is_validated(phase):
        return [statement(phase, name) for name in AFTER_PROMOTION]
    return [upsert(phase)] if there["staged"] else []


def _is_validated(phase: Phase) -> bool:
    p = phase.params
    relations = {name: spelled(p, name) for name in ("vectors", "table")}
    found = db.rows(phase.connection, SQL["is_validated"], p, **relations)
    return bool(found) and all(row["validated"] for row in found)


def upsert(phase: Phase, keys: list[object] | None = None) -> db.Statement:
    """The INSERT … ON CONFLICT of one batch."""
    return db.statement(SQL["upsert"], phase.params, keys=keys)


def promote(phase: Phase) -> tuple[int, float]:
    """Carries out what is left of the promotion; returns the rows that took their place by it, and the seconds."""
    started, rows = time.perf_counter(), 0
    for s in plan(phase):
        if s.name == "sidetable.upsert":
            continue
        if s.name == "sidetable.promote":
            rows = db.one(phase.connection, SQL["staged_rows"], phase.params)["rows"]
        phase.do(s)
    return rows, time.perf_counter() - started
