"""Partial indexes for filter values: measured, used or dropped again, interrupted half-way, and taken back."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import partial_index_candidates
from runbook_lib.benchmark.partial_index_candidates import Value
from runbook_lib.benchmark.prepared import CALLS
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, GateFailed
from runbook_lib.core.phase import Phase
from runbook_lib.core.registry import MIGRATE
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.operate import filter_indexes, serve_filters
from runbook_lib.search import search_function, statements
from tests.conftest import write_params
from tests.opened import write
from tests.stepping import step, step_all
from tests.test_search_function import call
from tests.test_server_versions import SECTIONS

Open = Callable[..., Phase]
TARGET = {
    "target": {"filters": ["status"]},
    "legacy": {
        "query": "SELECT id FROM articles WHERE body ILIKE '%' || :query || '%'"
        " AND (:status::text IS NULL OR status = :status) ORDER BY id LIMIT :k"
    },
    "tune": {"queries": 40, "ef_search": [40, 80], "target_recall": 0.8},
}
APART: dict[str, Any] = {"embeddings": {"source": "callable", "callable": "tests.toy:embed_apart"}}
# Thousands of rows are searched within milliseconds by any way: how much faster an index is, is chance here.
NAMED: dict[str, Any] = {"partial_indexes": {"status": ["it's 50 %", "Draft"]}, "smallest_gain": 0.001}
EXACT = {"scan": "exact", "candidates": 40, "iterative_scan": "off", "most_scanned": 20_000}


def many_rows(connection: psycopg.Connection[Any], times: int = 10) -> None:
    """More articles; four in ten are a Draft, four in ten have a status with marks that SQL reads."""
    connection.execute(
        "ALTER TABLE articles SET (autovacuum_enabled = false);"
        "INSERT INTO articles (title, body, status)"
        " SELECT title, concat_ws(' ', body, 'copy', g), CASE g % 5 WHEN 0 THEN 'Stable' WHEN 1 THEN 'Draft'"
        " WHEN 2 THEN 'Draft' ELSE 'it''s 50 %' END"
        f" FROM articles, generate_series(1, {times}) AS g WHERE title IS NOT NULL"
    )
    connection.execute("CREATE INDEX ON articles (status)")


def strategies(phase: Phase) -> dict[str | None, str]:
    found = db.rows(phase.connection, search_function.SQL["strategies"], phase.params)
    return {row["value"]: row["scan"] for row in found}


@pytest.fixture
def ready(open_phase: Open, articles: psycopg.Connection[Any]) -> Callable[..., Phase]:
    """Opens the operation on a table whose function searches a Draft exactly, and the rest as it is not listed."""
    many_rows(articles)

    def make(**sections: Any) -> Phase:
        phase = open_phase("operate/serve_filters", **(TARGET | APART | {"filters": NAMED} | sections))
        for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        db.use_search_path(phase.connection)
        for statement in search_function.set_search_setting(phase.connection, phase.params, 40):
            phase.do(statement)
        for value, share in (("Draft", 0.4), (None, 0.0)):
            learnt = {"filter": "status", "values": [value], "shares": [share], "recall": 1.0, "p50_ms": 9.0}
            phase.do(db.statement(search_function.SQL["learn_strategy"], phase.params, **learnt, **EXACT))
        articles.execute("ANALYZE articles")
        search_function.move_route(phase, "vector", 100, "test")
        return phase

    return make


def partial_indexes(connection: psycopg.Connection[Any]) -> dict[str, bool]:
    """Condition and validity of each vector index with a condition."""
    found = connection.execute(
        "SELECT pg_get_expr(i.indpred, i.indrelid), i.indisvalid FROM pg_index i JOIN pg_class c"
        " ON c.oid = i.indexrelid JOIN pg_am a ON a.oid = c.relam"
        " WHERE a.amname = 'hnsw' AND i.indpred IS NOT NULL ORDER BY 1"
    ).fetchall()
    return dict(found)


BOTH = {"(status = 'Draft'::text)": True, "(status = 'it''s 50 %'::text)": True}


def test_values_get_an_index_that_the_function_uses_and_undo_takes_all_back(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    before, function = strategies(phase), search_function.function_state(phase.connection, phase.params)
    right = {s: [r["score"] for r in call(articles, "cookie leaks", status=s)] for s in ("Draft", "it's 50 %")}
    assert serve_filters.check(phase).passed
    assert [s.name for s in serve_filters.plan(phase)] == ["filters.create"] * 2
    shown = serve_filters.apply(phase)
    assert [row[2] for row in shown.rows] == ["before", "after"] * 2
    assert partial_indexes(articles) == BOTH
    assert strategies(phase) == before | {"Draft": "index", "it's 50 %": "index"}
    gates = serve_filters.verify(phase)
    assert gates.passed, str(gates)
    assert [g.name for g in gates] == [
        *["filters.index_serves_its_value", "filters.index_is_valid", "filters.function_uses_the_index"] * 2,
        "filters.nothing_is_left",
    ]
    for status, scores in right.items():
        found = call(articles, "cookie leaks", status=status)
        statuses = "SELECT DISTINCT status FROM articles WHERE id = ANY (%s)"
        assert articles.execute(statuses, [[r["id"] for r in found]]).fetchall() == [(status,)]
        assert found[0]["score"] == pytest.approx(scores[0]) and len(found) == 10
    assert serve_filters.plan(phase).statements == ()
    rows = len(phase.ledger.entries())
    serve_filters.apply(phase)
    assert len(phase.ledger.entries()) == rows, "applied twice, nothing is done"

    serve_filters.undo(phase)
    assert partial_indexes(articles) == {}
    assert strategies(phase) == before
    assert search_function.function_state(phase.connection, phase.params) == function
    assert serve_filters.verify_undone(phase).passed
    assert serve_filters.undo_plan(phase).statements == ()
    serve_filters.undo(phase)


def test_recall_is_that_of_an_independent_count(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(filters=NAMED | {"partial_indexes": {"status": ["Draft"]}})
    serve_filters.apply(phase)
    (known,) = filter_indexes.remembered(phase.ledger).values()
    assert known["before"]["recall"] == 1.0, "every row was read"
    statement = statements.route_statement(phase.connection, phase.params, "vector")
    value = Value("status", "Draft", "")
    (asked,) = partial_index_candidates.questions(phase.connection, phase.params, {value: 0.4}).values()
    hits = wanted = 0
    with phase.connection.transaction():
        for name, setting in (
            ("hnsw.ef_search", known["after"]["candidates"]),
            ("hnsw.iterative_scan", "strict_order"),
        ):
            phase.connection.execute("SELECT set_config(%s, %s, true)", [name, str(setting)])
        for q in asked[1::2]:
            given = {"status": "Draft", "query": q.text, "k": 10, "embedding": q.vector}
            nearest = phase.connection.execute(statement, given, prepare=False).fetchall()
            with phase.connection.transaction():
                phase.connection.execute("SET LOCAL enable_indexscan = off")
                exact = phase.connection.execute(statement, given, prepare=False).fetchall()
            limit = exact[-1]["score"] - 1e-5
            keys = [r["key"] for r in exact if str(r["key"]) != q.own_key]
            right = [r for r in nearest if str(r["key"]) != q.own_key and r["score"] >= limit]
            hits, wanted = hits + min(len(right), len(keys)) / len(keys), wanted + 1
    assert known["after"]["recall"] == pytest.approx(hits / wanted, abs=0.002)


def test_an_index_that_gains_too_little_is_dropped_again(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(filters={"partial_indexes": {"status": ["Draft"]}, "smallest_gain": 1000.0})
    before = strategies(phase)
    serve_filters.apply(phase)
    assert partial_indexes(articles) == {}
    assert strategies(phase) == before
    (failed,) = serve_filters.verify(phase).failed
    (known,) = filter_indexes.remembered(phase.ledger).values()
    was, now = known["before"], known["after"]
    times = known["why_not"].split(" ")[0]
    assert float(times) < 1000
    assert str(failed) == (
        "FAIL    filters.index_serves_its_value   status = Draft\n"
        f"  found   recall {now['recall']:.3f}, p50 {now['p50_ms']:.2f} ms;"
        f" before recall {was['recall']:.3f}, p50 {was['p50_ms']:.2f} ms;"
        f" dropped again: {times} times as fast as before\n"
        "  needed  recall 0.800, used in each call, 1000 times as fast where it was good before\n"
        "  danger  every write to rows of this value would pay for an index that gains nothing\n"
        "  do      leave the value out of filters, or raise index.m or tune.ef_search; nothing was changed for it"
    )


def test_an_index_that_misses_the_target_or_is_not_used_is_dropped_again(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = ready()
    real = partial_index_candidates.cheapest_through_the_index
    with monkeypatch.context() as patch:
        patch.setattr(
            partial_index_candidates, "cheapest_through_the_index", lambda *asked: replace(real(*asked), recall=0.5)
        )
        serve_filters.apply(phase)
    assert partial_indexes(articles) == {}
    assert {m["why_not"] for m in filter_indexes.remembered(phase.ledger).values()} == {
        "recall 0.500, 0 questions short of rows"
    }
    with monkeypatch.context() as patch:
        patch.setattr(partial_index_candidates, "scans_by_the_function", lambda *_: 3)
        serve_filters.apply(phase)
    assert {m["why_not"] for m in filter_indexes.remembered(phase.ledger).values()} == {
        f"the function uses it in 3 of {CALLS} calls"
    }
    assert partial_indexes(articles) == {}


def test_interrupted_anywhere_a_rerun_goes_on_and_undo_leads_back(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = ready(filters=NAMED | {"partial_indexes": {"status": ["Draft"]}})
    before = strategies(phase)
    name = filter_indexes.name_of(phase.params, Value("status", "Draft", ""))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for so_far, left_to_do in (("built", []), ("invalid", ["filters.drop", "filters.create"]), ("noted", [])):
        with monkeypatch.context() as patch:
            patch.setattr(serve_filters, "_use_or_drop", stop)
            with pytest.raises(KeyboardInterrupt):
                serve_filters.apply(phase)
        if so_far == "invalid":
            articles.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass", [name])
        if so_far == "noted":
            through = filter_indexes.remembered(phase.ledger)[name]["before"] | {"scan": "index", "share": 0.4}
            filter_indexes.remember(phase, name, served=True, after=through)
        measured = filter_indexes.remembered(phase.ledger)[name]["before"]
        assert [s.name for s in serve_filters.plan(phase)] == left_to_do, so_far
        serve_filters.apply(phase)
        assert partial_indexes(articles) == {"(status = 'Draft'::text)": True}
        assert serve_filters.verify(phase).passed
        assert filter_indexes.remembered(phase.ledger)[name]["before"] == measured, (
            "with the index there it would say nothing"
        )
        serve_filters.undo(phase)
        assert (partial_indexes(articles), strategies(phase)) == ({}, before)


def test_a_value_that_is_no_longer_named_is_taken_back(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    serve_filters.apply(phase)
    fewer = phase.params.model_copy(
        update={"filters": phase.params.filters.model_copy(update={"partial_indexes": {"status": ["Draft"]}})}
    )
    phase = replace(phase, params=fewer)
    names = [s.name for s in serve_filters.plan(phase)]
    assert names == ["filters.forget_strategy", "filters.drop"]
    serve_filters.apply(phase)
    assert partial_indexes(articles) == {"(status = 'Draft'::text)": True}
    assert strategies(phase) == {"Draft": "index", None: "exact"}
    assert serve_filters.verify(phase).passed


def test_tuned_again_since_a_value_is_searched_exactly_once_its_index_is_gone(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(filters=NAMED | {"partial_indexes": {"status": ["Draft"]}})
    serve_filters.apply(phase)
    articles.execute("UPDATE runbook.strategy SET candidates = 77 WHERE value = 'Draft'")
    assert (
        filter_indexes.is_served(
            phase.connection,
            phase.ledger,
            phase.params,
            *next(iter(filter_indexes.wanted(phase.connection, phase.ledger, phase.params).items())),
        )
        is False
    )
    serve_filters.undo(phase)
    assert strategies(phase) == {"Draft": "exact", None: "exact"}


def tuned(column: str, shares: dict[str, float], **chosen: Any) -> dict[str, Any]:
    return {"column": column, "shares": shares, "chosen": {"recall": 1.0, "rows_short": 0, "p50_ms": 1.0} | chosen}


def test_without_named_values_those_that_70_tune_found_wanting_are_served(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(filters={"most_indexes": 3, "smallest_gain": 0.001})
    assert partial_index_candidates.called_for(phase.ledger, phase.params) == [], "never tuned"
    classes = [
        tuned("status", {"fast": 0.2}),
        tuned("status", {"slow, rare": 0.001, "slow": 0.02, "slow, common": 0.3}, p50_ms=40.0),
        tuned("status", {"misses": 0.2}, recall=0.7),
        tuned("status", {"short": 0.1}, rows_short=2, p50_ms=0.1),
        tuned("status, views", {"together": 0.2}, p50_ms=50.0),
        {"column": None, "shares": {}, "chosen": None},
    ]
    phase.note("tuning", {"classes": classes})
    assert partial_index_candidates.called_for(phase.ledger, phase.params) == [
        Value("status", "slow, common", "p50 40 ms, above 5 ms"),
        Value("status", "slow", "p50 40 ms, above 5 ms"),
        Value("status", "misses", "recall 0.700, below 0.800"),
    ]
    phase.note("tuning", {"classes": [tuned("status", {"Draft": 0.4}, p50_ms=40.0)]})
    serve_filters.apply(phase)
    assert partial_indexes(articles) == {"(status = 'Draft'::text)": True}
    # Tuned again with its index there, the value is slow no more; its index stays.
    phase.note("tuning", {"classes": [tuned("status", {"Draft": 0.4})]})
    assert serve_filters.plan(phase).statements == ()
    assert serve_filters.verify(phase).passed


def test_where_nothing_is_wanting_nothing_is_built(ready: Callable[..., Phase]) -> None:
    phase = ready(filters={})
    phase.note("tuning", {"classes": [tuned("status", {"Draft": 0.4})]})
    assert serve_filters.check(phase).passed and serve_filters.plan(phase).statements == ()
    serve_filters.apply(phase)
    assert [(g.name, g.found) for g in serve_filters.verify(phase)] == [
        ("filters.nothing_is_left", "no value calls for an index")
    ]


def test_what_cannot_be_served_is_refused_first(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready(
        filters=NAMED | {"most_indexes": 1},
        search={
            "mode": "application",
            "application_query": "SELECT id FROM articles ORDER BY embedding <=> :embedding",
        },
    )
    assert [g.name for g in serve_filters.check(phase).failed] == [
        "filters.function_holds_the_query",
        "filters.indexes_are_few",
    ]
    few = next(g for g in serve_filters.check(phase) if g.name == "filters.indexes_are_few")
    assert str(few) == (
        "FAIL    filters.indexes_are_few   status\n"
        "  found   2 values\n"
        "  needed  1 at most\n"
        "  danger  each index takes memory from the others, and planning a search looks at all of them\n"
        "  do      name fewer values in filters.partial_indexes, or partition by it (operate/partition_by_filter)"
    )
    tight = phase.params.model_copy(
        update={"index": phase.params.index.model_copy(update={"maintenance_work_mem_mb": 0})}
    )
    failed = serve_filters.check(replace(phase, params=tight)).failed
    assert "filters.largest_build_fits_in_memory" in [g.name for g in failed]


def test_a_table_beside_or_a_partitioned_one_takes_no_partial_index(open_phase: Open) -> None:
    phase = open_phase("operate/serve_filters", **TARGET, vector={"layout": "side_table"})
    (failed,) = (g for g in serve_filters.check(phase).failed if g.name == "filters.table_takes_partial_indexes")
    assert failed.found == "the vectors are in a table of their own, without the filters"
    write(phase, "DROP TABLE articles; CREATE TABLE public.articles (id bigint) PARTITION BY HASH (id)")
    phase = replace(
        phase, params=phase.params.model_copy(update={"vector": open_phase(**{"name": "x"}).params.vector})
    )
    (failed,) = (g for g in serve_filters.check(phase).failed if g.name == "filters.table_takes_partial_indexes")
    assert failed.found == "partitioned"


def test_a_column_that_is_no_filter_is_a_bad_parameter(make_params: Callable[..., Any]) -> None:
    with pytest.raises(BadInput) as raised:
        make_params(filters={"partial_indexes": {"status": ["Draft"]}})
    assert "filters.partial_indexes: status is not among target.filters" in str(raised.value)


def test_without_execute_nothing_is_built(ready: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = replace(ready(), execute=False)
    assert len(serve_filters.apply(phase).rows) == 2
    assert len(serve_filters.expected(phase).rows) == 2
    assert partial_indexes(articles) == {}


def test_the_notebook_does_it_and_undo_of_the_index_takes_it_away(
    articles: psycopg.Connection[Any], tmp_path: Path
) -> None:
    many_rows(articles)
    sections = SECTIONS | {k: v for k, v in TARGET.items() if k != "tune"} | APART | {"filters": NAMED}
    path = write_params(tmp_path, **sections)
    with pytest.raises(GateFailed) as raised:
        step("operate/serve_filters", path)
    assert [g.name for g in raised.value.gates.failed] == ["phase.predecessor_passed"]
    step_all("migrate", MIGRATE[:8], path)
    step("operate/serve_filters", path, execute=False)
    assert partial_indexes(articles) == {}
    step("operate/serve_filters", path, times=2)
    assert partial_indexes(articles) == BOTH
    step("undo/index", path)
    assert partial_indexes(articles) == {}
