"""How a run is stopped, by a signal or by its time limit: no statement is left behind, and the record is written."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import psycopg

from runbook_lib import db
from runbook_lib.gates import BadInput
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("runner")

# A cancelled statement that has not stopped by then loses its session: nothing may go on without its runner.
GRACE_S = 1.0

TIME_LIMIT = "its time limit"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether somebody asked this run to stop, and whether an exception may be raised where the code stands.

    reason: why this process signals itself; empty for a signal from elsewhere.
    """

    def __init__(self) -> None:
        self.requested = ""
        self.reason = ""
        self.raises = False


def end_sessions(params: Params, run_id: str, grace_s: float = 0) -> int:
    """Cancels the statements of a run and ends its sessions after the grace; returns how many it ended.

    Raises BadInput where the server cannot be reached.
    """
    prefix = f"runbook {run_id} "[:63]  # PostgreSQL keeps 63 bytes of an application name
    with db.connect(params, "runbook-runner") as connection:
        db.one(connection, SQL["cancel_statements"], params, prefix=prefix)
        time.sleep(grace_s)
        return int(db.one(connection, SQL["end_sessions"], params, prefix=prefix)["sessions"])


@contextmanager
def stopped_by_signals(params: Params, run_id: str) -> Iterator[Stop]:
    """SIGINT and SIGTERM cancel the run's statement at once and interrupt the notebook; the rest is still written.

    A second signal changes nothing: the end is bounded, and the record must not be cut off.
    """
    stop = Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.requested:
            return
        stop.requested = stop.reason or signal.Signals(number).name
        # On a thread: the kernel may be too busy to be told, and the statement must be gone in any case.
        threading.Thread(target=quietly, args=(end_sessions, params, run_id, GRACE_S), daemon=True).start()
        if stop.raises:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.signal(s, handle) for s in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def limited_to(minutes: float | None, stop: Stop) -> Iterator[None]:
    """Interrupts this process as by SIGINT once the time is over; only where signals can be handled.

    Not by SIGALRM: schedulers and test runners keep their own time with it.
    """
    main = threading.main_thread()
    if minutes is None or threading.current_thread() is not main:
        yield
        return

    def interrupt() -> None:
        stop.reason = TIME_LIMIT
        signal.pthread_kill(main.ident or 0, signal.SIGINT)

    timer = threading.Timer(minutes * 60, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def quietly(do: Callable[..., Any], *values: Any) -> str:
    """Does what may fail because the server is gone; returns why it did, or nothing."""
    try:
        do(*values)
    except (BadInput, psycopg.Error) as error:
        return " ".join(str(error).split())
    return ""
