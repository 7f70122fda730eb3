"""Shadow of live calls: both answers logged, at a bounded cost, and never a call that fails for it."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib import backfill, extension, index, live, schema, search, staging, tune
from runbook_lib.phase import Phase
from tests import toy

Open = Callable[..., Phase]
VECTOR = [float(x) for x in toy.embed(["cookie leaks"])[0]]
CALL = "SELECT * FROM search_articles_shadow('cookie leaks', %s::real[], 5)"
LOG = "runbook.articles_shadow_log"


@pytest.fixture
def shadowed(open_phase: Open) -> Callable[..., Phase]:
    def make(sample_percent: float = 100, calls_per_minute: int = 60, **sections: dict[str, Any]) -> Phase:
        shadow = {"sample_percent": sample_percent, "calls_per_minute": calls_per_minute}
        phase = open_phase("80_shadow", shadow=shadow, **sections)
        for module in (search, extension, schema, staging, backfill, index, tune, live):
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
        search.move_route(phase, route, 100 if route == "vector" else 0, "test")
        own = articles.execute("SELECT * FROM search_articles('cookie leaks', %s::real[], 5)", [VECTOR]).fetchall()
        assert articles.execute(CALL, [VECTOR]).fetchall() == own
        assert own[0][2] == route


def test_both_answers_and_times_are_logged_and_no_text(
    shadowed: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = shadowed()
    articles.execute(CALL, [VECTOR])
    search.move_route(phase, "vector", 100, "test")
    articles.execute(CALL, [VECTOR])
    rows = live.logged(phase)
    assert [(r["live_route"], r["other_route"], r["problem"]) for r in rows] == [
        ("legacy", "vector", None),
        ("vector", "legacy", None),
    ]
    assert rows[0]["live_keys"] == rows[1]["other_keys"] and rows[0]["other_keys"] == rows[1]["live_keys"]
    assert all(r["live_ms"] > 0 and r["other_ms"] > 0 for r in rows)
    assert "cookie" not in str(articles.execute(f"SELECT * FROM {LOG}").fetchall())
    assert "vector" in str(live.summary(phase)) and live.verify(phase).passed


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
    assert len(articles.execute(CALL, [[1.0, 2.0]]).fetchall()) == 5
    assert str(live.verify(phase).failed[0]) == (
        "FAIL    live.no_shadow_failed   search_articles_shadow\n"
        "  found   1 of 1 sampled calls; 22000 expected 8 dimensions, not 2\n"
        "  needed  0\n"
        "  danger  these calls would fail for users as soon as the reads move\n"
        "  do      mend what the error names, then DELETE the rows with a problem from the log and run"
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
    with pytest.raises(psycopg.errors.InsufficientPrivilege), articles.transaction():
        articles.execute("SET LOCAL ROLE live_app")
        articles.execute(f"SELECT live_keys FROM {LOG}")
    articles.execute("DROP OWNED BY live_app")
    articles.execute("DROP ROLE live_app")


def test_without_a_share_there_is_nothing_to_make(shadowed: Callable[..., Phase]) -> None:
    phase = shadowed(sample_percent=0)
    assert live.plan(phase).statements == ()
    assert str(live.summary(phase)) == "live calls\nnone sampled yet"
    assert live.verify(phase).passed


def test_undo_removes_both_and_twice_does_nothing(shadowed: Callable[..., Phase]) -> None:
    phase = shadowed()
    live.apply(phase)
    live.undo(phase)
    assert live.verify_undone(phase).passed
    assert live.undo_plan(phase).statements == ()
