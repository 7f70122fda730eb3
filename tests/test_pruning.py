"""While a backfill goes page by page, pages are tidied early; afterwards the table's setting is what it was."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.backfill import batch_strategy, pruning, workers
from runbook_lib.core.gates import Gates
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, expand_schema, extension, load_embeddings
from tests.evidence import assert_every_row_has_the_vector_of_its_text

Connection = psycopg.Connection[Any]
PART = "public.articles"


@pytest.fixture
def loaded(open_phase: Callable[..., Phase], articles: Connection) -> Phase:
    phase = open_phase("50_backfill", backfill={"strategy": "page_interleaved", "batch_rows": 20})
    extension.apply(phase)
    expand_schema.apply(phase)
    load_embeddings.apply(phase)
    return phase


def options(articles: Connection) -> list[str] | None:
    row = articles.execute("SELECT reloptions FROM pg_class WHERE oid = 'articles'::regclass").fetchone()
    return row[0] if row else None


def test_the_plan_names_the_table_whose_lock_it_takes(loaded: Phase) -> None:
    (shown,) = pruning.plan(loaded.connection, loaded.params, [PART])
    assert shown.lock == f"SHARE UPDATE EXCLUSIVE on {PART}"
    assert shown.query.as_string() == f"ALTER TABLE {PART} SET (fillfactor = {pruning.FILLFACTOR})"


def seen_while_it_works(
    articles: Connection, monkeypatch: pytest.MonkeyPatch, raises: bool = False
) -> list[list[str] | None]:
    """What the catalogue says before each batch."""
    seen = []
    update = workers._update

    def look(*args: Any) -> Any:
        seen.append(options(articles))
        if raises and len(seen) == 3:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(workers, "_update", look)
    return seen


@pytest.mark.parametrize("before", [None, ["fillfactor=95"], ["autovacuum_vacuum_scale_factor=0.1"]])
def test_the_fillfactor_is_lowered_for_the_backfill_only(
    loaded: Phase, articles: Connection, monkeypatch: pytest.MonkeyPatch, before: list[str] | None
) -> None:
    for option in before or ():
        articles.execute(f"ALTER TABLE articles SET ({option})")
    plan = [s.text(loaded.connection) for s in backfill.plan(loaded)]
    assert any("fillfactor = 80" in s for s in plan)
    seen = seen_while_it_works(articles, monkeypatch)
    backfill.apply(loaded)
    assert all("fillfactor=80" in (options_ or ()) for options_ in seen) and seen
    assert options(articles) == before
    assert backfill.verify(loaded).passed
    assert_every_row_has_the_vector_of_its_text(articles)


def test_a_lower_fillfactor_is_left_alone(
    loaded: Phase, articles: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles.execute("ALTER TABLE articles SET (fillfactor = 70)")
    seen = seen_while_it_works(articles, monkeypatch)
    backfill.apply(loaded)
    assert {tuple(s or ()) for s in seen} == {("fillfactor=70",)}
    assert loaded.ledger.latest("fillfactor") is None


def test_killed_half_way_the_next_run_puts_back_what_was_there_first(
    loaded: Phase, articles: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    articles.execute("ALTER TABLE articles SET (fillfactor = 90)")
    with monkeypatch.context() as patch:
        seen_while_it_works(articles, patch, raises=True)
        with pytest.raises(KeyboardInterrupt):
            backfill.apply(loaded)
    assert options(articles) == ["fillfactor=80"]
    (gate,) = Gates(tuple(pruning.verify(loaded.connection, loaded.ledger, loaded.params))).failed
    assert str(gate).splitlines()[0:3] == [
        f"FAIL    backfill.fillfactor_is_as_before   {PART}",
        f"  found   {PART}: 80",
        f"  needed  {PART}: 90",
    ]
    backfill.apply(loaded)
    assert options(articles) == ["fillfactor=90"] and backfill.verify(loaded).passed


def test_killed_half_way_undo_puts_it_back(
    loaded: Phase, articles: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen_while_it_works(articles, patch, raises=True)
        with pytest.raises(KeyboardInterrupt):
            backfill.apply(loaded)
    expand_schema.undo(loaded)
    assert options(articles) is None


def test_where_somebody_holds_the_table_it_goes_on_without(
    open_phase: Callable[..., Phase], loaded: Phase, articles: Connection, database: str, capsys: Any
) -> None:
    phase = open_phase("50_backfill", locks={"timeout_ms": 20, "tries": 2})
    parts = [r.part for r in batch_strategy.relations(phase.connection, phase.params)]
    with psycopg.connect(database, application_name="a vacuum by hand") as holder:
        holder.execute("LOCK TABLE articles IN SHARE UPDATE EXCLUSIVE MODE")
        pruning.apply(phase, parts)
        assert options(articles) is None
        holder.rollback()
    assert "the fillfactor stays as it is" in capsys.readouterr().out
    pruning.restore(phase)
    assert pruning.verify(phase.connection, phase.ledger, phase.params)[0].verdict == "PASS"
