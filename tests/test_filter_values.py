"""Values to measure conditions with: told from the condition's text, and found in the column that it compares."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from runbook_lib.benchmark import filter_values
from runbook_lib.benchmark.filter_values import Compared, compared
from runbook_lib.benchmark.query_set import Query, read_queries
from runbook_lib.core import db
from runbook_lib.core.gates import BadInput
from runbook_lib.params import Params
from runbook_lib.params.filters import Filter
from runbook_lib.search import combined_filters, share_classes

TABLE = '"public"."articles"'


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("t.price <= :f", Compared(TABLE, "price", "<=", False, True)),
        (":f > t.price", Compared(TABLE, "price", "<", False, True)),
        ('t."Price €"::numeric >= :f', Compared(TABLE, '"Price €"', ">=", False, True)),
        ("t.tags @> :f", Compared(TABLE, "tags", "@>", False, True)),
        (":f <@ t.tags", Compared(TABLE, "tags", "@>", False, True)),
        ("t.tenant = ANY (:f)", Compared(TABLE, "tenant", "=", True, True)),
        (
            "EXISTS (SELECT FROM acl a WHERE a.doc = t.id AND a.user_id = :f)",
            Compared("acl", "user_id", "=", False, False),
        ),
        (
            'EXISTS (SELECT FROM x y JOIN "My s"."Acl" AS "A b" ON true WHERE "A b".u = ANY(:f) AND y.doc = t.id)',
            Compared('"My s"."Acl"', "u", "=", True, False),
        ),
        ("t.id IN (SELECT acl.doc FROM acl WHERE acl.user_id = :f)", Compared("acl", "user_id", "=", False, False)),
        ("lower(t.title) = :f", None),
        ("t.made_at > now() - :f", None),
        ("b.x = :f", None),
    ],
)
def test_what_a_condition_compares_is_told_from_its_text(where: str, found: Compared | None) -> None:
    assert compared(Filter("f", type="text", where=where), TABLE) == found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (2.5, "2.5"),
        ("a'b", "a'b"),
        (["a", 'b"c\\', None, [1, 2]], '{"a","b\\"c\\\\",NULL,{"1","2"}}'),
        ({"a": "ü"}, '{"a": "ü"}'),
    ],
)
def test_values_of_json_are_written_as_postgresql_reads_them(value: object, text: str) -> None:
    assert combined_filters.text_of(value) == text


def test_shares_have_one_class_in_python_and_in_sql(articles: psycopg.Connection[Any]) -> None:
    for share in (0.0, 0.00029, *share_classes.EDGES, 0.299, 0.31, 1.0):
        expression = share_classes.expression(psycopg.sql.Literal(share))
        row = articles.execute(psycopg.sql.SQL("SELECT {}").format(expression), []).fetchone()
        assert row == (share_classes.of(share),)


FILTERS: dict[str, Any] = {
    "status": None,
    "most_views": {"type": "int", "where": "t.views <= :most_views"},
    "has": {"type": "text[]", "where": "t.words @> :has"},
    "states": {"type": "mood[]", "where": "t.mood = ANY (:states)"},
    "owner": {"type": "bigint", "where": "EXISTS (SELECT FROM acl a WHERE a.doc = t.id AND a.user_id = :owner)"},
    "meta": {"type": "jsonb", "where": "t.meta @> :meta"},
    "odd": {"type": "int", "where": "t.title = :odd::text"},
}


@pytest.fixture
def filtered(articles: psycopg.Connection[Any], make_params: Callable[..., Params]) -> Params:
    articles.execute(
        "CREATE EXTENSION vector;"
        "CREATE TYPE mood AS ENUM ('Stable', 'Draft');"
        "ALTER TABLE articles ADD mood mood DEFAULT 'Stable', ADD words text[],"
        "  ADD meta jsonb, ADD embedding vector(8);"
        "INSERT INTO articles (title, body) SELECT 'more', 'x' FROM generate_series(1, 2000);"
        "UPDATE articles SET views = id, words = string_to_array(body, ' '), embedding = '[1,1,1,1,1,1,1,1]';"
        "CREATE TABLE acl (doc bigint, user_id bigint);"
        "INSERT INTO acl SELECT id, u FROM articles, generate_series(0, 6) u WHERE id % (1 << u) = 0;"
        "ANALYZE articles; ANALYZE acl"
    )
    return make_params(target={"filters": FILTERS, "always": "t.views > 0"})


def test_values_are_found_for_every_share(filtered: Params, articles: psycopg.Connection[Any]) -> None:
    given = (("meta", '{"a": 1}'), ("owner", "3"))
    own = [replace(q, filters=given) for q in read_queries(filtered)[:1]]
    with db.connect(filtered, "test") as connection:
        known = filter_values.of_filters(connection, filtered, own)
        found = filter_values.by_class(connection, filtered, own, random.Random(1))
    assert known["owner"][0] == "3" and set(known["owner"]) == {str(u) for u in range(7)}
    assert known["states"] == ['{"Stable"}'], "of one value no larger set can be made"
    assert known["status"] == ["Stable"] and known["meta"] == ['{"a": 1}'] and known["odd"] == []
    assert {'{"x"}', '{"the"}', '{"cookie"}'} <= set(known["has"])
    assert len(known["most_views"]) > 15, "a value that cuts at two shares is named once"
    names = {name for name, _ in found}
    assert names == {"most_views", "has", "states", "owner", share_classes.TOGETHER}, (
        "no row has that meta, nothing is odd"
    )
    classes = {c for name, c in found if name == "most_views"}
    assert classes >= {"0.03 to 0.1 %", "0.3 to 1 %", "10 to 30 %", "above 30 %"}
    for (name, listed), asked in found.items():
        several = name == share_classes.TOGETHER
        assert len(asked) <= (filter_values.VALUES_OF_SETS if several else filter_values.VALUES)
        sets = [tuple(n for n, _ in allowed) for allowed in asked]
        assert not several or max(map(sets.count, sets)) <= filter_values.OF_A_SET
        # Every second value is held out: of two with the same filters, one is.
        pairs = [i for i, own in enumerate(sets) if several and sets.count(own) == 2]
        assert all(sets[i] == sets[i + 1] for i in pairs[::2]) and pairs == list(range(len(pairs)))
        for allowed, share in asked.items():
            assert share_classes.of(share) == listed
            assert (len(allowed) > 1) == several


def test_values_of_a_large_table_are_sampled_all_over_it(
    filtered: Params, articles: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    articles.execute("TRUNCATE acl; INSERT INTO acl SELECT i, i / 5000 FROM generate_series(0, 29999) i; ANALYZE acl")
    monkeypatch.setattr(filter_values, "SAMPLED_ROWS", 6000)
    with db.connect(filtered, "test") as connection:
        known = filter_values.of_filters(connection, filtered, [])["owner"]
    assert set(known) == {str(owner) for owner in range(6)}, "the first 6,000 rows are of two owners"


def test_a_row_that_is_not_found_soon_is_not_waited_for(
    filtered: Params, make_params: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row takes ten milliseconds to be left out: twenty seconds a value."""
    slow = {"type": "int", "where": "t.views <= :slow AND pg_sleep(0.01) IS NULL"}
    params = make_params(target={"filters": {"most_views": FILTERS["most_views"], "slow": slow}})
    monkeypatch.setattr(filter_values, "LONGEST_LOOK_S", 0.05)
    monkeypatch.setattr(filter_values, "LOOKED_FOR_S", 1.0)
    started = time.monotonic()
    with db.connect(params, "test") as connection:
        found = filter_values.by_class(connection, params, [], random.Random(1))
        assert connection.execute("SHOW statement_timeout").fetchone() == {"statement_timeout": "0"}
    assert {name for name, _ in found} == {"most_views"}, "what is quick is found all the same"
    assert time.monotonic() - started < 60, "all its values would take minutes"


def test_sets_reach_from_one_value_to_all_of_them() -> None:
    found = [value.count(",") + 1 for value in filter_values._sets([str(i) for i in range(40)])]
    assert sorted(set(found)) == [1, 2, 4, 16, 20, 40] and found.count(1) == 40
    assert list(filter_values._sets([])) == []


def test_the_planner_expects_what_a_join_lets_through(filtered: Params, articles: psycopg.Connection[Any]) -> None:
    with db.connect(filtered, "test") as connection:
        estimate = filter_values.Estimate(connection, filtered)
        for user in range(6):
            assert 0.5 < estimate.of((("owner", str(user)),)) * 2**user < 2


def test_filters_of_a_query_that_no_parameter_names_are_refused(filtered: Params) -> None:
    line = '{"query_id": "a", "text": "x", "filters": {"owner": 3, "has": ["a"], "status": null}}\n'
    filtered.queries.file.write_text(line)
    assert read_queries(filtered) == [Query("a", "x")]
    assert read_queries(filtered)[0].filters == (("has", '{"a"}'), ("owner", "3"))
    filtered.queries.file.write_text(line.replace("owner", "ower").replace('"has"', '"his"'))
    with pytest.raises(BadInput) as raised:
        read_queries(filtered)
    assert "filters: ower, his not among target.filters" in str(raised.value)
