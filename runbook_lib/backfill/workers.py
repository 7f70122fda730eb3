"""The workers of a backfill: claim a range, update it batch by batch, rest while the server's health asks for it.

Workers are threads with a connection each; the server does the work. The thread that started them looks at the
server's health, counts, and writes the ledger.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from runbook_lib.backfill import batch_ranges, refused_rows, untouched, vector_store
from runbook_lib.backfill import throttle as throttle_module
from runbook_lib.backfill.batch_ranges import BatchRange
from runbook_lib.backfill.batch_strategy import LEAST_HOT_SHARE, StrategyChoice
from runbook_lib.backfill.progress import Progress
from runbook_lib.backfill.throttle import Pace, Throttle, first_pace, throttled
from runbook_lib.core import db, table_kind
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("backfill")
WINDOWS = load("windows")

SECONDS_BETWEEN_CLAIMS = 0.2
# After so many updates in ranges that are done it is judged whether enough of them stay on their page. Within a
# range the first pass, of rows that leave, would tell too little.
UPDATES_OF_THE_PROBE = 2000
# A worker says that it is alive so often within its lease.
SIGNS_A_LEASE = 4


@dataclass(frozen=True)
class Batch:
    """One transaction: rows updated, of them HOT; rows put off to the end because somebody held one of them.

    at: when it ended, by ``time.perf_counter``.
    """

    rows: int
    hot: int
    seconds: float
    put_off: int = 0
    at: float = field(default_factory=time.perf_counter)


@dataclass
class Board:
    """What the workers and the thread that watches them tell each other."""

    stop: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event = field(default_factory=threading.Event)
    batches: queue.SimpleQueue[Batch] = field(default_factory=queue.SimpleQueue)
    ranges: queue.SimpleQueue[list[Batch]] = field(default_factory=queue.SimpleQueue)
    whole_ranges: bool = False
    most_batch_rows: int | None = None
    rest_ms: int = 0
    refused: dict[Any, str] = field(default_factory=dict)
    seen: untouched.Compared = field(default_factory=untouched.Compared)


@dataclass
class BackfillOutcome:
    """What the workers of this run did. pauses: [reason, seconds]; refused: the server's words, by key; seen: of
    rows that were compared; counts_hot: do the workers count hot, or is it asked for at the end?"""

    rows: int = 0
    hot: int = 0
    put_off: int = 0
    seconds: list[float] = field(default_factory=list)
    pauses: list[tuple[str, float]] = field(default_factory=list)
    samples: list[list[float]] = field(default_factory=list)
    judged_rows: int = 0
    judged_hot: int = 0
    remark: str = ""
    refused: dict[Any, str] = field(default_factory=dict)
    seen: untouched.Compared = field(default_factory=untouched.Compared)
    counts_hot: bool = True

    @property
    def hot_share(self) -> float:
        return self.hot / self.rows if self.rows else 0.0


def run(phase: Phase, choice: StrategyChoice, total: int) -> BackfillOutcome:
    """Works until no range is left, here or elsewhere. total: rows to be done, for the time left.

    Raises what stopped a worker, and PausedTooLong; a rerun resumes from there.
    """
    board, outcome = Board(rest_ms=phase.params.backfill.pause_between_batches_ms), BackfillOutcome()
    outcome.refused, outcome.seen = board.refused, board.seen
    outcome.counts_hot = table_kind.of(phase.params).has_pages_here
    workers = phase.params.backfill.workers
    with (
        throttled(phase, past=outcome.pauses) as throttle,
        Progress("backfilled", total) as progress,
        ThreadPoolExecutor(workers, "backfill") as pool,
    ):
        try:
            _steer(throttle, board)
            own = phase.connection, phase.params, board
            futures = [pool.submit(work, *own, worker_name(n)) for n in range(workers)]
            while not _ended(futures):
                _count(board, outcome, progress, choice)
                _steer(throttle, board)
        finally:
            board.stop.set()
        for future in futures:
            future.result()
        _count(board, outcome, progress, choice)
    outcome.samples = progress.samples
    return outcome


def worker_name(n: int) -> str:
    """A name that no other worker has, on any machine, in any run."""
    return f"{socket.gethostname()} {os.getpid()}.{n} {uuid.uuid4().hex[:8]}"


def _ended(futures: Sequence[Future[None]]) -> bool:
    done, waiting = wait(futures, timeout=throttle_module.SECONDS_BETWEEN_LOOKS, return_when=FIRST_EXCEPTION)
    return not waiting or any(f.exception() for f in done)


def _count(board: Board, outcome: BackfillOutcome, progress: Progress, choice: StrategyChoice) -> None:
    while not board.batches.empty():
        batch = board.batches.get()
        outcome.rows += batch.rows
        outcome.hot += batch.hot
        outcome.put_off += batch.put_off
        outcome.seconds.append(batch.seconds)
        said = f"{outcome.hot_share:.0%} of the updates touched no index" if outcome.counts_hot else ""
        progress.add(batch.rows, said, batch.at)
    while not board.ranges.empty():
        for batch in board.ranges.get():
            outcome.judged_rows += batch.rows
            outcome.judged_hot += batch.hot
    if choice.strategy == "page_interleaved" and not board.whole_ranges:
        _judge(board, outcome)


def _judge(board: Board, outcome: BackfillOutcome) -> None:
    """Page by page is given up where too few rows stay on their page."""
    rows, hot = outcome.judged_rows, outcome.judged_hot
    if rows < UPDATES_OF_THE_PROBE or hot >= LEAST_HOT_SHARE * rows:
        return
    board.whole_ranges = True
    outcome.remark = (
        f"only {hot / rows:.0%} of the updates in the first ranges stayed on their page: rows too long"
        " for the room that others leave, or an old snapshot, or a replica's, holds dead rows; from here range by"
        " range"
    )
    print(f"  {outcome.remark}")


def _steer(throttle: Throttle, board: Board) -> None:
    """Holds the workers or lets them go, by the server's health and the DBA's row."""
    connection, params = throttle.connection, throttle.phase.params
    throttle.watch.pids = [r["pid"] for r in db.rows(connection, WINDOWS["workers"], params)]
    if throttle.look(board.hold.set):
        board.hold.clear()
    if wishes := db.rows(connection, WINDOWS["control"], params):
        board.most_batch_rows = wishes[0]["most_batch_rows"]
        rest_ms = wishes[0]["pause_between_batches_ms"]
        board.rest_ms = params.backfill.pause_between_batches_ms if rest_ms is None else rest_ms


def work(connection: db.Connection, params: Params, board: Board, worker: str) -> None:
    """One worker: range after range, until none is left or the board says stop."""
    pace = first_pace(params)
    paces = {True: pace, False: pace}
    with db.beside(connection, params, "worker") as own:
        own.execute(SQL["session"].compose({}), {"frozen_ms": f"{db.FROZEN_MS}ms"})
        witness = untouched.witness(own, params, board.seen)
        while not board.stop.is_set():
            claimed = batch_ranges.claim(own, params, worker)
            if claimed is not None:
                _work_on(_Desk(own, params, board, worker, claimed, witness), paces)
            elif batch_ranges.state(own, params).left:
                # Somebody else has them; should that worker die, its ranges come free.
                board.stop.wait(SECONDS_BETWEEN_CLAIMS)
            else:
                return


@dataclass
class _Desk:
    """A worker at one range, and when it last told the others that it is alive."""

    connection: db.Connection
    params: Params
    board: Board
    worker: str
    claimed: BatchRange
    witness: untouched.Witness | None
    rows: int = 0
    batches: list[Batch] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)

    def may_go_on(self) -> bool:
        """Waits while the backfill is held; False if it is stopped, or the range was taken over."""
        every = self.params.backfill.lease_s / SIGNS_A_LEASE
        while not self.board.stop.is_set():
            if time.monotonic() - self.seen >= every:
                if not batch_ranges.still_ours(self.connection, self.params, self.worker, self.claimed, self.rows):
                    return False
                self.rows, self.seen = 0, time.monotonic()
            if not self.board.hold.is_set():
                return True
            self.board.stop.wait(min(every, SECONDS_BETWEEN_CLAIMS))
        return False


def _work_on(desk: _Desk, paces: dict[bool, Pace]) -> None:
    """Every pass of a range, in batches; the first pass, whose rows leave their page, has a pace of its own."""
    for n, keys in enumerate(_passes(desk)):
        first, done = n == 0, 0
        while done < len(keys):
            if not desk.may_go_on():
                return
            rows = min(paces[first].rows, desk.board.most_batch_rows or paces[first].rows)
            batch = _update(desk, keys[done : done + rows])
            done += rows
            desk.rows += batch.rows
            desk.batches.append(batch)
            desk.board.batches.put(batch)
            paces[first] = paces[first].after(batch.rows, batch.seconds)
            if desk.board.rest_ms:
                desk.board.stop.wait(desk.board.rest_ms / 1000)
    desk.board.ranges.put(desk.batches)
    batch_ranges.close(desk.connection, desk.params, desk.worker, desk.claimed, desk.rows)


def _passes(desk: _Desk) -> Iterator[Sequence[Any]]:
    passes = batch_ranges.passes(desk.connection, desk.params, desk.claimed)
    if not desk.board.whole_ranges:
        return passes
    return iter([[key for keys in passes for key in keys]])


def _update(desk: _Desk, keys: Sequence[Any]) -> Batch:
    """One transaction, or as many as it takes to name a row that is refused."""
    started = time.perf_counter()
    done = refused_rows.in_halves(desk.params, keys, lambda part: _transaction(desk, part), desk.board.refused)
    return Batch(
        sum(b.rows for b in done),
        sum(b.hot for b in done),
        time.perf_counter() - started,
        sum(b.put_off for b in done),
    )


def _transaction(desk: _Desk, keys: Sequence[Any]) -> Batch:
    """A batch of which somebody holds a row is put off to the end instead of waiting longer."""
    p, part, started = desk.params, desk.claimed.part, time.perf_counter()
    statement = vector_store.of(p).write(p, keys, part)
    try:
        with desk.connection.transaction():
            db.set_local(desk.connection, table_kind.of(p).of_a_batch)
            before = db.one(desk.connection, SQL["hot"], p, part=part)
            if desk.witness:
                desk.witness.before(keys)
            rows = desk.connection.execute(statement.query, statement.values).rowcount
            if desk.witness:
                desk.witness.after()
            after = db.one(desk.connection, SQL["hot"], p, part=part)
    except db.NOT_NOW:
        return Batch(0, 0, time.perf_counter() - started, put_off=len(keys))
    return Batch(rows, after["hot"] - before["hot"], time.perf_counter() - started)
