"""The ranges of a backfill: cut once, claimed by one worker at a time, taken over from one that is gone or silent.

A worker that wakes up after its range was taken over does no harm: each update asks for the hash of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from runbook_lib.backfill import batch_strategy
from runbook_lib.backfill.batch_strategy import StrategyChoice
from runbook_lib.core import db, table_kind
from runbook_lib.core.names import key_of, names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("windows")
BACKFILL = load("backfill")

# A range is about a second's work: what a dead worker leaves undone, and what is claimed at once.
BLOCKS_A_WINDOW = 1024
FEWEST_BLOCKS_A_WINDOW = 64
# So many ranges for each worker at least, so that none waits long for the last.
WINDOWS_A_WORKER = 8


@dataclass(frozen=True)
class BatchRange:
    """A range of heap blocks, its end left out; or of keys, its start left out. ``claims`` counts its workers."""

    id: int
    part: str
    from_block: int | None
    to_block: int | None
    after_key: Any
    to_key: Any
    claims: int


@dataclass(frozen=True)
class Round:
    """How far the round is. taken_over: ranges that more than one worker claimed."""

    windows: int
    left: int
    taken_over: int
    workers: int
    rows: int


def plan(connection: db.Connection, params: Params) -> list[db.Statement]:
    """What makes the tables that steer the work, as far as they are missing; a run may have stopped between them."""
    there = {"window": "create_windows", "control": "create_control"}
    return [
        db.statement(SQL[block], params)
        for table, block in there.items()
        if not db.relation_exists(connection, spelled(params, table))
    ]


def create(phase: Phase) -> None:
    """Makes the tables where they are missing."""
    for statement in plan(phase.connection, phase.params):
        phase.do(statement)


def state(connection: db.Connection, params: Params) -> Round:
    """Counts the windows."""
    return Round(**db.one(connection, SQL["state"], params))


def cut(connection: db.Connection, params: Params, choice: StrategyChoice) -> None:
    """Cuts the work again, in one transaction: no worker sees half of it."""
    with connection.transaction():
        connection.execute(SQL["forget"].compose(names(params)))
        if choice.strategy == "page_interleaved":
            _cut_blocks(connection, params)
        else:
            values = {"part": spelled(params, "table"), "rows": _rows_a_range(connection, params)}
            connection.execute(SQL["cut_keys"].compose(names(params)), values)


def _rows_a_range(connection: db.Connection, params: Params) -> int:
    """As many as make some ranges for each worker, between the fewest and the most of this kind of table."""
    kind = table_kind.of(params)
    if kind.fewest_rows_a_key_range == kind.rows_a_key_range:
        return kind.rows_a_key_range
    staged = int(db.one(connection, BACKFILL["staged_rows"], params)["rows"])
    share = staged // (params.backfill.workers * WINDOWS_A_WORKER)
    return min(max(share, kind.fewest_rows_a_key_range), kind.rows_a_key_range)


def _cut_blocks(connection: db.Connection, params: Params) -> None:
    found = batch_strategy.relations(connection, params)
    share = sum(r.blocks for r in found) // (params.backfill.workers * WINDOWS_A_WORKER)
    blocks = min(max(share, FEWEST_BLOCKS_A_WINDOW), BLOCKS_A_WINDOW)
    for r in found:
        connection.execute(SQL["cut_blocks"].compose(names(params)), {"part": r.part, "blocks": blocks})


def claim(connection: db.Connection, params: Params, worker: str) -> BatchRange | None:
    """Claims the next range for this worker; None where none is free."""
    lease = params.backfill.lease_s
    found = db.rows(connection, SQL["claim"], params, worker=worker, lease_s=lease)
    return BatchRange(**found[0]) if found else None


def still_ours(connection: db.Connection, params: Params, worker: str, claimed: BatchRange, rows: int) -> bool:
    """Tells the others that the worker is alive and counts its rows; False where the range was taken over."""
    return bool(db.rows(connection, SQL["seen"], params, worker=worker, id=claimed.id, rows=rows))


def close(connection: db.Connection, params: Params, worker: str, claimed: BatchRange, rows: int) -> bool:
    """Marks the range as done; False where it was taken over."""
    return bool(db.rows(connection, SQL["done"], params, worker=worker, id=claimed.id, rows=rows))


def passes(connection: db.Connection, params: Params, claimed: BatchRange) -> Iterator[Sequence[Any]]:
    """The keys of a range, a list a pass: the largest row of every block, then the next, until none is left.

    A range of keys is one pass, or one for each shard that holds some of them.
    """
    if claimed.from_block is None:
        yield from _keys_between(connection, params, claimed)
        return
    values = {"from_tid": f"({claimed.from_block},0)", "to_tid": f"({claimed.to_block},0)"}
    for row in connection.execute(batch_strategy.ranked(connection, params, claimed.part), values).fetchall():
        yield row["keys"]


def _keys_between(connection: db.Connection, params: Params, claimed: BatchRange) -> Iterator[Sequence[Any]]:
    after = sql.SQL("true") if claimed.after_key is None else key_of(params).written("s.own_key > %after_key")
    query = db.reading(BACKFILL["keys_between"], params, {"after": after})
    found = connection.execute(query, {"after_key": claimed.after_key, "to_key": claimed.to_key}).fetchall()
    yield from (row["keys"] for row in found if row["keys"])
