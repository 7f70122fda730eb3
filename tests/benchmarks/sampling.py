"""What a migration takes while it runs, sampled from outside: WAL, disk, memory of the kernel, sessions at work."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import psycopg

EVERY_S = 0.2
# Disk and memory take longer to ask for.
SLOW_EVERY = 10
# Phases that ask the application's queries, besides what the runbook itself does.
ASKING = ("10_", "70_", "80_", "90_")
STATE = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint,
       (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'
        AND application_name LIKE 'runbook%')
"""
WORK = """
SELECT phase, coalesce(sum((body->>'seconds')::float) FILTER (WHERE kind = 'load'), 0),
       coalesce(sum((body->>'seconds')::float) FILTER (WHERE kind = 'statement' AND body->>'name' ~ %s), 0)
FROM runbook.entry WHERE phase ~ '^[456]0_' GROUP BY phase
"""
# Statements that write the vectors, or build the index.
WRITES = r"^(backfill\.update|sidetable\.|chunks\.upsert|index\.create)"


@dataclass(frozen=True)
class Sample:
    """At a moment, in seconds since the epoch. disk, memory: bytes, as of the last time they were asked for."""

    at: float
    wal: int
    disk: int
    memory: int
    is_at_work: bool


@contextmanager
def sampled(dsn: str) -> Iterator[list[Sample]]:
    """Samples of a database until the block ends; memory is that of this process's kernels, the largest."""
    samples, over = list[Sample](), threading.Event()

    def sample() -> None:
        disk = memory = 0
        with psycopg.connect(dsn, autocommit=True, application_name="bench sampler") as connection:
            while not over.wait(EVERY_S):
                if len(samples) % SLOW_EVERY == 0:
                    disk, memory = _disk(connection), _memory()
                wal, active = connection.execute(STATE).fetchone() or (0, 0)
                samples.append(Sample(time.time(), wal, disk, memory, active > 0))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def _disk(connection: psycopg.Connection[Any]) -> int:
    (size,) = connection.execute("SELECT pg_database_size(current_database())").fetchone() or (0,)
    return int(size)


def _memory() -> int:
    found = [0]
    for child in psutil.Process().children(recursive=True):
        try:
            if any("ipykernel" in part for part in child.cmdline()):
                found.append(child.memory_info().rss)
        except psutil.Error:
            continue
    return max(found)


def growth(samples: Sequence[Sample], phases: Sequence[tuple[str, float, float]]) -> list[tuple[str, ...]]:
    """A row a phase: name, seconds, WAL and disk in MB, largest memory in MB."""
    rows = []
    for name, began, end in phases:
        own = [s for s in samples if began <= s.at <= end]
        if own:
            wal, disk = own[-1].wal - own[0].wal, own[-1].disk - own[0].disk
            memory = max(s.memory for s in own)
            rows.append((name, f"{end - began:.1f}", *(f"{x / 2**20:,.0f}" for x in (wal, disk, memory))))
    return rows


def overhead(
    connection: psycopg.Connection[Any], samples: Sequence[Sample], phases: Sequence[tuple[str, float, float]]
) -> tuple[float, float, float]:
    """Seconds of embedding with COPY, backfill writes and build; of queries asked; and of everything else.

    Queries are asked where a session of the runbook is at work in a phase that asks any.
    """
    whole = sum(end - began for _, began, end in phases)
    work = sum(a + b for _, a, b in connection.execute(WORK, [WRITES]).fetchall())
    asked = 0.0
    for name, began, end in phases:
        own = [s for s in samples if began <= s.at <= end]
        if name.startswith(ASKING) and own:
            asked += (end - began) * sum(s.is_at_work for s in own) / len(own)
    return work, asked, whole - work - asked
