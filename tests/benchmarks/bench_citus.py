"""The backfill on Citus against one big UPDATE of the same rows, in one run; RUNBOOK_CITUS_DSN names the cluster.

    python -m tests.benchmarks.bench_citus [--rows 60000] [--shards 32] [--repetitions 2] [--workers 1 2 4]
        [--servers-of citus]

The table public.articles and schema runbook of that database are made for it, and dropped. Texts of about 480
characters, vectors of 256 dimensions, staged beforehand. Before each arm the vectors are taken away and the table is
vacuumed; the arms take turns. Prints rows a second, the ratio to the big UPDATE, and p50 and p95 of a batch. On a
busy machine a statement of many sessions takes processor time from others, and one session does not: --servers-of
names the OS user of servers on this machine, of which processor time a row is then printed as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
import psycopg

from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import changing, names
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, expand_schema, extension
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed, write

DIMENSION = 256
CREATE = "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text, views int NOT NULL DEFAULT 0)"
FILL = """
INSERT INTO articles SELECT i, 'title ' || i, repeat(md5(i::text) || ' ', 14) FROM generate_series(1, %s) i
"""
STAGE = """
INSERT INTO {staging} (key, text_hash, embedding)
SELECT t.{key}, {text_hash},
       (SELECT array_agg(sin(t.id * n)) FROM generate_series(1, %(dimension)s) n)::real[]::{vector_type}
FROM {table} t
"""
BIG_UPDATE = """
UPDATE {table} t SET {embedding} = s.embedding, {embedding_hash} = s.text_hash, {embedding_updated_at} = now()
FROM {staging} s
WHERE s.key = t.{key} AND t.{embedding_hash} IS DISTINCT FROM s.text_hash AND s.text_hash = {text_hash}
"""
EMPTY = "UPDATE articles SET embedding = NULL, embedding_hash = NULL, embedding_updated_at = NULL"


def sweep(connection: psycopg.Connection) -> None:
    """Nothing of an earlier run is left."""
    connection.execute("SET citus.multi_shard_modify_mode = 'sequential'")
    connection.execute("SET citus.enable_unsafe_triggers = on")
    connection.execute("DROP TABLE IF EXISTS articles CASCADE")
    connection.execute("DROP SCHEMA IF EXISTS runbook CASCADE")


def main() -> None:
    """Prints a line an arm and repetition, and the medians."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--rows", type=int, default=60_000)
    asked.add_argument("--shards", type=int, default=32)
    asked.add_argument("--repetitions", type=int, default=2)
    asked.add_argument("--servers-of", default="")
    asked.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4])
    given = asked.parse_args()
    dsn = os.environ["RUNBOOK_CITUS_DSN"]
    os.environ[DSN_ENV] = dsn
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    with psycopg.connect(dsn, autocommit=True) as admin, tempfile.TemporaryDirectory() as folder:
        sweep(admin)
        admin.execute(CREATE)
        admin.execute(f"SET citus.shard_count = {given.shards}")
        admin.execute("SELECT create_distributed_table('articles', 'id')")
        admin.execute(FILL, [given.rows])
        admin.execute("ANALYZE articles")
        arms = {"one big UPDATE": 0} | {f"{n} workers": n for n in given.workers}
        for repetition in range(given.repetitions):
            for arm, workers in arms.items():
                found, cost = measure(admin, Path(folder), arm, workers, given.servers_of, first=not rates)
                rates.setdefault(arm, []).append(found)
                costs.setdefault(arm, []).append(cost)
                print(f"{repetition + 1} {arm}: {found:,.0f} rows/s, {cost:.0f} µs of processor a row", flush=True)
        sweep(admin)
    whole = statistics.median(rates["one big UPDATE"])
    for arm, found in rates.items():
        rate = statistics.median(found)
        print(f"{arm}: {rate:,.0f} rows/s, {rate / whole:.2f} of one UPDATE, {statistics.median(costs[arm]):.0f} µs")


def spent(user: str) -> float:
    """Seconds of processor that the servers of an OS user have taken, those of ended sessions with them."""
    total = 0.0
    for process in psutil.process_iter(["username", "cpu_times"]):
        if user and process.info["username"] == user and (times := process.info["cpu_times"]):
            total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(
    admin: psycopg.Connection, folder: Path, arm: str, workers: int, user: str, *, first: bool
) -> tuple[float, float]:
    """Rows a second of one arm, and microseconds of the servers' processor a row."""
    own = {
        "target": {"distributed": "citus"},
        "search": {"fulltext_column": None},
        "vector": {"dimension": DIMENSION},
        "backfill": {"workers": max(workers, 1)},
    }
    params = load_params(write_params(folder, **own))
    with db.connect(params, "bench ledger") as of_ledger, db.connect(params, "bench") as connection:
        ledger = Ledger(of_ledger, params, "bench", "50_backfill")
        ledger.create()
        phase = gates_passed(Phase("50_backfill", "bench", True, params, connection, ledger))
        n = names(params) | changing(params)
        with contextlib.redirect_stdout(io.StringIO()):
            if first:
                extension.apply(phase)
                expand_schema.apply(phase)
                write(phase, psycopg.sql.SQL(STAGE).format(**n), {"dimension": DIMENSION})
            write(phase, EMPTY)
            admin.execute("VACUUM ANALYZE articles")
            started, before = time.perf_counter(), spent(user)
            if not workers:
                rows = write(phase, psycopg.sql.SQL(BIG_UPDATE).format(**n)).rowcount
            else:
                with phase.opened():
                    _, outcome = backfill.move_staged(phase)
                rows = outcome.rows
                seconds = sorted(outcome.seconds)
        took, cost = time.perf_counter() - started, (spent(user) - before) / rows * 1e6
    if workers:
        p50, p95 = (seconds[int(len(seconds) * q)] * 1000 for q in (0.5, 0.95))
        print(f"    batches of {arm}: {len(seconds)}, p50 {p50:.0f} ms, p95 {p95:.0f} ms")
    return rows / took, cost


if __name__ == "__main__":
    main()
