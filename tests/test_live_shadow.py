"""Shadow of live calls: both answers logged, at a bounded cost, and never a call that fails for it."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, live_calls, load_embeddings, tune
from runbook_lib.search import live_shadow, search_function
from tests import toy
from tests.test_search_function import FILTERED, carry_settings, learn

Open = Callable[..., Phase]
VECTOR = [float(x) for x in toy.embed(["cookie leaks"])[0]]
CALL = "SELECT * FROM search_articles_shadow('cookie leaks', %s::real[], 5)"
LOG = "runbook.articles_shadow_log"
SURE = "ms with 99 % confidence"
LIMIT = "at most 25.00 ms, with 5 ms for noise"


@pytest.fixture
def shadowed(open_phase: Open) -> Callable[..., Phase]:
    def make(
        sample_percent: float = 100, calls_per_minute: int = 60, by_hand: bool = False, **sections: dict[str, Any]
    ) -> Phase:
        shadow = {"sample_percent": sample_percent, "calls_per_minute": calls_per_minute}
        phase = open_phase("80_shadow", shadow=shadow, **sections)
        for module in (
            search_function,
            extension,
            expand_schema,
            load_embeddings,
            backfill,
            build_index,
            *(() if by_hand else (tune,)),
            live_shadow,
        ):
            module.apply(phase)
        return phase

    return make


def logged(connection: psycopg.Connection[Any]) -> int:
    return int(connection.execute("SELECT count(*) FROM runbook.articles_shadow_log").fetchone()[0])  # type: ignore[index]


def test_it_answers_as_the_search_function_does(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = shadowed()
    for route in ("legacy", "vector"):
        search_function.move_route(phase, route, 100 if route == "vector" else 0, "test")
        own = articles.execute("SELECT * FROM search_articles('cookie leaks', %s::real[], 5)", [VECTOR]).fetchall()
        assert articles.execute(CALL, [VECTOR]).fetchall() == own
        assert own[0][2] == route


def test_both_answers_and_times_are_logged_and_no_text(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = shadowed()
    articles.execute(CALL, [VECTOR])
    search_function.move_route(phase, "vector", 100, "test")
    articles.execute(CALL, [VECTOR])
    rows = live_shadow.logged(phase.connection, phase.params)
    assert [(r["live_route"], r["other_route"], r["problem"]) for r in rows] == [
        ("legacy", "vector", None),
        ("vector", "legacy", None),
    ]
    assert rows[0]["live_keys"] == rows[1]["other_keys"] and rows[0]["other_keys"] == rows[1]["live_keys"]
    assert all(r["live_ms"] > 0 and r["other_ms"] > 0 for r in rows)
    assert "cookie" not in str(articles.execute(f"SELECT * FROM {LOG}").fetchall())
    assert "vector" in str(live_calls.summary(phase)) and live_calls.verify(phase).passed


@pytest.mark.parametrize(
    ("calls", "new_ms", "found"),
    [
        (live_calls.FEWEST_CALLS - 1, 900.0, None),
        (
            live_calls.FEWEST_CALLS,
            900.0,
            ("FAIL", f"p95 900.00 ms, at least 900.00 {SURE}, legacy 20.00 ms, 30 calls", LIMIT),
        ),
        (
            live_calls.FEWEST_CALLS,
            25.0,
            ("PASS", f"p95 25.00 ms, at least 25.00 {SURE}, legacy 20.00 ms, 30 calls", LIMIT),
        ),
        (
            live_calls.FEWEST_CALLS,
            26.0,
            ("FAIL", f"p95 26.00 ms, at least 26.00 {SURE}, legacy 20.00 ms, 30 calls", LIMIT),
        ),
    ],
)
def test_times_are_judged_from_thirty_calls_on(
    shadowed: Callable[..., Phase],
    articles: psycopg.Connection[Any],
    calls: int,
    new_ms: float,
    found: tuple[str, str, str] | None,
) -> None:
    phase = shadowed()
    articles.execute(
        f"INSERT INTO {LOG} (text_hash, live_route, live_ms, live_keys, other_route, other_ms, other_keys)"
        " SELECT '', 'vector', %s, '{1}', 'legacy', 20, '{1}' FROM generate_series(1, %s)",
        [new_ms, calls],
    )
    gates = {g.name: g for g in live_calls.verify(phase)}
    timed = gates.get("live.new_route_is_fast_enough")
    assert (timed and (str(timed.verdict), timed.found, timed.needed)) == found
    assert ("too few to judge" in gates["live.no_shadow_failed"].found) == (found is None)


def test_no_more_calls_a_minute_than_the_parameters_allow(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    shadowed(calls_per_minute=3)
    for _ in range(10):
        articles.execute(CALL, [VECTOR])
    assert logged(articles) == 3


def test_only_the_share_is_sampled(shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    shadowed(sample_percent=20, calls_per_minute=1000)
    for _ in range(200):
        articles.execute(CALL, [VECTOR])
    assert 15 <= logged(articles) <= 75


def test_a_shadow_that_fails_is_logged_and_the_call_has_its_answer(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = shadowed()
    # Legacy, which answers the caller, does not read it; the other route does.
    articles.execute("ALTER TABLE articles RENAME COLUMN embedding TO elsewhere")
    assert len(articles.execute(CALL, [VECTOR]).fetchall()) == 5
    assert str(live_calls.verify(phase).failed[0]) == (
        "FAIL    live.no_shadow_failed   search_articles_shadow\n"
        "  found   1 of 1 sampled calls; 42703 column t.embedding does not exist; too few to judge their times,"
        " which takes 30 without a problem\n"
        "  needed  0\n"
        "  danger  these calls would fail for users as soon as the reads move\n"
        "  do      fix what the error names, then DELETE the rows with a problem from the log and run"
        " 80_shadow again"
    )


def test_a_log_that_cannot_be_written_fails_no_call(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    shadowed()
    articles.execute(f"ALTER TABLE {LOG} ADD CHECK (id < 0)")
    assert len(articles.execute(CALL, [VECTOR]).fetchall()) == 5
    with articles.transaction():
        articles.execute("SET TRANSACTION READ ONLY")
        assert len(articles.execute(CALL, [VECTOR]).fetchall()) == 5


def test_the_role_of_the_application_may_call_it_and_read_no_answers(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute("DROP ROLE IF EXISTS live_app")
    articles.execute("CREATE ROLE live_app")
    articles.execute("GRANT SELECT ON articles TO live_app")
    shadowed(search={"grant_to": ["live_app"], "fulltext_column": "tsv"})
    with articles.transaction():
        articles.execute("SET LOCAL ROLE live_app")
        assert len(articles.execute(CALL, [VECTOR]).fetchall()) == 5
    assert logged(articles) == 1
    future = f"INSERT INTO {LOG} (text_hash, live_route, live_ms, live_keys, other_route, logged_at)"
    for not_theirs in (
        f"SELECT live_keys FROM {LOG}",
        f"DELETE FROM {LOG}",
        f"UPDATE {LOG} SET live_ms = 0",
        f"{future} VALUES ('', 'vector', 0, '{{}}', 'legacy', 'infinity')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), articles.transaction():
            articles.execute("SET LOCAL ROLE live_app")
            articles.execute(not_theirs)
    articles.execute("DROP OWNED BY live_app")
    articles.execute("DROP ROLE live_app")


@pytest.mark.attack
def test_what_an_application_writes_into_the_log_by_hand_is_no_figure_unless_it_could_be(
    open_phase: Open, articles: psycopg.Connection[Any]
) -> None:
    phase = open_phase("80_shadow", shadow={"sample_percent": 100})
    search_function.apply(phase)
    live_shadow.apply(phase)
    for forged in (
        "live_ms = 'NaN'",
        "other_ms = 'infinity'",
        "other_ms = -1",
        "other_ms = NULL",
        "other_keys = NULL",
        "live_keys = '{{1,2},{3,4}}'",
        "live_keys = ARRAY[(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 5000) i)]",
        "filters = '{made up}'",
        "live_route = 'made up'",
    ):
        articles.execute(
            f"TRUNCATE {LOG} RESTART IDENTITY;"
            f" INSERT INTO {LOG} (text_hash, live_route, live_ms, live_keys, other_route, other_ms, other_keys)"
            " SELECT '', 'legacy', 1, '{1}', 'vector', 1, '{1}' FROM generate_series(1, 2);"
            f" UPDATE {LOG} SET {forged} WHERE id = 2"
        )
        assert len(live_shadow.logged(phase.connection, phase.params)) == 1, forged
        assert live_calls.verify(phase).passed and "legacy" in str(live_calls.summary(phase))
    articles.execute(f"UPDATE {LOG} SET problem = repeat('x', 10000000)")
    assert len(live_calls.verify(phase).failed[0].found) < 700


def test_without_a_share_there_is_nothing_to_make(shadowed: Callable[..., Phase]) -> None:
    phase = shadowed(sample_percent=0)
    assert live_shadow.plan(phase).statements == ()
    assert str(live_calls.summary(phase)) == "live calls\nnone sampled yet"
    assert live_calls.verify(phase).passed


def test_undo_removes_both_and_twice_does_nothing(shadowed: Callable[..., Phase]) -> None:
    phase = shadowed()
    live_shadow.apply(phase)
    live_shadow.undo(phase)
    assert live_shadow.verify_undone(phase).passed
    assert live_shadow.undo_plan(phase).statements == ()


def test_undo_removes_each_where_the_search_function_has_gone_before(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = shadowed()
    search_function.undo(phase)
    assert [s.name for s in live_shadow.undo_plan(phase)] == ["live.drop_function", "live.drop_log"]
    articles.execute("DROP FUNCTION search_articles_shadow(text, real[], int, float8)")
    assert [s.name for s in live_shadow.undo_plan(phase)] == ["live.drop_function", "live.drop_log"], "overloads"
    live_shadow.undo(phase)
    assert live_shadow.verify_undone(phase).passed
    assert live_shadow.undo_plan(phase).statements == ()


# Filters: the route's own way of searching by them, not a plain query beside it


@pytest.fixture
def filtered(shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]) -> Phase:
    """A shadow on a table where every tenth row is a Draft, and one row of two hundred Rare.

    Drafts are searched through the index by so few candidates that a plain query would answer more.
    """
    articles.execute("UPDATE articles SET status = 'Draft' WHERE id % 10 = 0")
    articles.execute("UPDATE articles SET status = 'Rare' WHERE id = 7")
    phase = shadowed(calls_per_minute=1000, by_hand=True, **FILTERED)
    carry_settings(phase)
    learn(phase, "status", "Draft", "index", candidates=12)
    learn(phase, "status", None, "exact")
    articles.execute("UPDATE runbook.strategy SET iterative_scan = 'off' WHERE value = 'Draft'")
    for setting in ("enable_seqscan", "enable_bitmapscan", "enable_sort"):
        articles.execute(f"SET {setting} = off")
    return phase


def by_route(connection: psycopg.Connection[Any], route: str, function: str, status: str | None) -> list[str]:
    """Keys that the function answers for these filters while reads go to a route."""
    share = 0 if route == "legacy" else 100
    connection.execute("UPDATE runbook.route SET route = %s, share_percent = %s", [route, share])
    call = f"SELECT id::text FROM {function}('cookie leaks', %s::real[], 10, filter_status => %s)"
    return [row[0] for row in connection.execute(call, [VECTOR, status]).fetchall()]  # type: ignore[call-overload]


def test_the_shadow_is_what_the_route_answers_for_these_filters(
    filtered: Phase, articles: psycopg.Connection[Any]
) -> None:
    answered: dict[str | None, int] = {}
    for status in (None, "Draft", "Rare", "Stable", "nowhere"):
        articles.execute("TRUNCATE runbook.articles_shadow_log")
        answers = {route: by_route(articles, route, "search_articles", status) for route in ("legacy", "vector")}
        for route in ("legacy", "vector"):
            assert by_route(articles, route, "search_articles_shadow", status) == answers[route]
        rows = live_shadow.logged(filtered.connection, filtered.params)
        assert [(r["live_route"], r["other_route"], r["problem"]) for r in rows] == [
            ("legacy", "vector", None),
            ("vector", "legacy", None),
        ]
        for row in rows:
            assert (row["live_keys"], row["other_keys"]) == (answers[row["live_route"]], answers[row["other_route"]])
            assert row["filters"] == (["status"] if status else [])
        answered[status] = len(answers["vector"])
    assert answered.pop("Draft") < 10, "by the strategy's own candidates; a plain query would fill the page"
    assert answered == {None: 10, "Rare": 1, "Stable": 10, "nowhere": 0}


def test_a_strategy_that_fails_is_found_before_any_read_moves(
    filtered: Phase, articles: psycopg.Connection[Any]
) -> None:
    articles.execute("UPDATE runbook.strategy SET candidates = 0 WHERE value = 'Draft'")
    by_route(articles, "legacy", "search_articles_shadow", "Draft")
    assert (
        live_calls.verify(filtered)
        .failed[0]
        .found.startswith("1 of 1 sampled calls; 22023 0 is outside the valid range")
    )
    assert articles.execute("SELECT current_setting('runbook.route', true)").fetchone() in [(None,), ("",)]


def test_the_summary_has_a_row_for_each_set_of_filters(filtered: Phase, articles: psycopg.Connection[Any]) -> None:
    for status in (None, "Draft", "Rare"):
        by_route(articles, "legacy", "search_articles_shadow", status)
    live_calls.summary(filtered)
    noted = filtered.ledger.latest("live")
    assert noted is not None
    assert [(w["live"], w["filters"], w["calls"]) for w in noted["ways"]] == [
        ("legacy", "none", 1),
        ("legacy", "status", 2),
    ]


def test_a_route_that_a_transaction_names_ends_with_it(filtered: Phase, articles: psycopg.Connection[Any]) -> None:
    call = "SELECT DISTINCT answered_by FROM search_articles('cookie leaks', %s::real[], 3)"
    with articles.transaction():
        articles.execute("SELECT set_config('runbook.route', 'vector', true)")
        assert articles.execute(call, [VECTOR]).fetchall() == [("vector",)]
    assert articles.execute(call, [VECTOR]).fetchall() == [("legacy",)]
    with articles.transaction():
        articles.execute("SELECT set_config('runbook.route', 'nonsense', true)")
        assert articles.execute(call, [VECTOR]).fetchall() == [("legacy",)], "whatever is no route"
        articles.execute("SELECT set_config('runbook.route', 'vector', true)")
        without = "SELECT DISTINCT answered_by FROM search_articles('cookie leaks')"
        assert articles.execute(without).fetchall() == [("legacy",)], "without a vector there is one way"
