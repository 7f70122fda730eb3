"""Filters × selectivity × way × recall × latency: what 70_tune chose, on queries and values that it has not seen,
next to the best way measured for each class.

pytest -s tests/benchmarks/bench_filters.py
RUNBOOK_BENCHMARK_ROWS=10000,100000 takes other sizes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import exact, filter_classes, loop, query_set, replica
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.loop import Measured
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, tune
from runbook_lib.search import search_function, statements, ways
from runbook_lib.search.ways import Way
from tests.opened import gates_passed

SIZES = [int(n) for n in os.environ.get("RUNBOOK_BENCHMARK_ROWS", "10000,100000").split(",")]
DSN_ENV = "RUNBOOK_FILTERS_DSN"
DIMENSION, CLUSTERS, K = 64, 200, 10
# Queries that tune, as many held out by it, and queries that nobody has seen.
TUNED_BY, UNSEEN = 120, 40
TARGET = 0.95
# The function may take so much longer than the best way's bare statement, and so much more for its own work.
WORST_RATIO, MOST_MS = 1.1, 0.4
CENTRES = np.random.default_rng(0).normal(size=(CLUSTERS, DIMENSION))
# Documents that a user may read, as shares of all, three users each.
READABLE = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FILTERS: dict[str, Any] = {
    "kind": None,
    "max_price": {"type": "numeric", "where": "t.price <= :max_price"},
    "since": {"type": "timestamptz", "where": "t.created_at >= :since"},
    "tags": {"type": "text[]", "where": "t.tags @> :tags"},
    "tenants": {"type": "bigint[]", "where": "t.tenant_id = ANY (:tenants)"},
    "owner": {"type": "bigint", "where": "EXISTS (SELECT FROM acl a WHERE a.doc = t.id AND a.user_id = :owner)"},
}


def embed(texts: list[str]) -> np.ndarray:
    """ "c17 any word": near the centre of cluster 17, at a place of its own."""
    found = np.empty((len(texts), DIMENSION), np.float32)
    for i, text in enumerate(texts):
        cluster, seed = (int(part[1:]) for part in text.split())
        found[i] = CENTRES[cluster] + np.random.default_rng(seed).normal(size=DIMENSION)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def create(connection: psycopg.Connection[Any], rows: int) -> None:
    """Prices have nothing to do with the vectors; time and the first tag of a document do; one in ten is deleted."""
    connection.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, body text, kind text, price numeric, created_at timestamptz,"
        " tags text[], tenant_id bigint, deleted_at timestamptz)"
    )
    connection.execute("SELECT setseed(0.5)")
    connection.execute(
        "INSERT INTO docs SELECT i, 'c' || c || ' r' || i, 'kind' || floor(exp(random() * 2.5)),"
        " (random() * 1000)::numeric(9, 3), timestamptz '2026-01-01' + (c + 10 * random()) * interval '1 day',"
        " ARRAY['about' || c, 'tag' || floor(exp(random() * 7)), 'tag' || floor(exp(random() * 7))],"
        " floor(exp(random() * 7)), CASE WHEN random() < 0.1 THEN now() END"
        " FROM generate_series(1, %s) i, LATERAL (SELECT (i * 7919) %% %s AS c) s",
        [rows, CLUSTERS],
    )
    connection.execute("CREATE TABLE acl (user_id bigint, doc bigint, PRIMARY KEY (user_id, doc))")
    for i, share in enumerate(READABLE):
        connection.execute(
            "INSERT INTO acl SELECT %(user)s + u, d.id FROM docs d, generate_series(0, 2) u"
            " WHERE hashint8(d.id * 10 + u + %(user)s)::float8 / 4294967296 + 0.5 < %(share)s",
            {"user": 10 * i, "share": share},
        )
    for index in ("docs (kind)", "docs (price)", "docs (created_at)", "docs USING gin (tags)", "docs (tenant_id)"):
        connection.execute(f"CREATE INDEX ON {index}")
    connection.execute("CREATE INDEX ON acl (doc)")
    connection.execute("VACUUM ANALYZE docs, acl")


def queries(n: int, first: int) -> list[dict[str, Any]]:
    chosen = random.Random(first)
    return [
        {"query_id": f"q{i}", "text": f"c{chosen.randrange(CLUSTERS)} q{10**9 + i}"} for i in range(first, first + n)
    ]


@pytest.fixture(params=SIZES)
def tuned(request: pytest.FixtureRequest, server: str, tmp_path: Path) -> Iterator[Phase]:
    """Phase 70, about to tune a table of so many rows."""
    name = f"filters_{request.param}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
    os.environ[DSN_ENV] = make_conninfo(server, dbname=name)
    with psycopg.connect(os.environ[DSN_ENV], autocommit=True) as connection:
        create(connection, request.param)
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries(TUNED_BY * 2, 0)))
    data = {
        "connection": {"dsn_env": DSN_ENV},
        "target": {
            "name": "docs", "table": "docs", "key": "id", "text_columns": ["body"],
            "filters": FILTERS, "always": "t.deleted_at IS NULL",
        },
        "vector": {"dimension": DIMENSION},
        "embeddings": {"source": "callable", "callable": "tests.benchmarks.bench_filters:embed"},
        "legacy": {"query": "SELECT id FROM docs WHERE body ILIKE '%' || :query || '%' ORDER BY id LIMIT :k"},
        "queries": {"file": "queries.jsonl", "k": K},
        "index": {"maintenance_work_mem_mb": 512},
        "tune": {"queries": TUNED_BY * 2, "target_recall": TARGET},
        "backfill": {"batch_rows": 20_000},
    }  # fmt: skip
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    p = load_params(tmp_path / "params.yaml")
    ledger = Ledger(db.connect(p, "benchmark ledger"), p, "benchmark", "70_tune")
    ledger.create()
    phase = gates_passed(Phase("70_tune", "benchmark", True, p, db.connect(p, "benchmark"), ledger))
    search_function.apply(phase)
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    phase.connection.execute("VACUUM ANALYZE docs")
    db.use_search_path(phase.connection)
    yield phase
    phase.end("was ended by the test", "nothing")


def every_way(rows: int) -> list[Way]:
    """What somebody who tries everything would try."""
    found = [Way("exact", 40, "off", 20_000)]
    found += [Way("index", n, "off", 20_000) for n in (40, 80, 160, 320, 640)]
    for limit in (20_000, 100_000) if rows > 20_000 else (20_000,):
        found += [Way("relaxed", n, "relaxed_order", limit) for n in (40, 160, 640)]
    return found


@dataclass(frozen=True)
class Row:
    """A class: the function, and the best way of all that reach the target."""

    of: FilterClass
    recall: float
    short: int
    p50_ms: float
    overhead_ms: float
    way: str
    best: Measured

    def __str__(self) -> str:
        return (
            f"| {self.of.filter or 'none'} | {self.of.bucket.removeprefix('expected ')} | {self.of.share:.2%}"
            f" | {self.way} | {self.recall:.3f} | {self.p50_ms:.2f} | {self.overhead_ms:+.2f} | {self.best.way}"
            f" | {self.best.p50_ms:.2f} |"
        )


def unseen(phase: Phase, seen: Sequence[FilterClass]) -> list[FilterClass]:
    """The classes again, with values that 70_tune has not asked for where there are others."""
    asked = {allowed for c in seen for allowed in c.asked}
    found = {(c.filter, c.bucket): c for c in filter_classes.of_strategies(phase, random.Random(7))}
    result = []
    for key, c in found.items():
        new = tuple(a for a in c.asked if a not in asked)
        result.append(replace(c, asked=new or c.asked, bucket=key[1] + ("" if new else " (seen)")))
    return [filter_classes.UNFILTERED, *result]


@pytest.mark.timeout(7200)
def test_every_filter_is_searched_as_well_as_the_best_way_would(tuned: Phase) -> None:
    phase, p = tuned, tuned.params
    chosen = tune.apply(phase)
    assert isinstance(chosen, tune.Tuning)
    print(f"\n{chosen}")
    search_function.move_route(phase, "vector", 100, "benchmark")
    rows = int(db.one(phase.connection, filter_classes.SQL["rows_as_queries"], p, n=1)["key"] and _rows(phase))
    found = []
    for of in unseen(phase, [c.of for c in chosen.choices]):
        found.append(measured(phase, of, rows))
        print(found[-1], flush=True)
    wrong = [str(r) for r in found if r.recall < TARGET or r.short]
    slow = [str(r) for r in found if r.p50_ms > r.best.p50_ms * WORST_RATIO + MOST_MS]
    print(f"{len(found)} classes, {len(wrong)} below {TARGET}, {len(slow)} slower than the best way")
    assert not wrong and not slow


def _rows(phase: Phase) -> int:
    return int(phase.connection.execute("SELECT count(*) AS n FROM docs").fetchone()["n"])  # type: ignore[index]


def measured(phase: Phase, of: FilterClass, rows: int) -> Row:
    p = phase.params
    own = [Query(q["query_id"], q["text"]) for q in queries(UNSEEN, 10_000)]
    own = query_set.with_vectors(p, own)
    asked = [replace(q, allowed=of.asked[i % len(of.asked)] if of.asked else ()) for i, q in enumerate(own)]
    with exact.snapshot(phase) as connection:
        asked = exact.answered(connection, p, asked, K)
    with replica.connect(phase, "benchmark") as connection:
        tried = [loop.measure(connection, p, way, asked) for way in every_way(rows)]
        reached = [m for m in tried if m.recall >= TARGET and not m.rows_short]
        best = min(reached, key=lambda m: m.p50_ms)
        best = min((loop.measure(connection, p, best.way, asked) for _ in range(2)), key=lambda m: m.p50_ms)
        with connection.transaction():
            statements.force_route(connection, p, "vector")
            call = statements.filtered_call_statement(connection, p)
            loop.ask(connection, p, call, asked[:5], K)
            answers = min((loop.ask(connection, p, call, asked, K) for _ in range(3)), key=lambda a: sum(a.seconds))
            recall = answers.recall()
        way = _way(phase, of)
        bare = min(loop.measure(connection, p, way, asked).p50_ms for _ in range(2)) if way else 0.0
    p50 = answers.latency()["p50_ms"]
    return Row(of, recall.mean, recall.short, p50, p50 - bare if way else 0.0, str(way or "as tuned"), best)


def _way(phase: Phase, of: FilterClass) -> Way | None:
    """How the function searches this class: by its row in the strategies."""
    if of.filter is None:
        return ways.through_the_index(phase.params, int(phase.ledger.latest("tuning")["chosen"]))  # type: ignore[index]
    listed = of.listed or None
    for row in db.rows(phase.connection, search_function.SQL["strategies"], phase.params):
        if row["filter"] == of.filter and row["value"] == listed and listed:
            return Way(row["scan"], row["candidates"], row["iterative_scan"], row["most_scanned"])
    return None
