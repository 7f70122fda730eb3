"""Hybrid by an index on an expression, without a tsvector column; and what preflight says of that index."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.gates import BadInput, Gate
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import (
    backfill,
    build_index,
    expand_schema,
    extension,
    fulltext_check,
    inputs,
    load_embeddings,
)
from runbook_lib.params import Params
from runbook_lib.params.data import Search
from runbook_lib.search import search_function
from tests import partitioned, toy

Connection = psycopg.Connection[Any]
Open = Callable[..., Phase]
MakeParams = Callable[..., Params]
Judge = Callable[..., list[Gate]]

EXPRESSION = "to_tsvector('english', coalesce(title, '') || ' ' || coalesce(body, ''))"
BODY = "to_tsvector('english', body)"


def index_on(definition: str) -> str:
    return f"CREATE INDEX articles_words ON articles USING {definition};"


GIN = index_on(f"gin (({EXPRESSION}))")


def by(expression: str, **more: Any) -> dict[str, Any]:
    """Section search, with an expression in place of the toy's column."""
    return {"fulltext_column": None, "fulltext_expression": expression, **more}


@pytest.fixture
def judged(articles: Connection, open_phase: Open) -> Judge:
    """The gates of an expression, on a table without a tsvector column, after this DDL."""
    articles.execute("ALTER TABLE articles DROP COLUMN tsv")

    def judge(expression: str, ddl: str = "", **more: Any) -> list[Gate]:
        articles.execute(ddl)
        phase = open_phase(search=by(expression, **more))
        return list(fulltext_check.check(phase.connection, phase.params, {}))

    return judge


def verdicts(gates: list[Gate]) -> list[tuple[str, str]]:
    return [(g.name.removeprefix("inputs.fulltext_"), str(g.verdict)) for g in gates]


SERVED = [("expression_is_tsvector", "PASS"), ("config_exists", "PASS"), ("index_serves_hybrid", "PASS")]


TITLE = "setweight(to_tsvector('english', coalesce(title, '')), 'A')"
FUNCTIONS = """
    CREATE SCHEMA app;
    CREATE FUNCTION app.words(text) RETURNS tsvector IMMUTABLE LANGUAGE sql AS $$SELECT to_tsvector('english', $1)$$;
    CREATE FUNCTION joined(text, text) RETURNS text IMMUTABLE LANGUAGE sql AS $$SELECT concat($1, ' ', $2)$$;
"""


def test_an_index_as_other_people_write_it_serves(judged: Judge) -> None:
    for written, ddl in (
        (EXPRESSION, GIN),
        (EXPRESSION, index_on(f"gist (({EXPRESSION}))")),
        # As pg_dump writes it, and as people do; a comment may end it.
        ("to_tsvector('english'::regconfig, body)", index_on(f"gin ({BODY})")),
        (BODY, index_on("gin (to_tsvector('english'::regconfig, body))")),
        ("to_tsvector('pg_catalog.english', body) -- as in search.py", index_on(f"gin ({BODY})")),
        (f"{TITLE} || {BODY}", index_on(f"gin (({TITLE} || {BODY}))")),
        (BODY, index_on(f"gin (to_tsvector('simple', title), {BODY})")),
        # A condition that every match fulfils.
        (BODY, index_on(f"gin ({BODY}) WHERE body IS NOT NULL")),
        ("app.words(joined(title, body))", FUNCTIONS + index_on("gin (app.words(joined(title, body)))")),
        (BODY, "ALTER TABLE articles ALTER body TYPE varchar(200);" + index_on(f"gin ({BODY})")),
    ):
        gates = judged(written, "DROP INDEX IF EXISTS articles_words;" + ddl)
        assert verdicts(gates) == SERVED, "\n".join(map(str, gates))
        assert gates[-1].found == "articles_words serves it"


def test_a_column_may_have_any_name(judged: Judge, articles: Connection, open_phase: Open) -> None:
    before = "body"
    # The last is also what the search calls the words of a query.
    for name in ('Te "xt" %', "$runbook$", "{key}", "any_word"):
        quoted = sql.Identifier(name).as_string()
        expression = f"to_tsvector('english', {quoted})"
        articles.execute(sql.SQL("ALTER TABLE articles RENAME {} TO {}").format(*map(sql.Identifier, (before, name))))
        gates = judged(expression, "DROP INDEX IF EXISTS articles_words;" + index_on(f"gin ({expression})"))
        assert verdicts(gates) == SERVED, "\n".join(map(str, gates))
        phase = open_phase("10_baseline", search=by(expression), target={"text_columns": ["title"]})
        search_function.apply(phase)
        assert search_function.is_as_planned(phase.connection, phase.params), name
        before = name


def test_an_index_that_does_not_serve_is_named_with_the_reason(judged: Judge) -> None:
    for ddl, found in (
        (
            GIN.replace(";", " WHERE status = 'Stable';"),
            "public.articles_words is partial, WHERE (status = 'Stable'::text), and a search asks for every row",
        ),
        (
            index_on("gin (to_tsvector('simple', body))"),
            "public.articles_words is on another expression, to_tsvector('simple'::regconfig, body)",
        ),
        (
            GIN + "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'articles_words'::regclass",
            "public.articles_words is not valid (an earlier concurrent build did not finish)",
        ),
    ):
        g = judged(EXPRESSION, "DROP INDEX IF EXISTS articles_words;" + ddl)[-1]
        assert (g.name, str(g.verdict), g.found) == ("inputs.fulltext_index_serves_hybrid", "FAIL", found)
    assert g.do.startswith("DROP INDEX CONCURRENTLY public.articles_words; CREATE INDEX CONCURRENTLY")


def test_the_statement_named_makes_the_index_and_its_undo_takes_it_away(judged: Judge, articles: Connection) -> None:
    g = judged(EXPRESSION)[-1]
    create = f'CREATE INDEX CONCURRENTLY "articles_fulltext" ON "public"."articles" USING gin (({EXPRESSION}));'
    drop = 'DROP INDEX CONCURRENTLY "public"."articles_fulltext";'
    assert str(g) == (
        'FAIL    inputs.fulltext_index_serves_hybrid   search.fulltext_expression of "public"."articles"\n'
        "  found   no index on a tsvector\n"
        "  needed  a valid GIN or GiST index on exactly this, without a condition\n"
        "  danger  every hybrid search would read the whole table, and compute each row's words again\n"
        f'  do      {create} ANALYZE "public"."articles"; CONCURRENTLY takes SHARE UPDATE EXCLUSIVE, which keeps no'
        " reader and no writer waiting, and waits for transactions older than itself; undo: " + drop
    )
    for statement, verdict in ((create, "PASS"), (drop, "FAIL")):
        articles.execute(statement)
        assert verdicts(judged(EXPRESSION))[-1] == ("index_serves_hybrid", verdict)


def test_what_gives_no_words_is_refused(judged: Judge) -> None:
    for expression, found in (
        ("to_tsvector('english', bodi)", 'PostgreSQL says: column "bodi" does not exist'),
        ("to_tsvector('englisch', body)", 'PostgreSQL says: text search configuration "englisch" does not exist'),
        ("body", "text"),
        ("ARRAY[to_tsvector('english', title), to_tsvector('english', body)]", "tsvector[]"),
    ):
        g = judged(expression)[0]
        assert (g.name, str(g.verdict), g.found) == ("inputs.fulltext_expression_is_tsvector", "FAIL", found)


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "title, body",
        "to_tsvector('english', body); DROP TABLE articles",
        "to_tsvector('english', body)) FROM articles t WHERE (true",
        "to_tsvector('english', 'it)",
        "to_tsvector('english', \"body)",
        "to_tsvector('english', body) /* as in search.py",
        "to_tsvector('english', $x$it)",
    ],
)
def test_what_would_end_its_brackets_is_refused_by_the_params_file(make_params: MakeParams, expression: str) -> None:
    with pytest.raises(BadInput) as error:
        make_params(search=by(expression))
    (problem,) = error.value.problems
    assert problem.needed.endswith("one expression is needed, its brackets and quotes closed, without a semicolon")


def test_a_column_and_an_expression_are_one_too_many(make_params: MakeParams) -> None:
    with pytest.raises(BadInput, match="give fulltext_column or fulltext_expression, not both"):
        make_params(search={"fulltext_expression": BODY})


def test_what_no_index_can_hold_says_so_in_the_servers_words(judged: Judge) -> None:
    g = judged("to_tsvector(body)")[-1]
    said = "no index, and PostgreSQL says to one: functions in index expression must be marked IMMUTABLE"
    assert (str(g.verdict), g.found) == ("FAIL", said)
    assert g.do == "name the configuration, as in to_tsvector('english', body), and call IMMUTABLE functions only"


def test_the_configuration_is_that_of_the_expression_and_may_be_off_the_path(judged: Judge) -> None:
    expression = "to_tsvector('app.\"My German\"', body)"
    made = 'CREATE SCHEMA app; CREATE TEXT SEARCH CONFIGURATION app."My German" (COPY = german);'
    left_out = judged(expression, made + index_on(f"gin ({expression})"))
    assert str(left_out[1]) == (
        "FAIL    inputs.fulltext_config_exists   english\n"
        '  found   the default, but the tsvector is made with app."My German"\n'
        "  needed  the configuration that the tsvector is made with\n"
        "  danger  queries would be cut into other words than the rows\n"
        '  do      name it in search.fulltext_config: app."My German"'
    )
    for config in ("My German", "app.My German", 'app."My German"'):
        gates = judged(expression, fulltext_config=config)
        assert verdicts(gates) == SERVED, "\n".join(map(str, gates))


def test_a_column_needs_an_index_for_hybrid_once_a_scan_is_dear(articles: Connection, open_phase: Open) -> None:
    phase = open_phase(cut_over={"route": "hybrid"})
    columns = {"tsv": {"type": "tsvector"}}

    def found() -> tuple[str, str]:
        g = list(fulltext_check.check(phase.connection, phase.params, columns))[-1]
        return str(g.verdict), g.found

    assert found() == ("PASS", "articles_tsv serves it")
    articles.execute("DROP INDEX articles_tsv")
    assert found() == ("PASS", f"no index, and with {toy.ROWS + 1} rows none is needed")
    articles.execute("INSERT INTO articles (body) SELECT 'filler' FROM generate_series(1, 1000)")
    assert found() == ("FAIL", "no index on a tsvector")


def test_every_partition_needs_one_and_the_statements_make_it(database: str, make_params: MakeParams) -> None:
    p = make_params(search=by(EXPRESSION), target={"key_from_one_source": True})
    with psycopg.connect(database, autocommit=True) as connection, db.connect(p, "test") as own:
        partitioned.create_articles(connection, "range", trigram=False)

        def found() -> Gate:
            return list(fulltext_check.check(own, p, {}))[-1]

        connection.execute(f'CREATE INDEX ON "Articles High %" USING gin (({EXPRESSION}))')
        before = found()
        statements = re.findall(r"(?:CREATE|DROP) INDEX [^;]*;", before.do)
        assert statements == [
            f"CREATE INDEX CONCURRENTLY ON public.articles_low USING gin (({EXPRESSION}));",
            f'CREATE INDEX "articles_fulltext" ON "public"."articles" USING gin (({EXPRESSION}));',
            'DROP INDEX "public"."articles_fulltext";',
        ]
        assert (str(before.verdict), before.figures["read_whole"]) == ("FAIL", ["articles_low"])
        for statement, verdict in zip(statements, ("PASS", "PASS", "FAIL"), strict=True):
            connection.execute(statement.encode())
            assert found().verdict == verdict
        assert len(found().figures["read_whole"]) == 2


def test_an_index_that_is_being_built_is_waited_for_and_not_dropped(
    judged: Judge, articles: Connection, database: str
) -> None:
    judged(EXPRESSION)
    with psycopg.connect(database) as writer, psycopg.connect(database, autocommit=True) as builder:
        # A build waits for writers that are older than itself.
        writer.execute("UPDATE articles SET views = 1 WHERE id = 1")
        build = threading.Thread(target=builder.execute, args=(GIN.replace("INDEX", "INDEX CONCURRENTLY"),))
        build.start()
        while not articles.execute("SELECT FROM pg_stat_progress_create_index").fetchall():
            time.sleep(0.02)
        g = judged(EXPRESSION)[-1]
        writer.rollback()
        build.join()
    assert (str(g.verdict), g.found) == ("FAIL", "public.articles_words is still being built")
    assert g.do == "wait until it is built, and look again: SELECT * FROM pg_stat_progress_create_index;"
    assert judged(EXPRESSION)[-1].found == "articles_words serves it"


ON_ONLY = f"CREATE INDEX articles_words ON ONLY articles USING gin (({EXPRESSION}));"


@pytest.mark.parametrize("attached", [False, True])
def test_an_index_of_the_parent_that_is_not_valid_is_finished_or_dropped_without_concurrently(
    database: str, make_params: MakeParams, attached: bool
) -> None:
    p = make_params(search=by(EXPRESSION), target={"key_from_one_source": True})
    with psycopg.connect(database, autocommit=True) as connection, db.connect(p, "test") as own:
        partitioned.create_articles(connection, "range", trigram=False)
        connection.execute(ON_ONLY)
        if attached:
            connection.execute(f'CREATE INDEX high_words ON "Articles High %" USING gin (({EXPRESSION}))')
            connection.execute("ALTER INDEX articles_words ATTACH PARTITION high_words")
        before = list(fulltext_check.check(own, p, {}))[-1]
        assert before.found == (
            "public.articles_tsv is on another expression, tsv;"
            " public.articles_words is not valid (a partition lacks its part of it)"
        )
        statements = re.findall(r"(?:CREATE|DROP|ALTER) INDEX [^;]*;", before.do)
        using = f"USING gin (({EXPRESSION}));"
        assert statements == (
            [
                f'CREATE INDEX CONCURRENTLY "articles_low_fulltext" ON public.articles_low {using}',
                'ALTER INDEX public.articles_words ATTACH PARTITION "public"."articles_low_fulltext";',
                "DROP INDEX public.articles_words;",
            ]
            if attached
            else [
                "DROP INDEX public.articles_words;",
                f"CREATE INDEX CONCURRENTLY ON public.articles_low {using}",
                f'CREATE INDEX CONCURRENTLY ON public."Articles High %" {using}',
                f'CREATE INDEX "articles_fulltext" ON "public"."articles" {using}',
                'DROP INDEX "public"."articles_fulltext";',
            ]
        )
        for statement in statements[:-1]:
            connection.execute(statement.encode())
        assert str(list(fulltext_check.check(own, p, {}))[-1].verdict) == "PASS"
        whole = "SELECT bool_and(indisvalid) FROM pg_index WHERE indrelid = 'articles'::regclass"
        assert connection.execute(whole).fetchone() == (True,)
        connection.execute(statements[-1].encode())
        assert len(list(fulltext_check.check(own, p, {}))[-1].figures["read_whole"]) == 2


def test_hybrid_answers_as_with_a_stored_column_and_through_the_index(articles: Connection, open_phase: Open) -> None:
    phase = open_phase("70_tune")
    search_function.apply(phase)
    for module in (extension, expand_schema, load_embeddings, backfill, build_index):
        module.apply(phase)
    search_function.move_route(phase, "hybrid", 100, "test")
    asked = [f"{s} {v}" for s in toy.SUBJECTS for v in toy.VERBS]
    by_column = [answers(articles, text) for text in asked]
    assert all(by_column)

    articles.execute(GIN + "ALTER TABLE articles DROP COLUMN tsv; ANALYZE articles")
    own = open_phase("70_tune", search=by(EXPRESSION))
    assert not search_function.is_as_planned(own.connection, own.params)
    search_function.apply(own)
    assert search_function.is_as_planned(own.connection, own.params) and search_function.current_route(
        own.connection, own.params
    ) == ("hybrid", 100)
    assert [answers(articles, text) for text in asked] == by_column

    # Where a scan of the table is dear enough, the planner takes the index by itself.
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 'filler', repeat('of no use ', 50) FROM generate_series(1, 3000);"
        " ANALYZE articles"
    )
    # Counts of transactions before may still be among this session's.
    counted = "SELECT pg_stat_get_xact_numscans('articles_words'::regclass)"
    with articles.transaction():
        (before,) = articles.execute(counted).fetchone() or (0,)
        assert answers(articles, "cookie leaks") == by_column[0]
        (after,) = articles.execute(counted).fetchone() or (0,)
    assert after - before == 2, "once a word"

    search_function.undo(own)
    assert search_function.verify_undone(own).passed
    assert articles.execute("SELECT to_regclass('articles_words') IS NOT NULL").fetchone() == (True,), "it is theirs"


def answers(connection: Connection, text: str) -> list[Any]:
    """What the application gets: keys with their scores, whose last digits depend on the order of reading."""
    vector = [float(x) for x in toy.embed([text])[0]]
    found = connection.execute("SELECT * FROM search_articles(%s, %s::real[], 10)", [text, vector]).fetchall()
    assert {row[2] for row in found} == {"hybrid"}
    return [(key, round(score, 12), *rest) for key, score, *rest in found]


# A statement of their own


BM25 = (
    "CREATE FUNCTION bm25(text) RETURNS TABLE (doc bigint, points real) STABLE LANGUAGE sql AS"
    " $$SELECT id, (100 - id)::real FROM public.articles WHERE title LIKE $1$$"
)
OWN = (
    "SELECT doc, points FROM public.bm25(:query) WHERE :status IS NULL OR doc IN (SELECT id FROM public.articles"
    " WHERE status = :status) ORDER BY points DESC LIMIT :k -- best first"
)


def asked_by(query: str, make_params: MakeParams, **more: Any) -> list[Gate]:
    own = {"fulltext_column": None, "words_query": query} | more
    params = make_params(search=own, target={"filters": ["status"]})
    with db.connect(params, "test") as connection:
        return list(fulltext_check.check_words_query(connection, params))


def test_a_words_query_is_planned_with_its_filters(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(BM25)
    assert [str(g.verdict) for g in asked_by(OWN, make_params)] == ["PASS", "PASS"]
    assert articles.execute("SELECT FROM pg_class WHERE relname = 'runbook_probe'").fetchone() is None


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT doc, points FROM bm24(:query)", "function bm24(text) does not exist"),
        ("SELECT doc FROM bm25(:query)", 'table "best" has 1 columns available but 2 columns specified'),
        ("SELECT title, 1 FROM articles WHERE title = :query", "operator does not exist: text = bigint"),
        ("SELECT id, ARRAY[1] FROM articles WHERE title = :query", "cannot cast type integer[] to double precision"),
        ("SELECT id, 1 FROM articles WHERE title = :query AND status = :state", 'syntax error at or near ":"'),
        ("SELECT id, 1 FROM articles WHERE title = :query LIMIT :k - status", "operator does not exist"),
        ("DELETE FROM articles WHERE title = :query RETURNING id, 1", "syntax error"),
    ],
)
def test_a_words_query_that_cannot_be_planned_is_refused_in_postgresqls_words(
    articles: Connection, make_params: MakeParams, query: str, said: str
) -> None:
    articles.execute(BM25)
    (found,) = asked_by(query, make_params)
    assert (found.name, str(found.verdict)) == ("inputs.words_query_can_be_planned", "FAIL")
    assert said in found.found


def test_what_a_words_query_reads_is_granted_by_name(articles: Connection, make_params: MakeParams) -> None:
    articles.execute(BM25 + "; CREATE ROLE words_caller; REVOKE EXECUTE ON FUNCTION bm25 FROM PUBLIC")
    try:
        _, found = asked_by(OWN, make_params, grant_to=["words_caller"])
        assert str(found) == (
            "FAIL    inputs.callers_may_read_what_words_query_reads   search.grant_to and search.seen_as\n"
            "  found   words_caller lacks EXECUTE on bm25(text); words_caller lacks SELECT on public.articles\n"
            "  needed  SELECT on the columns, EXECUTE on the functions that search.words_query names\n"
            "  danger  the search function runs with its caller's privileges: their hybrid searches would fail\n"
            "  do      have their owner run: GRANT EXECUTE ON FUNCTION bm25(text) TO words_caller;"
            " GRANT SELECT ON public.articles TO words_caller;"
        )
    finally:
        articles.execute("DROP OWNED BY words_caller; DROP ROLE words_caller")


def test_a_words_query_is_one_statement() -> None:
    for text in ("SELECT 1, 2 WHERE :query; DROP TABLE a", "SELECT 1, (:query", "SELECT 1, :query) b (a, b) --"):
        with pytest.raises(ValueError, match="one statement is needed, with closed brackets and quotes"):
            Search(words_query=text)


def test_preflight_names_a_fault_of_the_words_query(articles: Connection, make_params: MakeParams) -> None:
    own = {"fulltext_column": None, "words_query": "SELECT doc, points FROM public.bm25(:query)"}
    params = make_params(search=own)
    with db.connect(params, "test") as connection:
        failed = [g for g in inputs.check(connection, params) if str(g.verdict) == "FAIL"]
    assert [g.name for g in failed] == ["inputs.words_query_can_be_planned"]
