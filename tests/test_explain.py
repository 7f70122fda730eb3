"""The plan of the query that the application sends: each cause that keeps it from the index, provoked and named."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from runbook_lib.benchmark import explain
from runbook_lib.benchmark.prepared import Sent
from runbook_lib.core import db
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, load_embeddings
from runbook_lib.search import search_function
from tests.conftest import DSN_ENV, write_params
from tests.opened import gates_passed
from tests.test_search_function import FILTERED, learn

VECTOR = "[1,2,3,4,5,6,7,8]"
NEAREST = "SELECT id FROM articles ORDER BY embedding <=> $1 LIMIT $2"


@pytest.fixture(scope="module")
def big(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phase]:
    """A phase on four thousand rows with an HNSW index, where the planner has a choice to make."""
    with psycopg.connect(server, autocommit=True) as admin, pytest.MonkeyPatch.context() as patch:
        admin.execute("CREATE DATABASE t_explain")
        dsn = make_conninfo(server, dbname="t_explain")
        patch.setenv(DSN_ENV, dsn)
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                """
                CREATE EXTENSION vector;
                -- A vacuum in the middle of a test would change what the planner knows, and so its plans.
                CREATE TABLE articles (id bigint PRIMARY KEY, status text, body text, embedding vector(8))
                    WITH (autovacuum_enabled = off);
                INSERT INTO articles SELECT n, CASE WHEN n % 4 = 0 THEN 'Draft' ELSE 'Stable' END, repeat('x', 50),
                    ARRAY(SELECT sin(n * d) FROM generate_series(1, 8) d)::vector FROM generate_series(1, 4000) n;
                CREATE INDEX articles_embedding_hnsw ON articles USING hnsw (embedding vector_cosine_ops);
                ANALYZE articles;
                """
            )
        p = load_params(write_params(tmp_path_factory.mktemp("explain")))
        phase_connection = db.connect(p, "test explain")
        ledger = Ledger(phase_connection, p, "test", "70_tune")
        yield gates_passed(Phase("70_tune", "test", True, p, phase_connection, ledger))
        phase_connection.close()
        admin.execute("DROP DATABASE t_explain WITH (FORCE)")


@pytest.fixture
def ask(big: Phase) -> Iterator[Callable[..., str]]:
    """Judges a statement after statements that spoil something; all of it is rolled back after the test."""
    with db.rolled_back(big.connection):

        def judge(
            text: str,
            *spoilers: str,
            kind: str = "custom",
            values: tuple[Any, ...] = (VECTOR, 10),
            exact: explain.Exactly | None = None,
        ) -> str:
            for spoiler in spoilers:
                big.connection.execute(sql.SQL(spoiler))
            sent = Sent("the application's query", text, ("embedding", "k", "status"), values)
            return str(explain.judge(big.connection, big.params, sent, kind, exact))

        yield judge


def message(found: str, do: str, kind: str = "custom") -> str:
    return (
        f"FAIL    explain.{kind}_plan_uses_the_index   the application's query\n"
        f"  found   {found}\n"
        "  needed  Index Scan articles_embedding_hnsw\n"
        "  danger  every search would read the whole table\n"
        f"  do      {do}"
    )


@pytest.mark.parametrize("kind", ["custom", "generic"])
def test_a_bound_limit_uses_the_index_under_both_plans(ask: Callable[..., str], kind: str) -> None:
    assert ask(NEAREST, kind=kind) == (
        f"PASS    explain.{kind}_plan_uses_the_index   the application's query\n"
        "  found   Index Scan articles_embedding_hnsw\n"
        "  needed  Index Scan articles_embedding_hnsw"
    )


def test_1_descending(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles ORDER BY embedding <=> $1 DESC LIMIT $2") == message(
        "Seq Scan articles; sorted DESC, farthest first; an index gives the nearest first",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k",
    )


def test_2_nulls_first(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles ORDER BY embedding <=> $1 NULLS FIRST LIMIT $2") == message(
        "Seq Scan articles; sorted NULLS FIRST; an index holds no NULL and gives them last",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k",
    )


def test_3_the_operator_of_another_class(ask: Callable[..., str]) -> None:
    assert ask("SELECT id, embedding <-> $1 AS d FROM articles a ORDER BY a.embedding <-> $1 LIMIT $2") == message(
        "Seq Scan articles; sorted by <->; vector_cosine_ops serves <=>",
        "send instead: SELECT id, embedding <-> :embedding AS d FROM articles a"
        " ORDER BY a.embedding <=> :embedding LIMIT :k",
    )


@pytest.mark.parametrize("operator", ['OPERATOR("public".<->)', "operator ( public . <-> )"])
def test_3_an_operator_is_written_with_its_schema_again(ask: Callable[..., str], operator: str) -> None:
    served = operator.replace("<->", "<=>")
    assert ask(f"SELECT id FROM articles ORDER BY embedding {operator} $1 LIMIT $2") == message(
        f"Seq Scan articles; sorted by {operator}; vector_cosine_ops serves <=>",
        f"send instead: SELECT id FROM articles ORDER BY embedding {served} :embedding LIMIT :k",
    )


def test_3_an_operator_of_a_schema_off_the_path_keeps_it(ask: Callable[..., str]) -> None:
    moved = ('CREATE SCHEMA "50% off"', 'ALTER EXTENSION vector SET SCHEMA "50% off"')
    keys = 'embedding OPERATOR("50% off".<=>) $1'
    assert ask(f"SELECT id FROM articles ORDER BY 1 - ({keys}) DESC LIMIT $2", *moved) == message(
        f"Seq Scan articles; the distance is inside an expression, 1 - ({keys}) DESC",
        'send instead: SELECT id FROM articles ORDER BY embedding OPERATOR("50% off".<=>) :embedding LIMIT :k',
    )


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("1 - (embedding <=> $1) DESC", "1 - (embedding <=> $1) DESC"),
        ("(embedding <=> $1) + 0", "(embedding <=> $1) + 0"),
        ("round((embedding <=> $1)::numeric, 3)", "round((embedding <=> $1)::numeric, 3)"),
    ],
)
def test_4_an_expression_around_the_distance(ask: Callable[..., str], keys: str, shown: str) -> None:
    assert ask(f"SELECT id FROM articles ORDER BY {keys} LIMIT $2") == message(
        f"Seq Scan articles; the distance is inside an expression, {shown}",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k",
    )


def test_4_an_expression_behind_an_alias(ask: Callable[..., str]) -> None:
    text = "SELECT id, 1 - (embedding <=> $1) AS similarity FROM articles ORDER BY similarity DESC LIMIT $2"
    assert ask(text) == message(
        "Seq Scan articles; the distance is inside an expression, similarity DESC",
        "send instead: SELECT id, 1 - (embedding <=> :embedding) AS similarity FROM articles"
        " ORDER BY embedding <=> :embedding LIMIT :k",
    )


def test_5_a_cast_without_dimension(ask: Callable[..., str]) -> None:
    answer = ask(
        "SELECT a.id FROM articles a ORDER BY a.embedding::halfvec <=> $1::halfvec LIMIT $2",
        "DROP INDEX articles_embedding_hnsw",
        "CREATE INDEX articles_half ON articles USING hnsw ((embedding::halfvec(8)) halfvec_cosine_ops)",
    )
    assert answer == message(
        "Seq Scan articles; embedding is cast to halfvec without a dimension;"
        " the index is on (embedding::halfvec(8))",
        "send instead: SELECT a.id FROM articles a"
        " ORDER BY (a.embedding::halfvec(8)) <=> :embedding::halfvec LIMIT :k",
    )


def test_6_no_limit(ask: Callable[..., str]) -> None:
    answer = ask(
        "SELECT id FROM articles ORDER BY embedding <=> $1", "SET LOCAL random_page_cost = 4", values=(VECTOR,)
    )
    assert answer == message(
        "Seq Scan articles; no LIMIT: every row is asked for, in order",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT 10",
    )


def test_6_no_limit_and_yet_the_index_returns_few_rows_in_silence(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles ORDER BY embedding <=> $1", values=(VECTOR,)) == (
        "FAIL    explain.custom_plan_uses_the_index   the application's query\n"
        "  found   Index Scan articles_embedding_hnsw; no LIMIT: every row is asked for, in order\n"
        "  needed  Index Scan articles_embedding_hnsw\n"
        "  danger  the index ends after some rows; the rest is never returned\n"
        "  do      send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT 10"
    )


PARTIAL = (
    "DROP INDEX articles_embedding_hnsw",
    "CREATE INDEX articles_stable ON articles USING hnsw (embedding vector_cosine_ops) WHERE status = 'Stable'",
)


def test_7_a_partial_index_whose_predicate_is_not_implied(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles WHERE id > 0 ORDER BY embedding <=> $1 LIMIT $2", *PARTIAL) == message(
        "Seq Scan articles; articles_stable holds only rows WHERE (status = 'Stable'::text),"
        " which the statement does not imply",
        "send instead: SELECT id FROM articles WHERE ((status = 'Stable'::text)) AND id > 0"
        " ORDER BY embedding <=> :embedding LIMIT :k",
    )


TOLD = "SET LOCAL plan_cache_mode = force_generic_plan"


def test_8_a_generic_plan(ask: Callable[..., str]) -> None:
    text = "SELECT id FROM articles WHERE status = $3 ORDER BY embedding <=> $1 LIMIT $2"
    assert ask(text, *PARTIAL, TOLD, kind="generic", values=(VECTOR, 10, "Stable")) == message(
        "Seq Scan articles; a generic plan knows neither the LIMIT nor the filter; a custom plan uses the index",
        "ALTER ROLE postgres SET plan_cache_mode = force_custom_plan, postgres being the role of the application",
        kind="generic",
    )


def test_8_a_generic_plan_that_a_constant_limit_mends(ask: Callable[..., str]) -> None:
    answer = ask(NEAREST, "SET LOCAL random_page_cost = 9", TOLD, kind="generic")
    assert answer == message(
        "Seq Scan articles; a generic plan knows neither the LIMIT nor the filter; a custom plan uses the index",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT 10;"
        " or ALTER ROLE postgres SET plan_cache_mode = force_custom_plan,"
        " postgres being the role of the application",
        kind="generic",
    )


def test_8_a_generic_plan_that_the_server_never_turns_to(ask: Callable[..., str]) -> None:
    text = "SELECT id FROM articles WHERE status = $3 ORDER BY embedding <=> $1 LIMIT $2"
    assert ask(text, *PARTIAL, kind="generic", values=(VECTOR, 10, "Stable")) == (
        "PASS    explain.generic_plan_uses_the_index   the application's query\n"
        "  found   Seq Scan articles; a generic plan knows neither the LIMIT nor the filter; a custom plan uses the"
        " index, and the server keeps to custom plans, which are cheaper\n"
        "  needed  Index Scan articles_embedding_hnsw"
    )


def test_9_probes_as_many_as_lists(ask: Callable[..., str]) -> None:
    answer = ask(
        NEAREST,
        "DROP INDEX articles_embedding_hnsw",
        "CREATE INDEX articles_embedding_ivf ON articles USING ivfflat (embedding vector_cosine_ops)"
        " WITH (lists = 20)",
        "SET LOCAL ivfflat.probes = 20",
        "SET LOCAL random_page_cost = 16",
    )
    assert answer == message(
        "Seq Scan articles; ivfflat.probes 20 of 20 lists: the index would read every row as well",
        "SET ivfflat.probes = 4",
    )


def test_10_an_invalid_index(ask: Callable[..., str]) -> None:
    answer = ask(
        NEAREST, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_embedding_hnsw'::regclass"
    )
    assert answer == message(
        "Seq Scan articles; articles_embedding_hnsw is invalid: a build did not finish",
        "DROP INDEX CONCURRENTLY articles_embedding_hnsw; then run 60_build_index with execute: true",
    )


def test_no_index_at_all(ask: Callable[..., str]) -> None:
    assert ask(NEAREST, "DROP INDEX articles_embedding_hnsw") == message(
        "Seq Scan articles; there is no vector index", "run 60_build_index with execute: true"
    )


def test_11_a_table_too_small(ask: Callable[..., str]) -> None:
    answer = ask(
        NEAREST,
        "CREATE TABLE public.kept AS SELECT * FROM articles WHERE id <= 20",
        "TRUNCATE articles",
        "INSERT INTO articles SELECT * FROM kept",
        "ANALYZE articles",
    )
    assert answer == (
        "PASS    explain.custom_plan_uses_the_index   the application's query\n"
        "  found   Seq Scan articles; 20 rows in 1 pages: reading all of them is cheaper, 1.71 against 3.03\n"
        "  needed  Index Scan articles_embedding_hnsw"
    )


@pytest.mark.parametrize(
    ("spoiler", "found", "do"),
    [
        ("enable_indexscan = off", "enable_indexscan is off, set by session", "SET enable_indexscan = on"),
        (
            "random_page_cost = 40",
            "random_page_cost is 40, set by session: the price of spinning disks",
            "SET random_page_cost = 1.1",
        ),
    ],
)
def test_12_cost_settings(ask: Callable[..., str], spoiler: str, found: str, do: str) -> None:
    assert ask(NEAREST, f"SET LOCAL {spoiler}") == message(f"Seq Scan articles; {found}", do)


def test_13_a_vector_of_another_type(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles ORDER BY embedding <=> $1::halfvec LIMIT $2") == message(
        "Seq Scan articles; the query's vector is halfvec, embedding is vector(8): every row would be cast",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding::vector(8) LIMIT :k",
    )


def test_13_a_column_that_is_cast_away_from_its_index(ask: Callable[..., str]) -> None:
    answer = ask("SELECT id FROM articles ORDER BY embedding::halfvec(8) <=> $1::halfvec(8) LIMIT $2")
    assert answer == message(
        "Seq Scan articles; embedding is cast, embedding::halfvec(8); the index is on embedding",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding::vector(8) LIMIT :k",
    )


def test_two_causes_at_once_are_both_named(ask: Callable[..., str]) -> None:
    assert ask("SELECT id FROM articles ORDER BY embedding <-> $1 DESC LIMIT $2") == message(
        "Seq Scan articles; sorted DESC, farthest first; an index gives the nearest first;"
        " sorted by <->; vector_cosine_ops serves <=>",
        "send instead: SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k",
    )


def test_a_search_inside_a_common_table_expression_is_found(ask: Callable[..., str]) -> None:
    text = (
        "WITH near AS (SELECT id FROM articles ORDER BY embedding <=> $1 DESC LIMIT $2)"
        " SELECT id FROM near -- ORDER BY embedding <-> $1\n ORDER BY id"
    )
    assert "SELECT id FROM articles ORDER BY embedding <=> :embedding LIMIT :k) SELECT" in ask(text)


def test_the_function_and_the_applications_own_query_are_both_proved(open_phase: Callable[..., Phase]) -> None:
    phase = open_phase(
        "70_tune",
        search={
            "mode": "application",
            "application_query": "SELECT id FROM articles ORDER BY embedding <=> :embedding",
            # A hundred of two hundred rows are read faster without the index.
            "hybrid_candidates": 10,
        },
        target={"name": "articles", "table": "articles", "key": "id", "text_columns": ["title", "body"]},
        cut_over={"route": "hybrid"},
    )
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    verdicts = [
        (g.name, g.subject, str(g.verdict)) for g in explain.gates(phase.connection, phase.ledger, phase.params)
    ]
    assert verdicts == [
        ("explain.function_searches_by_the_index", "search_articles, route vector", "PASS"),
        ("explain.function_searches_by_the_index", "search_articles, route hybrid", "PASS"),
        ("explain.custom_plan_uses_the_index", "the vector query of search_articles", "PASS"),
        ("explain.custom_plan_uses_the_index", "the application's query", "FAIL"),
        ("explain.generic_plan_uses_the_index", "the application's query", "FAIL"),
    ]
    assert search_function.current_route(phase.connection, phase.params) == ("legacy", 0), "the proof moves no read"


BY_STATUS = "SELECT id FROM articles WHERE status = $3 ORDER BY embedding <=> $1 LIMIT $2"
RARE = (
    "UPDATE articles SET status = 'Rare' WHERE id <= 3",
    "CREATE INDEX articles_status ON articles (status)",
    "ANALYZE articles",
)


def test_14_exact_through_the_filters_own_index(ask: Callable[..., str]) -> None:
    answer = ask(BY_STATUS, *RARE, "SET LOCAL enable_bitmapscan = off", values=(VECTOR, 10, "Rare"))
    assert answer == message(
        "Index Scan articles_status; exact search through articles_status is cheaper, for it leaves few rows",
        "nothing: these answers are exact; let 70_tune decide which filters are answered so",
    )


@pytest.mark.parametrize(
    ("off", "scan"), [("enable_bitmapscan", "Index Scan"), ("enable_indexscan", "Bitmap Index Scan")]
)
def test_14_where_70_tune_chose_exact_the_filters_own_index_is_right(
    ask: Callable[..., str], off: str, scan: str
) -> None:
    spoilers = (*RARE, f"SET LOCAL {off} = off", "SET LOCAL enable_seqscan = off")
    assert ask(BY_STATUS, *spoilers, values=(VECTOR, 10, "Rare"), exact=explain.Exactly("status = Rare", "")) == (
        "PASS    explain.custom_plan_uses_the_index   the application's query\n"
        f"  found   {scan} articles_status\n"
        "  needed  Index Scan articles_embedding_hnsw, or an index of the filter, for 70_tune chose exact where"
        " status = Rare"
    )


def test_14_where_70_tune_chose_exact_the_whole_table_is_still_too_much(ask: Callable[..., str]) -> None:
    spoilers = ("SET LOCAL enable_indexscan = off", "SET LOCAL enable_bitmapscan = off")
    answer = ask(BY_STATUS, *RARE, *spoilers, values=(VECTOR, 10, "Rare"), exact=explain.Exactly("status = Rare", ""))
    assert answer.startswith("FAIL") and "found   Seq Scan articles" in answer


MISSED = explain.Exactly("status = Stable", "the index finds 0.740 of their answers")


@pytest.mark.parametrize("kind", ["custom", "generic"])
def test_14_where_70_tune_chose_exact_the_vector_index_will_not_do(ask: Callable[..., str], kind: str) -> None:
    stable = {"values": (VECTOR, 10, "Stable"), "kind": kind}
    answer = ask(BY_STATUS, **stable, exact=MISSED)
    assert answer == (
        f"FAIL    explain.{kind}_plan_uses_the_index   the application's query\n"
        "  found   Index Scan articles_embedding_hnsw; the index finds 0.740 of their answers\n"
        "  needed  an index of the filter, for 70_tune chose exact where status = Stable\n"
        "  danger  the index hides rows that exact search finds\n"
        "  do      send instead, for these: SELECT id FROM articles WHERE status = :status"
        " ORDER BY (embedding <=> :embedding) + 0 LIMIT :k"
    )
    pasted = BY_STATUS.replace("embedding <=> $1", "(embedding <=> $1) + 0")
    as_told = ("CREATE INDEX articles_status ON articles (status)", "SET LOCAL enable_seqscan = off")
    assert ask(pasted, *as_told, **stable, exact=MISSED).startswith("PASS"), "as it was told"


def test_14_where_the_index_was_measured_to_find_enough_it_will_do(ask: Callable[..., str]) -> None:
    enough = explain.Exactly("status = Stable", "")
    assert ask(BY_STATUS, values=(VECTOR, 10, "Stable"), exact=enough).startswith("PASS")


@pytest.mark.parametrize(
    ("low", "missed"),
    [
        (0.97, ""),
        (0.6, "the index finds 0.990 of their answers"),
        (None, "what the index finds of their answers was not measured"),
    ],
)
def test_14_what_the_index_finds_is_what_70_tune_measured(
    open_phase: Callable[..., Phase], low: float | None, missed: str
) -> None:
    target = {"name": "articles", "table": "articles", "key": "id", "text_columns": ["title", "body"]}
    phase = open_phase("70_tune", target=target | {"filters": ["status"]})
    search_function.apply(phase)
    learn(phase, "status", None, "exact")
    point = {
        "scan": "index",
        "candidates": 40,
        "iterative_scan": "strict_order",
        "most_scanned": 20_000,
        "recall": 0.99,
    }
    other = point | {"candidates": 80, "low": 0.1, "worst": 0.1, "rows_short": 5}
    points = [other] if low is None else [other, point | {"low": low, "worst": 0.98, "rows_short": 0}]
    rare = {"column": "status", "shares": {}, "points": [other]}
    listed = {"column": "status", "shares": {"Stable": 0.7}, "points": points}
    phase.note("tuning", {"chosen": 40, "classes": [{"column": None, "shares": {}, "points": []}, rare, listed]})
    sent = Sent("the application's query", BY_STATUS, ("embedding", "k", "status"), (VECTOR, 10, "Stable"))
    assert explain._chosen_exact(phase.connection, phase.ledger, phase.params, sent) == explain.Exactly(
        "status = Stable", missed
    )


@pytest.mark.parametrize(("scan", "verdict"), [("exact", "PASS"), ("relaxed", "FAIL")])
def test_14_the_strategies_say_what_was_chosen_for_the_applications_filter(
    open_phase: Callable[..., Phase], articles: psycopg.Connection[Any], scan: str, verdict: str
) -> None:
    articles.execute("UPDATE articles SET views = id")
    articles.execute("CREATE INDEX articles_views ON articles (views)")
    articles.execute("VACUUM ANALYZE articles")
    query = "SELECT id FROM articles WHERE views = :views::int ORDER BY embedding <=> :embedding LIMIT :k"
    target = {"name": "articles", "table": "articles", "key": "id", "text_columns": ["title", "body"]}
    phase = open_phase(
        "70_tune",
        search={"mode": "application", "application_query": query},
        **{**FILTERED, "target": target | {"filters": ["status", "views"]}},
    )
    for module in (search_function, extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    learn(phase, "views", None, scan)
    articles.execute(f"ALTER DATABASE {articles.info.dbname} SET enable_seqscan = off")  # type: ignore[call-overload]
    own = [
        g
        for g in explain.gates(phase.connection, phase.ledger, phase.params)
        if g.subject == "the application's query"
    ]
    assert [str(g.verdict) for g in own] == [verdict] * 2
    assert all("articles_views" in g.found for g in own)
