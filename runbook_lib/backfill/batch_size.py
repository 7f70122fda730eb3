"""How many rows a batch takes: as many as fit the time that a transaction may last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runbook_lib.params import Params

# A new measurement counts this much against the average of those before it. After GitLab's batch optimizer
# (lib/gitlab/database/background_migration/batch_optimizer.rb), which also clamps what one step may change.
WEIGHT_OF_NEWEST = 0.3
LARGEST_GROWTH = 1.5
LARGEST_CUT = 0.25
FEWEST_ROWS = 10


@dataclass(frozen=True)
class Pace:
    """rows: of the next batch. target_s: what a batch should take. row_s: what a row took so far, smoothed."""

    rows: int
    target_s: float
    most_rows: int
    row_s: float = 0.0

    def after(self, rows: int, seconds: float) -> Pace:
        """The pace once a batch of so many rows took so long. A batch without rows says nothing."""
        if rows < 1:
            return self
        newest = seconds / rows
        row_s = newest if not self.row_s else (1 - WEIGHT_OF_NEWEST) * self.row_s + WEIGHT_OF_NEWEST * newest
        wanted = self.target_s / max(row_s, newest, 1e-9)
        step = min(max(wanted, self.rows * LARGEST_CUT), self.rows * LARGEST_GROWTH)
        return replace(self, rows=min(max(round(step), FEWEST_ROWS), self.most_rows), row_s=row_s)


def first_pace(params: Params) -> Pace:
    """The pace of the first batch, before anything was measured."""
    b = params.backfill
    return Pace(min(b.batch_rows, b.most_batch_rows), b.batch_ms / 1000, b.most_batch_rows)


def in_turn(keys: Sequence[Any], pace: Pace) -> Iterator[Sequence[Any]]:
    """The keys, as many at a time as the caller's work between two turns says."""
    done = 0
    while done < len(keys):
        batch, began = keys[done : done + pace.rows], time.perf_counter()
        yield batch
        done += len(batch)
        pace = pace.after(len(batch), time.perf_counter() - began)
