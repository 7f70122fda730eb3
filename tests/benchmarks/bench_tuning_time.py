"""How long 70_tune takes by table size, how many queries it asks, and the memory of this process meanwhile.

pytest -s tests/benchmarks/bench_tuning_time.py
RUNBOOK_BENCHMARK_ROWS=100000,1000000 takes other sizes.

Made-up vectors: clusters, each a plane of a few dimensions, so that an index has something to find. Three filters:
one that has nothing to do with the vectors, one of many tenants, and one that follows the clusters.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
import pytest
import yaml
from pgvector.psycopg import register_vector
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import loop
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import build_index, expand_schema, extension, tune
from runbook_lib.search import search_function
from tests.opened import gates_passed

SIZES = [int(n) for n in os.environ.get("RUNBOOK_BENCHMARK_ROWS", "100000").split(",")]
DSN_ENV = "RUNBOOK_TUNING_TIME_DSN"
DIMENSION, CLUSTERS, PLANE, BLOCK = 256, 2000, 24, 20_000
QUERIES = 500
# The goals: for a million rows, in proportion for fewer; and memory of any size.
MOST_SECONDS_A_MILLION, LEAST_SECONDS, MOST_MEGABYTES = 600, 120, 1000
CENTRES = np.random.default_rng(0).normal(size=(CLUSTERS, DIMENSION)).astype(np.float32)
PLANES = np.random.default_rng(1).normal(size=(CLUSTERS, PLANE, DIMENSION)).astype(np.float32) / np.sqrt(PLANE)


def vectors(clusters: np.ndarray, seed: int) -> np.ndarray:
    """A vector at length 1 for each cluster number."""
    drawn = np.random.default_rng(seed)
    places = drawn.normal(size=(len(clusters), 1, PLANE)).astype(np.float32)
    found = CENTRES[clusters] + (places @ PLANES[clusters])[:, 0] * 1.2
    found += 0.1 * drawn.normal(size=found.shape).astype(np.float32)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)


def embed(texts: list[str]) -> np.ndarray:
    """ "c17 q5": the fifth query, near cluster 17."""
    return np.concatenate([vectors(np.array([int(c[1:])]), int(q[1:])) for c, q in (t.split() for t in texts)])


def fill(connection: psycopg.Connection[Any], rows: int) -> None:
    """Rows of about 480 characters. kind: 60, 30, 9 and 1 %. tenant: a thousand, as large as chance has them. topic:
    the cluster's, of twenty.
    """
    register_vector(connection)
    with (
        connection.cursor() as cursor,
        cursor.copy("COPY docs (id, body, kind, tenant, topic, embedding) FROM STDIN (FORMAT BINARY)") as copy,
    ):
        copy.set_types(["int8", "text", "text", "int8", "text", "vector"])
        for first in range(0, rows, BLOCK):
            n = min(BLOCK, rows - first)
            drawn = np.random.default_rng(10**6 + first)
            clusters = drawn.integers(0, CLUSTERS, n)
            kinds = drawn.choice(["page", "note", "mail", "law"], n, p=[0.6, 0.3, 0.09, 0.01])
            tenants = np.exp(drawn.uniform(0, np.log(1000), n)).astype(int)
            made = vectors(clusters, 10**6 + first)
            for i in range(n):
                words = f"c{clusters[i]} row {first + i} "
                body = (words * 32)[:480]
                topic = f"topic {clusters[i] % 20}"
                copy.write_row((first + i, body, str(kinds[i]), int(tenants[i]), topic, made[i]))


def params_file(folder: Path) -> Path:
    """The params file and its queries."""
    drawn = np.random.default_rng(3)
    texts = [f"c{drawn.integers(CLUSTERS)} q{10**9 + i}" for i in range(2 * QUERIES)]
    lines = [json.dumps({"query_id": f"q{i}", "text": text}) for i, text in enumerate(texts)]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {
            "name": "docs", "table": "docs", "key": "id", "text_columns": ["body"],
            "filters": ["kind", "tenant", "topic"],
        },
        "vector": {"dimension": DIMENSION},
        "embeddings": {"source": "callable", "callable": "tests.benchmarks.bench_tuning_time:embed"},
        "legacy": {"query": "SELECT id FROM docs WHERE body ILIKE '%' || :query || '%' ORDER BY id LIMIT :k"},
        "queries": {"file": "queries.jsonl"},
        "index": {"maintenance_work_mem_mb": 2200},
        "tune": {"queries": QUERIES},
    }  # fmt: skip
    (folder / "params.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return folder / "params.yaml"


def opened(folder: Path) -> Phase:
    """Phase 70 on the database that DSN_ENV names."""
    p = load_params(params_file(folder))
    ledger = Ledger(db.connect(p, "benchmark ledger"), p, "benchmark", "70_tune")
    ledger.create()
    return gates_passed(Phase("70_tune", "benchmark", True, p, db.connect(p, "benchmark"), ledger))


def make(folder: Path, rows: int) -> None:
    """The table with its vectors and its index, without staging and backfill."""
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE docs (id bigint PRIMARY KEY, body text, kind text, tenant bigint, topic text)"
        )
        phase = opened(folder)
        search_function.apply(phase)
        for module in (extension, expand_schema):
            module.apply(phase)
        connection.execute("ALTER TABLE docs DISABLE TRIGGER USER")
        fill(connection, rows)
        connection.execute("ALTER TABLE docs ENABLE TRIGGER USER")
        for column in ("kind", "tenant", "topic"):
            connection.execute(f"CREATE INDEX ON docs ({column})")
        connection.execute("VACUUM ANALYZE docs")
        build_index.apply(phase)
        phase.end("was ended by the benchmark", "nothing")


@contextmanager
def memory() -> Iterator[list[int]]:
    """Resident bytes of this process, every tenth of a second."""
    process, seen, done = psutil.Process(), [psutil.Process().memory_info().rss], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            seen.append(process.memory_info().rss)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Queries that measuring puts, and their seconds, by kind of scan; filled while it goes on."""
    found: Counter[str] = Counter()
    ask, explain, measure = loop.ask, loop.explain, loop._measure
    now = ["other"]

    def timed(function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        answer = function(*args, **more)
        found[f"{now[0]} queries"] += len(answer.rows) if function is ask else 1
        found[f"{now[0]} ms"] += round(1000 * (time.perf_counter() - started))
        return answer

    def of_a_way(connection: Any, params: Any, way: Any, *args: Any, **more: Any) -> Any:
        now[0] = way.scan
        try:
            return measure(connection, params, way, *args, **more)
        finally:
            now[0] = "other"

    monkeypatch.setattr(loop, "ask", lambda *args, **more: timed(ask, *args, **more))
    monkeypatch.setattr(loop, "explain", lambda *args, **more: timed(explain, *args, **more))
    monkeypatch.setattr(loop, "_measure", of_a_way)
    return found


def report(phase: Phase, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Tunes, says what it took, and returns seconds and megabytes."""
    asked = counted(monkeypatch)
    started = time.perf_counter()
    with memory() as seen:
        found = tune.apply(phase)
    seconds, megabytes = time.perf_counter() - started, max(seen) / 1e6
    assert isinstance(found, tune.Tuning)
    print(f"\n{found}")
    print(f"{seconds:.0f} s, {megabytes:.0f} MB (at first {seen[0] / 1e6:.0f}), load {os.getloadavg()[0]:.1f}")
    print(dict(asked))
    print(f"{len(found.choices)} classes; exact p50 without a filter {found.exact_p50_ms:.0f} ms")
    for choice in found.choices:
        ways = ", ".join(f"{p.way} {p.questions}: {p.recall:.3f} {p.p50_ms:.2f} ms" for p in choice.points)
        print(f"  {choice.of}, {choice.of.share:.2%} | {ways}")
    return seconds, megabytes


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("rows", SIZES)
def test_tuning_ends_in_minutes_in_little_memory(
    rows: int, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"tuning_time_{rows}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    monkeypatch.setenv(DSN_ENV, make_conninfo(server, dbname=name))
    make(tmp_path, rows)
    phase = opened(tmp_path)
    seconds, megabytes = report(phase, monkeypatch)
    failed = [g for g in tune.verify(phase) if g.verdict != "PASS"]
    phase.end("was ended by the benchmark", "nothing")
    assert not failed, failed
    assert seconds <= max(LEAST_SECONDS, MOST_SECONDS_A_MILLION * rows / 1e6)
    assert megabytes <= MOST_MEGABYTES
