"""Hybrid: words weighed by how rare they are, bounded look-ups, both halves on one scale, weights learned."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import fusion, query_set
from runbook_lib.core import db
from runbook_lib.core.gates import Gate
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import backfill, build_index, expand_schema, extension, hybrid_weights, load_embeddings
from runbook_lib.operate import refresh
from runbook_lib.params.data import Search
from runbook_lib.search import hybrid, search_function, statements, word_statistics
from tests import toy

Open = Callable[..., Phase]
COLUMN = {"fulltext_column": "tsv"}
EXPRESSION = {
    "fulltext_column": None,
    "fulltext_expression": "to_tsvector('english', coalesce(title, '') || ' ' || coalesce(body, ''))",
}


@pytest.fixture
def ready(open_phase: Open) -> Callable[..., Phase]:
    """Opens phase 70 on a table with vectors and index, hybrid answering."""

    def make(search: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Phase:
        phase = open_phase("70_tune", search=search or COLUMN, **sections)
        search_function.apply(phase)
        for module in (extension, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        search_function.move_route(phase, "hybrid", 100, "test")
        return phase

    return make


def asked(connection: psycopg.Connection[Any], text: str, k: int = 10, near: str = "") -> list[int]:
    """Keys, best first. near: another text whose vector is sent."""
    vector = [float(x) for x in toy.embed([near or text])[0]]
    rows = connection.execute("SELECT * FROM search_articles(%s, %s::real[], %s)", [text, vector, k]).fetchall()
    return [row["id"] if isinstance(row, dict) else row[0] for row in rows]


def weights(connection: psycopg.Connection[Any], text: str) -> dict[str, tuple[float, str]]:
    """Weight and look-up of each word of a query."""
    rows = connection.execute("SELECT * FROM runbook.articles_weigh_words(%s)", [text]).fetchall()
    return {word: (weight, lookup) for _, word, weight, lookup in rows}


def gates(phase: Phase) -> list[Gate]:
    return hybrid_weights.gates(phase.connection, phase.ledger, phase.params)


# How common words are


@pytest.mark.parametrize("source", [COLUMN, EXPRESSION], ids=["column", "expression"])
def test_a_words_weight_is_that_of_bm25_by_the_rows_that_hold_it(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], source: dict[str, Any]
) -> None:
    ready(source)
    rows, holding = toy.ROWS + 1, {"cooki": 25, "leak": 40, "midnight": 40}
    found = weights(articles, "cookies leak at midnight, a xylophone")
    for word, n in holding.items():
        assert found[f"'{word}'"][0] == pytest.approx(math.log(1 + (rows - n + 0.5) / (n + 0.5)))
    assert list(found) == ["'xylophon'", "'cooki'", "'leak'", "'midnight'"], "rarest first; stop words are none"


def test_names_that_stand_in_one_row_are_not_kept(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    articles.execute("INSERT INTO articles (title) VALUES ('letter of Ebenezer')")
    ready()
    kept = {lexeme for (lexeme,) in articles.execute("SELECT lexeme FROM runbook.words").fetchall()}
    assert "cooki" in kept and not kept & {"letter", "ebenez"}


def test_a_word_that_is_common_is_looked_up_only_beside_a_rare_one(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    ready(COLUMN | {"hybrid": {"word_rows": 100}})
    articles.execute("UPDATE runbook.words SET rows = 90 WHERE lexeme = 'cooki'")
    articles.execute("UPDATE runbook.words SET rows = 500 WHERE lexeme = 'leak'")
    articles.execute("UPDATE runbook.words SET rows = 900000 WHERE lexeme = 'midnight'")
    found = weights(articles, "cookies leak at midnight")
    assert [lookup for _, lookup in found.values()] == ["'cooki'", "'cooki' & 'leak'", "'cooki' & 'midnight'"]
    alone = weights(articles, "midnight")
    assert alone["'midnight'"][1] == "'midnight'", "the rarest is looked up however common it is"
    assert weights(articles, "leak at midnight")["'midnight'"][1] == "'leak' & 'midnight'"
    articles.execute("UPDATE runbook.words SET rows = 800000 WHERE lexeme = 'leak'")
    assert weights(articles, "leak at midnight")["'midnight'"][1] is None, "the look-up itself would cost too much"


@pytest.mark.parametrize("source", [COLUMN, EXPRESSION], ids=["column", "expression"])
def test_the_limit_holds_when_the_statistics_are_wrong(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], source: dict[str, Any]
) -> None:
    phase = ready(source | {"hybrid": {"word_rows": 100}})
    articles.execute("INSERT INTO articles (title) SELECT 'zebra stripes' FROM generate_series(1, 3000)")
    assert {lookup for _, lookup in weights(articles, "zebra stripes").values()} == {"'zebra'", "'stripe'"}
    statement = statements.fulltext_statement(phase.connection, phase.params)
    values = {"query": "zebra stripes", "embedding": None, "k": 1000}
    plan = phase.connection.execute(
        b"EXPLAIN (ANALYZE, FORMAT JSON) " + statement.as_bytes(phase.connection), values, prepare=False
    ).fetchone()
    assert plan is not None
    read = list(_limited(plan["QUERY PLAN"][0]["Plan"]))
    assert read and max(read) <= hybrid.MOST_PAIRS * 100
    assert 100 <= len(phase.connection.execute(statement, values).fetchall()) <= 200


def _limited(node: dict[str, Any]) -> Any:
    """Rows that came out of each Limit, over all its loops."""
    if node["Node Type"] == "Limit":
        yield node["Actual Rows"] * node["Actual Loops"]
    for below in node.get("Plans", []):
        yield from _limited(below)


@pytest.mark.parametrize("source", [COLUMN, EXPRESSION], ids=["column", "expression"])
def test_rows_that_hold_the_parts_of_a_code_in_another_order_are_read_up_to_the_limit(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], source: dict[str, Any]
) -> None:
    phase = ready(source | {"hybrid": {"word_rows": 100}})
    if source is EXPRESSION:
        articles.execute(f"CREATE INDEX ON articles USING gin (({EXPRESSION['fulltext_expression']}))")
    coded = articles.execute("INSERT INTO articles (title) VALUES ('sees ERR_AUTH_EXPIRED') RETURNING id").fetchone()
    articles.execute("INSERT INTO articles (title) SELECT 'auth err expired' FROM generate_series(1, 3000)")
    articles.execute("VACUUM ANALYZE articles")
    statement = statements.fulltext_statement(phase.connection, phase.params)
    values = {"query": "ERR_AUTH_EXPIRED", "embedding": None, "k": 10}
    with phase.connection.transaction():
        phase.connection.execute("SET LOCAL enable_seqscan = off")
        plan = phase.connection.execute(
            b"EXPLAIN (ANALYZE, FORMAT JSON) " + statement.as_bytes(phase.connection), values, prepare=False
        ).fetchone()
        found = phase.connection.execute(statement, values).fetchall()
    assert plan is not None and coded
    assert sum(_read_in_vain(plan["QUERY PLAN"][0]["Plan"])) <= 3 * 100
    assert found[0]["key"] == coded[0]


def _read_in_vain(node: dict[str, Any]) -> Any:
    """Rows that were read and then left out, over all loops."""
    for removed in ("Rows Removed by Index Recheck", "Rows Removed by Filter"):
        yield node.get(removed, 0) * node["Actual Loops"]
    for below in node.get("Plans", []):
        yield from _read_in_vain(below)


def test_words_are_counted_again_once_the_table_has_grown(
    ready: Callable[..., Phase],
    articles: psycopg.Connection[Any],
    open_phase: Open,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready()
    before = articles.execute("SELECT rows FROM runbook.words WHERE lexeme = 'cooki'").fetchone()
    articles.execute("INSERT INTO articles (title) SELECT 'cookie ' || n FROM generate_series(1, 100) n")
    articles.execute("ANALYZE articles")
    again = open_phase("operate/refresh", search=COLUMN)
    assert word_statistics.is_outdated(again.connection, again.params)
    assert [s.name for s in refresh.plan(again)][-1] == "words.count"
    refresh.apply(again)
    assert "words.count: about 301 rows are read" in capsys.readouterr().out
    after = articles.execute("SELECT rows FROM runbook.words WHERE lexeme = 'cooki'").fetchone()
    assert (before, after) == ((25,), (125,))
    assert not word_statistics.is_outdated(again.connection, again.params)


def test_words_that_were_counted_long_ago_or_on_another_table_are_told(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()

    def gate() -> Gate:
        return word_statistics.are_current(phase.connection, phase.params)

    assert gate().verdict == "PASS"
    articles.execute("INSERT INTO articles (title) SELECT 'cookie ' || n FROM generate_series(1, 60) n")
    articles.execute("ANALYZE articles")
    assert gate().verdict == "PASS", "a refresh counts them again before the monitor complains"
    articles.execute("INSERT INTO articles (title) SELECT 'cookie ' || n FROM generate_series(1, 40) n")
    articles.execute("ANALYZE articles; UPDATE runbook.hybrid SET counted_at = now() - interval '12 hours'")
    assert str(gate()) == (
        'FAIL    watch.words_are_counted   "runbook"."words"\n'
        "  found   counted 0.5 days ago, over 201 rows of 301 today\n"
        "  needed  counted in the last 14 days, since when the table has grown or shrunk by 40 % at most\n"
        "  danger  hybrid ranks worse by old counts, and may look up words that are common by now\n"
        "  do      run operate/refresh with execute: true, which counts them again, and schedule it"
    )
    phase.do(word_statistics.count_statement(phase.connection, phase.params))
    assert gate().verdict == "PASS"
    articles.execute("UPDATE runbook.hybrid SET counted_at = now() - interval '15 days'")
    assert gate().verdict == "FAIL" and gate().found.startswith("counted 15.0 days")
    articles.execute("DELETE FROM runbook.hybrid")
    assert gate().verdict == "FAIL" and gate().found == "the words were never counted"


def test_a_refresh_goes_on_while_another_counts_the_words(
    ready: Callable[..., Phase],
    articles: psycopg.Connection[Any],
    open_phase: Open,
    database: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ready()
    articles.execute("INSERT INTO articles (title) SELECT 'cookie ' || n FROM generate_series(1, 100) n")
    articles.execute("ANALYZE articles")
    with psycopg.connect(database) as other:
        other.execute("SELECT FROM runbook.hybrid FOR UPDATE")
        refresh.apply(open_phase("operate/refresh", search=COLUMN, locks={"timeout_ms": 20, "tries": 2}))
    assert "another worker is counting the words" in capsys.readouterr().out
    assert articles.execute(
        "SELECT count(*) FROM articles WHERE title ~ '^cookie' AND embedding IS NULL"
    ).fetchone() == (0,)


def test_words_are_not_counted_where_the_function_is_of_an_earlier_release(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    articles.execute("DROP TABLE runbook.words, runbook.hybrid")
    assert word_statistics.counted(phase.connection, phase.params) is None
    phase.do(search_function.create_statement(phase.connection, phase.params))
    assert asked(articles, "cookie leaks"), "made again it has its tables, and weighs alike until they are filled"
    assert {weight for weight, _ in weights(articles, "cookie leaks").values()} == {1.0}


def test_undo_forgets_the_words(ready: Callable[..., Phase], articles: psycopg.Connection[Any]) -> None:
    phase = ready()
    search_function.undo(phase)
    assert articles.execute("SELECT count(*) FROM runbook.words").fetchone() == (0,)
    assert articles.execute("SELECT count(*) FROM runbook.hybrid").fetchone() == (0,)
    left = articles.execute(
        "SELECT proname FROM pg_proc WHERE proname IN ('articles_weigh_words', 'articles_vector_weight')"
    ).fetchall()
    assert left == [] and search_function.undo_plan(phase).statements == ()


@pytest.mark.attack
def test_who_may_search_reads_neither_the_words_nor_the_weights(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    """A caller of hybrid reads the table of words: refused; the function alone answers."""
    articles.execute("CREATE ROLE hybrid_app")
    try:
        ready(COLUMN | {"grant_to": ["hybrid_app"]})
        articles.execute("GRANT SELECT ON articles TO hybrid_app; SET ROLE hybrid_app")
        assert asked(articles, "cookie leaks")[:5] == asked(articles, "cookie leaks", k=5)
        for table in ("words", "hybrid"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                articles.execute(f"SELECT * FROM runbook.{table}")
    finally:
        articles.execute("RESET ROLE; DROP OWNED BY hybrid_app; DROP ROLE hybrid_app")


@pytest.fixture
def a_role(articles: psycopg.Connection[Any]) -> Iterator[str]:
    articles.execute("CREATE ROLE hybrid_reader")
    yield "hybrid_reader"
    articles.execute("RESET ROLE; DROP OWNED BY hybrid_reader; DROP ROLE hybrid_reader")


@pytest.mark.attack
@pytest.mark.parametrize("source", [COLUMN, EXPRESSION], ids=["column", "expression"])
def test_under_row_level_security_neither_half_finds_a_row_that_the_caller_may_not_see(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], source: dict[str, Any], a_role: str
) -> None:
    """A caller of hybrid names the words, and the code, of a row of others; it may read these columns alone."""
    hidden = "secret xylophone ERR_AUTH_EXPIRED cookie leaks"
    ids = articles.execute("INSERT INTO articles (title) VALUES (%s), (%s) RETURNING id", [hidden, hidden]).fetchall()
    articles.execute("UPDATE articles SET status = 'Theirs' WHERE title = %s", [hidden])
    ready(source | {"grant_to": [a_role]})
    assert set(asked(articles, hidden, k=2)) == {row[0] for row in ids}
    articles.execute(
        "ALTER TABLE articles ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY theirs ON articles FOR SELECT USING (status <> 'Theirs');"
        f"GRANT SELECT (id, title, body, tsv, embedding) ON articles TO {a_role}; SET ROLE {a_role}"
    )
    for text in (hidden, "xylophone", "ERR_AUTH_EXPIRED", "cookie leaks"):
        found = asked(articles, text, k=200)
        assert found and not {row[0] for row in ids} & set(found), text
    assert len(set(asked(articles, "cookie leaks", k=10))) == 10


# What is found


def test_a_query_of_stop_words_or_unknown_words_is_answered_by_the_vectors(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    ready()
    near = toy.nearest("cookie leaks on logout")
    for text in ("", "the of and", "xylophone zyzzyva", "!?"):
        assert set(asked(articles, text, k=len(near), near="cookie leaks on logout")) == near


def test_a_code_is_found_first_though_its_parts_are_common(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    """Every part of it stands in many rows, in another order; the vector points elsewhere."""
    articles.execute(
        "INSERT INTO articles (title, body) SELECT 'expired auth', 'err again, auth expired, err ' || n"
        " FROM generate_series(1, 300) n"
    )
    row = articles.execute(
        "INSERT INTO articles (title, body) VALUES ('session', 'a user sees ERR_AUTH_EXPIRED on the page')"
        " RETURNING id"
    ).fetchone()
    cve = articles.execute(
        "INSERT INTO articles (title, body) VALUES ('socket', 'as told in CVE-2021-44228.') RETURNING id"
    ).fetchone()
    articles.execute("INSERT INTO articles (title) SELECT 'CVE-2021-' || n FROM generate_series(1000, 1200) n")
    assert row and cve
    ready()
    for text in (
        "ERR_AUTH_EXPIRED",
        "why err_auth_expired when the session expires",
        "auth expired ERR_AUTH_EXPIRED?",
    ):
        assert asked(articles, text, near="buffer overflows")[0] == row[0], text
    for text in ("CVE-2021-44228", "is the socket hit by cve-2021-44228?"):
        assert asked(articles, text, near="buffer overflows")[0] == cve[0], text


def test_a_statement_of_their_own_can_be_the_words_half(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    """A stand-in for a BM25 index: a function that ranks by itself."""
    articles.execute("ALTER TABLE articles ADD note text NOT NULL DEFAULT ''")
    articles.execute("UPDATE articles SET note = 'gleam' WHERE id IN (7, 9)")
    articles.execute(
        "CREATE FUNCTION bm25(text) RETURNS TABLE (doc bigint, points real) STABLE LANGUAGE sql AS"
        " $$SELECT id, (100 - id)::real FROM public.articles WHERE note = $1$$"
    )
    own = "SELECT doc, points FROM public.bm25(:query) ORDER BY points DESC LIMIT :k"
    ready({"fulltext_column": None, "words_query": own})
    assert set(asked(articles, "gleam", near="buffer blocks")[:2]) == {7, 9}, "both far from that vector"
    assert set(asked(articles, "nothing of it", k=3, near="cookie leaks on logout")) <= toy.nearest(
        "cookie leaks on logout"
    )


def test_words_are_searched_in_one_way() -> None:
    with pytest.raises(ValueError, match="give fulltext_column or words_query, not both"):
        Search(fulltext_column="tsv", words_query="SELECT id, 1 FROM bm25(:query)")
    with pytest.raises(ValueError, match="does not mention :query"):
        Search(words_query="SELECT id, 1 FROM bm25(':query')")


# Weights


def test_the_weight_is_the_one_that_ranks_right_rows_first() -> None:
    scored = [("right", 0.0, 1.0), ("near", 1.5, 0.0), ("far", -1.0, -1.0)]
    assert fusion.ranking(scored, 0.3)[0] == "right" and fusion.ranking(scored, 0.5)[0] == "near"
    marks = {"q": {"right": 1}}
    assert fusion.measure({"q": scored}, marks, 0.3) == 1.0
    assert fusion.measure({"q": scored}, marks, 1.0) == pytest.approx(1 / math.log2(3))
    assert fusion.measure({}, marks, 0.5) == 0.0, "a query without an answer counts"


def test_weights_are_learned_on_one_half_proved_on_the_other_and_kept_in_the_database(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    hybrid_weights.apply(phase, 40)
    noted = phase.ledger.latest("hybrid_weights")
    assert noted and (noted["judged"], noted["learned_on"], noted["proved_on"]) == (40, 20, 20)
    assert noted["kept"] and noted["proved"]["learned"] >= noted["proved"]["equal"]
    assert articles.execute("SELECT vector_weight FROM runbook.hybrid").fetchone() == (noted["vector_weight"],)
    assert [str(g.verdict) for g in gates(phase)] == ["PASS"]

    articles.execute("UPDATE runbook.hybrid SET vector_weight = 0.93")
    (changed,) = gates(phase)
    assert changed.verdict == "FAIL" and changed.found.startswith("vectors 0.93, words 0.07")
    for statement in hybrid_weights.undo_plan(phase.connection, phase.params):
        phase.do(statement)
    assert hybrid_weights.undo_plan(phase.connection, phase.params) == []


def test_without_judgements_the_halves_weigh_alike_and_the_record_says_so(ready: Callable[..., Phase]) -> None:
    phase = ready(queries={"judgements": None})
    hybrid_weights.apply(phase, 40)
    (found,) = gates(phase)
    assert found.verdict == "PASS"
    assert found.found == "vectors 0.5, words 0.5: equal, with no judged queries to learn from"


def test_the_function_ranks_by_the_weight_that_the_table_has(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any]
) -> None:
    phase = ready()
    text, near = "socket expires", "cookie leaks on logout"
    by = {}
    for weight in (0.0, 1.0):
        phase.do(word_statistics.learn_statement(phase.params, weight))
        by[weight] = set(asked(articles, text, k=3, near=near))
    holding = {r[0] for r in articles.execute("SELECT id FROM articles WHERE title = 'socket expires'").fetchall()}
    assert by[0.0] <= holding and by[1.0] <= toy.nearest(near)


def test_what_is_learned_from_is_what_the_function_ranks(ready: Callable[..., Phase]) -> None:
    phase = ready()
    queries = query_set.with_vectors(phase.params, query_set.read_queries(phase.params))[:8]
    hybrid_weights.apply(phase, 200)
    weight = 0.3
    phase.do(word_statistics.learn_statement(phase.params, weight))
    with db.connect(phase.params, "test") as connection, connection.transaction():
        scores = fusion._scores(connection, phase.params, queries)
        route = statements.route_statement(connection, phase.params, "hybrid")
        for q in queries:
            rows = connection.execute(route, {"query": q.text, "embedding": q.vector, "k": 5}).fetchall()
            weighed = {key: weight * near + (1 - weight) * wordy for key, near, wordy in scores[q.query_id]}
            # Rows of one score may come in any order, so each row is compared with its own.
            answered = [r["score"] for r in rows]
            assert answered == pytest.approx([weighed[str(r["key"])] for r in rows]), q.text
            best = fusion.ranking(scores[q.query_id], weight)[:5]
            assert answered == pytest.approx([weighed[key] for key in best]), q.text


def test_a_weight_that_loses_on_the_queries_held_out_is_not_kept(
    ready: Callable[..., Phase], articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words are right on the half that learns, vectors on the other; no weight suits both."""
    phase = ready()
    dealt = query_set.sample(query_set.read_queries(phase.params), 40)
    marks = query_set.read_judgements(phase.params)
    sides = {q.query_id: (-2.0, 1.0) if place % 2 == 0 else (1.0, -0.5) for place, q in enumerate(dealt)}
    scores = {
        query_id: [(next(iter(marks[query_id])), *right), ("wrong", 0.0, 0.0)] for query_id, right in sides.items()
    }
    monkeypatch.setattr(fusion, "_scores", lambda *_: scores)
    hybrid_weights.apply(phase, 40)
    noted = phase.ledger.latest("hybrid_weights")
    assert noted and (noted["vector_weight"], noted["kept"]) == (0.3, False), "by hand: below 1 / 3"
    assert noted["proved"]["learned"] < noted["proved"]["equal"] == noted["proved"]["vectors"]
    assert articles.execute("SELECT vector_weight FROM runbook.hybrid").fetchone() == (None,)
    (kept,) = gates(phase)
    tried = "vectors 0.3, words 0.7 did worse and is not used; learned on 20 judged queries, nDCG@10 on 20 others"
    assert kept.verdict == "PASS" and kept.found.startswith(f"vectors 0.5, words 0.5; {tried}: learned ")

    articles.execute("UPDATE runbook.hybrid SET vector_weight = %s", [noted["vector_weight"]])
    assert [str(g.verdict) for g in gates(phase)] == ["FAIL"], "the weight that lost"
