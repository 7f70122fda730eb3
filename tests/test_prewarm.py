"""The finished index read into the cache: only on request, as far as it fits, and said beforehand where it cannot."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.phase import Phase
from runbook_lib.indexes import prewarm
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings, preflight

Connection = psycopg.Connection[Any]
Open = Callable[..., Phase]
ASKED = {"index": {"prewarm": True}}


def _indexed(phase: Phase) -> Phase:
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    return phase


def _cached(connection: Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_buffercache WHERE relfilenode = pg_relation_filenode('articles_embedding_hnsw')"
        " AND reldatabase = (SELECT oid FROM pg_database WHERE datname = current_database())"
    ).fetchone()
    return int(row[0]) if row else -1


def test_a_missing_extension_is_told_in_preflight_and_never_made(articles: Connection, open_phase: Open) -> None:
    phase = open_phase(**ASKED)
    (failed,) = preflight.look(phase).failed
    assert str(failed) == (
        f"FAIL    preflight.prewarm_is_possible   {articles.info.dbname}\n"
        "  found   pg_prewarm is offered by the server, not installed here\n"
        "  needed  the extension pg_prewarm, since index.prewarm is true\n"
        "  danger  the first searches after the build would read the index from disk\n"
        "  do      CREATE EXTENSION pg_prewarm; the runbook does not do it by itself; or set index.prewarm: false"
    )
    shown = prewarm.apply(_indexed(open_phase("60_build_index", **ASKED)))
    assert "not done: pg_prewarm is not installed" in str(shown)
    assert not articles.execute("SELECT FROM pg_extension WHERE extname = 'pg_prewarm'").fetchall()


def test_nothing_is_read_unless_it_is_asked_for(articles: Connection, open_phase: Open) -> None:
    articles.execute("CREATE EXTENSION pg_prewarm")
    phase = _indexed(open_phase("60_build_index"))
    assert list(prewarm.gates(phase)) == [] and prewarm.plan(phase).statements == ()
    assert str(prewarm.apply(phase)).endswith("not asked for: index.prewarm is false")
    assert phase.ledger.latest("prewarm") is None


def test_the_whole_index_is_in_the_cache_afterwards(articles: Connection, open_phase: Open) -> None:
    articles.execute('CREATE SCHEMA "Tools"; CREATE EXTENSION pg_prewarm SCHEMA "Tools"')
    articles.execute("CREATE EXTENSION pg_buffercache")
    phase = open_phase("60_build_index", **ASKED)
    assert preflight.look(phase).passed
    assert prewarm.plan(_plan_only(open_phase)).statements == (), "no index yet, nothing to read"
    _indexed(phase)
    articles.execute("SELECT pg_buffercache_evict_relation('articles_embedding_hnsw')")
    assert _cached(articles) == 0
    shown = prewarm.apply(phase)
    blocks = articles.execute("SELECT pg_relation_size('articles_embedding_hnsw') / 8192").fetchone()
    assert blocks == (_cached(articles),) and "all of it" in str(shown)
    noted = phase.ledger.latest("prewarm")
    assert noted is not None and noted["read_bytes"] == noted["index_bytes"] == blocks[0] * 8192


def _plan_only(open_phase: Open) -> Phase:
    return open_phase("60_build_index", execute=False, **ASKED)


def test_an_index_larger_than_the_cache_is_read_in_part_with_a_warning(
    articles: Connection, open_phase: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles.execute("CREATE EXTENSION pg_prewarm; CREATE EXTENSION pg_buffercache")
    phase = _indexed(open_phase("60_build_index", **ASKED))
    buffers = articles.execute("SELECT setting::int FROM pg_settings WHERE name = 'shared_buffers'").fetchone()
    assert buffers is not None
    monkeypatch.setattr(prewarm, "SHARE_OF_BUFFERS", 5 / buffers[0])
    articles.execute("SELECT pg_buffercache_evict_relation('articles_embedding_hnsw')")
    assert "the index does not fit into 0% of shared_buffers" in str(prewarm.apply(phase))
    assert _cached(articles) == 5


def test_an_index_that_is_not_valid_is_left_alone(articles: Connection, open_phase: Open) -> None:
    articles.execute("CREATE EXTENSION pg_prewarm")
    phase = _indexed(open_phase("60_build_index", **ASKED))
    articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_embedding_hnsw'::regclass")
    assert prewarm.plan(phase).statements == ()
