"""Who depends on the table: each kind is named before anything changes, and what works instead works."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from runbook_lib.core.gates import Gate
from runbook_lib.migrate import inputs
from runbook_lib.params import Params

Connection = psycopg.Connection[Any]
MakeParams = Callable[..., Params]

SIDE = {"layout": "side_table"}
ADD = (
    'ALTER TABLE "public"."articles" ADD COLUMN IF NOT EXISTS "embedding" "public"."vector"(8), ADD COLUMN IF NOT'
    ' EXISTS "embedding_updated_at" timestamptz, ADD COLUMN IF NOT EXISTS "embedding_hash" bytea;'
)


def found(p: Params) -> list[Gate]:
    return [g for g in inputs.input_problems(p) if g.name.startswith("dependents.")]


def failed(p: Params) -> list[str]:
    return [g.name for g in inputs.input_problems(p).failed]


def test_a_publication_is_named_with_what_its_subscriber_needs_and_agreed_to_by_name(
    articles: Connection, make_params: MakeParams
) -> None:
    articles.execute("CREATE PUBLICATION told FOR TABLE articles")
    assert [str(g) for g in found(make_params())] == [
        "FAIL    dependents.publication_is_agreed_to   publication told\n"
        '  found   sends every column of "public"."articles", and so the new ones; no logical slot here reads it'
        " now\n"
        "  needed  no subscriber that lacks them, agreed to by name: accept.publications: [told]\n"
        "  danger  a subscriber that lacks a column or table stops at the first change of it; its slot then keeps"
        " every WAL file here until the disk is full\n"
        f"  do      on each subscriber, after CREATE EXTENSION vector there: {ADD}; or set vector.layout: side_table,"
        " which adds no column to this table; then name told in accept.publications"
    ]
    for p in (make_params(accept={"publications": ["told"]}), make_params(vector=SIDE)):
        assert failed(p) == []


@pytest.mark.parametrize(
    ("publication", "column", "side_table"),
    [
        ('"All %" FOR ALL TABLES', "sends every column of", 'publication "All %"'),
        ("whole FOR TABLES IN SCHEMA public", "sends every column of", "sends each table of public, and so"),
        ("parts FOR TABLE articles (id, title)", "", ""),
        ("other FOR TABLE others", None, None),
    ],
)
def test_publications_of_every_kind(
    articles: Connection, make_params: MakeParams, publication: str, column: str | None, side_table: str | None
) -> None:
    articles.execute(f"CREATE TABLE others (id int PRIMARY KEY); CREATE PUBLICATION {publication}")
    for wanted, p in ((column, make_params()), (side_table, make_params(vector=SIDE))):
        gates = found(p)
        assert len(gates) == (0 if wanted is None else 1)
        assert [g.verdict for g in gates] == ([] if wanted is None else ["FAIL" if wanted else "PASS"])
        assert all((wanted or "") in str(g) for g in gates)
    if column == "":
        assert gates[0].found.startswith("sends none of the new columns; each UPDATE of the backfill is sent without")


def test_a_publication_of_one_partition_counts(database: str, make_params: MakeParams) -> None:
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(
            "CREATE TABLE articles (id bigint PRIMARY KEY, title text, body text) PARTITION BY RANGE (id);"
            " CREATE TABLE a1 PARTITION OF articles DEFAULT; CREATE PUBLICATION one FOR TABLE a1"
        )
    assert [g.verdict for g in found(make_params(search={"fulltext_column": None}))] == ["FAIL"]


def test_a_table_with_children_is_refused_and_a_child_is_served(
    articles: Connection, make_params: MakeParams
) -> None:
    articles.execute(
        "CREATE TABLE old_articles () INHERITS (articles); ALTER TABLE old_articles ADD PRIMARY KEY (id)"
    )
    (g,) = found(make_params())
    assert (g.name, g.verdict, g.found) == (
        "dependents.table_has_no_children",
        "FAIL",
        "old_articles inherit from it",
    )
    assert found(make_params(target={"table": "old_articles"})) == []


@pytest.mark.parametrize(
    ("make", "column", "side_table"),
    [
        ("CREATE TYPE kind AS (id bigint, title text, body text); CREATE TABLE odd OF kind (PRIMARY KEY (id))",
         "a typed table, OF kind", None),
        ("CREATE UNLOGGED TABLE odd (id bigint PRIMARY KEY, title text, body text)", None,
         "an unlogged table, with its vectors in a side table"),
        ("CREATE TABLE odd (id bigint PRIMARY KEY, title text, body text); DO $$ BEGIN"
         " FOR i IN 1..1596 LOOP EXECUTE format('ALTER TABLE odd ADD COLUMN c%s int', i); END LOOP;"
         " FOR i IN 1..1500 LOOP EXECUTE format('ALTER TABLE odd DROP COLUMN c%s', i); END LOOP; END $$",
         "1599 columns, 1500 of them dropped", None),
    ],
)  # fmt: skip
def test_tables_that_take_no_column_or_no_reference(
    articles: Connection, make_params: MakeParams, make: str, column: str | None, side_table: str | None
) -> None:
    articles.execute(make)
    for wanted, vector in ((column, {}), (side_table, SIDE)):
        p = make_params(target={"table": "odd"}, vector=vector, search={"fulltext_column": None})
        assert [g.found for g in found(p)] == ([wanted] if wanted else [])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("json", "could not identify an equality operator for type json"),
        ("json[]", "could not identify an equality operator for type json"),
        ("point", "could not identify an equality operator for type point"),
        ("xml", "could not identify an equality operator for type xml"),
        ("jsonb", None),
        ("text[]", None),
        ("mood", None),
        ("float8", None),
        ("whole", None),
    ],
)
def test_a_filter_must_have_equality_and_an_order(
    articles: Connection, make_params: MakeParams, kind: str, said: str | None
) -> None:
    articles.execute("CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE DOMAIN whole AS int CHECK (VALUE > 0)")
    articles.execute(f'ALTER TABLE articles ADD COLUMN "share %" {kind}')
    gates = found(make_params(target={"filters": ["share %"]}))
    assert [g.verdict for g in gates] == (["FAIL"] if said else [])
    if said:
        assert str(gates[0]).startswith(
            'FAIL    dependents.filter_can_be_compared   share % of "public"."articles"\n'
            f"  found   {kind}; PostgreSQL says: "
        )


def test_a_function_that_lists_the_columns_of_a_row_is_found_by_trying(
    articles: Connection, make_params: MakeParams
) -> None:
    articles.execute(
        "CREATE TABLE odd (id bigint PRIMARY KEY, title text, body text);"
        "CREATE FUNCTION fine() RETURNS SETOF odd LANGUAGE sql AS 'SELECT o FROM odd o';"
        "CREATE FUNCTION also_fine() RETURNS SETOF odd LANGUAGE sql AS 'SELECT * FROM odd';"
    )
    articles.execute("INSERT INTO odd SELECT id, title, body FROM articles; ANALYZE odd")
    made = {"target": {"table": "odd"}, "search": {"fulltext_column": None}}
    assert failed(make_params(**made)) == []
    articles.execute("CREATE FUNCTION listed() RETURNS SETOF odd LANGUAGE sql AS 'SELECT id, title, body FROM odd'")
    (g,) = inputs.input_problems(make_params(**made)).failed
    assert (g.name, g.found) == (
        "trial.functions_still_return_rows",
        "PostgreSQL says to function listed(): return type mismatch in function declared to return odd",
    )
    assert failed(make_params(**made, vector=SIDE)) == []


@pytest.mark.parametrize(("key", "verdict"), [("PRIMARY KEY", "PASS"), ("NOT NULL UNIQUE", "FAIL")])
def test_a_subscribed_table_needs_a_way_to_find_its_rows(
    articles: Connection, make_params: MakeParams, key: str, verdict: str
) -> None:
    articles.execute(f"CREATE TABLE odd (id bigint {key}, title text, body text)")
    articles.execute("CREATE SUBSCRIPTION fed CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)")
    articles.execute("SET allow_system_table_mods = on")
    articles.execute(
        "INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate)"
        " SELECT s.oid, 'odd'::regclass, 'r' FROM pg_subscription s"
    )
    try:
        (g,) = found(make_params(target={"table": "odd"}, search={"fulltext_column": None}))
        (beside,) = found(make_params(target={"table": "odd"}, search={"fulltext_column": None}, vector=SIDE))
    finally:
        articles.execute("ALTER SUBSCRIPTION fed DISABLE; ALTER SUBSCRIPTION fed SET (slot_name = NONE)")
        articles.execute("DROP SUBSCRIPTION fed")
    assert (g.name, g.verdict, beside.verdict) == ("dependents.subscription_finds_its_rows", verdict, "PASS")
    assert g.found == "fed by subscription fed; " + (
        "rows that it brings are captured" if verdict == "PASS" else "no primary key and no replica identity here"
    )
