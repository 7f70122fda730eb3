"""Which statements of pg_stat_statements are searches, told by their text; and what older releases of it know."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.migrate import statement_statistics
from runbook_lib.params import Params
from runbook_lib.sql import load

COLUMNS = ["title", "body", "Ward No", "100 %"]

SEARCHES = [
    "SELECT id FROM articles WHERE title ILIKE $1",
    "select id from articles where title not like $1",
    "SELECT id FROM articles WHERE body SIMILAR  TO $1",
    "SELECT id FROM articles WHERE title ~ $1",
    "SELECT id FROM articles WHERE title~*$1",
    "SELECT id FROM articles WHERE title !~~* $1",
    "SELECT id FROM articles WHERE title OPERATOR(pg_catalog.~~) $1",
    "SELECT id FROM articles WHERE tsv @@ plainto_tsquery($1)",
    "SELECT id FROM articles WHERE $1 <% body",
    "SELECT id FROM articles WHERE body %> $1",
    "SELECT id FROM articles WHERE body %>> $1",
    "SELECT id FROM articles WHERE title % $1",
    "SELECT id FROM articles a WHERE lower(a.title) % lower($1)",
    "SELECT id FROM articles ORDER BY title <-> $1 LIMIT $2",
    'SELECT id FROM articles a ORDER BY a."Ward No" <-> $1 LIMIT $2',
    'SELECT id FROM articles ORDER BY "100 %" <-> $1 LIMIT $2',
    "SELECT id FROM articles ORDER BY $1 <<-> body LIMIT $2",
    "SELECT id FROM articles ORDER BY coalesce(body, $1) <->>> $2",
    "SELECT id FROM articles ORDER BY strict_word_similarity($1, body) DESC",
    "SELECT id FROM articles WHERE title ^@ $1",
    "SELECT id FROM articles WHERE strpos(body, $1) > $2",
    "SELECT id FROM articles WHERE position($1 in body) > $2",
    "SELECT id FROM articles WHERE regexp_matches(title, $1) IS NOT NULL",
    "/* app=web */ SELECT id FROM articles WHERE title ILIKE $1",
    "-- list\nWITH w AS (SELECT $1) SELECT id FROM articles WHERE body LIKE $2",
    "(SELECT id FROM articles WHERE title LIKE $1)",
    "DECLARE c CURSOR FOR SELECT id FROM articles WHERE title LIKE $1",
]
OTHERS = [
    "SELECT id FROM articles ORDER BY binary_quantize(embedding) <~> $1 LIMIT $2",
    "SELECT id FROM articles ORDER BY bits<~>$1 LIMIT $2",
    "SELECT id FROM articles ORDER BY bits <%> $1 LIMIT $2",
    "SELECT title FROM articles ORDER BY embedding <-> $1 LIMIT $2",
    "SELECT title, body, embedding <-> $1 AS d FROM articles",
    "SELECT title FROM articles ORDER BY embedding <=> $1 LIMIT $2",
    "SELECT title FROM articles ORDER BY embedding <#> $1, embedding <+> $2",
    "SELECT title FROM articles WHERE id % $1 = $2",
    "SELECT title FROM articles WHERE area ~= $1",
    "SELECT title FROM articles WHERE title ~>=~ $1",
    "SELECT title FROM articles WHERE tags @> $1 AND tags <@ $2 AND doc @? $3",
    "SELECT title FROM articles WHERE likes > $1 AND dislike < $2",
    "UPDATE articles SET title = $1 WHERE title LIKE $2",
    "SELECT relname FROM pg_class WHERE relname LIKE $1 OR relname = 'articles'",
    "SELECT count(*) FROM (SELECT id FROM articles WHERE title LIKE $1) AS legacy LIMIT $2",
    "WITH words AS (SELECT $1::tsquery AS any_word) SELECT id FROM articles, words WHERE tsv @@ any_word",
]


@pytest.mark.parametrize(("text", "is_a_search"), [*((t, True) for t in SEARCHES), *((t, False) for t in OTHERS)])
def test_a_search_is_told_by_its_operators_as_a_whole(server: str, text: str, is_a_search: bool) -> None:
    with psycopg.connect(server) as connection:
        row = connection.execute(
            "SELECT %(text)s ~* %(reads)s AND (%(text)s ~* %(searches)s OR %(text)s ~* %(near)s)"
            " AND %(text)s !~* %(own)s",
            {
                "text": text,
                "reads": statement_statistics.READS,
                "searches": statement_statistics.SEARCHES,
                "near": statement_statistics.near_text(COLUMNS),
                "own": statement_statistics.OWN,
            },
        ).fetchone()
    assert row == (is_a_search,)


@pytest.mark.parametrize("module", ["compare", "runner"])
def test_how_rows_begin_is_no_search(
    module: str, articles: psycopg.Connection[Any], make_params: Callable[..., Params]
) -> None:
    """Each record shows it; counted as searches, they would keep the legacy search from ever being retired."""
    articles.execute("CREATE EXTENSION pg_stat_statements; SELECT pg_stat_statements_reset()")
    p = make_params()
    with db.connect(p, "test") as connection:
        keys: Any = ["3"] if module == "compare" else "{3}"
        assert db.rows(connection, load(module)["first_words"], p, keys=keys)[0]["key"] == "3"
        assert statement_statistics.look(connection, p, ["title"]).searches == ()


@pytest.mark.parametrize(
    ("version", "age_is_known"), [("1.8", False), ("1.7", False), ("1.9", True), (None, True)], ids=str
)
def test_older_releases_of_the_extension_are_read_with_what_they_have(
    articles: psycopg.Connection[Any], make_params: Callable[..., Params], version: str | None, age_is_known: bool
) -> None:
    of = sql.SQL(" VERSION {}").format(sql.Literal(version)) if version else sql.SQL("")
    articles.execute(
        sql.SQL('CREATE SCHEMA "Stats"; CREATE EXTENSION pg_stat_statements SCHEMA "Stats"{}').format(of)
    )
    # The server of a worker counts for all its tests: where pg_stat_statements.max is taken, it throws away
    # what was called least.
    articles.execute('SELECT "Stats".pg_stat_statements_reset()')
    for _ in range(2):
        articles.execute("SELECT id FROM articles WHERE title ILIKE 'cookie%'")
    p = make_params()
    with db.connect(p, "test") as connection:
        found = statement_statistics.look(connection, p, ["title"])
    assert found.why == "" and (found.reset_s is not None) == age_is_known
    assert [(s.calls, s.text) for s in found.searches] == [(2, "SELECT id FROM articles WHERE title ILIKE $1")]
    assert found.searches[0].mean_ms > 0 and found.most >= 100 and found.calls >= 2


def test_what_counts_nothing_is_no_silence(
    articles: psycopg.Connection[Any], make_params: Callable[..., Params]
) -> None:
    p = make_params()
    with db.connect(p, "test") as connection:
        assert (
            statement_statistics.look(connection, p, []).why == "pg_stat_statements is not installed in this database"
        )
        articles.execute("CREATE EXTENSION pg_stat_statements")
        connection.execute("SET pg_stat_statements.track = 'none'")
        assert (
            statement_statistics.look(connection, p, []).why == "pg_stat_statements.track is none: nothing is counted"
        )
