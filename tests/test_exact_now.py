"""Exact answers of a while ago: rows that are gone, or changed, are no answers that a search could have missed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector.psycopg import register_vector

from runbook_lib.benchmark import exact, exact_now
from runbook_lib.benchmark.query_set import Query, exact_of
from runbook_lib.core import db
from runbook_lib.params import Params

K = 3
ROWS = 12
AT = np.array([1, 0, 0, 0, 0, 0, 0, 0], np.float32)
A = [Query("q", "", AT, allowed=(("topic", "a"),))]


@pytest.fixture
def near(articles: psycopg.Connection[Any]) -> Callable[[str], psycopg.Connection[Any]]:
    """Makes a table of which row n is the n-th nearest to AT, all of topic a; keys of a type."""

    def make(key: str) -> psycopg.Connection[Any]:
        articles.execute("CREATE EXTENSION vector; DROP TABLE articles")
        articles.execute('CREATE TABLE articles ("Row ID" ' + key + " PRIMARY KEY, topic text, embedding vector(8))")  # type: ignore[arg-type]
        made = {"bigint": "i", "text": "'100 % of ' || i", "uuid": "lpad(i::text, 32, '0')::uuid"}[key]
        articles.execute(
            f"INSERT INTO articles SELECT {made}, 'a', ('[1,' || i / 10.0 || ',0,0,0,0,0,0]')::vector"  # type: ignore[arg-type]
            f" FROM generate_series(1, {ROWS}) i"
        )
        return articles

    return make


def places(query: Query) -> list[int]:
    """Exact answers by the number of their row."""
    return [int(key.split()[-1].replace("-", "")) for key in exact_of([query])[0].keys]


@pytest.mark.parametrize("key", ["bigint", "text", "uuid"])
def test_what_is_deleted_or_moved_away_gives_its_place_to_the_next(
    near: Callable[[str], psycopg.Connection[Any]], make_params: Callable[..., Params], key: str
) -> None:
    writer = near(key)
    p = make_params(target={"key": "Row ID", "filters": ["topic"]}, queries={"k": K})
    with db.connect(p, "test") as connection:
        register_vector(connection)
        then = exact.answered(connection, p, A, K)
        assert places(then[0]) == [1, 2, 3]
        all_got = [[(k, 0.0) for k in exact_of(then)[0].keys]]
        # Row 1 is deleted, 2 gets another topic, 4 no vector, and 3 a vector that is farther than that of 5.
        writer.execute(
            "WITH n AS (SELECT \"Row ID\" AS key, row_number() OVER (ORDER BY embedding <=> '[1,0,0,0,0,0,0,0]') AS n"
            ' FROM articles), gone AS (DELETE FROM articles USING n WHERE "Row ID" = key AND n = 1)'
            " UPDATE articles SET topic = CASE n WHEN 2 THEN 'b' ELSE topic END,"
            " embedding = CASE n WHEN 4 THEN NULL WHEN 3 THEN '[1,0.55,0,0,0,0,0,0]' ELSE embedding END"
            ' FROM n WHERE "Row ID" = key AND n IN (2, 3, 4)'
        )
        now = exact_now.up_to_date(connection, p, then, [[]])
        assert places(now[0]) == [5, 3, 6]
        (by_sql,) = [[row["key"] for row in exact.by_sql(connection, p, A[0], K)]]
        assert list(exact_of(now)[0].keys) == by_sql
        assert exact_now.up_to_date(connection, p, then, all_got) == then, "nothing was missed, so nothing is asked"
        # Of the six that are known none is left but 5, 3 and 6.
        writer.execute("DELETE FROM articles WHERE embedding <=> '[1,0,0,0,0,0,0,0]' < 0.16")
        again = exact_now.up_to_date(connection, p, now, [[]])
    assert len(places(again[0])) < K and set(places(again[0])) <= {5, 3, 6}
