"""Rows moved from a table in use into another: copied by key, kept level by a queue, swapped in one transaction.

Copying comes first and catching up after it, never both at once: a row that is copied late is then never older than
one that was caught up. A key in the queue means the row as it is when the key is taken, so taking it twice, or
after another change, does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.backfill.progress import Progress
from runbook_lib.backfill.throttle import first_pace, throttled
from runbook_lib.core import db
from runbook_lib.core.display import duration, number
from runbook_lib.core.gates import RunbookError
from runbook_lib.core.names import names
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import Block, load

SQL = load("partitioning")

# Changes of one transaction of the catch-up at most: their keys are held in memory.
MOST_KEYS = 5_000
# Changes that wait are counted up to here, for the time left.
MOST_COUNTED = 1_000_000


class TooManyChanges(Exception):
    """More changes than may be left for the moment when everybody waits; the try is given up."""


@dataclass(frozen=True)
class Move:
    """Which table the rows go to, and how SQL spells what they are made of.

    extra: the names that the blocks of partitioning.sql need besides the common ones.
    """

    params: Params
    extra: dict[str, sql.Composable]

    def run(self, connection: db.Connection, block: Block, **values: Any) -> psycopg.Cursor[db.Row]:
        """Carries out one block."""
        return connection.execute(block.compose(names(self.params) | self.extra), values)

    def row(self, connection: db.Connection, block: Block, **values: Any) -> db.Row:
        """The single row of a block."""
        row = self.run(connection, block, **values).fetchone()
        if row is None:
            raise LookupError(f"{block.name} returned no row")
        return row


@dataclass
class Swapped:
    """The moment when everybody waited: seconds from the lock to the commit, changes applied meanwhile, tries."""

    seconds: float
    drained: int
    tries: int


@contextmanager
def session(connection: db.Connection, params: Params) -> Iterator[db.Connection]:
    """A connection from which no policy hides a row."""
    with db.beside(connection, params, "move") as reader:
        reader.execute(SQL["session"].compose({}))
        yield reader


def copy(phase: Phase, move: Move, total: int) -> int:
    """Copies every row that is left, by key, each batch with its checkpoint; returns the rows that are there."""
    with session(phase.connection, phase.params) as connection, Progress("copied", total) as progress:
        state = move.row(connection, SQL["copying"])
        progress.add(int(state["rows"]))

        def batch(rows: int) -> int:
            state.update(move.row(connection, SQL["copy_batch"], rows=rows))
            return int(state["rows"]) - progress.done

        with throttled(phase, [db.server_pid(connection)]) as throttle:
            batches = throttle.paced(first_pace(phase.params), batch)
            while not state["copied"]:
                progress.add(next(batches))
                time.sleep(phase.params.backfill.pause_between_batches_ms / 1000)
    return progress.done


def queued(move: Move, connection: db.Connection, most: int) -> int:
    """Changes that wait, counted up to a bound."""
    return int(move.row(connection, SQL["queued"], most=most)["rows"])


def apply_changes(move: Move, connection: db.Connection, rows: int) -> int:
    """Takes so many of the oldest changes and makes them true in the other table, in one transaction."""
    with connection.transaction():
        taken = move.row(connection, SQL["take"], rows=rows)
        if taken["truncated"]:
            move.run(connection, SQL["empty_beside"])
        if taken["keys"]:
            move.run(connection, SQL["take_away"], keys=taken["keys"])
            move.run(connection, SQL["put_back"], keys=taken["keys"])
    return int(taken["rows"])


def catch_up(phase: Phase, move: Move, few: int | None = None) -> int:
    """Rounds until at most so many changes wait; returns the changes that were applied.

    few: half of what the swap may take, if not given. Raises RunbookError where changes come faster than that.
    """
    p = move.params.partitioning
    enough = p.most_rows_in_swap // 2 if few is None else few
    until = time.monotonic() + p.longest_catch_up_minutes * 60
    with ExitStack() as stack:
        connection = stack.enter_context(session(phase.connection, phase.params))
        if queued(move, connection, enough + 1) <= enough:
            return 0
        throttle = stack.enter_context(throttled(phase, [db.server_pid(connection)]))
        progress = stack.enter_context(Progress("caught up", queued(move, connection, MOST_COUNTED)))
        batches = throttle.paced(
            first_pace(phase.params, most=MOST_KEYS), lambda rows: apply_changes(move, connection, rows)
        )
        while queued(move, connection, enough + 1) > enough:
            rows = next(batches)
            # Those that came meanwhile are part of the work.
            progress.total = max(progress.total, progress.done + rows)
            progress.add(rows)
            if time.monotonic() > until:
                waiting = queued(move, connection, MOST_KEYS)
                raise RunbookError(
                    found=f"{number(progress.done)} changes applied, {number(waiting)} or more still wait",
                    needed=f"{number(enough)} at most, within {p.longest_catch_up_minutes:g} minutes",
                    danger="the swap would make everybody wait for all of them",
                    do="run this again at a quieter time; it resumes where it stopped",
                )
    return progress.done


def swap(phase: Phase, move: Move, statement: db.Statement) -> Swapped:
    """The last changes and the change of names in one transaction, which waits for its lock in short tries.

    Where too many changes have come before the lock was there, the try is given up and they are applied first.
    """
    params = move.params
    most = params.partitioning.most_rows_in_swap
    locked = [0.0]

    def work(connection: db.Connection) -> int:
        move.run(connection, SQL["lock"])
        locked[0] = time.perf_counter()
        waiting = queued(move, connection, most + 1)
        if waiting > most:
            raise TooManyChanges
        drained = apply_changes(move, connection, waiting) if waiting else 0
        connection.execute(statement.query, statement.values)
        return drained

    for tries in range(1, params.locks.tries + 1):
        catch_up(phase, move)
        with session(phase.connection, params) as connection:
            try:
                drained, lock_tries = db.in_short_tries(
                    connection, params, statement.name, statement.lock, lambda: work(connection)
                )
            except TooManyChanges:
                print(f"  {statement.name}: try {tries}, more than {number(most)} changes came; catching up first")
                continue
        swapped = Swapped(time.perf_counter() - locked[0], drained, tries + lock_tries - 1)
        phase.note_statement(db.Done(statement, -1, swapped.seconds, swapped.tries))
        print(f"  {statement.name}: done, {duration(swapped.seconds)} under the lock, {drained} changes in it")
        return swapped
    raise RunbookError(
        found=f"more than {number(most)} changes came before the lock, {params.locks.tries} times",
        needed=f"{number(most)} at most (partitioning.most_rows_in_swap)",
        danger="everybody would wait for all of them",
        do="run this again at a quieter time; nothing was swapped",
    )
