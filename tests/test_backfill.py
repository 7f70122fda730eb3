"""Phase 50: every vector reaches its row, none an older text, and a stopped run goes on."""

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib import backfill, db, extension, refresh, schema, staging
from runbook_lib.gates import LockNotObtained
from runbook_lib.phase import Phase
from tests import toy

Open = Callable[..., Phase]


@pytest.fixture
def loaded(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 50 on a table whose vectors are staged."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("50_backfill", **{"backfill": {"batch_rows": 30}, **sections})
        extension.apply(phase)
        schema.apply(phase)
        staging.apply(phase)
        return phase

    return make


def assert_every_row_has_the_vector_of_its_text(articles: psycopg.Connection[Any]) -> int:
    """Embeds every text anew and compares; returns the rows with text."""
    rows = articles.execute(
        "SELECT id, concat_ws(E'\\n', title, body), embedding::real[], embedding_updated_at FROM articles ORDER BY id"
    ).fetchall()
    with_text = [r for r in rows if r[1].strip()]
    assert [r[0] for r in with_text if r[2] is None] == []
    assert [r[0] for r in rows if not r[1].strip() and r[2] is not None] == []
    assert np.allclose([r[2] for r in with_text], toy.embed([r[1] for r in with_text]), atol=1e-6)
    assert all(r[3] is not None for r in with_text)
    return len(with_text)


def test_every_row_gets_its_vector(loaded: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = loaded()
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and (recorded["rows"], recorded["batches"]) == (toy.ROWS, 7)


def test_a_row_changed_during_the_backfill_is_never_given_its_old_vector(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded()
    articles.execute("UPDATE articles SET body = 'changed before its batch' WHERE id IN (1, 150)")
    articles.execute("INSERT INTO articles (id, title) VALUES (9001, 'inserted meanwhile')")
    articles.execute("DELETE FROM articles WHERE id = 77")
    articles.execute("UPDATE articles SET title = NULL, body = ' ' WHERE id = 88")
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "drain", lambda phase: refresh.Drained(0, 0, 0))
        backfill.apply(phase)
    bare = articles.execute("SELECT id FROM articles WHERE embedding IS NULL ORDER BY 1").fetchall()
    assert [b[0] for b in bare] == [1, 88, 150, 201, 9001], "no old vector was given"
    assert [(g.verdict, g.figures.get("missing")) for g in backfill.verify(phase)] == [("FAIL", 3), ("PASS", None)]
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert_every_row_has_the_vector_of_its_text(articles)


def test_a_text_emptied_after_the_backfill_loses_its_vector(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded()
    backfill.apply(phase)
    articles.execute("UPDATE articles SET title = '', body = NULL WHERE id = 9")
    assert [g.verdict for g in backfill.verify(phase)] == ["PASS", "FAIL"]
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert_every_row_has_the_vector_of_its_text(articles)


def test_run_twice_the_second_changes_no_row(loaded: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = loaded()
    backfill.apply(phase)
    before = articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall()
    backfill.apply(phase)
    assert articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall() == before


def test_stopped_after_any_batch_it_goes_on(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded()
    calls = iter(range(100))

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return in_short_tries(*args, **kwargs)

    in_short_tries = db.in_short_tries
    with monkeypatch.context() as patch:
        patch.setattr(db, "in_short_tries", stopping)
        with pytest.raises(KeyboardInterrupt):
            backfill.apply(phase)
    done = articles.execute("SELECT count(embedding) FROM articles").fetchone()
    assert done == (90,)
    backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS


def test_a_row_that_somebody_holds_stops_it_with_the_holder_named(
    loaded: Callable[..., Phase], database: str
) -> None:
    phase = loaded()
    with psycopg.connect(database, application_name="the nightly job") as holder:
        holder.execute("UPDATE articles SET views = 1 WHERE id = 40")
        with pytest.raises(LockNotObtained, match="the nightly job"):
            backfill.apply(phase)
        holder.rollback()
    backfill.apply(phase)
    assert backfill.verify(phase).passed


def test_drain_puts_a_failed_batch_back(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded()
    backfill.apply(phase)
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")

    def broken(texts: list[str]) -> np.ndarray:
        raise OSError("the model is away")

    with monkeypatch.context() as patch:
        patch.setattr("runbook_lib.embed.model", lambda params: broken)
        with pytest.raises(OSError, match="away"):
            refresh.drain(phase)
    assert articles.execute("SELECT count(*) FROM runbook.articles_queue").fetchone() == (5,)
    assert refresh.drain(phase) == refresh.Drained(changes=5, updated=5, refused=0)
    assert_every_row_has_the_vector_of_its_text(articles)
