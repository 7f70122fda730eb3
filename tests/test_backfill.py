"""Phase 50: every vector reaches its row, none an older text, and a stopped run goes on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib.backfill import batch_ranges, batch_strategy, change_queue, throttle, workers
from runbook_lib.core.cell_order import OutOfOrder
from runbook_lib.core.gates import BadInput, LockNotObtained, OutsideWindow
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from tests import toy
from tests.conftest import write_params
from tests.evidence import assert_every_row_has_the_vector_of_its_text

Open = Callable[..., Phase]


@pytest.fixture
def loaded(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 50 on a table whose vectors are staged."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("50_backfill", **{"backfill": {"batch_rows": 30}, **sections})
        extension.apply(phase)
        expand_schema.apply(phase)
        load_embeddings.apply(phase)
        return phase

    return make


def test_every_row_gets_its_vector(loaded: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = loaded()
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None
    assert (recorded["rows"], recorded["strategy"], recorded["windows_taken_over"]) == (
        toy.ROWS,
        "page_interleaved",
        0,
    )


@pytest.mark.parametrize("strategy", ["page_interleaved", "key_ranges"])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_strategy_with_any_number_of_workers(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], strategy: str, workers: int
) -> None:
    phase = loaded(backfill={"strategy": strategy, "workers": workers, "batch_rows": 20, "most_batch_rows": 20})
    backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["batches"] >= toy.ROWS / 20
    assert recorded["reason"].startswith("asked for by backfill.strategy; ")


def test_partitions_are_gone_through_one_by_one(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute(
        "ALTER TABLE articles RENAME TO old; CREATE TABLE articles (LIKE old INCLUDING DEFAULTS INCLUDING GENERATED,"
        " PRIMARY KEY (id)) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF articles FOR VALUES FROM (1) TO (100);"
        'CREATE TABLE "High %" PARTITION OF articles FOR VALUES FROM (100) TO (10000);'
        "CREATE INDEX ON articles USING gin (body gin_trgm_ops);"
        "INSERT INTO articles (id, title, body) SELECT id, title, body FROM old; ANALYZE articles"
    )
    phase = loaded(backfill={"strategy": "page_interleaved"})
    backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    parts = articles.execute("SELECT part, sum(rows) FROM runbook.articles_window GROUP BY 1 ORDER BY 1").fetchall()
    assert parts == [('public."High %"', 101), ("public.low", 99)]


def test_a_row_changed_during_the_backfill_is_never_given_its_old_vector(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded()
    articles.execute("UPDATE articles SET body = 'changed before its batch' WHERE id IN (1, 150)")
    articles.execute("INSERT INTO articles (id, title) VALUES (9001, 'inserted meanwhile')")
    articles.execute("DELETE FROM articles WHERE id = 77")
    articles.execute("UPDATE articles SET title = NULL, body = ' ' WHERE id = 88")
    with monkeypatch.context() as patch:
        patch.setattr(change_queue, "drain", lambda phase: change_queue.Drained(0, 0, 0))
        backfill.apply(phase)
    bare = articles.execute("SELECT id FROM articles WHERE embedding IS NULL ORDER BY 1").fetchall()
    assert [b[0] for b in bare] == [1, 88, 150, 201, 9001], "no old vector was given"
    assert [(g.verdict, g.figures.get("missing")) for g in backfill.verify(phase)] == [
        ("FAIL", 3),
        ("PASS", None),
        ("PASS", None),
        ("PASS", None),
    ]
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert_every_row_has_the_vector_of_its_text(articles)


def test_a_text_emptied_after_the_backfill_loses_its_vector(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded()
    backfill.apply(phase)
    articles.execute("UPDATE articles SET title = '', body = NULL WHERE id = 9")
    assert next(iter(backfill.verify(phase))).figures["newer"] == 1
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    assert_every_row_has_the_vector_of_its_text(articles)


def test_run_twice_the_second_changes_no_row(loaded: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = loaded()
    backfill.apply(phase)
    before = articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall()
    backfill.apply(phase)
    assert articles.execute("SELECT id, xmin FROM articles ORDER BY id").fetchall() == before


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_stopped_after_any_batch_it_goes_on(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    phase = loaded(backfill={"most_batch_rows": 20})
    calls = iter(range(100))

    def stopping(*args: Any) -> Any:
        if next(calls) == after:
            raise KeyboardInterrupt
        return update(*args)

    update = workers._update
    with monkeypatch.context() as patch:
        patch.setattr(workers, "_update", stopping)
        with pytest.raises(KeyboardInterrupt):
            backfill.apply(phase)
    done = articles.execute("SELECT count(embedding) FROM articles").fetchone()
    assert done is not None and (done[0] > 0) == (after > 0) and done[0] < toy.ROWS
    backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["rows"] == toy.ROWS - done[0], "no row was updated twice"


def test_a_session_may_come_to_help(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    phase = loaded()
    params_file = str(write_params(tmp_path))
    with pytest.raises(BadInput, match="no open range"):
        backfill.help_out(params_file)
    with phase.opened():
        batch_ranges.create(phase)
        batch_ranges.cut(phase.connection, phase.params, batch_strategy.choose(phase.connection, phase.params))
    with pytest.raises(OutOfOrder, match="50_backfill cannot be helped: 40_load_embeddings: NOT RUN"):
        backfill.help_out(params_file)
    replace(phase.ledger, phase="40_load_embeddings").append("phase", {"verdict": "PASS"})
    assert "200" in str(backfill.help_out(params_file))
    backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and (recorded["rows"], recorded["workers"]) == (0, 1)


def test_a_row_that_somebody_holds_stops_it_with_the_holder_named(
    loaded: Callable[..., Phase], database: str
) -> None:
    phase = loaded()
    with psycopg.connect(database, application_name="the nightly job") as holder:
        holder.execute("UPDATE articles SET views = 1 WHERE id = 40")
        with pytest.raises(LockNotObtained) as raised:
            backfill.apply(phase)
        left = holder.execute("SELECT array_agg(id) FROM articles WHERE embedding IS NULL AND title IS NOT NULL")
        assert left.fetchone() == ([40],), "every other row has its vector"
        holder.rollback()
    error = raised.value
    assert error.found.startswith("id 40 held by another session; pid ") and "the nightly job" in error.found
    assert (error.needed, error.danger, error.do) == (
        "these rows free within 3 tries of 100 ms; the others are done",
        "the new search would never find them",
        "end that session, or wait for it, then run 50_backfill again: only these rows are left",
    )
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["rows"] == toy.ROWS - 1, "what was done stands in the ledger"
    backfill.apply(phase)
    assert backfill.verify(phase).passed
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["rows"] == 1


def test_drain_puts_a_failed_batch_back(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded()
    backfill.apply(phase)
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")

    def broken(texts: list[str]) -> np.ndarray:
        raise OSError("the model is away")

    with monkeypatch.context() as patch:
        patch.setattr("runbook_lib.embeddings.embedding.model", lambda params: broken)
        with pytest.raises(embedding.ModelAway, match="the model is away"):
            change_queue.drain(phase)
    assert articles.execute("SELECT count(*) FROM runbook.articles_queue").fetchone() == (5,)
    assert change_queue.drain(phase) == change_queue.Drained(changes=5, updated=5, refused=0)
    assert_every_row_has_the_vector_of_its_text(articles)


def _closes_after(monkeypatch: pytest.MonkeyPatch, looks: int, answers: int) -> None:
    """The maintenance window is open for so many looks, then shut for so many."""
    asked = iter(range(1000))
    shut = range(looks, looks + answers)
    monkeypatch.setattr(throttle.maintenance_window, "is_open", lambda params, now=None: next(asked) not in shut)


def test_the_window_that_closes_ends_the_backfill_where_the_run_is_to_stop(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded(run={"window": "22:00-05:00", "outside_window": "stop"}, backfill={"most_batch_rows": 20})
    with monkeypatch.context() as patch:
        patch.setattr(throttle, "SECONDS_BETWEEN_LOOKS", 0.01)
        _closes_after(patch, 1, 2)
        with pytest.raises(OutsideWindow, match="22:00-05:00"):
            backfill.apply(phase)
        patch.setattr(throttle.maintenance_window, "is_open", lambda params, now=None: True)
        backfill.apply(phase)
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS


def test_the_wait_for_the_window_is_no_pause_that_is_too_long(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = loaded(run={"window": "22:00-05:00"}, health={"longest_pause_minutes": 1})
    monkeypatch.setattr(throttle, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(throttle.maintenance_window, "enter", lambda params: 3600.0)
    _closes_after(monkeypatch, 0, 1)
    backfill.apply(phase)
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None
    assert recorded["pauses"] == [{"reason": "outside the maintenance window", "seconds": 3600.0}]
    assert assert_every_row_has_the_vector_of_its_text(articles) == toy.ROWS


def test_what_was_written_since_the_last_drain_waits_and_is_no_fault(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded()
    backfill.apply(phase)
    articles.execute("UPDATE articles SET body = body || ' again' WHERE id <= 3")
    articles.execute("INSERT INTO articles (title, body) VALUES ('new', 'written by somebody who never stops')")
    gates = backfill.verify(phase)
    assert gates.passed
    assert "; 4 were written since the last drain began; 4 queued" in next(iter(gates)).found
    # A change that the drain should have finished, or one that was never captured, is a fault as before.
    articles.execute("UPDATE runbook.articles_queue SET queued_at = queued_at - interval '1 hour', error = 'held'")
    missing, stale = backfill.verify(phase).failed
    assert (missing.figures["missing"], stale.figures["stale"]) == (1, 3)


def test_what_a_transaction_wrote_that_ended_after_the_drain_is_no_fault(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any], database: str
) -> None:
    phase = loaded()
    with psycopg.connect(database) as slow:
        slow.execute("INSERT INTO articles (title, body) VALUES ('slow', 'begun before the drain, ended after it')")
        backfill.apply(phase)
    assert backfill.verify(phase).passed


def test_vectors_of_rows_without_text_go_in_batches(
    loaded: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = loaded(backfill={"batch_rows": 10, "most_batch_rows": 10})
    backfill.apply(phase)
    articles.execute(
        "ALTER TABLE articles DISABLE TRIGGER USER; UPDATE articles SET title = '', body = '' WHERE id <= 25;"
        "ALTER TABLE articles ENABLE ALWAYS TRIGGER runbook_articles_insert,"
        " ENABLE ALWAYS TRIGGER runbook_articles_update"
    )
    backfill.apply(phase)
    cleared = [
        e["body"]["rows"]
        for e in phase.ledger.entries()
        if e["kind"] == "statement" and e["body"]["name"] == "backfill.clear_textless"
    ]
    assert cleared == [10, 10, 5]
    assert_every_row_has_the_vector_of_its_text(articles)


def test_the_plan_names_what_it_cannot_know_yet(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase("50_backfill")
    shown = backfill.plan(phase).statements[-1].text(phase.connection)
    assert "= ANY ('{the keys of one batch}')" in shown and "NULL)" not in shown
