"""A partitioned target: the whole way there and back, and the index put together partition by partition."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import comparison
from runbook_lib.core import db, row_counts
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE, UNDO
from runbook_lib.core.row_counts import Rows
from runbook_lib.indexes import forecast
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, preflight
from runbook_lib.sql import load
from tests import partitioned, servers, toy
from tests.conftest import DSN_ENV, write_params
from tests.evidence import assert_every_row_has_the_vector_of_its_text
from tests.partitioned import Kind
from tests.servers import dump
from tests.stepping import step_all

# The toy model is worse than LIKE on these queries, and 80_shadow would say so.
SECTIONS: dict[str, dict[str, Any]] = {
    "cut_over": {"calls_per_step": 20, "share_steps_percent": [100], "largest_relevance_loss": 1.0},
    "tune": {"ef_search": [20, 60], "target_recall": 0.9},
    "target": {"filters": ["tenant"]},
}
OWN_COLUMNS = "SELECT tableoid::regclass::text, id, tenant, title, body, status, views, tsv FROM articles ORDER BY id"


@pytest.fixture
def empty(database: str) -> Any:
    """A superuser's connection to a database without tables."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.mark.parametrize("kind", ["list", "range", "hash"])
def test_there_and_back(
    empty: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    partitioned.create_articles(empty, kind)
    _there_and_back(empty, database, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def older_server() -> Iterator[str]:
    """DSN of a server of PostgreSQL 16, which has no extension but pgvector."""
    with (
        tempfile.TemporaryDirectory(prefix="rb-", ignore_cleanup_errors=True) as folder,
        servers.running("16.14 with 0.8.5", Path(folder) / "data") as dsn,
    ):
        yield dsn


@pytest.mark.parametrize("kind", ["list", "range", "hash"])
def test_there_and_back_on_postgresql_16(
    older_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    database = make_conninfo(older_server, dbname=f"parted_by_{kind}")
    with psycopg.connect(older_server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(f"parted_by_{kind}")))
    monkeypatch.setenv(DSN_ENV, database)
    with psycopg.connect(database, autocommit=True) as connection:
        assert connection.info.server_version // 10_000 == 16
        partitioned.create_articles(connection, kind, trigram=False)
        _there_and_back(connection, database, tmp_path, monkeypatch)


def _there_and_back(
    empty: psycopg.Connection[Any], database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two hundred rows are searched within milliseconds by any way: what is faster is chance here.
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)
    before, own_rows = dump(database), empty.execute(OWN_COLUMNS).fetchall()
    path = write_params(tmp_path, **SECTIONS)

    step_all("migrate", MIGRATE, path)
    assert empty.execute("SELECT route, share_percent FROM runbook.route").fetchall() == [("vector", 100)]
    state = partitioned.index_state(empty)
    assert state["articles_embedding_hnsw"] == (True, False), "the index of the parent is valid, and part of no other"
    assert set(state.values()) <= {(True, False), (True, True)}
    assert len(state) == len(empty.execute("SELECT 1 FROM pg_partition_tree('articles')").fetchall())
    assert empty.execute(OWN_COLUMNS).fetchall() == own_rows

    step_all("undo", UNDO, path)
    assert dump(database) == before
    assert empty.execute(OWN_COLUMNS).fetchall() == own_rows


@pytest.fixture
def parted(articles: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The toy table, partitioned by a list of tenants, in the place of the ordinary one."""
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, "list")
    return articles


def test_a_row_that_moves_to_another_partition_under_the_update_is_taken_there(
    parted: psycopg.Connection[Any], database: str, open_phase: Callable[..., Phase]
) -> None:
    phase = open_phase("50_backfill", locks={"timeout_ms": 20_000})
    for module in (extension, expand_schema, load_embeddings):
        module.apply(phase)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            backfill.apply(phase)
        except BaseException as error:
            errors.append(error)

    with psycopg.connect(database) as mover:
        # Row 1 is of tenant acme; the backfill waits for the row, and finds it gone to another partition.
        mover.execute("UPDATE articles SET tenant = 'bolt' WHERE id = 1")
        filling = threading.Thread(target=run)
        filling.start()
        until = time.monotonic() + 20
        while time.monotonic() < until:
            if parted.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'transactionid'").fetchone():
                break
            time.sleep(0.05)
        mover.commit()
        filling.join(60)
    assert errors == []
    assert assert_every_row_has_the_vector_of_its_text(parted) == toy.ROWS
    assert backfill.verify(phase).passed
    noted = phase.ledger.latest("backfill")
    assert noted is not None and noted["put_off"] > 0, "the batch with the moved row was put off, and done at the end"


def test_counters_are_those_of_the_partitions(
    parted: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    phase = open_phase("50_backfill", backfill={"strategy": "key_ranges"})
    found = preflight.facts(phase)
    sizes = dict(
        parted.execute(
            "SELECT i.relname, (SELECT sum(pg_relation_size(t.relid)) FROM pg_partition_tree(i.oid) t)::bigint"
            " FROM pg_class i WHERE i.relkind = 'I' AND i.relname LIKE 'articles\\_%'"
        ).fetchall()
    )
    named = {name: size for name, _, size, _ in found.indexes}
    assert named == {name: sizes[name] for name in ("articles_pkey", "articles_trgm", "articles_tsv")}
    assert (found.rows, found.rows_are_counted, found.partitions) == (201, False, 4)
    assert found.largest_partition == pytest.approx(100 / 201)
    of_largest = forecast.forecast(100, phase.params).build_memory_bytes
    assert preflight.expected(found, phase.connection, phase.params).build_memory_bytes == of_largest, (
        "one build at a time"
    )
    for leaf in partitioned.leaves(parted):
        # Room on each page, so that some updates stay on theirs.
        parted.execute(f"ALTER TABLE {leaf} SET (fillfactor = 50)")
    parted.execute("VACUUM FULL ANALYZE articles")
    for module in (extension, expand_schema, load_embeddings):
        module.apply(phase)
    backfill.apply(phase)
    noted = phase.ledger.latest("backfill")
    parted.execute("SELECT pg_stat_force_next_flush()")
    hot = parted.execute(
        "SELECT sum(n_tup_hot_upd)::float / sum(n_tup_upd) FROM pg_stat_user_tables WHERE relname LIKE 'articles\\_%'"
    ).fetchone()
    assert noted is not None and hot is not None and hot[0] > 0.1
    assert noted["hot_share"] == pytest.approx(hot[0], abs=0.02)
    counted = db.one(phase.connection, load("backfill")["server_counts"], phase.params, table="articles")
    stored = parted.execute("SELECT sum(pg_table_size(relid)) FROM pg_partition_tree('articles')").fetchone()
    assert stored == (counted["bytes"],) and counted["bytes"] > 0
    whole = row_counts.of(phase.connection, phase.params)
    assert whole == Rows(201, counted=False), "not those of the parent beside those of its partitions"


def test_a_partition_that_does_not_capture_changes_is_named(
    parted: psycopg.Connection[Any], open_phase: Callable[..., Phase]
) -> None:
    phase = open_phase("30_expand_schema")
    for module in (extension, expand_schema):
        module.apply(phase)
    gates = {g.name: g for g in expand_schema.verify(phase)}
    assert gates["schema.every_partition_captures"].found == "4 of 4 partitions"
    parted.execute("ALTER TABLE articles_bolt_1 DISABLE TRIGGER runbook_articles_update")
    deaf = {g.name: g for g in expand_schema.verify(phase)}["schema.every_partition_captures"]
    assert str(deaf) == (
        'FAIL    schema.every_partition_captures   "public"."articles"\n'
        "  found   public.articles_bolt_1 of 4 partitions do not\n"
        "  needed  both triggers on every partition, enabled\n"
        "  danger  rows that are written to those partitions keep no vector, or an old one\n"
        "  do      ALTER TABLE public.articles_bolt_1 ENABLE TRIGGER …, for each trigger of articles named runbook_…"
    )


@pytest.mark.parametrize("kind", ["range", "hash"])
def test_vectors_beside_a_partitioned_table_stand_in_one_table(
    articles: psycopg.Connection[Any], open_phase: Callable[..., Phase], kind: Kind
) -> None:
    articles.execute("DROP TABLE articles")
    partitioned.create_articles(articles, kind)
    phase = open_phase("60_build_index", vector={"layout": "side_table"})
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
        assert module.verify(phase).failed == () or module is expand_schema
    assert assert_every_row_has_the_vector_of_its_text(articles, "side_table") == toy.ROWS
    articles.execute("DELETE FROM articles WHERE id = 7")
    assert articles.execute("SELECT count(*) FROM articles_embedding WHERE id = 7").fetchone() == (0,)
    assert partitioned.index_state(articles) == {"articles_embedding_hnsw": (True, False)}
    for module in (build_index, expand_schema):
        module.undo(phase)
        assert module.verify_undone(phase).passed
