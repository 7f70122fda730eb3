"""A table of tenants on a real cluster, which RUNBOOK_CITUS_DSN names; skipped without one. Its key has two columns,
and it is distributed by the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from runbook_lib.backfill import change_queue, vector_store
from runbook_lib.core import db
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.target import load_params
from runbook_lib.sql.key import text_of
from tests import composite, toy
from tests.drills.test_citus import DSN, SECTIONS, Connection, _workers, distributed
from tests.servers import dump
from tests.stepping import step, step_all

pytestmark = [pytest.mark.drill, pytest.mark.skipif(not DSN, reason="RUNBOOK_CITUS_DSN names no cluster")]
TENANTS = composite.SHAPES["tenants"]


@pytest.fixture
def tenants(monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """The coordinator, with a table of tenants, distributed by hash of the first column of its key."""
    with distributed(monkeypatch, lambda c: composite.create(c, TENANTS), "tenant_id") as connection:
        yield connection


def test_a_tenant_table_there_and_back(tenants: Connection, tmp_path: Path) -> None:
    before = dump(DSN)
    path = composite.params_file(
        tmp_path,
        TENANTS,
        **SECTIONS
        | {"target": {"name": "articles", "distributed": "citus", "filters": ["tenant_id"]}}
        | {"legacy": {"query": composite.OF_TENANTS}},
    )
    step_all("migrate", MIGRATE, path)
    assert tenants.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    assert composite.assert_every_row_has_the_vector_of_its_text(tenants, TENANTS) == toy.ROWS
    placed = "SELECT DISTINCT colocation_id FROM citus_tables WHERE table_name::text ~ 'articles(_staging|_queue)?$'"
    assert len(tenants.execute(placed).fetchall()) == 1
    vector = toy.embed(["cookie leaks"])[0].tolist()
    of_one = "SELECT tenant_id, id, answered_by FROM search_articles('cookie leaks', %s::real[], 3, 2)"
    for dsn in [DSN, *_workers(tenants)]:
        with psycopg.connect(dsn, autocommit=True) as node:
            answers = node.execute(of_one, [vector]).fetchall()
        assert len(answers) == 3 and {(tenant, by) for tenant, _, by in answers} == {(2, "vector")}
    changed = "UPDATE articles SET title = 'thread blocks', body = NULL WHERE tenant_id = 1 AND id < %s"
    tenants.execute(changed, [TENANTS.value(21)[1]])
    tenants.execute("DELETE FROM articles WHERE tenant_id = %s AND id = %s", TENANTS.value(24))
    step("operate/refresh", path)
    assert tenants.execute("SELECT count(*) FROM runbook.articles_queue").fetchall() == [(0,)]
    assert composite.assert_every_row_has_the_vector_of_its_text(tenants, TENANTS) == toy.ROWS - 1
    step_all("undo", UNDO, path)
    assert dump(DSN) == before


def test_a_batch_of_one_shard_of_tenants_is_one_task(tenants: Connection, tmp_path: Path) -> None:
    path = composite.params_file(
        tmp_path, TENANTS, **SECTIONS | {"target": {"name": "articles", "distributed": "citus"}}
    )
    step_all("migrate", MIGRATE[: MIGRATE.index("50_backfill")], path)
    params = load_params(path)
    with db.connect(params, "drill") as connection:
        keys = [text_of((2, i)) for i in range(10)]
        for query in (
            vector_store.of(params).write(params, keys, None).query,
            db.reading(change_queue.SQL["lock_rows"], params),
        ):
            plan = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) ") + query, {"keys": keys}).fetchone()
            assert plan is not None and '"Task Count": 1,' in json.dumps(next(iter(plan.values())))
