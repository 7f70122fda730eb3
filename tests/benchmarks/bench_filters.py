"""Filters × selectivity × way × recall × latency: what 70_tune chose, on queries and values that it has not seen,
next to the best way measured for each class.

pytest -s tests/benchmarks/bench_filters.py
RUNBOOK_BENCHMARK_ROWS=10000,100000 takes other sizes.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import yaml
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import exact, filter_classes, filter_values, loop, query_set, replica
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.filter_values import Estimate
from runbook_lib.benchmark.prepared import use
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, tune
from runbook_lib.params import Params
from runbook_lib.search import search_function, share_classes, statements, ways
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
# Values drawn, of which so many make a class; ways that are timed in turn, and turns.
DRAWN, OF_A_CLASS, BEST, TURNS = 3000, 20, 3, 5
CENTRES = np.random.default_rng(0).normal(size=(CLUSTERS, DIMENSION))
# Documents that a user may read, as shares of all, and users of each share.
READABLE = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
USERS = 6
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
            "INSERT INTO acl SELECT %(user)s + u, d.id FROM docs d, generate_series(0, %(users)s - 1) u"
            " WHERE hashint8(d.id * 10 + u + %(user)s)::float8 / 4294967296 + 0.5 < %(share)s",
            {"user": 10 * i, "share": share, "users": USERS},
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


def any_value(chosen: random.Random, name: str) -> str:
    """A value of a filter, of any share; not of those that the library finds for itself."""
    share = 10 ** chosen.uniform(-4, 0)
    if name == "max_price":
        return f"{1000 * share:.3f}"
    if name == "since":
        return str(np.datetime64("2026-01-01") + np.timedelta64(int(86400 * (1 - share) * (CLUSTERS + 5)), "s"))
    if name == "tags":
        own = [f"tag{int(np.exp(chosen.uniform(0, 7)))}" for _ in range(chosen.choice((1, 1, 2)))]
        return "{" + ",".join(own if chosen.random() < 0.7 else [f"about{chosen.randrange(CLUSTERS)}"]) + "}"
    if name == "tenants":
        return "{" + ",".join(str(int(np.exp(chosen.uniform(0, 7)))) for _ in range(chosen.choice((1, 3, 30)))) + "}"
    if name == "owner":
        return str(10 * chosen.randrange(len(READABLE)) + chosen.randrange(USERS))
    return f"kind{int(np.exp(chosen.uniform(0, 2.5)))}"


def unseen(phase: Phase, chosen: tune.Tuning) -> list[FilterClass]:
    """Values that 70_tune has not asked for, by the share that the planner expects, as a call is searched."""
    p, drawn = phase.params, random.Random(7)
    asked = {allowed for c in chosen.choices for allowed in c.of.asked}
    estimate, found = Estimate(phase.connection, p), dict[tuple[str, str], dict[Any, float]]()
    conditions = [name for name in FILTERS if FILTERS[name]]
    for i in range(DRAWN):
        some = [conditions[i % len(conditions)]]
        if i % 3 == 0:
            some = [n for n in FILTERS if n in drawn.sample(list(FILTERS), drawn.randint(2, len(FILTERS)))]
        allowed = tuple((name, any_value(drawn, name)) for name in some)
        if allowed in asked or not any(name in conditions for name in some):
            continue
        share = estimate.of(allowed)
        place = (some[0] if len(some) == 1 else share_classes.TOGETHER, share_classes.of(share))
        mine = found.setdefault(place, {})
        if len(mine) < OF_A_CLASS and filter_values.any_row(phase.connection, p, estimate, allowed):
            mine[allowed] = share
    return [
        filter_classes.UNFILTERED,
        *filter_classes.expected(p, {place: mine for place, mine in found.items() if mine}),
    ]


@dataclass(frozen=True)
class Row:
    """A class: how the function answered it, and the best of all ways that reach the target, ms."""

    of: FilterClass
    recall: float
    short: int
    way: Way
    ms: float
    bare_ms: float
    best: Way
    best_ms: float

    def __str__(self) -> str:
        return (
            f"| {self.of.filter or 'none'} | {self.of.bucket} | {self.way} | {self.recall:.3f} | {self.ms:.2f}"
            f" | {self.ms - self.bare_ms:+.2f} | {self.best} | {self.best_ms:.2f} |"
        )


@pytest.mark.timeout(7200)
def test_every_filter_is_searched_as_well_as_the_best_way_would(tuned: Phase) -> None:
    prove(tuned)


def prove(phase: Phase) -> None:
    chosen = tune.apply(phase)
    assert isinstance(chosen, tune.Tuning)
    search_function.move_route(phase, "vector", 100, "benchmark")
    print(f"\n{chosen}\n| filter | share expected | way | recall@{K} | ms | of it the function | best way | ms |")
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for of in unseen(phase, chosen):
        found.append(measured(phase, of))
        print(found[-1], flush=True)
    wrong = [str(r) for r in found if r.recall < TARGET or r.short]
    slow = [str(r) for r in found if r.ms > r.best_ms * WORST_RATIO + MOST_MS]
    print(
        f"{len(found)} classes, {len(wrong)} below {TARGET}, {len(slow)} slower than the best way:", *slow, sep="\n"
    )
    assert not wrong and not slow


def measured(phase: Phase, of: FilterClass) -> Row:
    """Every way once, then the function, its way and the best few in turn; of each question the fastest of its turns,
    since others use the machine too.
    """
    p = phase.params
    own = query_set.with_vectors(p, [Query(q["query_id"], q["text"]) for q in queries(UNSEEN, 10_000)])
    asked = [replace(q, allowed=of.asked[i % len(of.asked)] if of.asked else ()) for i, q in enumerate(own)]
    with exact.snapshot(phase.connection, phase.params) as connection:
        asked = exact.answered(connection, p, asked, K)
    way = way_of(phase, of)
    with replica.connect(phase.connection, phase.params, "benchmark") as connection:
        tried = [loop.measure(connection, p, each, asked) for each in every_way(phase)]
        reached = sorted((m for m in tried if m.recall >= TARGET and not m.rows_short), key=lambda m: m.p50_ms)
        call = statements.filtered_call_statement(connection, p)
        loop.ask(connection, p, call, asked[:5], K)
        seconds: dict[Any, list[list[float]]] = {each: [] for each in (None, way, *(m.way for m in reached[:BEST]))}
        for each in list(seconds) * TURNS:
            with connection.transaction():
                statements.force_route(connection, p, "vector")
                if each is not None:
                    use(connection, each.settings(p.index.method))
                statement = call if each is None else partial(bare, connection, p, each)
                answers = loop.ask(connection, p, statement, asked, K)
                seconds[each].append(answers.seconds)
                if each is None:
                    recall = answers.recall()
    ms = {each: 1000 * float(np.median(np.min(turns, axis=0))) for each, turns in seconds.items()}
    best = min((m.way for m in reached[:BEST]), key=lambda each: ms[each])
    return Row(of, recall.mean, recall.short, way, ms[None], ms[way], best, ms[best])


def bare(connection: db.Connection, params: Params, way: Way, query: Query) -> Any:
    given = [name for name, _ in query.allowed]
    return statements.route_statement(connection, params, "vector", scan=way.scan, given=given)


def every_way(phase: Phase) -> list[Way]:
    """What somebody who tries everything would try."""
    found = [ways.exact(phase.params)]
    found += [Way("index", n, "off", 20_000) for n in (20, 40, 80, 160, 320, 640)]
    found += [Way("index", n, "strict_order", 20_000) for n in (20, 80, 320)]
    return [
        *found,
        *(Way("relaxed", n, "relaxed_order", limit) for limit in (20_000, 100_000) for n in (20, 80, 320)),
    ]


def way_of(phase: Phase, of: FilterClass) -> Way:
    """How the function searches this class: by its row in the strategies."""
    if of.filter is None:
        return ways.through_the_index(phase.params, int(phase.ledger.latest("tuning")["chosen"]))  # type: ignore[index]
    rows = db.rows(phase.connection, search_function.SQL["strategies"], phase.params)
    there = {row["value"]: row for row in rows if row["filter"] == of.filter}
    row = there.get(of.listed) or there[None]
    return Way(row["scan"], row["candidates"], row["iterative_scan"], row["most_scanned"])
