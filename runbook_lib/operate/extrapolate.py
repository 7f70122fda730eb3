"""From samples to the whole table: each figure as a range, since a sample is not the table. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

# With fewer rows the fixed cost of a transaction and of a session outweighs the rows.
FEWEST_ROWS = 1000
# An HNSW build takes at least as much more as its rows, and hardly more than this power of them while it fits memory.
LEAST_POWER, MOST_POWER = 1.0, 1.4
# Measured: CREATE INDEX CONCURRENTLY takes 13 to 15 % longer than CREATE INDEX, which samples are built with.
CONCURRENTLY = 1.15


@dataclass(frozen=True)
class Range:
    """A figure of the whole table: the least and the most that a fit over the samples gives, and its middle."""

    low: float
    expected: float
    high: float

    def as_data(self) -> dict[str, float]:
        """Plain data for the ledger."""
        return {"low": self.low, "expected": self.expected, "high": self.high}

    def plus(self, low: float, high: float) -> Range:
        """With what no sample shows; the middle moves by half of both."""
        return Range(self.low + low, self.expected + (low + high) / 2, self.high + high)


def of(candidates: Sequence[float]) -> Range:
    """The range that these estimates span."""
    return Range(min(candidates), median(candidates), max(candidates))


def sizes(rows: int, percents: Sequence[float], most_rows: int) -> list[int]:
    """Rows of each sample, the smallest first.

    Their ratio is kept: where the largest would pass ``most_rows`` all shrink, and where the smallest would be too
    small to say anything all grow, as far as the table has rows; what is too small even then is left out.
    """
    wanted = [rows * p / 100 for p in percents]
    if min(wanted) < FEWEST_ROWS:
        wanted = [w * FEWEST_ROWS / max(min(wanted), 1e-9) for w in wanted]
    largest = min(rows, most_rows)
    if max(wanted) > largest:
        wanted = [w * largest / max(wanted) for w in wanted]
    found = sorted({max(1, round(w)) for w in wanted})
    return [n for n in found if n >= FEWEST_ROWS or n == found[-1]]


def linear(samples: Sequence[tuple[int, float]], rows: int) -> Range:
    """What grows with the rows. samples: (rows, figure).

    The estimates are the slopes between each two samples, which leave out what does not grow, and the figure a row
    of the largest.
    """
    n, figure = max(samples)
    slopes = [(b - a) / (m - k) for (k, a), (m, b) in combinations(sorted(samples), 2) if m > k]
    return of([rows * s for s in (*(s for s in slopes if s > 0), figure / n)])


def hnsw_seconds(samples: Sequence[tuple[int, float]], rows: int) -> Range:
    """Seconds of a concurrent HNSW build. samples: (rows, seconds) of plain builds.

    A row's place is found by a search that takes about log(rows): each sample gives one estimate by
    rows · log(rows). Caches hold less and less of a growing graph, so the power that the samples themselves grow
    by gives one more.
    """
    ordered = sorted(samples)
    (first, quick), (last, slow) = ordered[0], ordered[-1]
    estimates = [s * rows * math.log(max(rows, 2)) / (n * math.log(max(n, 2))) for n, s in ordered]
    if last > first and quick > 0:
        power = math.log(slow / quick) / math.log(last / first)
        estimates.append(slow * (rows / last) ** min(max(power, LEAST_POWER), MOST_POWER))
    found = of(estimates)
    return Range(found.low, found.expected * CONCURRENTLY, found.high * CONCURRENTLY)


def ivfflat_seconds(samples: Sequence[tuple[int, int, float]], rows: int, lists: int) -> Range:
    """Seconds of a concurrent IVFFlat build. samples: (rows, lists, seconds): each row is held against each list."""
    found = of([s * (rows / n) * (lists / k) for n, k, s in samples])
    return Range(found.low, found.expected * CONCURRENTLY, found.high * CONCURRENTLY)
