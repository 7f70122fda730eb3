"""``:name`` and ``:"any name"``: what is a placeholder, and what is none."""

import pytest

from runbook_lib.benchmark import vector_statement
from runbook_lib.params import placeholders

NAMES = ["query", "k", "Ward No", "share %", 'a"b', "str\u00e4\u00dfe"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a = :query LIMIT :k", ["query", "k"]),
        ('"Ward No" = :"Ward No"::int AND :"share %" > 0', ["Ward No", "share %"]),
        (':"a""b" + :"query" + :str\u00e4\u00dfe', ['a"b', "query", "str\u00e4\u00dfe"]),
        ("x::query, y[1:k], ':query', $$:k$$, $a$ :k $a$, \":k\"", []),
        ("-- :query\n/* :k */ :k", ["k"]),
        ("E'it\\'s :k' || :query", ["query"]),
        (":querying :kk :other", []),
    ],
)
def test_what_is_a_placeholder(text: str, found: list[str]) -> None:
    pieces = placeholders.split(text, NAMES)
    assert [piece for is_name, piece in pieces if is_name] == found
    again = "".join(placeholders.written(piece) if is_name else piece for is_name, piece in pieces)
    assert again == text.replace(':"query"', ":query")


def test_bound_and_named_are_each_others_way_back() -> None:
    text = 'SELECT id WHERE w = :"Ward No" AND :query <> \':k\' AND w > :"Ward No" LIMIT :k'
    bound, used = vector_statement.bound(text, NAMES)
    assert bound == "SELECT id WHERE w = $1 AND $2 <> ':k' AND w > $1 LIMIT $3"
    assert vector_statement.named(bound, used) == text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" SELECT 1; ", "SELECT 1"),
        ("SELECT 1 ; -- done; really\n/* ; */ ;", "SELECT 1"),
        ("-- why\nSELECT ';' -- no end", "-- why\nSELECT ';' -- no end"),
        ("SELECT 1; SELECT 2; -- two", "SELECT 1; SELECT 2"),
        ("SELECT $$;$$;", "SELECT $$;$$"),
        ("SELECT 'a--b;';", "SELECT 'a--b;'"),
        (";", ";"),
    ],
)
def test_a_statement_without_its_end(text: str, kept: str) -> None:
    assert placeholders.without_its_end(text) == kept
