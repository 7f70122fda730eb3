"""Progress of a long step: a line now and then that reads well live and in the saved record, and its samples."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from runbook_lib.core.display import duration, number

# A line at most this often, and about this many samples for the picture, however long the step.
SECONDS_BETWEEN_LINES = 5.0
MOST_SAMPLES = 200


class Progress:
    """Counts rows against a total and says rate and time left.

    samples: [seconds since the start, rows so far], thinned to about MOST_SAMPLES.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.samples: list[list[float]] = [[0.0, 0]]
        self._started = self._last_line = time.perf_counter()
        self._shortest_step = 0.0

    def __enter__(self) -> Self:
        print(f"  {number(self.total)} rows to be {self.what}")
        return self

    def add(self, rows: int, note: str = "", at: float | None = None) -> None:
        """Counts rows that are done, committed and safe. at: when, by ``time.perf_counter``; now if not given."""
        self.done += rows
        now = time.perf_counter() if at is None else at
        seconds = now - self._started
        if seconds - self.samples[-1][0] >= self._shortest_step:
            self.samples.append([round(seconds, 3), self.done])
            if len(self.samples) > MOST_SAMPLES:
                self.samples = self.samples[::2]
                self._shortest_step = seconds / MOST_SAMPLES * 2
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._say(seconds, note)

    def _say(self, seconds: float, note: str) -> None:
        rate = self.done / seconds if seconds else 0.0
        left = max(self.total - self.done, 0)
        eta = f", about {duration(left / rate)} left" if rate and left else ""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total else ""
        print(
            f"  {number(self.done)} rows{share} {self.what}, {number(rate)} rows/s{eta}{'; ' + note if note else ''}"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        if self.samples[-1][1] != self.done:
            self.samples.append([round(seconds, 3), self.done])
        self._say(seconds, f"stopped by {kind.__name__}" if kind else f"in {duration(seconds)}")
