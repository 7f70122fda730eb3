"""Filters that are conditions: what the parameters refuse, and what preflight finds out about the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from runbook_lib.core import db
from runbook_lib.core.gates import Gate
from runbook_lib.migrate import filter_checks
from runbook_lib.params import Params

OWNER = "EXISTS (SELECT FROM acl a WHERE a.doc = t.id AND a.user_id = :owner)"
SOUND: dict[str, Any] = {
    "status": None,
    "most_views": {"type": "int4", "where": "t.views <= :most_views OR t.views = 7 * :most_views"},
    "states": {"type": "text[]", "where": "t.status = ANY (:states)"},
    "owner": {"type": "bigint", "where": OWNER},
    'Sta"te %': {"type": "text", "where": 't.status LIKE :"Sta""te %" || \'%\''},
}


@pytest.fixture
def acl(articles: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The toy table, and who owns which of its rows."""
    articles.execute("CREATE TABLE acl (doc bigint, user_id bigint)")
    return articles


@pytest.fixture
def a_role(articles: psycopg.Connection[Any]) -> Iterator[str]:
    """A role without any right."""
    articles.execute("CREATE ROLE caller_with_filters")
    yield "caller_with_filters"
    articles.execute("DROP OWNED BY caller_with_filters; DROP ROLE caller_with_filters")


def found(params: Params) -> dict[str, Gate]:
    with db.connect(params, "test") as connection:
        return {f"{g.name} {g.subject}": g for g in filter_checks.check(connection, params)}


def problem(params: Params) -> Gate:
    (bad,) = [g for g in found(params).values() if g.verdict != "PASS"]
    return bad


def test_every_kind_of_condition_is_planned(acl: psycopg.Connection[Any], make_params: Callable[..., Params]) -> None:
    gates = found(make_params(target={"filters": SOUND, "always": "t.status <> 'Deleted'"}))
    assert {g.verdict for g in gates.values()} == {"PASS"}
    assert [g.subject for g in gates.values()] == [
        *(f"target.filters.{name}" for name in list(SOUND)[1:]),
        "target.always",
        "search.grant_to and search.seen_as",
    ]
    assert acl.execute("SELECT FROM pg_class WHERE relname = 'runbook_probe'").fetchone() is None


def test_columns_alone_ask_for_no_gate(acl: psycopg.Connection[Any], make_params: Callable[..., Params]) -> None:
    assert found(make_params(target={"filters": ["status"]})) == {}


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"type": "numerick", "where": "t.views = :f"}, "type numerick does not exist, or no value can have it"),
        ({"type": "anyelement", "where": "t.views = :f"}, "type anyelement does not exist, or no value can have it"),
        ({"type": "int[", "where": "t.views = :f"}, "syntax error"),
        ({"type": "int", "where": "t.prize <= :f"}, "column t.prize does not exist"),
        ({"type": "text[]", "where": "t.views <= :f"}, "operator does not exist: integer <= text[]"),
        ({"type": "int", "where": "t.views + :f"}, "argument of WHERE must be type boolean, not type integer"),
        ({"type": "int", "where": "true ORDER BY :f"}, "syntax error"),
        ({"type": "int", "where": "true UNION SELECT :f = 1"}, "syntax error"),
        ({"type": "int", "where": "count(*) > :f"}, "aggregate functions are not allowed in WHERE"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_postgresqls_words(
    acl: psycopg.Connection[Any], make_params: Callable[..., Params], condition: dict[str, str], said: str
) -> None:
    gate = problem(make_params(target={"filters": {"f": condition}}))
    assert (gate.name, gate.subject) == ("inputs.condition_can_be_planned", "target.filters.f")
    assert said in gate.found


@pytest.mark.parametrize(
    "where",
    [
        "t.views <= :f * random()",
        "EXISTS (SELECT FROM acl a WHERE a.doc = t.id AND random() < :f)",
        "t.title = volatile_of_ours(:f)",
    ],
)
def test_a_volatile_function_is_refused(
    acl: psycopg.Connection[Any], make_params: Callable[..., Params], where: str
) -> None:
    acl.execute("CREATE FUNCTION volatile_of_ours(float8) RETURNS text LANGUAGE plpgsql AS $$BEGIN RETURN 1; END$$")
    gate = problem(make_params(target={"filters": {"f": {"type": "float8", "where": where}}}))
    assert str(gate) == (
        "FAIL    inputs.condition_is_stable   target.filters.f\n"
        "  found   a volatile function, such as random() or clock_timestamp()\n"
        "  needed  only STABLE or IMMUTABLE functions, such as now()\n"
        "  danger  the same search would match different rows each time, so recall could not be measured\n"
        "  do      leave the function out; if it is yours and changes nothing, declare it STABLE"
    )


def test_what_the_application_may_not_read_is_granted_by_name(
    acl: psycopg.Connection[Any], make_params: Callable[..., Params], a_role: str
) -> None:
    acl.execute(
        f'CREATE SCHEMA "x y"; CREATE FUNCTION "x y".f() RETURNS int STABLE LANGUAGE sql AS \'SELECT 1\';'
        f' REVOKE ALL ON FUNCTION "x y".f() FROM PUBLIC; GRANT SELECT ON articles TO {a_role}'
    )
    where = {"owner": {"type": "bigint", "where": OWNER}, "f": {"type": "int", "where": 't.views = :f + "x y".f()'}}
    params = make_params(target={"filters": where}, search={"grant_to": [a_role]})
    gate = problem(params)
    assert str(gate) == (
        "FAIL    inputs.callers_may_read_what_filters_read   search.grant_to and search.seen_as\n"
        f'  found   {a_role} lacks SELECT on public.acl; {a_role} lacks EXECUTE on "x y".f(); {a_role} lacks USAGE on'
        ' schema "x y"\n'
        "  needed  SELECT on the columns, EXECUTE on the functions that the conditions name\n"
        "  danger  the search function runs with its caller's privileges: their searches with these filters would"
        " fail\n"
        f"  do      have their owner run: GRANT SELECT ON public.acl TO {a_role}; GRANT EXECUTE ON FUNCTION"
        f' "x y".f() TO {a_role}; GRANT USAGE ON SCHEMA "x y" TO {a_role};'
    )
    acl.execute(
        f'GRANT SELECT ON acl TO {a_role}; GRANT ALL ON SCHEMA "x y" TO {a_role};'
        f' GRANT ALL ON FUNCTION "x y".f() TO {a_role}'
    )
    assert {g.verdict for g in found(params).values()} == {"PASS"}
