"""The pause of a long loop: while the server's health, or the DBA, asks for it, and outside the maintenance window.

It is said when it begins, and once more for each new reason; one line, replaced in place, counts its seconds. Its end
is said and written into the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runbook_lib.backfill import health
from runbook_lib.core import maintenance_window, thresholds
from runbook_lib.core.display import LiveLine, duration
from runbook_lib.core.gates import PausedTooLong
from runbook_lib.core.phase import Phase
from runbook_lib.core.thresholds import apart


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
        """Begins, goes on with, or ends a pause. Raises PausedTooLong."""
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
                do="remove the cause, then run this phase again: it goes on where it was",
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
