"""Vectors in a table of their own: there and back, what others change meanwhile, and when it pays."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import vector_store
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import statements
from tests import toy
from tests.evidence import assert_every_row_has_the_vector_of_its_text

Open = Callable[..., Phase]


@pytest.fixture
def staged(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 50 with vectors beside the table; they are staged."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("50_backfill", **{"vector": {"layout": "side_table"}, **sections})
        expand_schema.record_start(phase)
        extension.apply(phase)
        expand_schema.apply(phase)
        load_embeddings.apply(phase)
        return phase

    return make


def proved(articles: psycopg.Connection[Any]) -> int:
    return assert_every_row_has_the_vector_of_its_text(articles, "side_table")


def test_the_staging_table_takes_its_place(staged: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = staged()
    before = articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall()
    assert expand_schema.verify(phase).passed
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert proved(articles) == toy.ROWS
    assert articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall() == before, "no row was written"
    assert expand_schema.plan(phase).statements == (), "the staging table was made again"
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and (recorded["rows"], recorded["strategy"]) == (toy.ROWS, "side_table")


def test_run_twice_the_second_changes_nothing(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = staged()
    backfill.apply(phase)
    before = articles.execute("SELECT id, xmin FROM articles_embedding ORDER BY id").fetchall()
    load_embeddings.apply(phase)
    backfill.apply(phase)
    assert articles.execute("SELECT id, xmin FROM articles_embedding ORDER BY id").fetchall() == before


@pytest.mark.parametrize("after", range(5))
def test_stopped_after_any_statement_it_goes_on(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    phase = staged()
    calls, do = iter(range(100)), Phase.do

    def stopping(self: Phase, statement: Any) -> Any:
        if statement.name.startswith("sidetable.") and next(calls) == after:
            raise KeyboardInterrupt
        return do(self, statement)

    with monkeypatch.context() as patch:
        patch.setattr(Phase, "do", stopping)
        with pytest.raises(KeyboardInterrupt):
            backfill.apply(phase)
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert proved(articles) == toy.ROWS
    valid = articles.execute(
        "SELECT convalidated FROM pg_constraint WHERE conname = 'runbook_articles_vector_of_row'"
    )
    assert valid.fetchall() == [(True,)]


def test_rows_that_change_before_and_after_the_promotion(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = staged()
    articles.execute("DELETE FROM articles WHERE id IN (7, 8)")
    articles.execute("UPDATE articles SET body = 'changed after staging' WHERE id = 9")
    articles.execute("UPDATE articles SET title = NULL, body = '' WHERE id = 10")
    articles.execute("INSERT INTO articles (id, title) VALUES (9001, 'inserted after staging')")
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert proved(articles) == toy.ROWS - 2
    articles.execute("DELETE FROM articles WHERE id = 11")
    articles.execute("UPDATE articles SET id = 9002 WHERE id = 12")
    articles.execute("UPDATE articles SET body = 'changed after the backfill' WHERE id = 13")
    articles.execute("INSERT INTO articles (id, title) VALUES (9003, 'inserted after the backfill')")
    assert next(iter(backfill.verify(phase))).figures["newer"] == 2, "a key that changes keeps its vector"
    load_embeddings.apply(phase)
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert proved(articles) == toy.ROWS - 2


def test_readers_of_the_table_may_read_its_vectors(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute("GRANT SELECT ON articles TO PUBLIC")
    phase = staged()
    backfill.apply(phase)
    granted = articles.execute("SELECT has_table_privilege('public', 'articles_embedding', 'SELECT')").fetchone()
    assert granted == (True,)


def test_the_index_is_built_and_a_search_uses_it(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = staged()
    backfill.apply(phase)
    build_index.apply(phase)
    assert build_index.verify(phase).passed
    statement = statements.route_statement(phase.connection, phase.params, "vector")
    values = {"query": "cookie leaks", "embedding": list(map(float, toy.embed(["cookie leaks"])[0])), "k": 3}
    with phase.connection.transaction():
        phase.connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        plan = phase.connection.execute(b"EXPLAIN " + statement.as_bytes(phase.connection), values).fetchall()
        found = phase.connection.execute(statement, values).fetchall()
    assert any("articles_embedding_hnsw" in str(line) for line in plan)
    assert len(found) == 3


def test_undo_leads_back_to_the_catalogue_of_the_start(
    staged: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = staged()
    backfill.apply(phase)
    build_index.apply(phase)
    assert not expand_schema.verify_as_at_start(phase).passed
    build_index.undo(phase)
    expand_schema.undo(phase)
    extension.undo(phase)
    assert expand_schema.verify_undone(phase).passed
    assert expand_schema.verify_as_at_start(phase).passed
    assert articles.execute("SELECT to_regclass('articles_embedding')").fetchone() == (None,)


def test_the_plan_can_be_printed_before_anything_is_there(open_phase: Open) -> None:
    phase = open_phase("50_backfill", execute=False, vector={"layout": "side_table"})
    assert "sidetable.validate" in [s.name for s in backfill.plan(phase)]
    assert "RENAME TO" in str(backfill.plan(phase))
    assert "ON DELETE CASCADE" in str(expand_schema.plan(phase))


def test_a_table_of_many_dear_updates_wants_its_vectors_beside() -> None:
    assert vector_store.COLUMN.core_share(1000) == 0.73
    assert vector_store.advice(1000) == (
        "side_table: in the column, updates that are not HOT would take 73.0% of a core more than today"
    )
    assert vector_store.advice(1).startswith("column: ")


def test_both_layouts_stand_side_by_side(open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    articles.execute("UPDATE articles SET views = views + 1")
    shown = str(vector_store.compare(open_phase("30_expand_schema")))
    for part in ("column", "side_table", "830 µs, today 100 µs", "108 µs, today 100 µs", "1.13 ×", "✔"):
        assert part in shown
