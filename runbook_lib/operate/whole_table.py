"""What the whole table will take by its samples and by the formulas, and what the figures do not hold.

Each figure is a range, since a sample is not the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from runbook_lib.backfill import vector_store
from runbook_lib.core import db
from runbook_lib.core.display import Table, duration, number, share, size
from runbook_lib.core.ledger import Ledger
from runbook_lib.indexes.forecast import Forecast
from runbook_lib.migrate import preflight
from runbook_lib.migrate.preflight import Facts
from runbook_lib.operate.sample import Sample
from runbook_lib.params import Params

# With fewer rows the fixed cost of a transaction and of a session outweighs the rows.
FEWEST_ROWS = 1000
# An HNSW build takes at least as much more as its rows, and hardly more than this power of them while it fits memory.
LEAST_POWER, MOST_POWER = 1.0, 1.4
# Measured: CREATE INDEX CONCURRENTLY takes 13 to 15 % longer than CREATE INDEX, which samples are built with.
CONCURRENTLY = 1.15
# Figure of the ledger's row: how it is called, and how it reads.
FIGURES = {
    "staging_bytes": ("staging table", size),
    "table_growth_bytes": ("growth of the table until the next vacuum", size),
    "index_bytes": ("index", size),
    "build_memory_bytes": ("memory that its build wants", size),
    "wal_bytes": ("WAL", size),
    "load_seconds": ("loading into staging, without the model", duration),
    "backfill_seconds": ("backfill", duration),
    "build_seconds": ("build of the index", duration),
}


def figures(params: Params, facts: Facts, expects: Forecast, found: Sequence[Sample]) -> dict[str, Range]:
    """What the whole table will take by these samples."""
    rows, largest = facts.rows, found[-1]
    vectors = round(rows * largest.vectors / largest.rows)
    out = {
        name: linear([(s.rows, getattr(s, name)) for s in found], rows)
        for name in ("staging_bytes", "table_growth_bytes", "index_bytes", "load_seconds", "backfill_seconds")
    }
    wal = [(s.rows, s.load_wal_bytes + s.backfill_wal_bytes + s.build_wal_bytes) for s in found]
    out["wal_bytes"] = linear(wal, rows).plus(0, _full_images(params, facts, largest))
    at_once = vectors * built_at_once(params, facts)
    if memory := [s.memory_bytes_a_row * at_once for s in found if s.memory_bytes_a_row]:
        out["build_memory_bytes"] = spanned(memory)
    if expects.lists is None:
        out["build_seconds"] = hnsw_seconds([(s.vectors, s.build_seconds) for s in found], vectors)
    else:
        built = [(s.vectors, s.lists or 1, s.build_seconds) for s in found]
        out["build_seconds"] = ivfflat_seconds(built, vectors, expects.lists)
    return out


def built_at_once(params: Params, facts: Facts) -> float:
    """Share of the rows that one build holds in memory: partitions are built one after the other."""
    return vector_store.of(params).built_at_once(facts.largest_partition)


def _full_images(params: Params, facts: Facts, s: Sample) -> int:
    """Pages that a checkpoint lets be logged whole, once each: a sample is too quick to show them."""
    if not vector_store.of(params).columns(params):
        return 0
    return facts.heap_bytes + round(facts.indexes_bytes * (1 - s.hot_share))


def body(
    connection: db.Connection, ledger: Ledger, params: Params, facts: Facts, found: Sequence[Sample]
) -> dict[str, Any]:
    """The ledger's row of a rehearsal: the samples, the whole by them and by the forecast, and remarks."""
    expects = preflight.expected(facts, connection, params)
    whole = figures(params, facts, expects, found)
    return {
        "run_id": ledger.run_id,
        "table_rows": facts.rows,
        "samples": [s.as_data() for s in found],
        "whole": {
            name: {"forecast": getattr(expects, name), **whole[name].as_data()} for name in FIGURES if name in whole
        },
        "remarks": _remarks(facts, expects, found, whole["wal_bytes"].expected),
    }


def _remarks(facts: Facts, expects: Forecast, found: Sequence[Sample], wal_bytes: float) -> list[str]:
    """What the figures do not hold, said openly."""
    last, remarks = found[-1], []
    if random := last.vectors_from.get("random"):
        remarks.append(
            f"{number(random)} of {number(last.vectors)} vectors are random, since the target has none yet: a build"
            " over the vectors of texts may be quicker, sizes are the same"
        )
    if facts.triggers:
        remarks.append(f"triggers of the table did not fire: {', '.join(facts.triggers)}")
    if len(found) == 1:
        remarks.append("one sample only, so the range says nothing about its error")
    if last.rows == facts.rows:
        remarks.append("the largest sample is the whole table")
    if expects.lists is None and expects.build_memory_bytes > expects.build_budget_bytes:
        remarks.append("the time of the build holds only while its graph fits into memory; the whole one does not")
    if expects.max_wal_bytes and wal_bytes > expects.max_wal_bytes:
        times = number(int(wal_bytes / expects.max_wal_bytes))
        remarks.append(
            f"that WAL passes max_wal_size, {size(expects.max_wal_bytes)}, {times} times: the backfill pauses for"
            " checkpoints, and its pauses are not among these times"
        )
    if last.others_wal_bytes_per_s > 0:
        remarks.append(f"others wrote {size(last.others_wal_bytes_per_s)} of WAL a second meanwhile, left out here")
    return remarks


def compare(ledger: Ledger) -> Table:
    """The forecast by formula and the rehearsal's range, for the whole table."""
    noted = ledger.latest("rehearsal")
    if noted is None:
        return Table(("the whole table",), [("not rehearsed yet",)])
    rows: list[Sequence[str]] = []
    for name, (title, shown) in FIGURES.items():
        if not (figure := noted["whole"].get(name)):
            continue
        ratio = figure["expected"] / figure["forecast"] if figure["forecast"] else None
        rows.append(
            (
                title,
                shown(figure["forecast"]),
                f"{shown(figure['low'])} to {shown(figure['high'])}",
                shown(figure["expected"]),
                "" if ratio is None else f"{ratio:.2f} ×",
            )
        )
    caption = f"{number(noted['table_rows'])} rows. " + ". ".join(noted["remarks"])
    return Table(("the whole table", "forecast", "rehearsed", "about", "rehearsed / forecast"), rows, caption)


def shown(ledger: Ledger) -> Table:
    """What each sample took."""
    noted = ledger.latest("rehearsal") or {"samples": []}
    return Table(
        (
            "vectors",
            "load, µs a row",
            "backfill, µs a row",
            "HOT",
            "WAL a row",
            "index a row",
            "build",
            "memory a row",
            "update of a text, without and with index and capture",
        ),
        [
            (
                number(s["vectors"]),
                1e6 * s["load_seconds"] / s["vectors"],
                1e6 * s["backfill_seconds"] / s["vectors"],
                share(s["hot_share"]),
                size((s["load_wal_bytes"] + s["backfill_wal_bytes"] + s["build_wal_bytes"]) / s["vectors"]),
                size(s["index_bytes"] / s["vectors"]),
                duration(s["build_seconds"]),
                size(s["memory_bytes_a_row"]) if s["memory_bytes_a_row"] else "not measured",
                f"{number(s['bare_write_ms'])} ms, {number(s['write_ms'])} ms"
                if s.get("write_ms")
                else "not measured",
            )
            for s in noted["samples"]
        ],
    )


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


def spanned(candidates: Sequence[float]) -> Range:
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
    return spanned([rows * s for s in (*(s for s in slopes if s > 0), figure / n)])


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
    found = spanned(estimates)
    return Range(found.low, found.expected * CONCURRENTLY, found.high * CONCURRENTLY)


def ivfflat_seconds(samples: Sequence[tuple[int, int, float]], rows: int, lists: int) -> Range:
    """Seconds of a concurrent IVFFlat build. samples: (rows, lists, seconds): each row is held against each list."""
    found = spanned([s * (rows / n) * (lists / k) for n, k, s in samples])
    return Range(found.low, found.expected * CONCURRENTLY, found.high * CONCURRENTLY)
