"""Operate 20: what drifts after the cut-over is found, and named."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from runbook_lib.benchmark import loop
from runbook_lib.cli.main import main
from runbook_lib.core.gates import Gate
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import (
    backfill,
    baseline,
    build_index,
    cut_over,
    expand_schema,
    extension,
    load_embeddings,
    shadow,
    tune,
)
from runbook_lib.operate import monitor
from runbook_lib.search import search_function
from tests import toy
from tests.small_runs import wait_until

AT_WORK = "SELECT FROM pg_stat_activity WHERE application_name LIKE '%worker%' AND datname = current_database()"
Open = Callable[..., Phase]


@pytest.fixture
def tuned(open_phase: Open) -> Callable[..., Phase]:
    """Opens the watch on a target whose index is built and tuned, and whose reads have not moved."""

    def make(**sections: dict[str, Any]) -> Phase:
        cut_over = {"share_steps_percent": [100], "calls_per_step": 20}
        phase = open_phase("operate/monitor", cut_over=cut_over, **sections)
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index, tune):
            module.apply(phase)
        return phase

    return make


@pytest.fixture
def standing(tuned: Callable[..., Phase]) -> Callable[..., Phase]:
    """Opens the watch on a target whose reads have moved."""

    def make(**sections: dict[str, Any]) -> Phase:
        phase = tuned(**sections)
        baseline.apply(phase)
        shadow.apply(phase)
        cut_over.apply(phase)
        return phase

    return make


def failed(phase: Phase) -> dict[str, Gate]:
    return {g.name: g for g in monitor.look(phase).failed}


def test_what_was_proved_still_holds(standing: Callable[..., Phase]) -> None:
    phase = standing()
    gates = monitor.look(phase)
    assert gates.passed, str(gates)
    assert {g.name for g in gates} >= {
        "index.is_valid",
        "explain.function_searches_by_the_index",
        "watch.recall_holds",
        "watch.relevance_holds",
        "watch.nothing_is_missing",
        "watch.nothing_is_stale",
        "watch.queue_is_young",
        "watch.index_is_used",
        "watch.dead_rows_are_few",
        "watch.index_is_lean",
        "watch.settings_hold",
        "watch.extension_has_no_known_fault",
        "watch.route_is_as_set",
    }
    assert monitor.look(phase).passed, "it can be run again and again"
    assert "PASS" in str(monitor.last_look(phase))


def test_a_run_that_carries_nothing_out_looks_and_writes_nothing(
    standing: Callable[..., Phase], open_phase: Open
) -> None:
    standing()
    phase = open_phase("operate/monitor", execute=False)
    gates = phase.prove(monitor.look, ahead=True)
    assert {str(g.verdict) for g in gates} == {"WOULD PASS"} and not gates.passed
    assert phase.ledger.latest("watch") is None


def test_a_setting_that_somebody_changed_is_named_at_every_look(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    assert not failed(phase)
    signature = articles.execute("SELECT 'search_articles(text,real[],int,float8)'::regprocedure::text").fetchone()[0]  # type: ignore[index]
    articles.execute(f"SELECT '[1]'::vector; ALTER FUNCTION {signature} SET hnsw.ef_search = 7")
    for _ in range(2):
        gate = failed(phase)["watch.settings_hold"]
        assert gate.found.startswith("hnsw.ef_search=7; no hnsw.ef_search=")


def test_rows_that_died_before_the_index_was_built_are_not_counted_against_it(
    open_phase: Open, articles: psycopg.Connection[Any], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a vacuum has seen them, they are counted, but the index was built without them."""
    monkeypatch.setattr(monitor, "FEWEST_ROWS_FOR_DEAD", 0)
    articles.execute("ALTER TABLE articles SET (autovacuum_enabled = off)")
    phase = open_phase("operate/monitor")
    for module in (search_function, extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)

    def update(times: int) -> None:
        """A reader's snapshot keeps the pages from being pruned, so that the former versions of the rows stay."""
        with psycopg.connect(database) as reader:
            reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            reader.execute("SELECT count(*) FROM articles")
            for _ in range(times):
                articles.execute("UPDATE articles SET views = views + 1")
            articles.execute("SELECT pg_stat_force_next_flush()")

    # A session's last updates are counted when it ends.
    wait_until(lambda: articles.execute(AT_WORK).fetchone() is None, 10)
    update(1)
    articles.execute("ANALYZE articles")
    build_index.apply(phase)
    before = (phase.ledger.latest("index") or {})["dead_before"]
    assert before["dead"] >= toy.ROWS and before["vacuums"] == 0
    gate = monitor._dead_rows_are_few(phase.connection, phase.ledger, phase.params)
    assert gate.verdict == "PASS", str(gate)
    assert gate.found == f"0 dead rows, 0 % of all, without {before['dead']} that died before the index was built"

    update(4)
    gate = monitor._dead_rows_are_few(phase.connection, phase.ledger, phase.params)
    assert gate.verdict == "FAIL" and gate.found.endswith("that died before the index was built"), str(gate)
    articles.execute("VACUUM articles")
    gate = monitor._dead_rows_are_few(phase.connection, phase.ledger, phase.params)
    assert (gate.verdict, gate.found) == ("PASS", "0 dead rows, 0 % of all")
    update(1)
    gate = monitor._dead_rows_are_few(phase.connection, phase.ledger, phase.params)
    assert gate.verdict == "FAIL" and "before the index" not in gate.found, "since a vacuum, all of them count"


def test_rows_that_escaped_the_capture_are_counted(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    articles.execute("ALTER TABLE articles DISABLE TRIGGER USER")
    articles.execute("INSERT INTO articles (title) VALUES ('never seen')")
    articles.execute("UPDATE articles SET title = 'rewritten' WHERE id <= 2")
    found = {g.name: g for g in monitor._rows_are_fresh(phase.connection, phase.params, True)}
    assert str(found["watch.nothing_is_missing"]) == (
        "FAIL    watch.nothing_is_missing   public.articles\n"
        "  found   1 of 201 rows with text lack a vector and are not queued\n"
        "  needed  0\n"
        "  danger  the new search never finds these rows\n"
        "  do      look whether the capture triggers are enabled, then run 40_load_embeddings and 50_backfill"
    )
    assert found["watch.nothing_is_stale"].found.startswith("2 of 200 rows with a vector have that of an older text")


def test_queued_rows_are_no_fault_until_they_are_old(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    articles.execute("UPDATE articles SET title = 'changed' WHERE id = 1")
    assert all(
        g.verdict == "PASS"
        for g in (
            *monitor._rows_are_fresh(phase.connection, phase.params, True),
            monitor._queue_is_young(phase.connection, phase.params),
        )
    )
    articles.execute("UPDATE runbook.articles_queue SET queued_at = now() - interval '2 hours'")
    gate = monitor._queue_is_young(phase.connection, phase.params)
    assert (gate.found, gate.needed) == (
        "1 changes wait, the oldest for 2 h 0 min",
        "none for longer than 60 min 0 s",
    )


def test_a_large_table_is_sampled_and_says_so(tuned: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = tuned(watch={"count_up_to_rows": 1000})
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 'row ' || n, repeat('x', 500) FROM generate_series(1, 3000) n"
    )
    articles.execute("ANALYZE articles")
    gate = next(monitor._rows_are_fresh(phase.connection, phase.params, True))
    assert gate.found.endswith(
        "rows with text in a sample of the table's about 3,201 rows lack a vector and are not queued"
    )
    assert 0 < gate.figures["looked_at"] < 3201 and gate.figures["whole_table"] is False


@pytest.mark.parametrize(
    ("always", "verdict", "recall"), [(True, "FAIL", "0.500"), (False, "PASS", "1.000")], ids=["lost", "unlucky"]
)
def test_lost_recall_is_found_and_an_unlucky_sample_of_rows_is_not_the_last_word(
    tuned: Callable[..., Phase], monkeypatch: pytest.MonkeyPatch, always: bool, verdict: str, recall: str
) -> None:
    phase = tuned()
    ask = loop.ask
    calls: list[int] = []

    def forgetful(*args: Any, **kwargs: Any) -> loop.Answers:
        answers = ask(*args, **kwargs)
        calls.append(1)
        exact = len(calls) % 2 == 1
        if exact or not (always or len(calls) == 2):
            return answers
        return replace(answers, rows=[rows[:5] for rows in answers.rows])

    monkeypatch.setattr(loop, "ask", forgetful)
    gate = monitor._recall_holds(phase.connection, phase.ledger, phase.params)
    assert (str(gate.verdict), gate.found) == (verdict, f"recall@10 {recall} on 40 queries and 200 rows")
    assert len(calls) == 4, "exact answers and the index's, of the first rows and of the many that decide"


def test_relevance_that_fell_since_the_shadow_is_found(
    standing: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = standing()
    articles.execute("UPDATE articles SET embedding = (SELECT embedding FROM articles WHERE id = 1)")
    (gate,) = monitor._relevance_holds(phase.connection, phase.ledger, phase.params)
    assert (gate.name, str(gate.verdict)) == ("watch.relevance_holds", "FAIL")


def test_a_route_moved_past_the_runbook_is_found(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    search_function.move_route(phase, "vector", 100, "test")
    articles.execute("UPDATE runbook.route SET share_percent = 30")
    gate = monitor._route_is_as_set(phase.connection, phase.ledger, phase.params)
    assert (gate.found, gate.needed) == ("vector at 30 %", "vector at 100 %, as the ledger has it")


def test_an_index_that_is_gone_fails_and_everything_else_is_still_looked_at(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    articles.execute("DROP INDEX articles_embedding_hnsw")
    assert list(failed(phase)) == ["index.is_valid"]


def test_an_old_release_is_named_with_its_faults(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = tuned()
    articles.execute("UPDATE pg_extension SET extversion = '0.8.1' WHERE extname = 'vector'")
    gate = monitor._extension_is_sound(phase.connection, phase.params)
    assert gate.verdict == "FAIL" and gate.found.startswith("0.8.1; update it at a quiet time")
    assert "CVE-2026-3172" in gate.danger and "CVE-2026-18022" not in gate.danger, "that one is of 32-bit servers"
    articles.execute("UPDATE pg_extension SET extversion = '0.8.6' WHERE extname = 'vector'")


@pytest.mark.parametrize(
    ("last", "holds"),
    [
        ({"scans": 10, "calls": 5}, False),
        ({"scans": 9, "calls": 5}, True),
        ({"scans": 10, "calls": 8}, True),
        # An index built again counts from 0.
        ({"scans": 500, "calls": 5}, True),
    ],
)
def test_calls_without_scans_are_found(open_phase: Open, last: dict[str, int], holds: bool) -> None:
    phase = open_phase("operate/monitor")
    seen = {"scans": 10, "calls": 8, "at": "2026-01-02 00:00", "at_s": 1000.0, "route": "vector"}
    phase.note("watch", seen | last)
    assert (monitor._index_is_used(phase.ledger, phase.params, seen).verdict == "PASS") is holds


def test_a_day_without_any_scan_is_found(open_phase: Open) -> None:
    phase = open_phase("operate/monitor")
    seen = {"scans": 10, "calls": None, "at": "2026-01-02 00:00", "at_s": 1000.0, "route": "vector"}
    phase.note("watch", seen)
    assert monitor._index_is_used(phase.ledger, phase.params, seen | {"at_s": 5000.0}).verdict == "PASS"
    assert monitor._index_is_used(phase.ledger, phase.params, seen | {"at_s": 100_000.0}).verdict == "FAIL"
    assert (
        monitor._index_is_used(phase.ledger, phase.params, seen | {"at_s": 100_000.0, "route": "legacy"}).verdict
        == "PASS"
    )


def test_a_table_so_small_that_it_is_read_whole_needs_no_scan(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute("DELETE FROM articles WHERE id > 4")
    phase = tuned()
    search_function.move_route(phase, "vector", 100, "test")
    phase.note("watch", monitor._seen(phase.connection, phase.params) | {"at": "2026-01-02 00:00", "at_s": 0.0})
    used = {g.name: g for g in monitor.look(phase)}["watch.index_is_used"]
    assert (used.verdict, used.found) == (
        "PASS",
        "0 index scans since 2026-01-02 00:00; a table so small is read whole",
    )


def test_runbook_check_ends_with_1_where_the_search_regressed(
    tuned: Callable[..., Phase], articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    phase = tuned()
    runner, path = CliRunner(), str(tmp_path / "toy.yaml")
    before = runner.invoke(main, ["check", path])
    assert before.exit_code == 0 and "the search meets the accepted baseline" not in before.output, (
        "nothing proved yet"
    )
    replace(phase.ledger, phase="70_tune").append("phase", {"verdict": "PASS"})
    holds = runner.invoke(main, ["check", path])
    assert holds.exit_code == 0 and "the search meets the accepted baseline" in holds.output, holds.output
    articles.execute("DROP INDEX articles_embedding_hnsw")
    broken = runner.invoke(main, ["check", path])
    assert broken.exit_code == 1 and "FAIL    index.is_valid" in broken.output
    assert phase.ledger.latest("watch") is None, "a check writes nothing"
