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

from runbook_lib.core import claim, db
from runbook_lib.core.gates import BadInput
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("runner")

# A cancelled statement that has not stopped by then loses its session: nothing may go on without its runner.
GRACE_S = 1.0

TIME_LIMIT = "its time limit"
# So often a run asks the server whether it is there, and whether its claim is.
LOOK_S = 10.0
# On a machine that does much else an answer takes seconds.
LONGEST_SILENCE_S = 60.0
SILENCE = f"the silence of the server for {LONGEST_SILENCE_S:g} s"
CLAIM_IS_LOST = "the loss of its claim on the target: the server has ended the runner's session"
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
    if minutes is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(minutes * 60, _interrupt, (stop, TIME_LIMIT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _interrupt(stop: Stop, reason: str, over: threading.Event | None = None) -> None:
    if over is not None and over.is_set():
        return
    stop.reason = reason
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def watched(params: Params, run_id: str, stop: Stop, *, claimed: bool) -> Iterator[None]:
    """Interrupts this process as by SIGINT where the server has been silent for LONGEST_SILENCE_S, whatever a network
    between them pretends, or has ended the session that holds the claim; only where signals can be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(params, run_id, stop, claimed, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(GRACE_S)


def _watch(params: Params, run_id: str, stop: Stop, claimed: bool, over: threading.Event) -> None:
    unanswered, connection = None, None
    while not over.wait(LOOK_S):
        # Counted from the first question without an answer: this process may have been stopped before it.
        unanswered = unanswered or time.monotonic()
        left_s = max(LONGEST_SILENCE_S - (time.monotonic() - unanswered), 0)
        silence = threading.Timer(left_s, _interrupt, (stop, SILENCE, over))
        silence.daemon = True
        silence.start()
        try:
            if connection is None or connection.closed:
                connection = db.connect(params, f"runbook-watch {run_id}")
            held = db.one(connection, SQL["is_connected"], params, name=claim.runner_name(run_id))["connected"]
            why = CLAIM_IS_LOST if claimed and not held else ""
        except (BadInput, psycopg.Error):
            why = SILENCE
        finally:
            silence.cancel()
        if not why:
            unanswered = None
        elif why == CLAIM_IS_LOST or time.monotonic() - unanswered >= LONGEST_SILENCE_S:
            _interrupt(stop, why, over)
            break
    if connection is not None:
        connection.close()


def quietly(do: Callable[..., Any], *values: Any) -> str:
    """Does what may fail because the server is gone; returns why it did, or nothing."""
    try:
        do(*values)
    except (BadInput, psycopg.Error) as error:
        return " ".join(str(error).split())
    return ""
