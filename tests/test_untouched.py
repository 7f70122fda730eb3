"""The backfill names rows that refuse their vector, and proves on real rows that it changed nothing else."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import refused_rows, untouched
from runbook_lib.core.gates import Gate, GateFailed
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings, trials
from tests import toy

Connection = psycopg.Connection[Any]
FUNCTION = "CREATE FUNCTION {} RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;"
TRIGGER = "CREATE TRIGGER late BEFORE UPDATE ON articles FOR EACH ROW EXECUTE FUNCTION f()"


@pytest.fixture
def loaded(open_phase: Callable[..., Phase]) -> Callable[..., Phase]:
    """Opens phase 50 on a table whose vectors are staged, in small batches of which every one is compared."""

    def make(**sections: dict[str, Any]) -> Phase:
        sections["backfill"] = {"batch_rows": 10, "most_batch_rows": 10} | sections.get("backfill", {})
        phase = open_phase("50_backfill", **sections)
        for module in (extension, expand_schema, load_embeddings):
            module.apply(phase)
        return phase

    return make


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial before the backfill sees nothing, as if its sample had missed the rows."""
    monkeypatch.setattr(trials, "of_update", lambda *_: ([], None))
    monkeypatch.setattr(untouched, "EVERY", 1)


def _gates(phase: Phase) -> dict[str, Gate]:
    return {g.name: g for g in backfill.verify(phase)}


def test_a_trigger_made_after_preflight_is_found_before_a_row_changes(
    loaded: Callable[..., Phase], articles: Connection
) -> None:
    phase = loaded()
    articles.execute(FUNCTION.format("f()", "NEW.views := 7; RETURN NEW;") + TRIGGER)
    with pytest.raises(GateFailed, match="trigger late changed views in 5 of 5 rows"):
        backfill.apply(phase)
    assert articles.execute("SELECT count(embedding), max(views) FROM articles").fetchone() == (0, 0)


def test_what_the_trial_did_not_see_is_told_after_the_backfill(
    loaded: Callable[..., Phase], articles: Connection, unseen: None
) -> None:
    phase = loaded()
    articles.execute(
        "CREATE TABLE log (n bigint);"
        + FUNCTION.format("f()", "NEW.views := 7; INSERT INTO log VALUES (OLD.id); RETURN NEW;")
        + TRIGGER
    )
    backfill.apply(phase)
    g = _gates(phase)["backfill.nothing_else_was_touched"]
    assert str(g) == (
        """FAIL    backfill.nothing_else_was_touched   "public"."articles"
  found   201 rows compared in the transactions that gave them their vectors: views changed in 200; public.log was written
  needed  no other column changed and nothing else written, or agreed to by name
  danger  a trigger or a rule acted on every row that took its vector, and preflight did not see it
  do      find out which did: `runbook check` tries them one by one; then put right what it did"""  # noqa: E501
    )
    written = phase.ledger.latest(untouched.KIND)
    assert written == {"rows": 201, "columns": {"views": 200}, "written": ["public.log"]}, "figures and names alone"


def test_what_was_agreed_to_passes_and_is_named(loaded: Callable[..., Phase], articles: Connection) -> None:
    articles.execute(FUNCTION.format("f()", "NEW.views := 7; RETURN NEW;") + TRIGGER)
    phase = loaded(accept={"triggers": ["late"]})
    backfill.apply(phase)
    g = _gates(phase)["backfill.nothing_else_was_touched"]
    assert g.verdict == "PASS"
    assert g.found.endswith("; agreed to: trigger late") and "views changed in" in g.found
    # Another trigger, which nobody agreed to, is not covered by what was agreed to.
    articles.execute(
        FUNCTION.format("h()", "NEW.status := 'x'; RETURN NEW;")
        + TRIGGER.replace("late", "other").replace("f()", "h()")
    )
    phase.note(untouched.KIND, {"rows": 1, "columns": {"status": 1}, "written": []})
    assert _gates(phase)["backfill.nothing_else_was_touched"].verdict == "FAIL"


def test_writers_at_work_raise_no_false_alarm(
    loaded: Callable[..., Phase], articles: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untouched, "EVERY", 1)
    phase, stop = loaded(), threading.Event()

    def write() -> None:
        with psycopg.connect(database, autocommit=True) as c:
            while not stop.is_set():
                c.execute("UPDATE articles SET views = views + 1 WHERE id % 3 = 0")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        backfill.apply(phase)
    finally:
        stop.set()
        thread.join()
    g = _gates(phase)["backfill.nothing_else_was_touched"]
    assert (g.verdict, g.found.split(": ")[1]) == ("PASS", "no other column changed, nothing else was written")
    assert g.figures["rows"] > 0


def test_rows_that_a_trigger_keeps_end_in_a_gate_with_its_name(
    loaded: Callable[..., Phase], articles: Connection, unseen: None
) -> None:
    phase = loaded()
    articles.execute(FUNCTION.format("f()", "IF OLD.id IN (7, 70) THEN RETURN NULL; END IF; RETURN NEW;") + TRIGGER)
    backfill.apply(phase)
    gates = _gates(phase)
    assert gates["backfill.nothing_is_missing"].figures["missing"] == 2
    assert str(gates["backfill.every_staged_row_took_its_vector"]) == (
        """FAIL    backfill.every_staged_row_took_its_vector   "public"."articles"
  found   not id 7, 70: the UPDATE leaves 2 of 2 as they are; fired: late
  needed  every such row takes its vector
  danger  the new search never finds these rows, and no rerun changes that by itself
  do      settle it with the owner of the trigger, rule or constraint, then run 50_backfill again; or set vector.layout: side_table, which updates no row of this table"""  # noqa: E501
    )
    articles.execute("DROP TRIGGER late ON articles")
    backfill.apply(phase)
    assert "backfill.every_staged_row_took_its_vector" not in _gates(phase)


@pytest.mark.parametrize("strategy", ["page_interleaved", "key_ranges"])
def test_a_row_that_raises_is_named_and_the_others_get_their_vectors(
    loaded: Callable[..., Phase], articles: Connection, unseen: None, strategy: str
) -> None:
    phase = loaded(backfill={"strategy": strategy})
    articles.execute(
        FUNCTION.format("f()", "IF OLD.id IN (7, 70) THEN RAISE 'sealed'; END IF; RETURN NEW;") + TRIGGER
    )
    backfill.apply(phase)
    bare = articles.execute("SELECT array_agg(id ORDER BY id) FROM articles WHERE embedding IS NULL AND title <> ''")
    assert bare.fetchone() == ([7, 70],)
    g = _gates(phase)["backfill.every_staged_row_took_its_vector"]
    assert g.found == "not id 7, 70: PostgreSQL says: sealed (for instance id 7)"
    recorded = phase.ledger.latest("backfill")
    assert recorded is not None and recorded["refused"] == 2


def test_a_table_that_refuses_row_after_row_stops_the_backfill(
    loaded: Callable[..., Phase], articles: Connection, unseen: None
) -> None:
    phase = loaded()
    articles.execute(FUNCTION.format("f()", "RAISE 'the archive is closed';") + TRIGGER)
    with pytest.raises(GateFailed) as stopped:
        backfill.apply(phase)
    (g,) = stopped.value.gates
    assert g.name == "backfill.every_staged_row_took_its_vector"
    assert g.found.startswith(f"{refused_rows.MOST_REFUSED + 1} rows refused, and the backfill stopped; id ")
    assert g.found.endswith(": the archive is closed")
    articles.execute("DROP TRIGGER late ON articles")
    backfill.apply(phase)
    done = articles.execute("SELECT count(embedding) FROM articles").fetchone()
    assert done == (toy.ROWS,), "it resumes where it stopped"
