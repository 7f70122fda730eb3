"""A role that may create in a schema, and what it plants there: better matches for every call that is not exact."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

import runbook_lib
from tests.small_runs import wait_until

# What an argument of a type may be given as: a function of that very type is the better match.
GIVEN_AS = {
    "bigint": ["integer", "smallint"],
    "integer": ["smallint"],
    "numeric": ["integer", "bigint"],
    "double precision": ["integer", "bigint", "numeric", "real"],
    "text": ["character varying", "name"],
    "name": ["text", "character varying"],
    "oid": ["integer", "bigint", "regclass"],
    "regclass": ["oid", "text"],
    '"any"': ["text", "character varying", "integer", "bigint", "boolean"],
    "vector": ["real[]", "halfvec", "text"],
    "halfvec": ["real[]", "vector", "text"],
    "anyelement": ["text", "integer", "bigint", "character varying"],
    "anycompatible": ["text", "integer", "real"],
    "anyarray": ["text[]", "integer[]", "real[]", "name[]"],
    "anycompatiblearray": ["text[]", "integer[]", "real[]"],
    "text[]": ["character varying[]", "name[]"],
    "timestamp with time zone": ["date", "timestamp without time zone"],
}
WORDS = ["text", "character varying", "name", '"char"']
NUMBERS = ["smallint", "integer", "bigint", "real", "double precision", "numeric", "oid"]
TIMES = ["timestamp with time zone", "interval"]
LISTS = ["text[]", "name[]", "integer[]", "smallint[]", "real[]", "oid[]"]
OTHERS = ["bytea", "jsonb", "regclass"]
# Operators, between which types they are planted, and what they return.
OPERATORS = [
    (["=", "<>", "<", "<=", ">", ">="], [*WORDS, *NUMBERS, *TIMES, *LISTS, *OTHERS], "boolean"),
    (["+", "-", "*", "/", "%"], [*NUMBERS, *TIMES], "double precision"),
    (["||"], [*WORDS, *LISTS, "jsonb", "integer", "bigint", "bytea"], "text"),
    (["~~", "~~*", "!~~", "!~~*", "~", "~*", "!~", "!~*"], WORDS, "boolean"),
    (["@>", "<@", "&&"], [*LISTS, "jsonb"], "boolean"),
    (["->", "->>", "#>>"], ["jsonb", *WORDS, *LISTS, "bigint", "smallint"], "text"),
    (["<=>", "<->", "<#>", "<~>"], ["vector", "halfvec", "real[]", "text"], "double precision"),
]
# Of a function that takes any number of arguments.
ANY_THREE = ['"any"'] * 3
SIGNATURES = """
    SELECT p.proname::text AS name, p.pronargs AS n, p.provariadic <> 0 AS variadic, p.proretset AS of_many,
           ARRAY(SELECT format_type(a.t, NULL) FROM unnest(p.proargtypes::oid[]) WITH ORDINALITY AS a (t, i)
                 ORDER BY a.i) AS types,
           CASE WHEN y.typtype = 'p' THEN 'text' ELSE format_type(p.prorettype, NULL) END AS returns
    FROM pg_proc p JOIN pg_type y ON y.oid = p.prorettype
    WHERE p.pronamespace IN ('pg_catalog'::regnamespace, 'public'::regnamespace)
      AND p.proname = ANY (%s) AND p.pronargs BETWEEN 1 AND 5
"""
CALLS = """
    SELECT format('%%s(%%s)', p.proname, pg_get_function_arguments(p.oid))
    FROM pg_stat_user_functions s JOIN pg_proc p ON p.oid = s.funcid WHERE pg_get_userbyid(p.proowner) = %s
"""

OTHER_SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
"""


@contextmanager
def attacker(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """A role that may create in schema public and in no other; the server counts the calls of what it makes."""
    name = f"mallory_{connection.info.dbname}"
    role, database = sql.Identifier(name), sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
    try:
        connection.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(role))
        connection.execute(sql.SQL("ALTER DATABASE {} SET track_functions = 'all'").format(database))
        yield name
    finally:
        connection.execute(sql.SQL("DROP OWNED BY {r} CASCADE; DROP ROLE {r}").format(r=role))


def plant(connection: psycopg.Connection[Any], role: str) -> int:
    """Makes, as this role, functions and operators that an inexact call would prefer; returns how many."""
    made = [*_functions(connection), *_operators(connection)]
    connection.execute(sql.SQL("SET ROLE {}; SET search_path = public").format(sql.Identifier(role)))
    try:
        connection.execute("".join(made))
    finally:
        # What the test itself asks from here on is not to be led astray.
        connection.execute("RESET ROLE; SET search_path = pg_catalog")
    return len(made)


def make(connection: psycopg.Connection[Any], role: str, statement: str) -> None:
    """Carries out a statement as this role."""
    connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
    try:
        connection.execute(sql.SQL(statement))  # type: ignore[arg-type]
    finally:
        connection.execute("RESET ROLE")


def called(connection: psycopg.Connection[Any], role: str) -> list[str]:
    """Those of them that were called; waits for the end of all other sessions, with which the server counts them."""
    wait_until(lambda: connection.execute(OTHER_SESSIONS).fetchone() == (0,), 30)
    connection.execute("SELECT pg_stat_clear_snapshot()")
    return [row[0] for row in connection.execute(CALLS, [role]).fetchall()]


@contextmanager
def application(connection: psycopg.Connection[Any]) -> Iterator[str]:
    """A role that reads and writes the table."""
    name = f"app_{connection.info.dbname}"
    role = sql.Identifier(name)
    connection.execute(sql.SQL("CREATE ROLE {r} LOGIN; GRANT ALL ON articles TO {r}").format(r=role))
    try:
        yield name
    finally:
        connection.execute(sql.SQL("DROP OWNED BY {r} CASCADE; DROP ROLE {r}").format(r=role))


def use(database: str, role: str, vector: list[float]) -> None:
    """What an application does, exactly typed, with temporary objects named as what functions may look for."""
    with psycopg.connect(database, user=role, autocommit=True) as app:
        app.execute("CREATE TEMPORARY TABLE articles_queue (key bigint); CREATE TEMPORARY TABLE pg_class (oid oid)")
        app.execute("CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (false)")
        for function in ("search_articles", "search_articles_shadow"):
            call = f"SELECT * FROM public.{function}(%s::pg_catalog.text, %s::real[], 5, %s::pg_catalog.text)"
            for status in ("Stable", None):
                assert len(app.execute(call, ["cookie leaks", vector, status]).fetchall()) == 5
        app.execute("UPDATE public.articles SET body = 'other'::pg_catalog.text WHERE id = 7::bigint")


def call_inexactly(database: str) -> None:
    """What a session does that is not careful."""
    with psycopg.connect(database, autocommit=True) as victim:
        victim.execute("SELECT hashtextextended('x'::text, 0)")


def _named_in_our_sql() -> list[str]:
    """Every word before a bracket in the project's own SQL and Python."""
    folder = Path(str(files(runbook_lib)))
    texts = [path.read_text() for kind in ("*.sql", "*.py") for path in folder.rglob(kind)]
    return sorted({word.lower() for text in texts for word in re.findall(r"\b([a-z_0-9]+)\(", text, re.I)})


def _functions(connection: psycopg.Connection[Any]) -> Iterator[str]:
    found = connection.execute(SIGNATURES, [_named_in_our_sql()]).fetchall()
    taken = {(name, tuple(types)) for name, _, _, _, types, _ in found}
    for name, n, variadic, of_many, types, returns in found:
        for given in _variants([*types[: n - 1], *ANY_THREE] if variadic else types):
            if (name, given) in taken or any(t.startswith(('"any"', "any", "internal", "cstring")) for t in given):
                continue
            taken.add((name, given))
            body, many = ("RETURN", "SETOF ") if of_many else ("RETURN NULL", "")
            yield (
                f'CREATE FUNCTION "{name}"({", ".join(given)}) RETURNS {many}{returns} LANGUAGE plpgsql'
                f" AS 'BEGIN {body}; END';\n"
            )


def _variants(types: list[str]) -> Iterator[tuple[str, ...]]:
    """The types with one, or all, of them as what a caller may give."""
    for i in range(3):
        yield tuple(GIVEN_AS[t][min(i, len(GIVEN_AS[t]) - 1)] if t in GIVEN_AS else t for t in types)
    for place, kind in enumerate(types):
        for other in GIVEN_AS.get(kind, []):
            yield (*types[:place], other, *types[place + 1 :])


def _operators(connection: psycopg.Connection[Any]) -> Iterator[str]:
    there = {
        tuple(row)
        for row in connection.execute(
            "SELECT oprname::text, format_type(oprleft, NULL), format_type(oprright, NULL) FROM pg_operator"
        )
    }
    made = set()
    for operators, kinds, returns in OPERATORS:
        for left in kinds:
            for right in kinds:
                body = f'"hijack {returns}"({left}, {right})'
                if body not in made:
                    made.add(body)
                    yield f"CREATE FUNCTION {body} RETURNS {returns} LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';\n"
                for name in operators:
                    if (name, left, right) not in there:
                        sides = f"LEFTARG = {left}, RIGHTARG = {right}"
                        yield f'CREATE OPERATOR {name} (FUNCTION = "hijack {returns}", {sides});\n'
