"""Chunks after the migration, on every server: watched, refreshed, built again, given another model, rolled back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import comparison
from runbook_lib.core.gates import GateFailed
from runbook_lib.core.registry import MIGRATE, UNDO
from tests import servers, shapes, toy
from tests.conftest import DSN_ENV, write_params
from tests.servers import dump
from tests.stepping import step, step_all
from tests.test_chunks import APART, LENGTHEN, TEXT, assert_every_text_is_whole, best_by_hand
from tests.test_server_versions import READS_THE_INDEX, SECTIONS

RELEASES = ("16.14 with 0.8.5", "17.9 with 0.8.2", "18.6 with 0.8.6")
HNSW: dict[str, Any] = {"index": {"m": 16}}
DENSER: dict[str, Any] = {"index": {"m": 24, "ef_construction": 96}}
LISTS: dict[str, Any] = {
    "index": {"method": "ivfflat", "lists": 8},
    "tune": {"probes": [2, 4, 8], "target_recall": 0.9},
}
MORE_LISTS: dict[str, Any] = LISTS | {"index": {"method": "ivfflat", "lists": 12}}
VECTOR_INDEX = (
    "SELECT c.oid, c.reloptions FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
    " JOIN pg_am a ON a.oid = c.relam WHERE i.indrelid = 'articles_embedding'::regclass"
    " AND a.amname IN ('hnsw', 'ivfflat')"
)
SEARCH = (
    f"SELECT s.id, s.similarity, s.answered_by, substr({TEXT}, s.chunk_start, s.chunk_length)"
    " FROM search_articles(%s, %s::real[], 10, filter_status => %s) s JOIN articles a USING (id) ORDER BY s.rank"
)


@pytest.fixture(autouse=True)
def noise_is_no_slowness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred rows are searched within milliseconds by any way: what is faster is chance here."""
    monkeypatch.setattr(comparison, "FAST_ENOUGH_MS", 1000)


def create_long_articles(connection: psycopg.Connection[Any]) -> None:
    toy.create_articles(connection, trigram=False)
    connection.execute(LENGTHEN)
    connection.execute("UPDATE articles SET status = 'Rare' WHERE id % 9 = 0")
    # As for fast disks: with the default, so small a table is read whole by any way.
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET random_page_cost = 1.1".encode())
    connection.execute("VACUUM ANALYZE articles")


def assert_rows_are_answered_by_their_nearest_chunk(connection: psycopg.Connection[Any], route: str) -> None:
    connection.execute("SELECT set_config('runbook.route', %s, false)", [route])
    for query in ("cookie expires", "socket blocks in a loop"):
        vector = shapes.embed([query])[0]
        for status in (None, "Rare"):
            found = connection.execute(SEARCH, [query, vector.tolist(), status]).fetchall()
            expected = best_by_hand(connection, query, f"status = '{status}'" if status else "true")
            assert len({row[0] for row in found}) == len(found) == 10
            by_hand = {key: similarity for similarity, key in expected}
            for key, similarity, by, passage in found:
                assert by == route and similarity == pytest.approx(by_hand[key], abs=1e-3)
                assert float(shapes.embed([passage])[0] @ vector) == pytest.approx(similarity, abs=1e-3)
            if route == "vector":
                right = sum(s >= expected[9][0] - 1e-3 for _, s, *_ in found)
                assert right >= 8, f"recall {right / 10} for {query!r}, status {status}"


@pytest.mark.parametrize(
    ("release", "first", "second"),
    [*((release, HNSW, DENSER) for release in (*RELEASES, *servers.elsewhere())), (RELEASES[-1], LISTS, MORE_LISTS)],
)
def test_kept_there_and_rolled_back(
    release: str, first: dict[str, Any], second: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {
        **SECTIONS,
        **APART,
        "target": {"filters": ["status"]},
        "cut_over": SECTIONS["cut_over"] | {"route": "hybrid"},
        # Texts change here, and the judgements stay.
        "watch": {"largest_relevance_loss": 1.0},
    }
    with servers.reached(release) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        monkeypatch.setenv(DSN_ENV, dsn)
        create_long_articles(connection)
        before = dump(dsn)
        path = write_params(tmp_path, **sections | first)
        step_all("migrate", MIGRATE, path)
        assert connection.execute(READS_THE_INDEX).fetchall() == [("true",)]
        assert_every_text_is_whole(connection, shapes.embed)
        step("operate/monitor", path)

        connection.execute("UPDATE articles SET body = repeat('many more words of it. ', 15) WHERE id % 20 = 1")
        connection.execute("UPDATE articles SET title = 'short', body = 'now' WHERE id % 30 = 3")
        connection.execute("DELETE FROM articles WHERE id % 50 = 7")
        step("operate/refresh", path)
        assert_every_text_is_whole(connection, shapes.embed)
        was = connection.execute(VECTOR_INDEX).fetchall()
        path = write_params(tmp_path, **sections | second)
        step("operate/rebuild_index", path)
        now = connection.execute(VECTOR_INDEX).fetchall()
        assert len(was) == len(now) == 1 and was[0][0] != now[0][0] and was[0][1] != now[0][1]
        connection.execute("VACUUM ANALYZE articles, articles_embedding")
        step("operate/monitor", path)
        for route in ("vector", "hybrid"):
            assert_rows_are_answered_by_their_nearest_chunk(connection, route)
        step_all("undo", UNDO, path)
        assert dump(dsn) == before


def test_a_chunk_that_is_missing_or_stale_is_found_by_the_monitor(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    articles.execute(LENGTHEN)
    path = write_params(tmp_path, **SECTIONS | APART)
    step_all("migrate", MIGRATE, path)
    articles.execute("DELETE FROM articles_embedding WHERE id IN (5, 6)")
    articles.execute("ALTER TABLE articles DISABLE TRIGGER USER")
    articles.execute("UPDATE articles SET body = 'never captured' WHERE id IN (9, 12, 15)")
    articles.execute("ALTER TABLE articles ENABLE TRIGGER USER")
    with pytest.raises(GateFailed) as raised:
        step("operate/monitor", path)
    failed = {g.name: g for g in raised.value.gates.failed}
    assert failed["watch.nothing_is_missing"].found.startswith("2 ")
    assert failed["watch.nothing_is_stale"].found.startswith("3 ")


@pytest.fixture
def two_models(articles: psycopg.Connection[Any], tmp_path: Path) -> tuple[Path, Path]:
    """Params files of a target that is cut over, in chunks, and of a second one with chunks of another size and
    another model, proved up to 80_shadow.
    """
    articles.execute(LENGTHEN)
    old = write_params(tmp_path, **SECTIONS | {"embeddings": {"chunks": {"size": 40}}})
    (tmp_path / "v2").mkdir()
    new = write_params(
        tmp_path / "v2",
        **SECTIONS
        | {
            "target": {"name": "articles_v2"},
            "vector": {"column": "embedding_v2", "dimension": toy.FINER},
            "embeddings": {"callable": "tests.toy:embed_finer", "chunks": {"size": 80, "overlap": 10}},
            "model_change": {"replaces_params": "../toy.yaml"},
        },
    )
    step_all("migrate", MIGRATE, old)
    step_all("migrate", MIGRATE[:9], new)
    return old, new


def test_another_model_takes_over_with_chunks_of_its_own_and_goes_back(
    articles: psycopg.Connection[Any], database: str, two_models: tuple[Path, Path]
) -> None:
    _, new = two_models
    call = "SELECT id, similarity, chunk_start, chunk_length FROM search_articles(%s, %s::real[], 5)"
    text = "cookie leaks on logout"
    before = dump(database)
    step("operate/change_model", new)
    models = (
        (toy.embed, "articles_embedding", "embedding"),
        (toy.embed_finer, "articles_embedding_v2", "embedding_v2"),
    )
    for embed, table, column in models:
        vector = embed([text])[0].tolist()
        nearest = (
            f"SELECT 1 - (c.{column} <=> %s::real[]::vector), c.{column}_start, c.{column}_length"
            f" FROM {table} c WHERE id = %s ORDER BY 1 DESC, c.{column}_chunk LIMIT 1"
        )
        found = articles.execute(call, [text, vector]).fetchall()
        assert len({row[0] for row in found}) == 5
        for key, *answer in found:
            assert answer == pytest.approx(articles.execute(nearest, [vector, key]).fetchone(), abs=1e-6)
    step("undo/change_model", new)
    assert dump(database) == before
