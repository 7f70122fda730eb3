"""The search function: what it answers by which route and filter, who may call it, and what it leaves alone."""

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.core.names import index_name
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from tests import toy

Open = Callable[..., Phase]
FILTERED = {
    "target": {"filters": ["status", "views"]},
    "legacy": {
        "query": "SELECT id FROM articles WHERE body ILIKE '%' || :query || '%'"
        " AND (:status::text IS NULL OR status = :status) AND (:views::int IS NULL OR views = :views)"
        " ORDER BY id LIMIT :k"
    },
}


@pytest.fixture
def ready(open_phase: Open, articles: psycopg.Connection[Any]) -> Callable[..., Phase]:
    """Opens phase 70 on a table with vectors, index and search function; every tenth row is a Draft, ten are rare."""
    articles.execute("UPDATE articles SET status = 'Draft' WHERE id % 10 = 0")
    articles.execute("UPDATE articles SET views = 7 WHERE id % 20 = 1")

    def make(**sections: dict[str, Any]) -> Phase:
        phase = open_phase("70_tune", **(FILTERED | sections))
        search_function.apply(phase)
        for module in (extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        db.use_search_path(phase.connection)
        return phase

    return make


def vector(text: str) -> list[float]:
    return [float(x) for x in toy.embed([text])[0]]


def call(connection: psycopg.Connection[Any], text: str, k: int = 10, **filters: Any) -> list[dict[str, Any]]:
    """Calls the function as an application does, with the toy's vector of the text."""
    named = [sql.SQL("{} => {}").format(sql.Identifier(f"filter_{n}"), sql.Literal(v)) for n, v in filters.items()]
    statement = sql.SQL("SELECT * FROM search_articles({})").format(
        sql.SQL(", ").join(
            [sql.Literal(text), sql.SQL("{}::real[]").format(sql.Literal(vector(text))), sql.Literal(k), *named]
        )
    )
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(statement).fetchall()


def keys(found: list[dict[str, Any]]) -> list[int]:
    return [row["id"] for row in found]


def learn(phase: Phase, filter_: str, value: Any, scan: str, candidates: int = 40, share: float = 0.1) -> None:
    phase.do(
        db.statement(
            search_function.SQL["learn_strategy"], phase.params, filter=filter_, values=[value], shares=[share],
            scan=scan, candidates=candidates, iterative_scan="relaxed_order", most_scanned=20_000, recall=1.0,
            p50_ms=1.0,
        )
    )  # fmt: skip


def carry_settings(phase: Phase, value: int = 40) -> None:
    for statement in search_function.set_search_setting(phase.connection, phase.params, value):
        phase.do(statement)


# The legacy statement


@pytest.mark.parametrize(
    ("written", "bound"),
    [
        ("SELECT id FROM a WHERE b = :query LIMIT :k", "SELECT id FROM a WHERE b = %(query)s LIMIT %(k)s"),
        ("SELECT id::text FROM a WHERE b = :query::text LIMIT :k",
         "SELECT id::text FROM a WHERE b = %(query)s::text LIMIT %(k)s"),
        ("SELECT id FROM a WHERE b LIKE '%' || :query LIMIT :k",
         "SELECT id FROM a WHERE b LIKE '%%' || %(query)s LIMIT %(k)s"),
        ("SELECT id, ':kept' FROM a WHERE b = :query AND s = :status LIMIT :k",
         "SELECT id, ':kept' FROM a WHERE b = %(query)s AND s = (%(status)s::text) LIMIT %(k)s"),
        ("SELECT id FROM a WHERE b = :query AND c = :query LIMIT :k;",
         "SELECT id FROM a WHERE b = %(query)s AND c = %(query)s LIMIT %(k)s"),
    ],
)  # fmt: skip
def test_a_legacy_statement_keeps_everything_but_its_placeholders(
    articles: psycopg.Connection[Any], make_params: Callable[..., Params], written: str, bound: str
) -> None:
    params = make_params(legacy={"query": written}, target={"filters": ["status"]})
    with db.connect(params, "test") as connection:
        assert statements.legacy_statement(connection, params).as_string() == bound


def test_inside_the_function_placeholders_are_its_arguments(make_params: Callable[..., Params]) -> None:
    query = "SELECT id FROM a WHERE b = :query AND s = :status LIMIT :k"
    params = make_params(legacy={"query": query}, target={"filters": ["status"]})
    assert statements.legacy_in_function(params).as_string() == "SELECT id FROM a WHERE b = $1 AND s = $4 LIMIT $3"


# What it answers


def test_it_answers_by_the_route(ready: Callable[..., Phase]) -> None:
    phase = ready()
    legacy_answer = call(phase.connection, "cookie leaks")
    assert {row["answered_by"] for row in legacy_answer} == {"legacy"}
    assert keys(legacy_answer) == [1, 2, 3, 4, 5]
    for route in ("vector", "hybrid"):
        search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
        found = call(phase.connection, "cookie leaks")
        assert {row["answered_by"] for row in found} == {route}
        assert len(found) == 10 and set(keys(found)) & {1, 2, 3, 4, 5}
        scores = [row["score"] for row in found]
        assert scores == sorted(scores, reverse=True)


def test_without_a_vector_the_legacy_search_answers(ready: Callable[..., Phase]) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    found = phase.connection.execute("SELECT * FROM search_articles('cookie leaks')").fetchall()
    assert {row["answered_by"] for row in found} == {"legacy"}


def test_a_share_is_drawn_by_the_text_and_only_grows(ready: Callable[..., Phase]) -> None:
    phase = ready()
    texts = [f"{s} {v}" for s in toy.SUBJECTS for v in toy.VERBS]
    drawn_before: set[str] = set()
    for share in (10, 50, 100):
        search_function.move_route(phase, "vector", share, "test")
        by = {t: {row["answered_by"] for row in call(phase.connection, t, 3)} for t in texts}
        assert by == {t: {row["answered_by"] for row in call(phase.connection, t, 3)} for t in texts}
        to_vector = {t for t, routes in by.items() if routes == {"vector"}}
        drawn = db.rows(
            phase.connection, search_function.SQL["drawn"], phase.params, texts=texts, share_percent=share
        )
        assert to_vector == {row["text"] for row in drawn}
        assert drawn_before <= to_vector
        drawn_before = to_vector
    assert drawn_before == set(texts)


def test_k_above_ef_search_is_answered_in_full(ready: Callable[..., Phase]) -> None:
    phase = ready()
    carry_settings(phase, 10)
    search_function.move_route(phase, "vector", 100, "test")
    assert len(call(phase.connection, "cookie leaks", k=60)) == 60


def test_a_row_without_a_vector_is_never_answered(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    for scan in ("index", "relaxed", "exact"):
        statement = statements.route_statement(phase.connection, phase.params, "vector", scan=scan)  # type: ignore[arg-type]
        values = {"query": "", "embedding": vector("cookie"), "k": 1000, "status": None, "views": None}
        found = phase.connection.execute(statement, values).fetchall()
        assert len(found) == toy.ROWS, "all rows but the one without text"


@pytest.mark.parametrize("route", ["legacy", "vector", "hybrid"])
def test_every_route_heeds_every_filter(ready: Callable[..., Phase], route: Any) -> None:
    phase = ready()
    search_function.move_route(phase, route, 100, "test")
    drafts = keys(call(phase.connection, "expires", status="Draft"))
    assert drafts and all(key % 10 == 0 for key in drafts)
    both = keys(call(phase.connection, "expires", status="Stable", views=7))
    assert both and all(key % 20 == 1 for key in both)
    assert call(phase.connection, "expires", status="no such status") == []


# How it searches by which filter


@pytest.mark.parametrize("route", ["vector", "hybrid"])
@pytest.mark.parametrize("scan", ["index", "relaxed", "exact"])
def test_every_way_gives_filtered_answers_best_first(ready: Callable[..., Phase], route: Any, scan: str) -> None:
    phase = ready(search={"fulltext_column": "tsv", "hybrid_candidates": 10})
    carry_settings(phase)
    learn(phase, "status", "Draft", scan, candidates=200)
    search_function.move_route(phase, route, 100, "test")
    found = call(phase.connection, "cookie leaks", status="Draft")
    assert len(found) == 10 and all(key % 10 == 0 for key in keys(found))
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)


def strategy_used(phase: Phase, **filters: Any) -> tuple[str, str]:
    """Whether the vector index was read, by its counter, and how."""
    name = sql.Literal(f"public.{index_name(phase.params)}")
    counter = sql.SQL("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelid = {}::regclass").format(name)

    def scans() -> int:
        phase.connection.execute("SELECT pg_stat_force_next_flush()")
        row = phase.connection.execute(counter).fetchone()
        return int(row["idx_scan"]) if row else -1

    before = scans()
    call(phase.connection, "cookie leaks", **filters)
    return ("index" if scans() > before else "exact"), str(filters)


def test_the_value_decides_then_the_column_and_exact_beats_index(ready: Callable[..., Phase]) -> None:
    phase = ready()
    carry_settings(phase)
    search_function.move_route(phase, "vector", 100, "test")
    phase.connection.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    learn(phase, "status", "Stable", "index", share=0.9)
    learn(phase, "status", None, "exact", share=0.1)
    learn(phase, "views", "0", "relaxed", share=0.95)
    assert strategy_used(phase)[0] == "index", "no filter: the function's own settings"
    assert strategy_used(phase, status="Stable")[0] == "index"
    assert strategy_used(phase, status="Draft")[0] == "exact", "a value that is not listed"
    assert strategy_used(phase, views=0)[0] == "index"
    assert strategy_used(phase, status="Draft", views=0)[0] == "exact", "one filter of two asks for every row"
    assert strategy_used(phase, views=7)[0] == "index", "a filter without any row that fits: as if unfiltered"


def test_a_strategys_settings_end_with_the_call(ready: Callable[..., Phase]) -> None:
    phase = ready()
    carry_settings(phase, 40)
    learn(phase, "status", "Draft", "relaxed", candidates=321)
    search_function.move_route(phase, "vector", 100, "test")
    with phase.connection.transaction():
        phase.connection.execute("SET LOCAL hnsw.ef_search = 77")
        call(phase.connection, "cookie leaks", status="Draft")
        row = phase.connection.execute(
            "SELECT current_setting('hnsw.ef_search') AS ef, current_setting('hnsw.iterative_scan') AS scan"
        ).fetchone()
    assert row == {"ef": "77", "scan": "off"}


def test_a_fresh_connections_first_call_uses_the_functions_settings(
    ready: Callable[..., Phase], database: str
) -> None:
    phase = ready()
    carry_settings(phase, 200)
    search_function.move_route(phase, "vector", 100, "test")
    with psycopg.connect(database, autocommit=True) as fresh:
        fresh.execute("SET enable_seqscan = off")
        assert len(call(fresh, "cookie leaks", k=150)) == 150
    for statement in search_function.set_search_setting(phase.connection, phase.params, 5):
        if "iterative" not in str(statement.query):
            phase.do(statement)
    for statement in search_function.reset_search_setting(phase.connection, phase.params, "hnsw.iterative_scan"):
        phase.do(statement)
    with psycopg.connect(database, autocommit=True) as fresh:
        fresh.execute("SET enable_seqscan = off")
        # An element of the graph holds up to ten rows of one vector.
        assert len(call(fresh, "cookie leaks", k=100)) <= 50, "the function's ef_search of 5, not pgvector's 40"


# Who may call it, and what a caller can do with it


HOSTILE = [
    "'; DROP TABLE articles; --",
    "$runbook$",
    "%s %(query)s",
    "{key}",
    "\\'; SELECT 1",
    ":query",
    "a%' OR '1'='1",
]


@pytest.mark.attack
@pytest.mark.parametrize("text", HOSTILE)
def test_neither_text_nor_filter_is_ever_read_as_sql(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], text: str
) -> None:
    phase = ready()
    carry_settings(phase)
    learn(phase, "status", text, "exact")
    for route in ("legacy", "vector", "hybrid"):
        search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
        call(phase.connection, text)
        assert call(phase.connection, text, status=text) == []
    assert articles.execute("SELECT count(*) FROM articles").fetchone() == (toy.ROWS + 1,)


ODD = {
    "id": 'key $runbook$ "%"',
    "title": "te'xt $$ %s {x}",
    "status": "fil % (er \\ $1",
    "views": "it's :k $runbook1$",
}


@pytest.mark.attack
def test_names_of_columns_end_no_function_and_are_no_placeholder(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    articles.execute("UPDATE articles SET status = 'Draft' WHERE id % 2 = 0")
    for old, new in ODD.items():
        articles.execute(sql.SQL("ALTER TABLE articles RENAME {} TO {}").format(*map(sql.Identifier, (old, new))))
    key, status, views = (sql.Identifier(ODD[name]).as_string() for name in ("id", "status", "views"))
    sections: dict[str, Any] = {
        "target": {
            "key": ODD["id"],
            "text_columns": [ODD["title"], "body"],
            "filters": [ODD["status"], ODD["views"]],
        },
        "legacy": {
            "query": f"SELECT {key} FROM articles WHERE body ILIKE '%' || :query || '%' AND (:{status}::text IS NULL"
            f" OR {status} = :{status}) AND (:{views}::int IS NULL OR {views} = :{views}) ORDER BY {key} LIMIT :k"
        },
    }
    phase = open_phase("70_tune", **sections)
    search_function.apply(phase)
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    db.use_search_path(phase.connection)
    assert search_function.is_as_planned(phase.connection, phase.params)
    learn(phase, ODD["status"], "Stable", "exact")
    for status in ("Stable", "Draft"):
        for route in ("legacy", "vector", "hybrid"):
            search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
            found = call(phase.connection, "cookie leaks", **{ODD["status"]: status, ODD["views"]: 0})
            assert found and {row["answered_by"] for row in found} == {route}
            assert call(phase.connection, "cookie leaks", **{ODD["views"]: 1}) == []
    articles.execute(sql.SQL("UPDATE articles SET {} = 'cookie sings'").format(sql.Identifier(ODD["title"])))
    queued = articles.execute("SELECT count(*) FROM runbook.articles_queue").fetchone()
    assert queued == (toy.ROWS + 1,)


def test_a_filter_may_have_a_type_whose_name_holds_a_per_cent_sign(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    articles.execute(
        """CREATE SCHEMA "50% off"; CREATE TYPE "50% off"."%s" AS ENUM ('Stable', 'Draft');
        ALTER TABLE articles ALTER status DROP DEFAULT,
            ALTER status TYPE "50% off"."%s" USING status::"50% off"."%s";
        """
    )
    query = FILTERED["legacy"]["query"].replace("status = :status", "status::text = :status")
    phase = open_phase("70_tune", **(FILTERED | {"legacy": {"query": query}}))
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    db.use_search_path(phase.connection)
    search_function.move_route(phase, "vector", 100, "test")
    assert len(call(articles, "cookie leaks", status="Stable")) == 10
    assert call(articles, "cookie leaks", status="Draft") == []
    asked = {"query": "cookie leaks", "embedding": vector("cookie leaks"), "k": 3, "status": "Stable", "views": None}
    for statement in (
        statements.filtered_call_statement(phase.connection, phase.params),
        statements.route_statement(phase.connection, phase.params, "vector"),
    ):
        assert len(phase.connection.execute(statement, asked).fetchall()) == 3


def test_the_function_is_stable_pinned_and_runs_as_its_caller(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    state = search_function.function_state(phase.connection, phase.params)
    assert state is not None
    assert (state["volatility"], state["security_definer"]) == ("s", False)
    assert state["settings"] == ["search_path=pg_catalog, pg_temp"]
    granted = articles.execute(
        "SELECT bool_or(has_function_privilege('public', oid, 'execute')) FROM pg_proc WHERE proname ~ 'articles'"
    ).fetchone()
    assert granted == (False,)


@pytest.fixture
def app(articles: psycopg.Connection[Any], request: pytest.FixtureRequest) -> Any:
    """A plain role that may read the table; dropped with what it owns."""
    articles.execute("CREATE ROLE runbook_app LOGIN")
    articles.execute("GRANT SELECT ON articles TO runbook_app")
    yield "runbook_app"
    articles.execute("DROP OWNED BY runbook_app")
    articles.execute("DROP ROLE runbook_app")


@pytest.mark.attack
def test_a_plain_role_calls_it_where_the_extension_has_a_schema_of_its_own(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], database: str, app: str
) -> None:
    articles.execute("CREATE SCHEMA ext")
    phase = ready(search={"grant_to": [app]}, extension={"schema": "ext"})
    search_function.apply(phase)
    carry_settings(phase)
    learn(phase, "status", "Draft", "relaxed")
    search_function.move_route(phase, "vector", 100, "test")
    articles.execute(sql.SQL("GRANT USAGE ON SCHEMA ext TO {}").format(sql.Identifier(app)))
    with psycopg.connect(database, user=app, autocommit=True) as caller:
        assert len(call(caller, "cookie leaks")) == 10
        assert len(call(caller, "cookie leaks", status="Draft")) == 10
        for forbidden in (
            "UPDATE runbook.route SET share_percent = 0",
            "DELETE FROM runbook.strategy",
            "TABLE runbook.entry",
            # The values of all rows, also of those that the table's policies keep from this role.
            "TABLE runbook.strategy",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                caller.execute(forbidden)


def test_a_role_that_was_not_named_may_not_call_it(ready: Callable[..., Phase], database: str, app: str) -> None:
    ready()
    with (
        psycopg.connect(database, user=app, autocommit=True) as caller,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        call(caller, "cookie leaks")


def test_a_caller_cannot_shadow_what_the_function_names(
    ready: Callable[..., Phase], database: str, articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    with psycopg.connect(database, autocommit=True) as caller:
        caller.execute("CREATE TEMP TABLE articles AS SELECT * FROM public.articles LIMIT 0")
        assert len(call(caller, "cookie leaks")) == 10


# While it is in use


def test_no_call_fails_while_the_route_moves(ready: Callable[..., Phase], database: str) -> None:
    phase = ready()
    carry_settings(phase)
    learn(phase, "status", "Draft", "relaxed")
    stop = threading.Event()
    routes: list[set[str]] = []
    failures: list[Exception] = []

    def caller(number: int) -> None:
        seen: set[str] = set()
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                try:
                    seen |= {
                        r["answered_by"] for r in call(connection, f"{toy.SUBJECTS[number]} leaks", status="Stable")
                    }
                except psycopg.Error as error:
                    failures.append(error)
        routes.append(seen)

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            for route, share in (("vector", 50), ("vector", 100), ("hybrid", 100), ("legacy", 0)):
                search_function.move_route(phase, route, share, "test")  # type: ignore[arg-type]
            search_function.apply(phase)
            carry_settings(phase)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert set().union(*routes) >= {"vector", "hybrid", "legacy"}


def test_made_again_it_keeps_its_route_its_settings_and_its_strategies(ready: Callable[..., Phase]) -> None:
    phase = ready()
    carry_settings(phase, 80)
    learn(phase, "status", "Draft", "exact")
    search_function.move_route(phase, "hybrid", 50, "test")
    search_function.apply(phase)
    assert search_function.current_route(phase.connection, phase.params) == ("hybrid", 50)
    assert [row["value"] for row in db.rows(phase.connection, search_function.SQL["strategies"], phase.params)] == [
        "Draft"
    ]


def test_undo_leaves_no_function_no_route_and_no_strategy_and_twice_does_nothing(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    learn(phase, "status", "Draft", "exact")
    search_function.undo(phase)
    assert search_function.verify_undone(phase).passed
    for table in ("route", "strategy"):
        assert articles.execute(
            sql.SQL("SELECT count(*) FROM runbook.{}").format(sql.Identifier(table))
        ).fetchone() == (0,)
    assert search_function.undo_plan(phase).statements == ()


def test_a_function_that_is_left_says_so(ready: Callable[..., Phase]) -> None:
    assert str(search_function.verify_undone(ready())) == (
        "FAIL    search.function_is_gone   search_articles\n"
        "  found   search_articles(text,real[],integer,text,integer,double precision)\n"
        "  needed  no such function\n"
        "  danger  the table is not as it was\n"
        "  do      run undo/search_function again"
    )


def test_names_that_need_quoting(open_phase: Open, articles: psycopg.Connection[Any]) -> None:
    articles.execute('CREATE SCHEMA "My Schema"')
    articles.execute('ALTER TABLE articles SET SCHEMA "My Schema"')
    articles.execute('ALTER TABLE "My Schema".articles RENAME TO "Articles %s"')
    for old, new in (("id", "Key %"), ("status", 'Sta"tus'), ("views", "käse")):
        articles.execute(
            sql.SQL('ALTER TABLE "My Schema"."Articles %s" RENAME COLUMN {} TO {}').format(
                sql.Identifier(old), sql.Identifier(new)
            )
        )
    phase = open_phase(
        "70_tune",
        target={"schema": "My Schema", "table": "Articles %s", "key": "Key %", "filters": ['Sta"tus', "käse"]},
        vector={"column": "Em bed"},
        search={"function": "Search Ü %", "fulltext_column": "tsv"},
        legacy={
            "query": 'SELECT "Key %" FROM "My Schema"."Articles %s"'
            " WHERE body ILIKE '%' || :query || '%' LIMIT :k"
        },
    )
    search_function.apply(phase)
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    carry_settings(phase)
    learn(phase, 'Sta"tus', "Stable", "relaxed")
    for route in ("legacy", "vector", "hybrid"):
        search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
        statement = "SELECT * FROM \"My Schema\".\"Search Ü %\"('cookie', $1::real[], 3, 'Stable', 0)"
        with psycopg.RawCursor(phase.connection, row_factory=dict_row) as cursor:
            found = cursor.execute(statement.encode(), [vector("cookie")]).fetchall()
        assert len(found) == 3 and {row["answered_by"] for row in found} == {route}
    search_function.undo(phase)
    assert search_function.verify_undone(phase).passed


ZEROS, NAN, SHORT = [0.0] * 8, [float("nan")] * 8, [1.0] * 3


@pytest.mark.parametrize("share", [0, 100])
@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (ZEROS, "query_embedding is a vector of zeros, which has no direction to compare"),
        (NAN, "query_embedding holds NaN, infinity or NULL, which no vector may hold"),
        ([1.0] * 7 + [None], "query_embedding holds NaN, infinity or NULL, which no vector may hold"),
        ([1.0] * 7 + [float("-inf")], "query_embedding holds NaN, infinity or NULL, which no vector may hold"),
        (SHORT, "query_embedding has 3 dimensions, the vectors searched have 8"),
        ([], "query_embedding has 0 dimensions, the vectors searched have 8"),
    ],
)
def test_a_vector_that_cannot_be_compared_is_an_error_on_every_route(
    ready: Callable[..., Phase], share: int, vector: list[Any], message: str
) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", share, "test")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        phase.connection.execute("SELECT * FROM search_articles('cookie', %s::real[], 3)", [vector])


@pytest.mark.parametrize("route", ["legacy", "vector", "hybrid"])
def test_k_that_is_null_is_the_default_and_a_negative_one_an_error(ready: Callable[..., Phase], route: Any) -> None:
    phase = ready()
    search_function.move_route(phase, route, 100, "test")
    count = "SELECT count(*) AS n FROM search_articles(%s, %s::real[], %s)"
    vector = [float(x) for x in toy.embed(["cookie leaks"])[0]]

    def answered(text: str | None, k: int | None) -> int:
        return (phase.connection.execute(count, [text, vector, k]).fetchone() or {})["n"]

    assert answered("cookie", None) == search_function.DEFAULT_K and answered("cookie", 0) == 0
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="k is -1, needed: 0 or more"):
        answered("cookie", -1)
    # A call without a text goes where every call goes; the vector alone finds its rows.
    assert answered(None, 5) == (0 if route == "legacy" else 5)


def test_before_the_extension_is_there_a_call_with_a_vector_is_answered_by_legacy(
    open_phase: Callable[..., Phase],
) -> None:
    phase = open_phase("10_baseline")
    search_function.apply(phase)
    found = phase.connection.execute(
        "SELECT * FROM search_articles('cookie leaks', %s::real[], 3)", [[1.0] * 8]
    ).fetchall()
    assert {row["answered_by"] for row in found} == {"legacy"}


# What drivers send, and what comes back


@pytest.mark.parametrize(
    "vector_as",
    [
        "%(v)s::real[]",
        "%(v)s::real[]::vector",
        "%(v)s::double precision[]",
        "%(v)s::numeric[]",
        "%(v)s",
        "%(v)s::real[]::vector::text",
        "%(v)s::real[]::text",
        "%(l)s",
        "'{literal}'",
    ],
)
@pytest.mark.parametrize("text_as", ["'cookie leaks'", "'cookie leaks'::text", "'cookie leaks'::varchar"])
def test_every_type_of_vector_finds_the_same_rows(ready: Callable[..., Phase], vector_as: str, text_as: str) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    if "varchar" in text_as and vector_as in ("%(l)s", "'{literal}'"):
        pytest.skip("with text of type varchar a string without a type is taken for double precision[]")
    numbers = vector("cookie leaks")
    literal = f"[{', '.join(map(str, numbers))}]"
    statement = f"SELECT id FROM search_articles({text_as}, {vector_as.replace('{literal}', literal)}, 5)"
    found = phase.connection.execute(statement.encode(), {"v": numbers, "l": literal}).fetchall()
    assert keys(found) == keys(call(phase.connection, "cookie leaks", 5))


@pytest.mark.parametrize(
    "given", ["", ", NULL", ", NULL, 5", ", query_embedding => NULL", ", k => 5", ", NULL::vector"]
)
def test_a_vector_that_is_null_or_missing_fits_one_function_alone(ready: Callable[..., Phase], given: str) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    found = phase.connection.execute(f"SELECT * FROM search_articles('cookie leaks'{given})".encode()).fetchall()
    assert {row["answered_by"] for row in found} == {"legacy"}


def test_a_list_of_integers_is_a_vector_too(ready: Callable[..., Phase]) -> None:
    phase = ready()
    search_function.move_route(phase, "vector", 100, "test")
    for text in ("cookie", None):
        found = phase.connection.execute("SELECT * FROM search_articles(%s, %s, 5)", [text, [1, 0, 2, 0, 0, 0, 1, 0]])
        assert len(found.fetchall()) == 5


def test_each_route_fills_what_the_guide_says(ready: Callable[..., Phase]) -> None:
    phase = ready(search={"fulltext_column": "tsv", "returns": ["title", "views"]})
    rows = {}
    for route in ("legacy", "vector", "hybrid"):
        search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
        found = rows[route] = call(phase.connection, "cookie leaks", 5)
        assert [row["rank"] for row in found] == [1, 2, 3, 4, 5]
        assert list(found[0]) == ["id", "score", "answered_by", "similarity", "rank", "title", "views"]
        table = phase.connection.execute(
            "SELECT id, title, 1 - (embedding <=> %s::real[]::vector) AS similarity FROM articles",
            [vector("cookie leaks")],
        ).fetchall()
        by_id = {row["id"]: row for row in table}
        assert [row["title"] for row in found] == [by_id[row["id"]]["title"] for row in found]
        if route == "legacy":
            assert {(row["similarity"], row["score"]) for row in found} == {(None, None)}
        else:
            assert [row["similarity"] for row in found] == pytest.approx(
                [by_id[key]["similarity"] for key in keys(found)]
            )
    assert all(row["score"] == pytest.approx(row["similarity"] - 1) for row in rows["vector"])


@pytest.mark.parametrize(
    ("distance", "form"),
    [("l2", "1 / (1 + (embedding <-> {v}))"), ("inner_product", "-(embedding <#> {v})")],
)
def test_similarity_by_other_distances(ready: Callable[..., Phase], distance: str, form: str) -> None:
    phase = ready(vector={"distance": distance}, search={"fulltext_column": "tsv"})
    for route in ("vector", "hybrid"):
        search_function.move_route(phase, route, 100, "test")  # type: ignore[arg-type]
        found = call(phase.connection, "cookie leaks", 5)
        wanted = form.format(v=f"'{vector('cookie leaks')}'::vector")
        rows = phase.connection.execute(f"SELECT id, {wanted} AS s FROM articles".encode()).fetchall()
        by_id = {row["id"]: row["s"] for row in rows}
        assert [row["similarity"] for row in found] == pytest.approx([by_id[key] for key in keys(found)])


@pytest.mark.parametrize("scan", ["index", "relaxed", "exact"])
def test_rows_below_the_smallest_similarity_are_left_out(ready: Callable[..., Phase], scan: str) -> None:
    phase = ready()
    carry_settings(phase)
    learn(phase, "status", "Stable", scan)
    search_function.move_route(phase, "vector", 100, "test")
    every = call(phase.connection, "cookie leaks", 150, status="Stable")
    least = every[70]["similarity"]
    statement = (
        "SELECT * FROM search_articles('cookie leaks', %s::real[], 150, filter_status => 'Stable',"
        " min_similarity => %s)"
    )
    found = phase.connection.execute(statement, [vector("cookie leaks"), least]).fetchall()
    assert found == [row for row in every if row["similarity"] >= least] and 70 < len(found) < 150
    assert phase.connection.execute(statement, [vector("cookie leaks"), 1.1]).fetchall() == []


def test_the_smallest_similarity_of_the_parameters_is_the_default_and_spares_rows_found_by_their_words(
    ready: Callable[..., Phase],
) -> None:
    phase = ready(search={"fulltext_column": "tsv", "smallest_similarity": 1.1})
    search_function.move_route(phase, "vector", 100, "test")
    assert call(phase.connection, "cookie leaks") == []
    no_limit = "SELECT * FROM search_articles('cookie leaks', %s::real[], min_similarity => NULL)"
    assert len(phase.connection.execute(no_limit, [vector("cookie leaks")]).fetchall()) == 10
    search_function.move_route(phase, "hybrid", 100, "test")
    assert {row["id"] for row in call(phase.connection, "cookie")} <= {
        row["id"]
        for row in phase.connection.execute("SELECT id FROM articles WHERE body ~* 'cookie' OR title ~* 'cookie'")
    }


@pytest.mark.parametrize("least", [0.3, -0.5, 1.0, 1e-05, 0.1 + 0.2, None])
def test_another_smallest_similarity_makes_the_function_another(
    ready: Callable[..., Phase], open_phase: Open, least: float | None
) -> None:
    ready(search={"smallest_similarity": 0.25})
    again = open_phase("10_baseline", **(FILTERED | {"search": {"smallest_similarity": least}}))
    assert not search_function.is_as_planned(again.connection, again.params)
    search_function.apply(again)
    assert search_function.is_as_planned(again.connection, again.params)
    search_function.move_route(again, "vector", 100, "test")
    spelt = again.connection.execute(
        "SELECT pg_get_function_arguments(p.oid) AS a FROM pg_proc p WHERE p.proname = 'search_articles'"
    ).fetchall()
    expected = "NULL" if least is None else f"'{least:g}'" if least != 0.1 + 0.2 else "'0.30000000000000004'"
    assert len(spelt) == 3 and all(f"min_similarity double precision DEFAULT {expected}::" in r["a"] for r in spelt)


# Made anew with other arguments or columns


OLD = """CREATE FUNCTION search_articles(query_text text, query_embedding real[] DEFAULT NULL, k integer DEFAULT 10)
    RETURNS TABLE (id bigint, score double precision, answered_by text) LANGUAGE plpgsql AS 'BEGIN END'"""


def test_a_function_of_an_earlier_release_is_replaced_with_its_grants_comment_and_settings(
    open_phase: Open, articles: psycopg.Connection[Any], app: str
) -> None:
    articles.execute(OLD)
    articles.execute(f"GRANT EXECUTE ON FUNCTION search_articles TO {app} WITH GRANT OPTION")
    articles.execute(
        "COMMENT ON FUNCTION search_articles IS 'it''s 100 % ours'; GRANT USAGE ON SCHEMA public TO PUBLIC"
    )
    phase = open_phase("10_baseline")
    search_function.apply(phase)
    assert search_function.is_as_planned(phase.connection, phase.params)
    found = articles.execute(
        "SELECT count(*), bool_and(has_function_privilege(%s, oid, 'EXECUTE WITH GRANT OPTION')),"
        " max(obj_description(oid, 'pg_proc')) FROM pg_proc"
        " WHERE proname ~ '^(search_articles|articles_by_|check_vector)'",
        [app],
    ).fetchone()
    assert found == (7, True, "it's 100 % ours"), "three of the name, three routes, and the check"
    search_function.undo(phase)
    left = articles.execute("SELECT proname FROM pg_proc WHERE proname ~ 'articles'").fetchall()
    assert left == []


def test_a_view_on_the_function_is_found_before_it_is_dropped(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    articles.execute(OLD)
    articles.execute("CREATE VIEW found AS SELECT id FROM search_articles('cookie')")
    phase = open_phase("10_baseline")
    with pytest.raises(BadInput) as raised:
        search_function.apply(phase)
    assert str(raised.value).strip() == (
        "FAIL    search.nothing_depends_on_the_function   search_articles\n"
        "  found   view found needs public.search_articles(query_text text, query_embedding real[], k integer)\n"
        "  needed  no object that depends on it\n"
        "  danger  with other arguments or columns it must be dropped and recreated, which PostgreSQL refuses while"
        " something depends on it; DROP … CASCADE would drop that too\n"
        "  do      keep the definition (SELECT pg_get_viewdef of a view), drop the object, run this again, then"
        " recreate the object; nothing was changed"
    )
    articles.execute("DROP VIEW found")
    search_function.apply(phase)
    articles.execute("CREATE VIEW found AS SELECT id FROM search_articles('cookie')")
    search_function.apply(phase)
    with pytest.raises(BadInput, match="view found needs"):
        search_function.undo(phase)


def test_other_filters_or_columns_leave_no_function_of_the_former_ones(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    for target, search in (({"filters": ["status"]}, {}), ({"filters": []}, {"returns": ["title"]}), ({}, {})):
        phase = open_phase("10_baseline", target=target, search=search)
        search_function.apply(phase)
        assert search_function.is_as_planned(phase.connection, phase.params)
        count = "SELECT count(*) FROM pg_proc WHERE proname = 'search_articles'"
        assert articles.execute(count).fetchone() == (3,)
        twice = "SELECT proname FROM pg_proc WHERE proname ~ '^articles_by_' GROUP BY proname HAVING count(*) > 1"
        assert articles.execute(twice).fetchall() == []


def test_a_call_under_way_finds_what_answers_for_it_while_the_function_gets_another_filter(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    first = open_phase("10_baseline", target={"filters": ["status"]})
    search_function.apply(first)
    by_legacy = articles.execute("SELECT oid FROM pg_proc WHERE proname = 'articles_by_legacy'").fetchall()
    phase = open_phase("10_baseline", target={"filters": ["status", "views"]})
    statements_of_it = [s.name for s in search_function.plan(phase).statements]
    assert statements_of_it.index("search.drop_former") == statements_of_it.index("search.create_function") + 1
    phase.do(search_function.create_statement(phase.connection, phase.params))
    former = "SELECT oid FROM pg_proc WHERE proname = 'articles_by_legacy' AND pronargs = 5"
    assert articles.execute(former).fetchall() == by_legacy, "a call that has begun asks for it by its arguments"
    assert search_function.is_as_planned(phase.connection, phase.params)
    search_function.apply(phase)
    assert (
        articles.execute(former).fetchall() == []
        and search_function.drop_former(phase.connection, phase.params) == []
    )
    assert "search.drop_former" not in [s.name for s in search_function.plan(phase).statements]


@pytest.mark.parametrize("column", ["id", "rank", "filter_status", "k"])
def test_a_column_to_be_returned_clashes_with_no_other_name(make_params: Callable[..., Params], column: str) -> None:
    with pytest.raises(BadInput, match=f"has an argument or a result named {column} already"):
        make_params(target={"filters": ["status"]}, search={"returns": ["title", column]})


def test_each_routes_function_is_planned_for_the_values_of_its_call(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    """A generic plan could neither use a partial index nor see how much a filter lets through."""
    phase = ready()
    carry_settings(phase)
    search_function.move_route(phase, "vector", 100, "test")
    phase.connection.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
    name = index_name(phase.params)
    articles.execute(
        f"DROP INDEX {name}; CREATE INDEX {name} ON articles USING hnsw (embedding vector_cosine_ops)"
        " WHERE status = 'Draft'"
    )
    assert [strategy_used(phase, status="Draft")[0] for _ in range(8)] == ["index"] * 8
