"""The backfill against one big UPDATE, on a table with a trigram index.

    python -m tests.benchmarks.bench_backfill [--rows 100000] [--repetitions 3] [--own-core]

Every arm starts from a copy of the same database, in turn, so that a slow moment hits all of them; figures are
medians, ratios are of medians. Text: real passages, four to a row, about 1 kB; vectors of 384 dimensions, staged
beforehand. Two neighbours work beside each arm: one reads by primary key, one updates single rows. With --own-core
they have the first core to themselves, sessions and all, and the rest of the server has the others: what is left is
what the arm does to them by locks, pages and WAL, not by taking their processor. Two other questions: what it waits
for checkpoints (`--arms backfill held_at_90 --max-wal-size 64MB`), and what a second worker brings (`--arms backfill
two_workers --without-trigram`). Prints a table, and ends with status 1 where a ratio misses what was promised.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import yaml
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib import params
from runbook_lib.cli import demo, embedded
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import names
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, expand_schema, extension
from tests.opened import gates_passed, write

DSN_ENV = "RUNBOOK_BENCH_DSN"
DIMENSION = 384
PASSAGES = 3000
# About 1 kB of text a row, as in the measurements that the promises come from.
PASSAGES_A_ROW = 4
SETTLE_S = 1.5
BASELINE_S = 6.0

CREATE = """
CREATE EXTENSION pg_trgm;
CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, views int NOT NULL DEFAULT 0);
"""
STAGE = """
INSERT INTO {staging} (key, text_hash, embedding)
SELECT t.{key}, {text_hash}, v.embedding FROM {table} t
CROSS JOIN LATERAL (SELECT array_agg(random() - 0.5)::real[]::{vector_type} AS embedding
                    FROM generate_series(1, %(dimension)s + 0 * t.id)) v
"""
BIG_UPDATE = """
UPDATE {table} t SET {embedding} = s.embedding, {embedding_hash} = s.text_hash, {embedding_updated_at} = now()
FROM {staging} s WHERE s.key = t.{key} AND s.text_hash = {text_hash}
"""
COUNTS = """
SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint AS wal, n_tup_upd AS updates, n_tup_hot_upd AS hot,
       n_dead_tup AS dead FROM pg_stat_user_tables WHERE relname = 'articles'
"""


@dataclass(frozen=True)
class Measured:
    """One run of one arm. Times in seconds, of reads and updates in ms, WAL in bytes."""

    seconds: float
    wal: int
    dead: int
    hot_share: float
    batch_p95_ms: float
    read_p99_ms: float
    longest_update_ms: float
    note: str = ""


def rows_of_text(rows: int) -> Iterator[tuple[int, str, str]]:
    """Rows of real passages, some to a body, drawn from a seed."""
    passages = list(islice(demo._passages(demo._weaknesses(), set()), PASSAGES))
    draw = random.Random(1)
    for i in range(rows):
        drawn = draw.sample(passages, PASSAGES_A_ROW)
        yield i + 1, drawn[0].title, " ".join(a.body for a in drawn)


def fill(dsn: str, rows: int, *, trigram: bool = True) -> None:
    """The table with its indexes, as it is before anybody thinks of vectors; without a trigram index two of numbers
    and titles."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(CREATE)
        with connection.cursor().copy("COPY articles (id, title, body) FROM STDIN") as copy:
            for row in rows_of_text(rows):
                copy.write_row(row)
        connection.execute("SET maintenance_work_mem = '512MB'")
        if not trigram:
            connection.execute("CREATE INDEX ON articles (title)")
            connection.execute("CREATE INDEX ON articles (views)")
            return
        connection.execute("CREATE INDEX articles_trgm ON articles USING gin (title gin_trgm_ops, body gin_trgm_ops)")


def prepare(dsn: str, p: params.Params) -> None:
    """The database that every arm copies: phases 20 to 40 done, vectors staged."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        with opened(p) as phase:
            extension.apply(phase)
            expand_schema.apply(phase)
            db.use_search_path(phase.connection)
            stage = sql.SQL(STAGE).format(**names(p))
            write(phase, stage, {"dimension": DIMENSION})
        connection.execute("VACUUM (ANALYZE)")
        connection.execute("CHECKPOINT")


def copy_database(admin: psycopg.Connection[Any], template: str, name: str) -> None:
    """Makes a database as a copy of another one, in the place of an older copy."""
    admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
    admin.execute(create.format(sql.Identifier(name), sql.Identifier(template)))
    admin.execute("CHECKPOINT")


@contextlib.contextmanager
def opened(p: params.Params) -> Iterator[Phase]:
    """Phase 50, with a ledger, its prints kept from the screen."""
    with db.connect(p, "bench ledger") as ledger_connection, db.connect(p, "bench") as connection:
        ledger = Ledger(ledger_connection, p, "bench", "50_backfill")
        ledger.create()
        with contextlib.redirect_stdout(io.StringIO()):
            yield gates_passed(Phase("50_backfill", "bench", True, p, connection, ledger))


def big_update(p: params.Params) -> float:
    """One statement, one transaction; returns the seconds of its only batch."""
    with db.connect(p, "bench big update") as connection:
        started = time.perf_counter()
        connection.execute(sql.SQL(BIG_UPDATE).format(**names(p)))
        return time.perf_counter() - started


def our_backfill(p: params.Params) -> tuple[float, str]:
    """The backfill as phase 50 does it, strategy included; returns p95 of its batches in seconds, and a note."""
    with opened(p) as phase, phase.opened():
        backfill.move_staged(phase)
        noted = phase.ledger.latest("backfill") or {}
    paused = sum(p["seconds"] for p in noted["pauses"])
    note = f"{noted['strategy']}, {noted['batches']} batches, paused {paused:.1f} s"
    return noted["batch_p95_ms"] / 1000, note


def give_core_away(server: str) -> None:
    """Keeps this process, the server and all sessions to come off the first core."""
    others = list(range(1, psutil.cpu_count() or 1))
    with psycopg.connect(server) as connection:
        postmaster = psutil.Process(connection.info.backend_pid).parent()
    assert postmaster and others
    for process in (psutil.Process(), postmaster, *postmaster.children()):
        # A session that has ended since, this function's own for instance.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.cpu_affinity(others)


def neighbour(dsn: str, rows: int, ready: Event, stop: Event, out: Any, update: bool, own_core: bool) -> None:
    """Reads, or updates, one random row after the other and reports the time of each in ms."""
    times, draw = [], random.Random(2)
    # Columns by name, as an application should: a star would bring a vector along with every row filled so far.
    read = "SELECT id, title, body, views FROM articles WHERE id = %s"
    statement = "UPDATE articles SET views = views + 1 WHERE id = %s" if update else read
    with psycopg.connect(dsn, autocommit=True) as connection:
        for pid in (os.getpid(), connection.info.backend_pid) if own_core else ():
            psutil.Process(pid).cpu_affinity([0])
        ready.set()
        while not stop.is_set():
            key = draw.randint(1, rows)
            started = time.perf_counter()
            connection.execute(statement, [key])
            times.append((time.perf_counter() - started) * 1000)
            time.sleep(0.05 if update else 0.004)
    out.put((update, times))


def beside(dsn: str, rows: int, work: Callable[[], Any], own_core: bool) -> tuple[Any, list[float], list[float]]:
    """Does the work while the neighbours do theirs; returns its result, times of reads and of updates in ms."""
    context = multiprocessing.get_context("spawn")
    stop, out = context.Event(), context.Queue()
    ready = [context.Event(), context.Event()]
    processes = [
        context.Process(target=neighbour, args=(dsn, rows, ready[u], stop, out, bool(u), own_core)) for u in (0, 1)
    ]
    for process in processes:
        process.start()
    for event in ready:
        event.wait()
    try:
        result = work()
    finally:
        stop.set()
    times = dict(out.get() for _ in processes)
    for process in processes:
        process.join()
    return result, times[False], times[True]


def measure(server: str, arm: str, rows: int, own_core: bool) -> Measured:
    """Copies the database, lets the arm work on it with its neighbours, and counts what it left behind."""
    name = f"arm_{arm}"
    with psycopg.connect(server, autocommit=True) as admin:
        copy_database(admin, "base_side" if arm == "side_table" else "base_column", name)
    dsn = os.environ[DSN_ENV] = make_conninfo(server, dbname=name)
    p = parameters("side_table" if arm == "side_table" else "column", CHANGED.get(arm, {}))
    with psycopg.connect(dsn, autocommit=True, row_factory=psycopg.rows.dict_row) as connection:
        connection.execute("SELECT count(*) FROM articles")
        before = connection.execute(COUNTS).fetchone()
        work = big_update if arm == "big_update" else our_backfill
        (seconds, result), reads, updates = beside(dsn, rows, lambda: timed(lambda: work(p)), own_core)
        time.sleep(SETTLE_S)
        after = connection.execute(COUNTS).fetchone()
        missing = connection.execute(MISSING["side_table" if arm == "side_table" else "column"]).fetchone()
        assert before and after and missing == {"count": 0}, f"{arm} left {missing}"
    p95, note = result if isinstance(result, tuple) else (result, "one statement")
    changed = after["updates"] - before["updates"]
    return Measured(
        seconds,
        after["wal"] - before["wal"],
        after["dead"],
        (after["hot"] - before["hot"]) / changed if changed else 0.0,
        p95 * 1000,
        float(np.percentile(reads, 99)),
        max(updates, default=0.0),
        note,
    )


# Arms of the backfill with another parameter than the default.
CHANGED = {
    "held_at_90": {"health": {"wal_since_checkpoint_percent": 90}},
    "two_workers": {"backfill": {"workers": 2}},
}
MISSING = {
    "column": "SELECT count(*) FROM articles WHERE embedding IS NULL",
    "side_table": "SELECT count(*) FROM articles a"
    " WHERE NOT EXISTS (SELECT FROM articles_embedding e WHERE e.id = a.id)",
}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def parameters(layout: str, changed: dict[str, Any] | None = None) -> params.Params:
    """Parameters for the benchmark's table. changed: sections that differ from the defaults."""
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {"name": "articles", "table": "articles", "key": "id", "text_columns": ["title", "body"]},
        "vector": {"dimension": DIMENSION, "layout": layout},
        "embeddings": {"source": "callable", "callable": "tests.toy:embed"},
        "legacy": {"query": "SELECT id FROM articles WHERE body ILIKE '%' || :query || '%' LIMIT :k"},
        "queries": {"file": "none.jsonl"},
    } | (changed or {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_params(path)


def baseline(server: str, rows: int, own_core: bool) -> float:
    """p99 of the reads, in ms, with nothing but the neighbours at work."""
    dsn = make_conninfo(server, dbname="base_column")
    _, reads, _ = beside(dsn, rows, lambda: time.sleep(BASELINE_S), own_core)
    return float(np.percentile(reads, 99))


def main() -> int:
    """Runs every arm in turn and compares."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=10_000)
    arguments.add_argument("--repetitions", type=int, default=3)
    arguments.add_argument("--own-core", action="store_true")
    arguments.add_argument("--without-trigram", action="store_true")
    arguments.add_argument("--max-wal-size", default="4GB", help="small, to see what a checkpoint does to each arm")
    arguments.add_argument("--arms", nargs="+", default=["big_update", "backfill", "side_table"])
    options = arguments.parse_args()
    runs: dict[str, list[Measured]] = {arm: [] for arm in options.arms}
    with (
        tempfile.TemporaryDirectory(prefix="runbook-bench-") as folder,
        embedded.running(Path(folder) / "data") as server,
    ):
        with psycopg.connect(server, autocommit=True) as admin:
            # Its naps would hit one arm and not the other.
            admin.execute("ALTER SYSTEM SET autovacuum = off")
            admin.execute(sql.SQL("ALTER SYSTEM SET max_wal_size = {}").format(sql.Literal(options.max_wal_size)))
            admin.execute("SELECT pg_reload_conf()")
            admin.execute("CREATE DATABASE before")
            fill(make_conninfo(server, dbname="before"), options.rows, trigram=not options.without_trigram)
            for layout in ("column", *(["side_table"] if "side_table" in options.arms else [])):
                name = f"base_{layout.split('_')[0]}"
                copy_database(admin, "before", name)
                dsn = os.environ[DSN_ENV] = make_conninfo(server, dbname=name)
                prepare(dsn, parameters(layout))
        if options.own_core:
            give_core_away(server)
        quiet = []
        for _ in range(options.repetitions):
            quiet.append(baseline(server, options.rows, options.own_core))
            for arm in options.arms:
                runs[arm].append(measure(server, arm, options.rows, options.own_core))
    return report(options.rows, runs, statistics.median(quiet))


def median(runs: list[Measured], field: str) -> float:
    return float(statistics.median(getattr(m, field) for m in runs))


def report(rows: int, runs: dict[str, list[Measured]], quiet_p99: float) -> int:
    """Prints medians and ratios; returns 1 where a promise is missed."""
    repetitions = len(next(iter(runs.values())))
    print(f"{rows} rows, medians of {repetitions}; reads without any backfill: p99 {quiet_p99:.2f} ms")
    for arm, m in runs.items():
        seconds = median(m, "seconds")
        print(
            f"  {arm:<11} {seconds:8.2f} s {rows / seconds:9,.0f} rows/s  {seconds / rows * 1e6:6.0f} µs/row"
            f"  WAL {median(m, 'wal') / rows / 1024:5.1f} kB/row  dead {median(m, 'dead') / rows:5.2f}/row"
            f"  HOT {median(m, 'hot_share'):4.0%}  batch p95 {median(m, 'batch_p95_ms'):8.1f} ms"
            f"  read p99 {median(m, 'read_p99_ms'):5.2f} ms  longest update {median(m, 'longest_update_ms'):8.1f} ms"
            f"  {m[-1].note}"
        )
    return 1 if judge(runs, quiet_p99) else 0


def judge(runs: dict[str, list[Measured]], quiet_p99: float) -> int:
    """Prints each promise with what came out; returns how many were missed."""
    missed = 0
    for what, found, needed, at_least in promises(runs, quiet_p99):
        kept = found >= needed if at_least else found <= needed
        missed += not kept
        limit = f"{'at least' if at_least else 'at most'} {needed}"
        print(f"  {'kept  ' if kept else 'MISSED'} {what}: {found:.2f}, {limit}")
    return missed


def promises(runs: dict[str, list[Measured]], quiet_p99: float) -> Iterator[tuple[str, float, float, bool]]:
    """What was promised: name, found, needed, and whether needed is the least or the most."""
    if not {"big_update", "backfill"} <= set(runs):
        return
    big, ours = runs["big_update"], runs["backfill"]
    yield "rate against one big UPDATE", median(big, "seconds") / median(ours, "seconds"), 3.0, True
    yield "WAL against one big UPDATE", median(ours, "wal") / median(big, "wal"), 0.4, False
    yield "dead rows against one big UPDATE", median(ours, "dead") / median(big, "dead"), 0.35, False
    yield "p95 of a batch, ms", median(ours, "batch_p95_ms"), 250.0, False
    yield "p99 of a read against none at work", median(ours, "read_p99_ms") / quiet_p99, 1.5, False
    if "side_table" in runs:
        side = median(runs["side_table"], "seconds")
        yield "rate of the side table against one big UPDATE", median(big, "seconds") / side, 20.0, True


if __name__ == "__main__":
    sys.exit(main())
