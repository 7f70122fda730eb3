"""Conditions, hybrid in two languages and an index of some rows on every server: a table with odd names, owned by a
role that is no superuser, ordinary and partitioned, searched by callers under row level security.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.core.target import load_params
from runbook_lib.migrate import (
    backfill,
    build_index,
    expand_schema,
    filter_checks,
    hybrid_weights,
    load_embeddings,
    tune,
)
from runbook_lib.search import search_function, share_classes, statements, word_statistics
from tests import servers, toy
from tests.conftest import DSN_ENV, write_params
from tests.opened import opened

RELEASES = ("16.14 with 0.8.5", "17.9 with 0.8.2", "18.6 with 0.8.6")
OWNER, CALLER = "search_owner", "search_caller"
TABLE = '"Odd Schema"."The articles"'
FILTERS: dict[str, Any] = {
    "State of it": None,
    "max_price": {"type": "numeric", "where": "t.price <= :max_price"},
    "since": {"type": "timestamptz", "where": "t.since >= :since"},
    "tags": {"type": "text[]", "where": "t.tags @> :tags"},
    "tenants": {"type": "bigint[]", "where": "t.tenant = ANY(:tenants)"},
    "owner": {
        "type": "bigint",
        "where": 'EXISTS (SELECT FROM "Odd Schema".acl a WHERE a.doc = t."the id" AND a.user_id = :owner)',
    },
}
VALUES = {
    "State of it": "O'Brien, {x}",
    "max_price": "25.5",
    "since": "2026-01-15",
    "tags": "{a}",
    "tenants": "{1,2}",
    "owner": "7",
}
CONDITIONS = {
    "State of it": "\"State of it\" = 'O''Brien, {x}'",
    "max_price": "price <= 25.5",
    "since": "since >= '2026-01-15'",
    "tags": "tags @> '{a}'",
    "tenants": "tenant IN (1, 2)",
    "owner": '"the id" % 3 = 1',
}
ALWAYS = "t.deleted_at IS NULL"
HOSTILE = ("'; DROP TABLE acl; --", "$runbook$ $1 %(query)s", "{given} /* given */ \\", "a' OR '1'='1", ":max_price")


@pytest.fixture(params=[*RELEASES, *servers.elsewhere()])
def aged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to a database of its own on a server of another age, with pgvector; the parameters
    find it as the owner of the table.
    """
    with servers.reached(request.param) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        for role in (OWNER, CALLER):
            connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'of-a-test'")  # type: ignore[call-overload]
        connection.execute(f"GRANT CREATE ON DATABASE {connection.info.dbname} TO {OWNER}")  # type: ignore[call-overload]
        monkeypatch.setenv(DSN_ENV, make_conninfo(dsn, user=OWNER, password="of-a-test"))
        yield connection
        connection.execute(f"RESET ROLE; DROP OWNED BY {OWNER}, {CALLER} CASCADE; DROP ROLE {OWNER}, {CALLER}")  # type: ignore[call-overload]


def fill(connection: psycopg.Connection[Any], config: str, partitioned: bool) -> None:
    """The words of the toy table, in two languages, under names that must be quoted."""
    by, of = ('PARTITION BY HASH ("the id")', "PARTITION OF") if partitioned else ("", "")
    connection.execute(
        f"""
        CREATE SCHEMA "Odd Schema" AUTHORIZATION {OWNER};
        SET ROLE {OWNER};
        CREATE TABLE {TABLE} (
            "the id" bigint PRIMARY KEY, title text, body text, "State of it" text, price numeric, since timestamptz,
            tags text[], tenant bigint, deleted_at timestamptz, who text,
            tsv tsvector GENERATED ALWAYS AS
                (to_tsvector('{config}', coalesce(title, '') || ' ' || coalesce(body, ''))) STORED
        ) {by};
        CREATE TABLE "Odd Schema".acl (doc bigint, user_id bigint, PRIMARY KEY (user_id, doc));
        """  # type: ignore[call-overload]
    )
    for i in range(3 if partitioned else 0):
        connection.execute(
            f'CREATE TABLE "Odd Schema"."The part {i}" {of} {TABLE}'  # type: ignore[call-overload]
            f" FOR VALUES WITH (MODULUS 3, REMAINDER {i})"
        )
    texts = [(f"{s} {v}", f"the {s} {v} {p}") for s in toy.SUBJECTS for v in toy.VERBS for p in toy.PLACES]
    texts += [("Alte Häuser", "cookie am Fluss"), ("Ein altes Haus", "cookie ERR_AUTH_EXPIRED"), (None, "  ")]
    with connection.cursor() as cursor:
        cursor.executemany(
            f"""
            INSERT INTO {TABLE}
            SELECT i, %(title)s, %(body)s, (ARRAY['Draft', 'Stable', 'O''Brien, {{x}}'])[1 + i %% 3], i %% 50 + 0.5,
                   timestamptz '2026-01-01' + i %% 30 * interval '1 day', ARRAY['a', 'b', 'c'][i %% 3 + 1 : 3],
                   i %% 4, CASE WHEN i %% 5 = 0 THEN now() END, CASE WHEN i %% 7 = 0 THEN 'others' ELSE 'all' END
            FROM (SELECT %(i)s::bigint AS i) x
            """.replace("ARRAY['a', 'b', 'c'][", "(ARRAY['a', 'b', 'c'])["),  # type: ignore[arg-type]
            [{"i": i, "title": title, "body": body} for i, (title, body) in enumerate(texts, 1)],
        )
    connection.execute(
        f"""
        CREATE INDEX ON {TABLE} USING gin (tsv);
        INSERT INTO "Odd Schema".acl SELECT i, 7 FROM generate_series(1, 300, 3) i;
        ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY;
        CREATE POLICY theirs ON {TABLE} FOR SELECT TO {CALLER} USING (who = current_setting('app.who', true));
        GRANT USAGE ON SCHEMA "Odd Schema" TO {CALLER};
        GRANT SELECT ON {TABLE}, "Odd Schema".acl TO {CALLER};
        ANALYZE;
        RESET ROLE
        """  # type: ignore[call-overload]
    )


def sections(config: str, partitioned: bool) -> dict[str, Any]:
    id_, table = '"the id"', TABLE
    return {
        "target": {
            "schema": "Odd Schema", "table": "The articles", "key": "the id", "filters": FILTERS, "always": ALWAYS,
            "counted_rows": "searched",
        },
        "index": {"m": 40, "ef_construction": 200, "rows": "always" if partitioned else "all"},
        "search": {"fulltext_column": "tsv", "fulltext_config": config, "grant_to": [CALLER],
                   "seen_as": [{"role": CALLER, "settings": {"app.who": "all"}}]},
        "legacy": {"query": f"SELECT {id_} FROM {table} t WHERE body ILIKE :query || '%' ORDER BY {id_} LIMIT :k"},
        "tune": {"queries": 20, "ef_search": [60], "target_recall": 0.9},
    }  # fmt: skip


def learn_all(phase: Phase, scan: str) -> None:
    """Every filter, alone and with others, is searched so."""
    way = {"scan": scan, "candidates": 400, "most_scanned": 100_000, "recall": 1.0, "p50_ms": 1.0, "shares": [0.5]}
    way["iterative_scan"] = "relaxed_order" if scan == "relaxed" else "strict_order"
    phase.do(db.statement(search_function.SQL["forget_strategies"], phase.params))
    for name in (*FILTERS, share_classes.TOGETHER):
        learned = {"filter": name, "values": [None], **way}
        phase.do(db.statement(search_function.SQL["learn_strategy"], phase.params, **learned))


def answered(
    caller: psycopg.Connection[Any], call: Any, route: str, given: dict[str, str], text: str = "cookie", k: int = 300
) -> list[int]:
    vector = [float(x) for x in toy.embed(["cookie leaks"])[0]]
    with caller.transaction():
        caller.execute("SELECT set_config('runbook.route', %s, true)", [route])
        values = dict.fromkeys(FILTERS) | given | {"query": text, "embedding": vector, "k": k}
        return [row[0] for row in caller.execute(call, values).fetchall()]


@pytest.mark.attack
@pytest.mark.parametrize(("config", "partitioned"), [("german", False), ("simple", True)])
def test_a_caller_under_policies_finds_what_the_filters_let_through_in_either_language(
    aged: psycopg.Connection[Any], tmp_path: Path, config: str, partitioned: bool
) -> None:
    fill(aged, config, partitioned)
    params = load_params(write_params(tmp_path, **sections(config, partitioned)))
    phase = opened(params, "70_tune")
    try:
        checked = list(filter_checks.check(phase.connection, params))
        assert checked and {str(g.verdict) for g in checked} == {"PASS"}, checked
        for module in (search_function, expand_schema, load_embeddings, backfill, build_index):
            module.apply(phase)
        assert {str(g.verdict) for g in build_index.verify(phase)} == {"PASS"}
        assert {str(g.verdict) for g in backfill.verify(phase)} == {"PASS"}
        call = statements.filtered_call_statement(phase.connection, params)
        found_under_policies(aged, phase, call)
        of_words(aged, phase, call, config)
        tune.apply(phase)
        own = [g for g in tune.verify(phase) if g.name.startswith("tune.")]
        assert {str(g.verdict) for g in own} == {"PASS"}, [g for g in own if g.verdict != "PASS"]
        assert any(g.name == "tune.filters_together_reach_the_target" for g in own)
        search_function.undo(phase)
        assert word_statistics.counted(phase.connection, params) is None
        left = aged.execute("SELECT proname FROM pg_proc WHERE proname ~ '^(search_)?articles'").fetchall()
        assert {name for (name,) in left} <= {"articles_text", "articles_text_hash", "articles_capture"}, left
    finally:
        aged.execute("RESET ROLE")
        phase.end("was ended by the test", "nothing")


def found_under_policies(aged: psycopg.Connection[Any], phase: Phase, call: Any) -> None:
    """Every way, by every filter alone and with others, gives the rows that this caller may see, and no other."""

    def truth(*conditions: str) -> set[int]:
        """As a superuser, whom no policy binds."""
        aged.execute("RESET ROLE")
        where = " AND ".join(["embedding IS NOT NULL", "deleted_at IS NULL", "who = 'all'", *conditions])
        rows = aged.execute(f'SELECT "the id" FROM {TABLE} WHERE {where}').fetchall()  # type: ignore[call-overload]
        aged.execute(f"SET ROLE {CALLER}")  # type: ignore[call-overload]
        return {row[0] for row in rows}

    aged.execute("SET app.who = 'all'")
    sets = [(), *((name,) for name in FILTERS), ("max_price", "owner"), ("State of it", "tags"), tuple(FILTERS)]
    for scan in ("index", "relaxed", "exact"):
        learn_all(phase, scan)
        for names in sets:
            given = {name: VALUES[name] for name in names}
            expected = truth(*(CONDITIONS[name] for name in names))
            found = answered(aged, call, "vector", given)
            assert set(found) == expected and len(found) == len(expected), (scan, names)
            assert set(answered(aged, call, "hybrid", given)) <= expected, (scan, names)
        for hostile in HOSTILE:
            assert set(answered(aged, call, "hybrid", {}, hostile)) <= truth()
            assert answered(aged, call, "vector", {"State of it": hostile}) == []
            assert answered(aged, call, "vector", {"tags": "{" + _quoted(hostile) + "}"}) == []
    aged.execute("SET app.who = 'nobody'")
    assert answered(aged, call, "hybrid", {}) == []
    aged.execute("SET app.who = 'all'")
    aged.execute("RESET ROLE")
    assert aged.execute('SELECT count(*) FROM "Odd Schema".acl').fetchone() == (100,)


def _quoted(element: str) -> str:
    return '"' + element.replace("\\", "\\\\").replace('"', '\\"') + '"'


def of_words(aged: psycopg.Connection[Any], phase: Phase, call: Any, config: str) -> None:
    """The words are those of the configuration; counting and the weight are bounded, and taken back."""
    aged.execute(f"SET ROLE {CALLER}")  # type: ignore[call-overload]
    first = answered(aged, call, "hybrid", {}, "Haus", k=2)
    houses = [len(toy.SUBJECTS) * len(toy.VERBS) * len(toy.PLACES) + i for i in (1, 2)]
    assert (set(first) == set(houses)) if config == "german" else first[0] == houses[1]
    assert answered(aged, call, "hybrid", {}, "err_auth_expired", k=1) == [houses[1]]
    aged.execute("RESET ROLE")
    assert word_statistics.are_current(phase.connection, phase.params).verdict == "PASS"
    # A count waits for nobody longer than it may, and a weight is taken back.
    count = word_statistics.count_statement(phase.connection, phase.params)
    with psycopg.connect(aged.info.dsn, password=aged.info.password) as other:
        other.execute("SELECT FROM runbook.hybrid FOR UPDATE")
        with pytest.raises(db.LockNotObtained):
            phase.do(count)
    phase.do(count)
    phase.do(word_statistics.learn_statement(phase.params, 0.3))
    assert [s.name for s in hybrid_weights.undo_plan(phase.connection, phase.params)] == ["words.learn_weight"]
    for statement in hybrid_weights.undo_plan(phase.connection, phase.params):
        phase.do(statement)
    assert hybrid_weights.undo_plan(phase.connection, phase.params) == []
