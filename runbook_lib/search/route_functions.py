"""The functions that answer for the one that the application calls, as text: one for each route and way to scan, and
what they ask.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import function_of, identifier, key_of, literal, names, verbatim, words_functions
from runbook_lib.params import Params
from runbook_lib.params.filters import has_subquery
from runbook_lib.search import conditions, hybrid, search_path, share_classes, ways
from runbook_lib.search.signature import DEFAULT_K, Argument, Function, arguments, filter_arguments
from runbook_lib.search.statements import (
    Route,
    fulltext_names,
    legacy_in_function,
    min_similarity,
    route_statement,
    similarity_of_score,
)
from runbook_lib.sql import load

SQL, WORDS = load("search_function"), load("words")

# Where a query that is put together takes the conditions of the filters that are given.
GIVEN = "/* given */"
# What each is, for who reads it; how it scans.
WHAT: Mapping[str, tuple[str, Route, ways.Scan]] = {
    "legacy": ("The search from before the migration, as params.legacy.query has it.", "legacy", "index"),
    "vector": ("The nearest rows by their vectors, through the index.", "vector", "index"),
    "vector_relaxed": (
        "The nearest rows through the index, which may return them out of order; sorted afterwards.",
        "vector",
        "relaxed",
    ),
    "vector_exact": ("The nearest of all rows that match the filters, without the vector index.", "vector", "exact"),
    "hybrid": ("The nearest rows through the index and those that match best by words, combined.", "hybrid", "index"),
    "hybrid_exact": ("Like hybrid, but with the nearest of all rows, without the vector index.", "hybrid", "exact"),
}


def functions(connection: db.Connection, params: Params, retired: bool) -> list[Function]:
    """All of a target. retired: without that of the legacy route."""
    answering = [*_by_route(connection, params), *_share(connection, params)]
    if retired:
        answering = [f for f in answering if f.name != function_of(params, "legacy")]
    return [*answering, *_of_words(connection, params), _check_vector(params)]


def ways_of(params: Params) -> list[str]:
    """Those of WAYS_TO_ANSWER that this target needs, whatever its index holds."""
    return [
        way
        for way in WHAT
        if (params.target.filters or way in ("legacy", "vector", "hybrid"))
        and (params.search.has_fulltext or not way.startswith("hybrid"))
    ]


def _by_route(connection: db.Connection, params: Params) -> list[Function]:
    p = params
    taken = [Argument(a.name, a.type) for a in arguments(connection, p)]
    types, key = conditions.types(connection, p), key_of(p)
    results = [
        *(Argument(own, types[c]) for own, c in zip(key.names_by_own, p.target.key_columns, strict=True)),
        Argument("similarity", "double precision"),
        Argument("score", "double precision"),
    ]
    # A name may run over two lines, and a comment may not.
    numbered = ", ".join(f"${i} {' '.join(a.name.split())}" for i, a in enumerate(taken, 1))
    made = []
    for way in ways_of(p):
        what, route, scan = WHAT[way]
        subqueries = route != "legacy" and any(has_subquery(f.where) for f in p.target.each_filter)
        query = _query(connection, p, route, scan, sql.SQL(GIVEN) if subqueries else None)
        own = {
            "by_route": names(p)[f"by_{way}"],
            "arguments": sql.SQL(", ").join(a.declared() for a in taken),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "default_k": sql.Literal(DEFAULT_K),
            "search_path": sql.SQL(", ").join(map(identifier, search_path.of_route(connection, p, route))),
            "what": sql.SQL(what),
            "arguments_by_number": verbatim(numbered),
            "body": _put_together(connection, p, query) if subqueries else SQL["static"].compose({"query": query}),
        }
        made.append(Function(p.ledger.schema_, function_of(p, way), taken, results, SQL["by_route"].compose(own)))
    return made


def _put_together(connection: db.Connection, params: Params, query: sql.Composable) -> sql.Composable:
    """The body of a function whose query takes the conditions of the given filters only."""
    return SQL["put_together"].compose(
        {
            "always": _string(names(params)["always"]),
            "given": _given(connection, params, first=4),
            "query": _string(query),
            "passed": sql.SQL(", ").join(identifier(a.name) for a in arguments(connection, params)),
        }
    )


def _string(text: sql.Composable) -> sql.Composable:
    """A piece of SQL as a string, for EXECUTE."""
    return literal(text.as_string().replace("%%", "%"))


def _given(connection: db.Connection, params: Params, first: int) -> sql.Composable:
    """The part of a function that puts together the conditions of those filters that are given: a subquery is planned
    as a join only where nothing else would let its rows through. first: the number of the first filter's argument.
    """
    places = {name: sql.SQL(f"${first + i}") for i, name in enumerate(params.target.filters)}
    parts = [
        SQL["given"].compose({"argument": identifier(f"filter_{name}"), "condition": _string(condition)}, 4)
        for name, condition in conditions.each(connection, params, places).items()
    ]
    return sql.SQL(";\n    ").join(parts)


def _query(
    connection: db.Connection, params: Params, route: Route, scan: ways.Scan, filters: sql.Composable | None
) -> sql.Composable:
    """A route's query with the columns that its function returns. filters: in place of theirs."""
    if route == "legacy":
        own = {"key": names(params)["key"], "query": legacy_in_function(params)}
        return SQL["legacy"].compose(own, 4)
    if route == "hybrid":
        return route_statement(connection, params, route, in_function=True, scan=scan, indent=4, filters=filters)
    own = names(params) | {
        "similarity": similarity_of_score(params, sql.SQL("best.score")),
        "min_similarity": min_similarity(params),
        "query": route_statement(connection, params, route, in_function=True, scan=scan, indent=8, filters=filters),
    }
    return SQL["vector"].compose(own, 4)


def _share(connection: db.Connection, params: Params) -> list[Function]:
    """What tells how few rows the filters of a call let through; only conditions need it."""
    p = params
    if not any(f.column is None for f in p.target.each_filter):
        return []
    taken = [Argument(a.name, a.type) for a in filter_arguments(connection, p)]
    explained = conditions.SQL["rows_let_through"].compose(names(p) | {"filters": sql.SQL(GIVEN)})
    own = names(p) | {
        "arguments": sql.SQL(", ").join(a.declared() for a in taken),
        "search_path": sql.SQL(", ").join(map(identifier, search_path.expression_path(connection, p))),
        "given": _given(connection, p, first=1),
        "always": _string(names(p)["always"]),
        "rows_let_through": _string(explained),
        "rows_in_all": _string(conditions.SQL["rows_in_all"].compose(names(p))),
        "passed": sql.SQL(", ").join(identifier(a.name) for a in taken),
        "rows": sql.Literal(conditions.EXPECTED_ROWS),
        "class": share_classes.expression(sql.SQL("share")),
    }
    made = SQL["share"].compose(own)
    return [Function(p.ledger.schema_, function_of(p, "share"), taken, [], made)]


def _of_words(connection: db.Connection, params: Params) -> list[Function]:
    """What hybrid asks about the words of a query, and about the weights of its halves."""
    if not params.search.has_fulltext:
        return []
    p, schema, called = params, params.ledger.schema_, words_functions(params)
    weight = WORDS["vector_weight"].compose(names(p))
    otherwise = Argument("otherwise", "double precision")
    made = [Function(schema, called["vector_weight"], [otherwise], [], weight)]
    if p.search.has_tsvector:
        taken = [Argument("query_text", "text")]
        results = [
            Argument("place", "bigint"),
            Argument("word", "tsquery"),
            Argument("weight", "double precision"),
            Argument("lookup", "tsquery"),
        ]
        own = {
            "arguments": sql.SQL(", ").join(a.declared() for a in taken),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "code": literal(hybrid.CODE),
            "code_factor": sql.Literal(hybrid.CODE_FACTOR),
            **hybrid.limits(p),
            **fulltext_names(connection, p),
        }
        text = WORDS["weigh_words"].compose({**names(p), **own})
        made.append(Function(schema, called["weigh_words"], taken, results, text))
    return made


def _check_vector(params: Params) -> Function:
    taken = [
        Argument("query_embedding", "real[]"),
        Argument("dimension", "integer"),
        Argument("refuses_zero", "boolean"),
    ]
    return Function(params.ledger.schema_, "check_vector", taken, [], SQL["check_vector"].compose(names(params)))
