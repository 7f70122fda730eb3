"""Filters that are conditions: every route gives the rows that they let through, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import cheapest_way, comparison, exact, filters_together, loop, query_set
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.prepared import reads_index
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, filter_checks, load_embeddings
from runbook_lib.operate import monitor, rebuild_index
from runbook_lib.params import Params
from runbook_lib.search import search_function, share_classes, statements, ways
from tests import toy
from tests.test_filter_checks import SOUND
from tests.test_tune import measured

VALUES: dict[str, str] = {
    "status": "Draft",
    "most_views": "3",
    "states": '{Draft,"O\'Brien, {x}"}',
    "owner": "7",
    'Sta"te %': "Dr",
}


@pytest.fixture
def ready(articles: psycopg.Connection[Any], open_phase: Callable[..., Phase]) -> Callable[..., Phase]:
    articles.execute(
        "CREATE TABLE acl (doc bigint, user_id bigint, PRIMARY KEY (user_id, doc));"
        "INSERT INTO acl SELECT i, 7 FROM generate_series(1, 200, 3) i;"
        "UPDATE articles SET views = id % 9,"
        " status = (ARRAY['Draft', 'Stable', 'O''Brien, {x}', 'Deleted'])[1 + id % 4]"
    )
    return open_phase


def truth(connection: psycopg.Connection[Any], condition: str) -> set[int]:
    rows = connection.execute(f"SELECT id FROM articles t WHERE embedding IS NOT NULL AND {condition}").fetchall()  # type: ignore[arg-type]
    return {row[0] for row in rows}


CONDITIONS = {
    "status": "t.status = 'Draft'",
    "most_views": "(t.views <= 3 OR t.views = 21)",
    "states": "t.status IN ('Draft', 'O''Brien, {x}')",
    "owner": "t.id % 3 = 1",
    'Sta"te %': "t.status LIKE 'Dr%'",
}
TARGET = {"filters": SOUND, "always": "t.id % 5 > 0"}
SCANS = ("index", "relaxed", "exact")


@pytest.fixture
def searched(ready: Callable[..., Phase], articles: psycopg.Connection[Any]) -> Phase:
    """A table with its index and its function, whose every way finds all rows that there are."""
    phase = ready("60_build_index", target=TARGET, legacy=LEGACY, index={"m": 40, "ef_construction": 200})
    for module in (extension, expand_schema, load_embeddings, backfill, build_index, search_function):
        module.apply(phase)
    articles.execute("ANALYZE")
    return phase


LEGACY = {
    "query": "SELECT t.id FROM articles t WHERE t.body ILIKE '%' || :query || '%' AND (:status::text IS NULL OR"
    " t.status = :status) AND (:most_views::int IS NULL OR t.views <= :most_views OR t.views = 7 * :most_views)"
    " ORDER BY t.id LIMIT :k"
}


def answered(phase: Phase, route: str, given: dict[str, str], k: int = 300) -> list[int]:
    p = phase.params
    call = statements.filtered_call_statement(phase.connection, p)
    values = dict.fromkeys(p.target.filters) | given
    values |= {"query": "cookie", "embedding": [float(x) for x in toy.embed(["cookie leaks"])[0]], "k": k}
    with phase.connection.transaction():
        statements.force_route(phase.connection, p, route)
        rows = phase.connection.execute(call, values).fetchall()
    assert {row["answered_by"] for row in rows} <= {route}
    return [row["id"] for row in rows]


@pytest.mark.parametrize("given", [(), *((name,) for name in SOUND), ("most_views", "owner"), tuple(SOUND)])
@pytest.mark.parametrize("scan", SCANS)
def test_every_way_gives_all_rows_that_the_filters_let_through_and_no_other(
    searched: Phase, articles: psycopg.Connection[Any], given: tuple[str, ...], scan: str
) -> None:
    learn_all(searched, scan)
    allowed = " AND ".join(["t.id % 5 > 0", *(CONDITIONS[name] for name in given)])
    expected = truth(articles, allowed)
    found = answered(searched, "vector", {name: VALUES[name] for name in given})
    assert set(found) == expected and len(found) == len(expected)
    words = truth(articles, allowed + " AND t.tsv @@ to_tsquery('english', 'cookie')")
    assert words <= set(answered(searched, "hybrid", {name: VALUES[name] for name in given})) <= expected


def test_the_legacy_query_takes_the_same_names(searched: Phase, articles: psycopg.Connection[Any]) -> None:
    found = answered(searched, "legacy", {"most_views": "3", "status": "Draft"})
    assert set(found) == truth(articles, "t.body ILIKE '%cookie%' AND t.status = 'Draft' AND t.views <= 3")


def learn_all(phase: Phase, scan: str) -> None:
    """Every filter, alone and with others, is searched so, whatever the share that is expected."""
    way = {
        "scan": scan,
        "candidates": 1000,
        "iterative_scan": "relaxed_order" if scan == "relaxed" else "strict_order",
    }
    measured = {"most_scanned": 100_000, "recall": 1.0, "p50_ms": 1.0, "shares": [0.5]}
    phase.do(db.statement(search_function.SQL["forget_strategies"], phase.params))
    for name in (*SOUND, share_classes.TOGETHER):
        phase.do(
            db.statement(
                search_function.SQL["learn_strategy"], phase.params, filter=name, values=[None], **way, **measured
            )
        )


def test_exact_answers_are_those_of_the_conditions(searched: Phase, articles: psycopg.Connection[Any]) -> None:
    vector = toy.embed(["cookie leaks"])[0]
    sets = [(), *((name,) for name in SOUND), tuple(SOUND)]
    asked = [Query("q", "", vector, tuple((n, VALUES[n]) for n in given)) for given in sets]
    with db.connect(searched.params, "test") as connection, connection.transaction():
        found = exact.answered(connection, searched.params, asked, 300)
        checked = exact.stream_agrees_with_sql(connection, searched.params, found, 300)
    for given, query in zip(sets, found, strict=True):
        expected = truth(articles, " AND ".join(["t.id % 5 > 0", *(CONDITIONS[n] for n in given)]))
        assert query.exact and set(map(int, query.exact.keys)) == expected
    assert checked.verdict == "PASS"


ALWAYS = "t.views = 7 AND t.title <> 't.x'"


@pytest.fixture
def partly(open_phase: Callable[..., Phase], articles: psycopg.Connection[Any]) -> Callable[..., Phase]:
    """Opens a phase on three thousand rows, of which searches may find every fiftieth."""
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 'word ' || i % 97, 'more ' || i % 89"
        " FROM generate_series(1, 3000) i; UPDATE articles SET views = id % 50"
    )
    articles.execute(f"ALTER DATABASE {articles.info.dbname} SET enable_seqscan = off")  # type: ignore[call-overload]

    def make(name: str, *, build: bool = True, **index: Any) -> Phase:
        tuning = {"queries": 40, "ef_search": [1, 2], "target_recall": 0.5}
        sections = {"target": {"always": ALWAYS}, "tune": tuning, "index": {"m": 8, "ef_construction": 32, **index}}
        phase = open_phase(name, **sections, embeddings={"callable": "tests.toy:embed_apart"})
        if build:
            for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
                module.apply(phase)
            articles.execute("ANALYZE articles")
        return phase

    return make


def test_the_index_may_hold_what_always_lets_through_alone(
    partly: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = partly("60_build_index", rows="always")
    assert {g.name: str(g.verdict) for g in build_index.verify(phase)} == dict.fromkeys(
        (
            *("index.is_valid", "index.has_the_right_operator_class", "index.serves_every_search"),
            *("index.was_built_without_warning", "index.finds_known_rows"),
        ),
        "PASS",
    )
    with db.connect(phase.params, "test") as connection:
        (query,) = query_set.with_vectors(phase.params, [Query("q", "cookie leaks")])
        route = statements.route_statement(connection, phase.params, "vector")
        plan = loop.planned(connection, phase.params, route, query)
        assert plan.indexes == ["articles_embedding_hnsw"] and reads_index(connection, phase.params, plan)
    assert build_index.plan(phase).statements == ()
    # An index with another condition than that of the searches is found out.
    articles.execute("DROP INDEX articles_embedding_hnsw")
    articles.execute(
        "CREATE INDEX articles_embedding_hnsw ON articles USING hnsw (embedding vector_cosine_ops)"
        " WITH (m = 8, ef_construction = 32) WHERE views = 8"
    )
    (failed,) = [g for g in build_index.verify(phase) if g.name == "index.serves_every_search"]
    assert str(failed).startswith(
        "FAIL    index.serves_every_search   articles_embedding_hnsw on public.articles\n"
        "  found   not used for a search with this condition: public.articles\n"
        "  needed  used wherever t.views = 7 AND t.title <> 't.x' is asked for\n"
    )
    build_index.undo(phase)
    assert {str(g.verdict) for g in build_index.verify_undone(phase)} == {"PASS"}


def test_an_index_of_all_rows_is_rebuilt_as_one_of_some_and_back(
    partly: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    whole = partly("60_build_index")
    phase = partly("rebuild_index", build=False, rows="always")
    points = [measured(ways.Way("index", 2, "strict_order", 20_000), recall=0.3, p50_ms=5)]
    assert "Set index.rows: always" in cheapest_way._denser_index(whole.params, points)
    assert "Set index.rows: always" not in cheapest_way._denser_index(phase.params, points)
    wrong = {g.name: g.needed for g in build_index.verify(phase) if g.verdict != "PASS"}
    assert wrong["index.has_the_right_operator_class"].endswith(", of some rows")

    def condition() -> str | None:
        row = articles.execute(
            "SELECT pg_get_expr(indpred, indrelid) FROM pg_index"
            " WHERE indexrelid = 'articles_embedding_hnsw'::regclass"
        ).fetchone()
        assert row
        return row[0]

    assert condition() is None
    rebuild_index.apply(phase)
    assert {str(g.verdict) for g in rebuild_index.verify_new(phase)} == {"PASS"}
    rebuild_index.swap(phase)
    assert [g for g in rebuild_index.verify(phase) if g.verdict != "PASS"] == []
    assert str(condition()).startswith("((views = 7) AND")
    for _ in range(2):
        rebuild_index.undo(phase)
        assert condition() is None
        assert {str(g.verdict) for g in rebuild_index.verify_undone(phase)} == {"PASS"}


@pytest.mark.parametrize(
    ("always", "layout", "said"),
    [
        (None, "column", "needs target.always"),
        ("EXISTS (SELECT FROM acl a WHERE a.doc = t.id)", "column", "without a subquery"),
        ("t.views = 7", "side_table", "a side table lacks"),
    ],
)
def test_an_index_that_cannot_be_of_some_rows_is_refused_in_the_parameters(
    make_params: Callable[..., Params], always: str | None, layout: str, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        make_params(target={"always": always}, index={"rows": "always"}, vector={"layout": layout})


def test_a_condition_that_changes_by_itself_is_no_indexs(
    make_params: Callable[..., Params], articles: psycopg.Connection[Any]
) -> None:
    tried = {"t.views < extract(epoch FROM now())": "FAIL", 't."views" = 7 OR t.id IN (1, 2)': "PASS"}
    for always, verdict in tried.items():
        params = make_params(target={"always": always}, index={"rows": "always"})
        with db.connect(params, "test") as connection:
            (found,) = [g for g in filter_checks.check(connection, params) if "of_an_index" in g.name]
        assert found.verdict == verdict
        assert verdict == "PASS" or "must be marked IMMUTABLE" in found.found


def test_every_compared_search_has_the_filters_that_its_query_has(
    searched: Phase, articles: psycopg.Connection[Any]
) -> None:
    """legacy.query knows two of them; the words of hybrid weigh by what these filters let through."""
    p = searched.params
    given = {"a": {"status": "Draft"}, "b": {"most_views": 3, "owner": 7}, "c": {"states": ["Draft"]}, "d": {}}
    lines = [{"query_id": i, "text": "cookie leaks", "filters": filters} for i, filters in given.items()]
    p.queries.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert p.queries.judgements
    p.queries.judgements.write_text('{"query_id": "a", "key": "5", "relevance": 1}\n')
    systems = comparison.systems(searched)
    result = comparison.measure(searched.connection, searched.ledger, p, systems)
    views = "(t.views <= 3 OR t.views = 21)"
    wanted = {"a": "t.status = 'Draft'", "b": f"{views} AND t.id % 3 = 1", "c": "t.status = 'Draft'", "d": "true"}
    legacy = {"a": "t.status = 'Draft'", "b": views, "c": "true", "d": "true"}
    always = TARGET["always"]
    for system in systems:
        for i, keys in result[system]["answers"].items():
            allowed = legacy[i] if system == "legacy" else f"{wanted[i]} AND {always}"
            there = truth(articles, allowed)
            assert keys and {int(key) for key in keys} <= there, (system, i)
            assert len(keys) == p.queries.k or system in ("legacy", "fulltext"), (system, i)
    for i in given:
        assert set(result["vector"]["answers"][i]) <= set(map(str, truth(articles, f"{wanted[i]} AND {always}")))


@pytest.mark.parametrize(("counted", "found"), [("all", "FAIL"), ("searched", "PASS")])
def test_rows_that_no_search_may_find_are_missing_only_where_all_are_counted(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], counted: str, found: str
) -> None:
    """A deleted row whose vector is missing, and one whose vector is of an older text; nothing is queued for them."""
    articles.execute("UPDATE articles SET status = 'Deleted' WHERE id IN (7, 8)")
    phase = open_phase("50_backfill", target={"always": "t.status <> 'Deleted'", "counted_rows": counted})
    for module in (extension, expand_schema, load_embeddings, backfill):
        module.apply(phase)
    articles.execute(
        "SET session_replication_role = replica;"
        "UPDATE articles SET embedding = NULL, embedding_hash = NULL WHERE id = 7;"
        "UPDATE articles SET body = 'another' WHERE id = 8; DELETE FROM runbook.articles_staging WHERE key IN (7, 8)"
    )
    articles.execute("TRUNCATE runbook.articles_queue")
    gates = [
        *monitor._rows_are_fresh(phase.connection, phase.params, True),
        *backfill.verify(phase),
        *load_embeddings.verify(phase),
    ]
    verdicts = {gate.name: str(gate.verdict) for gate in gates}
    for name in (
        *("watch.nothing_is_missing", "watch.nothing_is_stale", "backfill.nothing_is_missing"),
        *("backfill.nothing_is_stale", "staging.every_row_with_text_is_ready"),
    ):
        assert verdicts[name] == found, name


def test_rows_that_are_searched_are_told_by_always(make_params: Callable[..., Params]) -> None:
    with pytest.raises(BadInput, match="counted_rows: searched needs always"):
        make_params(target={"counted_rows": "searched"})


def test_filters_given_together_have_their_own_way_before_that_of_any(
    searched: Phase, articles: psycopg.Connection[Any]
) -> None:
    phase, given = searched, {"most_views": "3", "owner": "7"}
    everything = truth(articles, f"{TARGET['always']} AND {CONDITIONS['most_views']} AND {CONDITIONS['owner']}")
    learn = search_function.SQL["learn_strategy"]
    way = {"candidates": 1, "iterative_scan": "off", "most_scanned": 1, "recall": 1.0, "p50_ms": 1.0, "shares": [0.5]}
    own = {"filter": share_classes.TOGETHER, "values": [None], "scan": "index"}
    phase.do(db.statement(search_function.SQL["forget_strategies"], phase.params))
    phase.do(db.statement(learn, phase.params, **(way | own)))
    articles.execute(f"ALTER DATABASE {articles.info.dbname} SET enable_seqscan = off")  # type: ignore[call-overload]
    # Every class of the share, since the planner's estimate decides which is asked for.
    exact = {"filter": "most_views & owner", "values": list(share_classes.NAMES), "scan": "exact"}
    phase.do(db.statement(learn, phase.params, **(way | exact | {"shares": [0.5] * len(share_classes.NAMES)})))
    assert set(answered(phase, "vector", given)) == everything
    how = articles.execute(
        "SELECT w.scan, o.scan FROM runbook.way_to_search('articles', 'most_views & owner', %s) w,"
        " runbook.way_to_search('articles', 'most_views & states', %s) o",
        [share_classes.NAMES[0]] * 2,
    ).fetchone()
    assert how == ("exact", "unmeasured"), "the others are looked up as several filters"


def test_a_set_of_filters_below_the_target_is_searched_exactly(
    make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sets in two classes one finds too little in one of them; each is measured on what was held out."""
    params = make_params(target=TARGET, tune={"target_recall": 0.9})
    sets = [(("most_views", "3"), ("owner", "7")), (("owner", "7"), ("states", "{Draft}"))]
    asked: dict[FilterClass, list[Query]] = {}
    for listed, n in (("1 to 3 %", 4), ("3 to 10 %", 2)):
        of = FilterClass(share_classes.TOGETHER, f"expected {listed}", tuple(sets), {}, 0.02, listed)
        # The even ones tuned it, and would all pass.
        asked[of] = [Query(f"q{i}", "", allowed=sets[i // 2 % 2]) for i in range(2 * n)]
    chosen = measured(ways.Way("index", 40, "strict_order", 20_000))
    choices = [cheapest_way.Choice(of, (), chosen, chosen, "") for of in asked]
    seen: list[int] = []

    def measure(_: Any, __: Any, way: ways.Way, queries: list[Query]) -> Any:
        seen.append(len(queries))
        low = queries[0].allowed == sets[1] and len(seen) > 2
        return measured(way, questions=len(queries), recall=0.6 if low else 1.0)

    monkeypatch.setattr(filters_together, "measure", measure)
    found = filters_together.proved(None, params, choices, asked)  # type: ignore[arg-type]
    assert seen == [2, 2, 1, 1]
    assert [(t.name, t.questions, t.recall, t.exact) for t in found] == [
        ("most_views & owner", 3, 1.0, False),
        ("owner & states", 3, pytest.approx(2.6 / 3, abs=1e-4), True),
    ]
    assert set(found[1].shares) == {"1 to 3 %", "3 to 10 %"}
    (gate,) = filters_together.gates(params, {"together": [t.as_data() for t in found]})
    assert str(gate) == (
        "PASS    tune.filters_together_reach_the_target   2 sets of filters given together\n"
        "  found   most_views & owner 1.000 on 3 held-out questions; searched exactly: owner & states\n"
        "  needed  recall 0.9 for each, or an exact search"
    )
    assert filters_together.gates(params, {}) == []
