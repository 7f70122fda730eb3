"""What can be told of a statement that pg_stat_statements has stripped of its constants, and what cannot."""

from __future__ import annotations

import pytest

from runbook_lib.cli.legacy_statement import LegacyQuery, conditions_by_name, of_statement

FILTERS = {"status": "text", "lang id": "integer"}


def told(text: str) -> LegacyQuery:
    return of_statement(text, FILTERS, "english")


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (
            "SELECT id FROM a WHERE t LIKE $1 LIMIT $2",
            "SELECT id\nFROM a\nWHERE t LIKE '%' || :query || '%'\nLIMIT :k",
        ),
        (
            "SELECT id FROM a WHERE lower(t) LIKE lower($2 || $1 || $3) ORDER BY id\nFETCH FIRST $4 ROWS ONLY",
            "SELECT id FROM a WHERE lower(t) LIKE lower('%' || :query || '%') ORDER BY id\nLIMIT :k",
        ),
        (
            "SELECT id FROM a WHERE t ILIKE $1::text || $2\nLIMIT $3 OFFSET $4",
            "SELECT id FROM a WHERE t ILIKE :query || '%'\nLIMIT :k",
        ),
        (
            "SELECT id FROM a WHERE v @@ websearch_to_tsquery($1, $2)\n"
            "ORDER BY ts_rank(v, plainto_tsquery($3)) LIMIT $4",
            "SELECT id FROM a WHERE v @@ websearch_to_tsquery('english', :query)\n"
            "ORDER BY ts_rank(v, plainto_tsquery(:query)) LIMIT :k",
        ),
        (
            "SELECT id FROM a WHERE t % $1\nORDER BY similarity(t, $2) DESC LIMIT 20",
            "SELECT id FROM a WHERE t % :query\nORDER BY similarity(t, :query) DESC LIMIT :k",
        ),
        (
            'SELECT id FROM a WHERE t ILIKE $1 AND a.status = $2 AND "lang id" = $3::int\nLIMIT $4',
            "SELECT id FROM a WHERE t ILIKE '%' || :query || '%' AND (:status::text IS NULL OR a.status = :status)"
            ' AND (:"lang id"::integer IS NULL OR "lang id" = :"lang id")\nLIMIT :k',
        ),
        ("SELECT id FROM a\nWHERE t ~* $1", "SELECT id FROM a\nWHERE t ~* :query\nLIMIT :k"),
    ],
)
def test_placeholders_are_told_by_what_stands_around_them(text: str, query: str) -> None:
    found = told(text)
    assert (found.query, found.complete) == (query, True)


A_SET = (
    "(:status_any::text[] IS NULL OR status = ANY (:status_any))",
    "status_any",
    {"type": "text[]", "where": "t.status = ANY (:status_any)"},
)


@pytest.mark.parametrize(
    ("condition", "query", "name", "filter"),
    [
        (
            "a.price <= $2",
            "(:max_price::numeric IS NULL OR a.price <= :max_price)",
            "max_price",
            {"type": "numeric", "where": "t.price <= :max_price"},
        ),
        (
            '"Made At">$2::timestamptz',
            '(:min_Made_At::timestamp with time zone IS NULL OR "Made At" > :min_Made_At)',
            "min_Made_At",
            {"type": "timestamp with time zone", "where": 't."Made At" > :min_Made_At'},
        ),
        ("status IN ($2, $3, $4)", *A_SET),
        ("status IN ($2 /*, ... */)", *A_SET),
        (
            "tags @> $2",
            "(:has_tags::text[] IS NULL OR tags @> :has_tags)",
            "has_tags",
            {"type": "text[]", "where": "t.tags @> :has_tags"},
        ),
    ],
)
def test_a_range_a_set_and_an_array_are_proposed_as_filters(
    condition: str, query: str, name: str, filter: dict[str, str]
) -> None:
    kinds = {"status": "text", "price": "numeric", "Made At": "timestamp with time zone", "tags": "text[]"}
    found = of_statement(f"SELECT id FROM a WHERE t ILIKE $1 AND {condition} LIMIT $5", kinds, "english")
    assert query in found.query and found.complete
    assert (found.filters, found.conditions) == ((name,), {name: filter})
    assert f"each comparison became an optional filter: {name}" in found.assumed


def test_placeholders_that_a_person_named_are_proposed_as_filters() -> None:
    kinds = {"price": "numeric", "tenant": "bigint"}
    text = "SELECT id FROM a WHERE (:dear::numeric IS NULL OR a.price <= :dear) AND tenant = ANY (:ours) LIMIT :k"
    assert conditions_by_name(text, kinds) == {
        "dear": {"type": "numeric", "where": "t.price <= :dear"},
        "ours": {"type": "bigint[]", "where": "t.tenant = ANY (:ours)"},
    }


def test_every_assumption_is_said() -> None:
    assert told("SELECT id FROM a WHERE t ILIKE $1 AND status = $2").assumed == (
        "the application puts % around the user's text for LIKE",
        "an equality is a filter that may be absent: status",
        "the statement had no LIMIT; the application took the first rows",
    )


@pytest.mark.parametrize(
    "text",
    [
        "SELECT id FROM a WHERE t ILIKE $1 ORDER BY CASE WHEN t ILIKE $2 THEN $3 ELSE $4 END LIMIT $5",
        "SELECT id FROM a WHERE t ILIKE ANY ($1) LIMIT $2",
        "SELECT id FROM a WHERE t ILIKE $1 AND made_at > $2 LIMIT $3",
    ],
)
def test_a_statement_whose_constants_are_lost_is_not_taken_for_complete(text: str) -> None:
    found = told(text)
    assert found.unknown and not found.complete


def test_a_statement_without_the_users_text_is_not_taken_for_a_search() -> None:
    assert not told("SELECT id FROM a WHERE status = $1 LIMIT $2").complete
