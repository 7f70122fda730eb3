"""The function that the application calls, as text.

``search_<target>`` checks its arguments, finds the route, and asks one of ``<target>_by_<route>`` in the ledger's
schema, which holds that route's query and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import has_chunks, identifier, literal, names
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, route_functions, share_classes, signature, ways
from runbook_lib.search.signature import DEFAULT_K, Argument, Function
from runbook_lib.sql import load

SQL, CHUNKS = load("search_function"), load("chunks")


def functions(
    connection: db.Connection, params: Params, settings: Mapping[str, str], retired: bool
) -> list[Function]:
    """All of a target, the one that the application calls first.

    settings: of pgvector, which it carries. retired: its legacy branch is gone.
    """
    search = _search(connection, params, settings, retired)
    called = overloads(connection, params, params.function_name)
    return [search, *called, *route_functions.functions(connection, params, retired)]


def _search(connection: db.Connection, params: Params, settings: Mapping[str, str], retired: bool) -> Function:
    p, arguments, results = params, signature.arguments(connection, params), signature.results(connection, params)
    filters = bool(p.target.filters)
    made = SQL["search"].compose(
        names(p)
        | {
            "arguments": sql.SQL(", ").join(a.declared() for a in arguments),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "default_k": sql.Literal(DEFAULT_K),
            "kept_settings": _set_clauses(settings),
            "dimension": sql.Literal(p.vector.dimension),
            # Under l2 a vector of zeros is a place like any other.
            "refuses_zero": sql.Literal(p.vector.distance != "l2"),
            "declared": _more(SQL["choose_way_variables"].compose({}, 4)) if filters else sql.SQL(""),
            "choose_way": _more(_choose_way(p)) if filters else sql.SQL(""),
            "answers": _answers(p, arguments, retired),
        }
    )
    return Function(p.target.schema_, p.function_name, arguments, results, made)


# By the type of the query's vector: that of its text, how the vector is passed on, and what for. PostgreSQL takes a
# value without a type, such as a literal, for text. An array of integers fits real[] as well as double precision[]:
# there it prefers text to character varying, and so takes the function itself.
OVERLOADS = {
    "double precision[]": (
        "character varying",
        "query_embedding::pg_catalog.float4[]",
        "For a list of numbers as most drivers send it.",
    ),
    "text": (
        "text",
        "pg_catalog.translate(query_embedding, '[]', '{}')::pg_catalog.float4[]",
        "For '[1, 2, 3]', '{1, 2, 3}', and NULL or a literal without a type.",
    ),
}


def overloads(connection: db.Connection, params: Params, name: str) -> list[Function]:
    """Functions of this name, which pass other types of a query's vector on to the one that takes real[]."""
    arguments, results = signature.arguments(connection, params), signature.results(connection, params)
    text, vector, *others = arguments
    made = []
    for kind, (text_type, passed, what) in OVERLOADS.items():
        own = [replace(text, type=text_type), replace(vector, type=kind, default=""), *others]
        given = [sql.SQL("query_text::pg_catalog.text"), sql.SQL(passed), *(identifier(a.name) for a in others)]
        parts = {
            "function": identifier(params.target.schema_, name),
            "arguments": sql.SQL(", ").join(a.declared() for a in own),
            "results": sql.SQL(", ").join(a.declared() for a in results),
            "default_k": sql.Literal(DEFAULT_K),
            "passed": sql.SQL(", ").join(given),
            "what": sql.SQL(what.replace("{", "{{").replace("}", "}}")),
        }
        made.append(Function(params.target.schema_, name, own, results, SQL["overload"].compose(parts)))
    return made


def _more(statement: sql.Composable) -> sql.Composable:
    """A statement, or declarations, below others in the body of the function."""
    return sql.SQL("\n    {};").format(statement)


def _answers(params: Params, arguments: Sequence[Argument], retired: bool) -> sql.Composable:
    """The part of the function that asks the function of the route and the way that were chosen."""
    branches = [
        ("chosen = 'vector' AND way = 'exact'", "vector", "vector_exact"),
        ("chosen = 'vector' AND way = 'relaxed'", "vector", "vector_relaxed"),
        ("chosen = 'vector'", "vector", "vector"),
        ("chosen = 'hybrid' AND way = 'exact'", "hybrid", "hybrid_exact"),
        ("chosen = 'hybrid'", "hybrid", "hybrid"),
    ]
    made = set(route_functions.ways_of(params))
    # Without words of its own to search, hybrid is the search by the vectors.
    given = [
        (
            c if params.search.has_fulltext else c.replace("chosen = 'vector'", "chosen IN ('vector', 'hybrid')"),
            r,
            way,
        )
        for c, r, way in branches
        if way in made
    ]
    passed = sql.SQL(", ").join(identifier(a.name) for a in arguments)

    def answer(route: str, way: str) -> sql.Composable:
        asked = names(params) | {
            "answered_by": sql.Literal(route),
            "by_route": names(params)[f"by_{way}"],
            "passed": passed,
        }
        return SQL["answer"].compose(asked | _of_the_row(params, route), 8)

    parts = [
        sql.SQL("{} {} THEN\n        {};\n    ").format(
            sql.SQL("ELSIF" if i else "IF"), sql.SQL(condition), answer(route, way)
        )
        for i, (condition, route, way) in enumerate(given)
    ]
    message = literal(f"the legacy search behind {params.function_name} was retired")
    last = SQL["refuse_legacy"].compose({"retired_message": message}, 8) if retired else answer("legacy", "legacy")
    return sql.SQL("{}ELSE\n        {};\n    END IF;").format(sql.SQL("").join(parts), last)


def _of_the_row(params: Params, route: str) -> dict[str, sql.Composable]:
    """The columns of an answer that are read from its row or its chunk, and what they are read from. Legacy finds
    rows and no chunks, and is there before they are."""
    columns: list[sql.Composable] = [identifier("t", c) for c in params.search.returns]
    joined = [SQL["of_the_row"].compose(names(params))] if columns else []
    if has_chunks(params):
        by_chunks = route != "legacy"
        place = "passage.{}" if by_chunks else "NULL::pg_catalog.int4"
        columns = [sql.SQL(place.format(name)) for name in signature.PLACE] + columns
        joined = [CHUNKS["passage"].compose(names(params), 8)] * by_chunks + joined
    ordered = sql.SQL(" ORDER BY answer.rank" if joined else "")
    return {
        "columns": sql.SQL("").join(sql.SQL(", {}").format(c) for c in columns),
        "of_the_row": sql.SQL("").join(sql.SQL("\n        {}").format(j) for j in joined) + ordered,
    }


def _choose_way(params: Params) -> sql.Composable:
    """The part of the function that looks up how to search by the filters that are given."""
    t, method = params.target, params.index.method
    given = {name: identifier(f"filter_{name}") for name in t.filters}
    columns = [given[name] for name in t.filter_columns]
    every, own = list(given.values()), {f.name: given[f.name] for f in t.each_filter if f.column is None}
    parts = {
        "filter_arguments": sql.SQL(", ").join(every),
        "conditions": sql.SQL(", ").join(own.values()),
        "asked_filter": combined_filters.given_name(t.filter_columns, columns) if columns else sql.SQL("NULL"),
        "asked_value": combined_filters.given_value(columns) if columns else sql.SQL("NULL"),
        "asked_condition": combined_filters.given_name(list(given), every),
        "together": sql.Literal(share_classes.TOGETHER),
    }
    several = "how.scan = 'unmeasured' AND num_nonnulls({filter_arguments}) > 1"
    unknown = f"{several} OR num_nonnulls({{conditions}}) > 0" if own else several
    return SQL["choose_way"].compose(
        names(params)
        | {
            "filter_arguments": parts["filter_arguments"],
            "asked": SQL["asked_of_conditions" if own else "asked"].compose(names(params) | parts, 4),
            "of_others": _more(SQL["way_of_others"].compose(names(params) | parts, 4)) if own else sql.SQL(""),
            "exact_unmeasured": sql.SQL(unknown).format(**parts),
            "setting": sql.Literal(ways.SETTING[method]),
            "iterative_setting": sql.Literal(ways.ITERATIVE[method][0]),
            "most_scanned_setting": sql.Literal(ways.MOST_SCANNED[method]),
        },
        4,
    )


def _set_clauses(settings: Mapping[str, str]) -> sql.Composable:
    clauses = [sql.SQL("SET {} = {}").format(sql.SQL(name), sql.Literal(v)) for name, v in settings.items()]
    return sql.SQL(" ").join(clauses)
