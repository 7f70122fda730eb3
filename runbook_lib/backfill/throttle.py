"""How fast long work goes: batches as large as the time that a transaction may last allows, and pauses while the
server's health, the DBA, or the maintenance window asks for one.

A pause is said when it begins, and once more for each new reason; one line, replaced in place, counts its seconds.
Its end is said and written into the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from runbook_lib.backfill import health
from runbook_lib.core import db, maintenance_window, table_kind, thresholds
from runbook_lib.core.display import LiveLine, duration
from runbook_lib.core.gates import PausedTooLong
from runbook_lib.core.phase import Phase
from runbook_lib.core.thresholds import apart
from runbook_lib.params import Params

SECONDS_BETWEEN_LOOKS = 1.0
# A new measurement counts this much against the average of those before it. After GitLab's batch optimizer
# (lib/gitlab/database/background_migration/batch_optimizer.rb), which also clamps what one step may change.
WEIGHT_OF_NEWEST = 0.3
LARGEST_GROWTH = 1.5
LARGEST_CUT = 0.25
FEWEST_ROWS = table_kind.ORDINARY.fewest_rows_a_batch


@dataclass(frozen=True)
class Pace:
    """rows: of the next batch. target_s: what a batch should take. row_s: what a row took so far, smoothed."""

    rows: int
    target_s: float
    most_rows: int
    row_s: float = 0.0
    fewest_rows: int = FEWEST_ROWS

    def after(self, rows: int, seconds: float) -> Pace:
        """The pace once a batch of so many rows took so long. A batch without rows says nothing."""
        if rows < 1:
            return self
        newest = seconds / rows
        row_s = newest if not self.row_s else (1 - WEIGHT_OF_NEWEST) * self.row_s + WEIGHT_OF_NEWEST * newest
        wanted = self.target_s / max(row_s, newest, 1e-9)
        step = min(max(wanted, self.rows * LARGEST_CUT), self.rows * LARGEST_GROWTH)
        return replace(self, rows=min(max(round(step), self.fewest_rows), self.most_rows), row_s=row_s)


def first_pace(params: Params, *, rows: int | None = None, most: int | None = None) -> Pace:
    """The pace of the first batch, before anything was measured. rows, most: bounds instead of the parameters'."""
    b = params.backfill
    most_rows = min(b.most_batch_rows, most or b.most_batch_rows)
    fewest = min(table_kind.of(params).fewest_rows_a_batch, most_rows)
    return Pace(min(rows or b.batch_rows, most_rows), b.batch_ms / 1000, most_rows, fewest_rows=fewest)


def in_turn(keys: Sequence[Any], pace: Pace) -> Iterator[Sequence[Any]]:
    """The keys, as many at a time as the caller's work between two turns says."""
    done = 0
    while done < len(keys):
        batch, began = keys[done : done + pace.rows], time.perf_counter()
        yield batch
        done += len(batch)
        pace = pace.after(len(batch), time.perf_counter() - began)


@dataclass
class Pause:
    """The pause that is on, if one is: since when, why, and what of it was said. past: those that ended, as
    [reason, seconds].
    """

    phase: Phase
    past: list[tuple[str, float]] = field(default_factory=list)
    since: float | None = None
    reasons: str = ""
    said: set[str] = field(default_factory=set)
    line: LiveLine | None = None

    def go_by(self, stops: Sequence[health.Answer]) -> None:
        """Begins, continues or ends a pause. Raises PausedTooLong."""
        if not stops:
            self.end()
            return
        now, reasons = time.monotonic(), "; ".join(str(a) for a in stops)
        if self.since is None:
            self.since, self.reasons = now, reasons
        lasts = now - self.since
        # By indicator: the figures in a reason are other ones at each look.
        asking = {a.indicator for a in stops}
        if not asking <= self.said:
            print(f"  paused{f' for {duration(lasts)}' if self.said else ''}: {reasons}")
            self.said |= asking
        self.line = self.line or LiveLine()
        self.line.show(f"  paused for {duration(lasts)}: {reasons}")
        most = self.phase.params.health.longest_pause_minutes * 60
        if lasts > most:
            lasted, longest = apart(lasts, most, thresholds.duration)
            raise PausedTooLong(
                found=f"paused for {lasted}: {reasons}",
                needed=f"a pause of at most {longest} (health.longest_pause_minutes)",
                danger="a run that waits for ever holds its place in the schedule and tells nobody",
                do="remove the cause, then run this phase again: it resumes where it stopped",
            )

    def end(self) -> None:
        """Ends the pause, if one is on, and writes it down."""
        if self.since is None:
            return
        seconds = time.monotonic() - self.since
        self._note(self.reasons, seconds)
        if self.line:
            self.line.show("")
        self.since, self.reasons, self.said, self.line = None, "", set(), None

    def keep_hours(self, hold: Callable[[], None] = lambda: None) -> None:
        """Waits until the maintenance window opens, however long that is. hold: called before it waits.

        Raises OutsideWindow where the parameters want the run to stop instead.
        """
        if maintenance_window.is_open(self.phase.params):
            return
        hold()
        self.end()
        self._note("outside the maintenance window", maintenance_window.enter(self.phase.params))

    def _note(self, reason: str, seconds: float) -> None:
        print(f"  the pause is over after {duration(seconds)}")
        self.past.append((reason, round(seconds, 3)))
        self.phase.note("pause", {"reason": reason, "seconds": round(seconds, 3)})


@dataclass
class Throttle:
    """Says whether long work may go on. connection: for the looks at the server's health. watch: its ``pids`` are the
    sessions at work, for which others should not have to wait."""

    phase: Phase
    connection: db.Connection
    pause: Pause
    watch: health.LastLook = field(default_factory=health.LastLook)
    looked: float = 0.0

    def look(self, hold: Callable[[], None] = lambda: None) -> bool:
        """May the work go on? hold: called first where it may not.

        Raises PausedTooLong, OutsideWindow, and OutOfOrder where what the step rests on was undone.
        """
        self.phase.ask(SECONDS_BETWEEN_LOOKS)
        self.pause.keep_hours(hold)
        stops = health.stops(health.look(self.connection, self.phase.params, self.watch))
        if stops:
            hold()
        self.pause.go_by(stops)
        return not stops

    def wait(self) -> None:
        """Returns once the work may go on; looks once a second."""
        if time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
            return
        while not self.look():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.looked = time.monotonic()

    def paced(self, pace: Pace, batch: Callable[[int], int]) -> Iterator[int]:
        """Batch after batch while the work may go on, without end: calls ``batch`` with as many rows as the pace says
        and yields how many it did."""
        while True:
            self.wait()
            began = time.perf_counter()
            rows = batch(pace.rows)
            pace = pace.after(rows, time.perf_counter() - began)
            yield rows


@contextmanager
def throttled(
    phase: Phase, pids: Sequence[int] = (), past: list[tuple[str, float]] | None = None
) -> Iterator[Throttle]:
    """A throttle on a session of its own. pids: the sessions at work. past: takes the pauses that ended."""
    with db.beside(phase.connection, phase.params, "health") as connection:
        pause = Pause(phase, [] if past is None else past)
        try:
            yield Throttle(phase, connection, pause, health.LastLook(pids=list(pids)))
        finally:
            pause.end()
