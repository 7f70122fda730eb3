"""The queue of changed rows: one bad row never blocks the rest, and nobody waits while the model is asked."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from runbook_lib import params
from runbook_lib.backfill import change_queue
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, GateFailed
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.embeddings import embedding
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from runbook_lib.operate import refresh
from tests import evidence, toy
from tests.opened import gates_passed

Open = Callable[..., Phase]
Articles = psycopg.Connection[Any]


LAYOUTS = pytest.mark.parametrize("layout", ["column", "side_table"])


@pytest.fixture
def filled(open_phase: Open, articles: Articles) -> Callable[..., Phase]:
    """Opens the refresh on a table whose rows all have their vectors and whose queue is empty."""

    def make(**sections: Any) -> Phase:
        phase = open_phase("operate/refresh", **sections)
        extension.apply(phase)
        expand_schema.apply(phase)
        load_embeddings.apply(phase)
        backfill.apply(phase)
        articles.execute("DELETE FROM runbook.articles_queue")
        return phase

    return make


def texts_and_vectors(articles: Articles) -> list[tuple[int, str, list[float] | None]]:
    return articles.execute(
        "SELECT id, concat_ws(E'\\n', title, body), embedding::real[] FROM articles"
        " WHERE title IS NOT NULL ORDER BY id"
    ).fetchall()


def without_the_vector_of_their_text(articles: Articles) -> list[int]:
    """Ids of the rows whose vector is not that of the text, by an independent embedding."""
    rows = texts_and_vectors(articles)
    right = toy.embed([r[1] for r in rows])
    return [r[0] for r, v in zip(rows, right, strict=True) if r[2] is None or not np.allclose(r[2], v, atol=1e-6)]


def picky(texts: list[str]) -> np.ndarray:
    if any("poison" in t for t in texts):
        raise ValueError("cannot take 'poison'")
    return toy.embed(texts)


PICKY = {"embeddings": {"callable": "tests.test_refresh:picky", "batch_rows": 7}}


@LAYOUTS
def test_inserted_changed_emptied_and_deleted_rows_are_brought_up_to_date(
    filled: Callable[..., Phase], articles: Articles, layout: str
) -> None:
    phase = filled(vector={"layout": layout})
    articles.execute("UPDATE articles SET body = 'other words ' || id WHERE id <= 40")
    articles.execute("INSERT INTO articles (title, body) VALUES ('new', 'one')")
    articles.execute("UPDATE articles SET title = '', body = ' ' WHERE id = 50; DELETE FROM articles WHERE id = 3")
    assert refresh.apply(phase).rows == [[42, 40, 0, 0]]
    assert refresh.verify(phase).passed
    # Row 50 has lost its text and, with it, its vector.
    assert evidence.assert_every_row_has_the_vector_of_its_text(articles, layout) == toy.ROWS - 1


def test_a_row_that_the_model_does_not_take_is_set_aside_and_the_rest_goes_on(
    filled: Callable[..., Phase], articles: Articles
) -> None:
    phase = filled(**PICKY)
    articles.execute("UPDATE articles SET body = 'other words ' || id WHERE id <= 40")
    articles.execute("UPDATE articles SET body = 'poison' WHERE id IN (5, 6, 33)")
    refresh.apply(phase)
    assert without_the_vector_of_their_text(articles) == [5, 6, 33]
    assert str(refresh.verify(phase).failed[0]) == (
        'FAIL    refresh.no_row_is_set_aside   "runbook"."articles_queue"\n'
        "  found   3 rows after 3 tries each, for instance ValueError\n"
        "  needed  none\n"
        "  danger  these rows keep the vector of their older text, or none\n"
        "  do      read column error of the queue; fix text or model, and run this again: each gets one more try"
    )
    kept = articles.execute("SELECT DISTINCT attempts, error FROM runbook.articles_queue WHERE key = 5").fetchall()
    assert kept == [(3, "ValueError: cannot take 'poison'")]
    assert str(change_queue.waiting(phase.connection, phase.params)) == "3 set aside: ValueError"


def test_a_row_set_aside_comes_back_with_its_next_change(filled: Callable[..., Phase], articles: Articles) -> None:
    phase = filled(**PICKY)
    articles.execute("UPDATE articles SET body = 'poison' WHERE id = 5")
    change_queue.drain(phase)
    articles.execute("UPDATE articles SET body = 'wholesome' WHERE id = 5")
    assert change_queue.drain(phase) == change_queue.Drained(changes=1, updated=1, refused=0)
    assert articles.execute("SELECT count(*) FROM runbook.articles_queue").fetchone() == (0,)
    assert without_the_vector_of_their_text(articles) == []


def test_a_row_set_aside_gets_one_more_try_a_run(
    filled: Callable[..., Phase], articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled(**PICKY)
    articles.execute("UPDATE articles SET body = 'poison' WHERE id = 5")
    change_queue.drain(phase)
    asked: list[list[str]] = []
    monkeypatch.setattr(embedding, "model", lambda params: lambda texts: asked.append(texts) or picky(texts))
    refresh.apply(phase)
    assert asked == [["cookie leaks\npoison"], embedding.PROBES]
    monkeypatch.setattr(embedding, "model", lambda params: toy.embed)
    refresh.apply(phase)
    assert refresh.verify(phase).passed


def test_unsound_vectors_are_set_aside_too(
    filled: Callable[..., Phase], articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'nothing' WHERE id IN (5, 6)")

    def zero_for_the_first(texts: list[str]) -> np.ndarray:
        return toy.embed(texts) * np.array([[not t.startswith("cookie leaks")] for t in texts])

    monkeypatch.setattr(embedding, "model", lambda params: zero_for_the_first)
    assert change_queue.drain(phase) == change_queue.Drained(changes=1, updated=1, refused=1)
    assert change_queue.waiting(phase.connection, phase.params).error == "a zero vector, which cosine cannot rank"


def test_where_the_model_is_away_no_row_is_blamed(
    filled: Callable[..., Phase], articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")

    def away(texts: list[str]) -> np.ndarray:
        raise OSError("the model is away")

    monkeypatch.setattr(embedding, "model", lambda params: away)
    with pytest.raises(embedding.ModelAway, match="OSError on 5 texts; on 2 probe texts OSError: the model is away"):
        change_queue.drain(phase)
    state = articles.execute("SELECT count(*), max(attempts), max(claimed_by) FROM runbook.articles_queue").fetchone()
    assert state == (5, 0, None), "nothing is claimed and no try is counted"


@pytest.mark.attack
def test_changes_of_before_the_servers_clock_went_back_are_taken_and_missed_until_then(
    filled: Callable[..., Phase], articles: Articles
) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")
    articles.execute(
        "UPDATE runbook.articles_queue SET queued_at = now() + interval '2 hours', claimed_by = 1, claimed_at ="
        " now() + interval '2 hours'"
    )
    phase.note("drain", db.one(phase.connection, backfill.SQL["drain_begins"], phase.params))
    assert [g.name for g in backfill.verify(phase).failed] == ["backfill.nothing_is_stale"]
    assert change_queue.waiting(phase.connection, phase.params).since_before == 5
    assert change_queue.drain(phase) == change_queue.Drained(changes=5, updated=5, refused=0)


def test_what_a_killed_worker_claimed_is_taken_over_at_once(
    filled: Callable[..., Phase], articles: Articles, database: str
) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")
    with psycopg.connect(database, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s, 77)", [change_queue.LOCK_CLASS])
        articles.execute("UPDATE runbook.articles_queue SET claimed_by = 77, claimed_at = clock_timestamp()")
        assert change_queue.drain(phase).changes == 0, "the other one lives and works at it"
        assert change_queue.waiting(phase.connection, phase.params).waiting == 5
    while articles.execute("SELECT count(*) FROM pg_locks WHERE objid = 77 AND objsubid = 2").fetchone() != (0,):
        pass
    assert change_queue.drain(phase) == change_queue.Drained(changes=5, updated=5, refused=0)


@pytest.mark.attack
def test_a_role_that_can_only_connect_keeps_no_change_from_being_taken(
    filled: Callable[..., Phase], articles: Articles, database: str
) -> None:
    """Who sees a worker's lock in pg_locks can wait for it, and holds it once the worker is gone."""
    phase, name = filled(), f"anybody_{articles.info.dbname}"
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")
    articles.execute("UPDATE runbook.articles_queue SET claimed_by = 77, claimed_at = clock_timestamp()")
    articles.execute(f"CREATE ROLE {name} LOGIN")
    try:
        with psycopg.connect(database, user=name, autocommit=True) as other:
            other.execute("SELECT pg_advisory_lock(%s, 77)", [change_queue.LOCK_CLASS])
            assert change_queue.drain(phase) == change_queue.Drained(changes=5, updated=5, refused=0)
    finally:
        articles.execute(f"DROP ROLE {name}")


def test_a_worker_that_stands_still_loses_its_claims(filled: Callable[..., Phase], articles: Articles) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'other' WHERE id <= 5")
    articles.execute("SELECT pg_advisory_lock(%s, 77)", [change_queue.LOCK_CLASS])
    articles.execute("UPDATE runbook.articles_queue SET claimed_by = 77, claimed_at = now() - interval '1 hour'")
    assert change_queue.drain(phase) == change_queue.Drained(changes=5, updated=5, refused=0)


def test_a_text_that_changes_while_the_model_is_asked_never_gets_the_old_vector(
    filled: Callable[..., Phase], articles: Articles, monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = filled()
    articles.execute("UPDATE articles SET body = 'old' WHERE id = 5")
    asked: list[str] = []

    def slow(texts: list[str]) -> np.ndarray:
        if not asked:
            articles.execute("UPDATE articles SET body = 'new' WHERE id = 5")
        asked.extend(texts)
        return toy.embed(texts)

    monkeypatch.setattr(embedding, "model", lambda params: slow)
    assert change_queue.drain(phase) == change_queue.Drained(changes=1, updated=0, refused=0), (
        "the newer change waits"
    )
    assert change_queue.drain(phase) == change_queue.Drained(changes=1, updated=1, refused=0)
    assert [t.splitlines()[1] for t in asked] == ["old", "new"]
    assert without_the_vector_of_their_text(articles) == []


@LAYOUTS
def test_a_row_that_somebody_holds_is_left_in_the_queue_and_the_others_go_on(
    filled: Callable[..., Phase], articles: Articles, database: str, layout: str
) -> None:
    phase = filled(vector={"layout": layout}, embeddings={"batch_rows": 5})
    articles.execute("UPDATE articles SET body = 'other words ' || id WHERE id <= 20")
    with psycopg.connect(database, application_name="the shop") as holder:
        holder.execute("UPDATE articles SET views = 1 WHERE id IN (7, 8)")
        assert refresh.apply(phase).rows == [[18, 18, 0, 2]]
        gate = refresh.verify(phase).failed[0]
        pid = holder.info.backend_pid
        assert gate.found.startswith("2 rows wait since before this drain, the oldest for ")
        why = ": changed since the last drain; 2 of them were tried: held by another session; "
        assert f"{why}pid {pid} (postgres, the shop, idle in transaction for 0 s) holds " in gate.found
        holder.rollback()
    kept = articles.execute("SELECT key, attempts, claimed_by FROM runbook.articles_queue ORDER BY key").fetchall()
    assert kept == [(7, 0, None), (8, 0, None)], "no try was counted"
    assert refresh.apply(phase).rows == [[2, 2, 0, 0]]
    assert refresh.verify(phase).passed
    assert evidence.assert_every_row_has_the_vector_of_its_text(articles, layout) == toy.ROWS


@LAYOUTS
def test_a_row_that_comes_free_is_taken_by_the_same_drain(
    filled: Callable[..., Phase], articles: Articles, database: str, layout: str
) -> None:
    phase = filled(vector={"layout": layout}, locks={"tries": 20, "longest_wait_between_tries_s": 0.2})
    articles.execute("UPDATE articles SET body = 'other words ' || id WHERE id <= 20")
    with psycopg.connect(database) as changing, psycopg.connect(database) as deleting:
        changing.execute("UPDATE articles SET body = 'the words of the holder' WHERE id = 7")
        deleting.execute("DELETE FROM articles WHERE id = 8")
        ends = [threading.Timer(0.5, c.commit) for c in (changing, deleting)]
        for end in ends:
            end.start()
        drained = change_queue.drain(phase)
        for end in ends:
            end.join()
    # 20 changes and the holder's own; rows 1 to 20 without 8 have a vector of their text.
    assert drained == change_queue.Drained(changes=21, updated=19, refused=0)
    assert evidence.assert_every_row_has_the_vector_of_its_text(articles, layout) == toy.ROWS - 1


def test_a_source_without_a_model_says_what_waits_and_settles_what_does_not(
    filled: Callable[..., Phase], articles: Articles
) -> None:
    phase = filled()
    articles.execute(
        "UPDATE articles SET body = 'other' WHERE id = 5; UPDATE articles SET body = 'gone' WHERE id = 6"
    )
    articles.execute("DELETE FROM articles WHERE id = 6")
    stored = phase.params.embeddings.model_copy(update={"source": "table", "table": "a.b", "callable": None})
    without = params.Params.model_copy(phase.params, update={"embeddings": stored})
    ledger = Ledger(phase.ledger.connection, without, "test-run", "operate/refresh")
    other = gates_passed(Phase("operate/refresh", "test-run", True, without, phase.connection, ledger))
    assert refresh.apply(other).rows == [[1, 0, 0, 0]]
    gate = refresh.verify(other).failed[0]
    assert gate.found.startswith("1 rows wait since before this drain, the oldest for ")
    assert gate.found.endswith(": for newer vectors: source: table (a.b) has no model")
    assert gate.do == "make vectors of these rows' texts, run 40_load_embeddings and 50_backfill, and this again"


def test_masked_values_are_counted_for_the_record(filled: Callable[..., Phase], articles: Articles) -> None:
    phase = filled(masking={"rules": ["email"]})
    articles.execute("UPDATE articles SET body = 'ask ann@example.org' WHERE id = 5")
    change_queue.drain(phase)
    assert phase.ledger.latest("masking") == {"texts": 1, "values": {"email": 1}}
    found = articles.execute("SELECT embedding::real[] FROM articles WHERE id = 5").fetchone()
    assert found is not None and np.allclose(found[0], toy.embed(["cookie leaks\nask <email>"])[0], atol=1e-6)


def test_the_refresh_needs_a_backfill_that_has_passed(filled: Callable[..., Phase]) -> None:
    phase = filled()
    with pytest.raises(GateFailed, match="50_backfill"):
        phase.require()
    Ledger(phase.ledger.connection, phase.params, "test-run", "50_backfill").append("phase", {"verdict": "PASS"})
    assert phase.require().passed


def test_without_execute_nothing_is_taken(open_phase: Open) -> None:
    phase = open_phase("operate/refresh", execute=False)
    assert "not carried out" in str(refresh.apply(phase))
    assert [s.name for s in refresh.plan(phase)] == ["refresh.update"]


def test_without_a_queue_it_says_so_and_changes_nothing(filled: Callable[..., Phase], articles: Articles) -> None:
    phase = filled()
    articles.execute("DROP TABLE runbook.articles_queue")
    with pytest.raises(BadInput) as error:
        refresh.plan(phase)
    assert str(error.value) == (
        "\nFAIL    refresh.changes_are_captured   public.articles\n"
        '  found   no queue "runbook"."articles_queue"\n'
        "  needed  the queue that the triggers on the table fill\n"
        "  danger  texts that changed since the capture was removed keep the vector of their former text\n"
        "  do      if operate/retire_legacy removed the capture on purpose, take operate/refresh off the schedule;"
        " undo/retire_legacy brings the capture back"
    )


def test_a_drain_writes_in_transactions_as_short_as_the_backfills(
    filled: Callable[..., Phase], articles: Articles
) -> None:
    """A row may be dear to write, for instance with a vector index on the table; no writer waits for a thousand."""
    phase = filled(backfill={"batch_ms": 20})
    articles.execute(
        "CREATE FUNCTION dear() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.004); RETURN NEW; END';"
        "CREATE TRIGGER dear BEFORE UPDATE OF embedding ON articles FOR EACH ROW EXECUTE FUNCTION dear();"
        "UPDATE articles SET body = body || ' changed' WHERE body <> '  '"
    )
    drained = change_queue.drain(phase)
    assert drained.updated == toy.ROWS
    rows = [n for (n,) in articles.execute("SELECT count(*) FROM articles GROUP BY xmin::text").fetchall()]
    assert max(rows) <= change_queue.FIRST_ROWS and len(rows) > toy.ROWS / change_queue.FIRST_ROWS
