"""How long writers and readers wait while a table is migrated: the longest and p99, phase by phase.

    python -m tests.benchmarks.bench_writers [--rows 100000] [--layout column] [--rate 10] [--refresh-rows 2000]

The demo's table, grown with real text to so many rows, with its trigram and tsvector indexes, is taken through
``runbook run --execute`` and then ``runbook operate refresh``, each in a process of its own, while five neighbours
work at a fixed rate: inserts, updates of the text, updates of another column, deletes, reads by key. What they waited
with nobody beside them is measured first. Before the refresh many texts change at once, so that it has work to do.
Prints a table; ends with status 1 where a writer waited for longer than LONGEST_WAIT_MS in a phase that changes
something.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import yaml

from runbook_lib.cli import demo, embedded
from runbook_lib.runner import manifest
from tests.benchmarks.bench_backfill import rows_of_text

DSN_ENV = "RUNBOOK_BENCH_DSN"
DEMO_PARAMS = Path("params/demo.yaml")
LONGEST_WAIT_MS = 500.0
ALONE_S = 30.0
FIRST_ID = 2_000_000
# The phases that change the table or what hangs on it.
CHANGING = ("30_", "40_", "50_", "60_", "70_", "80_", "90_", "operate/refresh")
STATEMENTS = {
    "insert": "INSERT INTO demo.articles (id, title, body, status, category, created_at)"
    " SELECT %(new)s, title, body || %(word)s, status, category, now() FROM demo.articles WHERE id = %(key)s",
    "text update": "UPDATE demo.articles SET body = body || %(word)s WHERE id = %(key)s",
    "other update": "UPDATE demo.articles SET views = views + 1 WHERE id = %(key)s",
    "delete": "DELETE FROM demo.articles WHERE id = %(key)s",
    "read": "SELECT id, title, body, views FROM demo.articles WHERE id = %(key)s",
}


@dataclasses.dataclass(frozen=True)
class Wait:
    """One statement of a neighbour. began: seconds since the epoch. ms: until its answer."""

    kind: str
    began: float
    ms: float


def neighbour(dsn: str, kind: str, rows: int, rate: float, ready: Event, stop: Event, out: Any) -> None:
    """Sends one statement of its kind at a fixed rate; reports each with its time."""
    waits, draw, new = [], random.Random(kind), FIRST_ID + 10 * rows
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ready.set()
            due = time.monotonic()
            while not stop.is_set():
                new += 1
                # Deletes take rows that nobody else names, so that the others always find theirs.
                low, high = (9 * rows // 10, rows - 1) if kind == "delete" else (0, 9 * rows // 10 - 1)
                values = {"key": FIRST_ID + draw.randint(low, high), "new": new, "word": f" changed {new}"}
                began, started = time.time(), time.perf_counter()
                connection.execute(STATEMENTS[kind].encode(), values)
                waits.append(Wait(kind, began, (time.perf_counter() - started) * 1000))
                due += 1 / rate
                time.sleep(max(0.0, due - time.monotonic()))
    finally:
        # Both are waited for, also where this one fails.
        ready.set()
        out.put(waits)


@contextmanager
def neighbours(dsn: str, rows: int, rate: float) -> Iterator[list[Wait]]:
    """All kinds at work until the block ends; their waits are there after it."""
    context = multiprocessing.get_context("spawn")
    stop, out, waits = context.Event(), context.Queue(), list[Wait]()
    ready = [context.Event() for _ in STATEMENTS]
    processes = [
        context.Process(target=neighbour, args=(dsn, kind, rows, rate, event, stop, out))
        for kind, event in zip(STATEMENTS, ready, strict=True)
    ]
    for process in processes:
        process.start()
    for event in ready:
        event.wait()
    try:
        yield waits
    finally:
        stop.set()
        for _ in processes:
            waits += out.get()
        for process in processes:
            process.join()
    assert not any(process.exitcode for process in processes), "a neighbour failed"


def fill(dsn: str, folder: Path, rows: int) -> None:
    """The demo's table with its judged articles, and so many rows of real passages, about 1 kB each."""
    demo.load(dsn, folder)
    with psycopg.connect(dsn, autocommit=True) as connection:
        copied = "COPY demo.articles (id, title, body, status, category, created_at) FROM STDIN"
        with connection.cursor().copy(copied) as copy:
            for key, title, body in rows_of_text(rows):
                copy.write_row((FIRST_ID + key - 1, title, body, "Passage", "Passage", "2024-02-29"))
        connection.execute("VACUUM ANALYZE demo.articles")


def write_params(folder: Path, layout: str) -> Path:
    """The demo's parameters with this layout, their queries and records in the folder."""
    data = yaml.safe_load(DEMO_PARAMS.read_text())
    data["connection"] = {"dsn_env": DSN_ENV}
    data["vector"]["layout"] = layout
    data["queries"] |= {"file": "queries.jsonl", "judgements": "judgements.jsonl", "judged_sample": 30}
    data["index"]["maintenance_work_mem_mb"] = 512
    data["record"] = {"runs_dir": str(folder / "runs")}
    data["cut_over"] |= {"largest_slowdown": 1000}
    # Of a table as small as this one the deletes take so many rows while it is measured that exact search itself
    # would miss .99 of the answers that were right before.
    data["tune"] = {"target_recall": 0.9}
    path = folder / "writers.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def runbook(*arguments: str) -> None:
    """One command of the runbook, in a process of its own. Raises CalledProcessError where it did not pass."""
    subprocess.run([sys.executable, "-c", "from runbook_lib.cli.main import main; main()", *arguments], check=True)


def times_of(folder: Path) -> list[tuple[str, float, float]]:
    """Name, beginning and end of each notebook of all runs, in seconds since the epoch."""
    phases = [p for path in folder.glob("runs/*/manifest.json") for p in manifest.read(path.parent).phases]
    began = [(p.name, datetime.fromisoformat(p.started).timestamp(), p.seconds or 0.0) for p in phases if p.started]
    return sorted(((name, at, at + seconds) for name, at, seconds in began), key=lambda p: p[1])


def report(waits: list[Wait], phases: list[tuple[str, float, float]]) -> int:
    """Prints a line a phase; returns how many phases that change something made a writer wait for too long."""
    during: dict[str, list[Wait]] = defaultdict(list)
    for wait in waits:
        # The newest phase that had begun: a wait belongs to the work that it began beside.
        name = next((name for name, began, end in reversed(phases) if began <= wait.began <= end + 1), None)
        if name:
            during[name].append(wait)
    print(
        f"{'phase':<26}{'s':>7}{'writes':>8}{'write p99':>11}{'longest':>9}  {'of':<13}{'read p99':>9}{'longest':>9}"
    )
    missed = 0
    for name, began, end in phases:
        writes = [w for w in during[name] if w.kind != "read"]
        reads = [w.ms for w in during[name] if w.kind == "read"]
        if not writes or not reads:
            continue
        worst = max(writes, key=lambda w: w.ms)
        missed += name.startswith(CHANGING) and worst.ms > LONGEST_WAIT_MS
        print(
            f"{name:<26}{end - began:>7.1f}{len(writes):>8}{np.percentile([w.ms for w in writes], 99):>11.1f}"
            f"{worst.ms:>9.1f}  {worst.kind:<13}{np.percentile(reads, 99):>9.1f}{max(reads):>9.1f}"
        )
    return missed


def main() -> int:
    """Carries out the migration and a refresh beside the neighbours, and reports what they waited."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=10_000)
    arguments.add_argument("--layout", default="column", choices=("column", "side_table"))
    arguments.add_argument("--rate", type=float, default=10.0, help="statements a second of each neighbour")
    arguments.add_argument("--refresh-rows", type=int, default=2000)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as made, embedded.running(Path(made, "data")) as server:
        folder = Path(made)
        dsn = os.environ[DSN_ENV] = demo.create_database(server)
        fill(dsn, folder, options.rows)
        params = write_params(folder, options.layout)
        alone = time.time()
        with neighbours(dsn, options.rows, options.rate) as waits:
            time.sleep(ALONE_S)
            began = time.time()
            runbook("run", str(params), "--execute", "--quiet")
            with psycopg.connect(dsn, autocommit=True) as connection:
                changed = "UPDATE demo.articles SET body = body || ' once more' WHERE id BETWEEN %s AND %s"
                connection.execute(changed, [FIRST_ID, FIRST_ID + options.refresh_rows - 1])
            runbook("operate", str(params), "refresh", "--execute", "--quiet")
        print(f"{options.rows} rows, {options.layout}, {len(STATEMENTS)} neighbours of {options.rate:g} a second")
        return 1 if report(waits, [("(nobody beside them)", alone, began), *times_of(folder)]) else 0


if __name__ == "__main__":
    sys.exit(main())
