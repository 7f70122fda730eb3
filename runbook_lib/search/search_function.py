"""The searches that are compared, and the one SQL function that the application calls."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from psycopg import sql

from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core import db, free_names, session
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gates, collect, gate
from runbook_lib.core.names import as_indexed, identifier, names, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.session import register_vector
from runbook_lib.params import Params, placeholders
from runbook_lib.search import combined_filters, function_ownership
from runbook_lib.sql import DOLLAR_TAG, load

SQL = load("search")

# Rows that a call gets which does not say how many, or says NULL.
DEFAULT_K = 10

Route = Literal["legacy", "vector", "hybrid"]
# How the nearest rows are found. index: in the order in which the index gives them. relaxed: the same, sorted
# afterwards, as an index that holds less than the vectors always needs. exact: by the full vectors, among all rows
# that the filters let through, the vector index unused.
Scan = Literal["index", "relaxed", "exact"]
SETTING = {"hnsw": "hnsw.ef_search", "ivfflat": "ivfflat.probes"}
MOST_SCANNED = {"hnsw": "hnsw.max_scan_tuples", "ivfflat": "ivfflat.max_probes"}
# What pgvector scans at most where nothing else is said: rows of an HNSW index, lists of an IVFFlat index.
MOST_SCANNED_DEFAULT = {"hnsw": 20_000, "ivfflat": 32_768}
# Keeps a page full where a filter or dead rows take answers away; strict order needs no second sort.
ITERATIVE = {"hnsw": ("hnsw.iterative_scan", "strict_order"), "ivfflat": ("ivfflat.iterative_scan", "relaxed_order")}


def _placeholders(params: Params, in_function: bool) -> dict[str, sql.Composable]:
    """How the query text, its vector, k and the filters are written: $n inside the function, %(name)s outside."""
    vector_type = names(params)["vector_type"]
    if in_function:
        own = {
            name: sql.SQL(f"${i}") for i, name in enumerate(["query", "embedding", "k", *params.target.filters], 1)
        }
    else:
        own = {name: sql.Placeholder(name) for name in ["query", "embedding", "k", *params.target.filters]}  # type: ignore[misc]
    return {**own, "embedding": sql.SQL("{}::{}").format(own["embedding"], vector_type)}


def _filters(connection: db.Connection, params: Params, places: Mapping[str, sql.Composable]) -> sql.Composable:
    """Equality with each filter that is given; a filter that is NULL lets every row through."""
    types = _columns(connection, params)
    parts = [
        sql.SQL("({}::{} IS NULL OR {})").format(
            places[c], verbatim(types[c]["type"]), _equals(identifier("t", c), types[c], places[c])
        )
        for c in params.target.filters
    ]
    return sql.SQL(" AND ").join(parts) if parts else sql.SQL("true")


def filter_is(connection: db.Connection, params: Params, column: str, value: sql.Composable) -> sql.Composable:
    """The condition of an index on the rows of one value of a filter, as the search function compares them."""
    return _equals(identifier(column), _columns(connection, params)[column], value)


def _equals(column: sql.Composable, type_: db.Row, value: sql.Composable) -> sql.Composable:
    """By the operator of the column's type, named with its schema: that of citext may be in none of a search path,
    and what is found in its place compares upper and lower case.
    """
    return sql.SQL("{} {} {}::{}").format(column, verbatim(type_["equals"]), value, verbatim(type_["type"]))


def column_types(connection: db.Connection, params: Params) -> dict[str, str]:
    """Types of the key and the filters, by column name; with their schemas, but for PostgreSQL's own."""
    return {name: row["type"] for name, row in _columns(connection, params).items()}


def _columns(connection: db.Connection, params: Params) -> dict[str, db.Row]:
    """The type of the key and of each filter, and its operator of equality, by column name."""
    columns = [params.target.key, *params.target.filters]
    found = db.rows(connection, SQL["column_types"], params, table=spelled(params, "table"), columns=columns)
    return {row["name"]: row for row in found}


def legacy_statement(params: Params, in_function: bool = False) -> sql.Composed:
    """The search of today. ``:query``, ``:k`` and ``:<filter>`` become bound values; everything else stays."""
    places = _placeholders(params, in_function) | {
        "query": sql.SQL("$1") if in_function else sql.Placeholder("query")
    }
    pieces = placeholders.split(params.legacy.query, ["query", "k", *params.target.filters])
    return sql.Composed([places[piece] if is_name else verbatim(piece) for is_name, piece in pieces])


def route_statement(
    connection: db.Connection, params: Params, route: Route, *, in_function: bool = False, scan: Scan = "index"
) -> sql.Composed:
    """The query of a route. Outside the function it returns the key and, for vector and hybrid, a score.

    scan: ``relaxed`` is the same as ``index`` for hybrid, which sorts in any case.
    """
    if route == "legacy":
        return legacy_statement(params, in_function)
    places = _placeholders(params, in_function)
    sorted_again = scan == "relaxed" or (scan == "index" and params.index.storage != "vector")
    block = "hybrid" if route == "hybrid" else "relaxed" if sorted_again else "exact_or_vector"
    n = names(params)
    return SQL[block].compose(
        n
        | {
            "nearest_first": _nearest_first(params, places["embedding"], scan),
            "query_text": places["query"],
            "query_vector": places["embedding"],
            "k": places["k"],
            **_how_many(params, places["k"], scan),
            "filters": _filters(connection, params, places),
            **(fulltext_names(connection, params) if route == "hybrid" else {}),
        }
    )


def fulltext_names(connection: db.Connection, params: Params) -> dict[str, sql.Composable]:
    """``{fulltext}``, the tsvector of the row ``t``, and ``{fulltext_config}``, by which a query becomes words.

    An expression is for a ``LATERAL (SELECT {fulltext})`` that sees ``t`` alone: there its names are columns of the
    row, and the planner finds the index on it.
    """
    s = params.search
    config = text_search_config(connection, params)
    # A comment may end the expression.
    document = (
        sql.SQL("({}\n)").format(verbatim(s.fulltext_expression))
        if s.fulltext_expression
        else identifier("t", s.fulltext_column or "")
    )
    spelled_config = config["spelled"] if config else s.fulltext_config
    return {
        "fulltext": document,
        "fulltext_config": verbatim(f"{sql.Literal(spelled_config).as_string()}::pg_catalog.regconfig"),
    }


def fulltext_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """Full text alone: the words half of hybrid, without filters."""
    return SQL["fulltext"].compose(names(params) | fulltext_names(connection, params))


def text_search_config(connection: db.Connection, params: Params, name: str = "") -> db.Row | None:
    """The configuration of that name, or of the parameters: its oid, and its name spelt whole; None if none is."""
    values = {"config": name or params.search.fulltext_config, "schema": params.target.schema_}
    found = db.rows(connection, SQL["text_search_config"], params, **values)
    return found[0] if found else None


def _nearest_first(params: Params, vector: sql.Composable, scan: Scan) -> sql.Composable:
    """The sort key: what the index holds of both vectors, by the operator that it serves."""
    n = names(params)
    if scan == "exact":
        # An expression around the distance is what no vector index can answer.
        return sql.SQL("({} {} {}) + 0").format(n["row_embedding"], n["distance"], vector)
    return sql.SQL("{} {} {}").format(n["row_indexed"], n["index_distance"], as_indexed(params, vector))


def _how_many(params: Params, k: sql.Composable, scan: Scan) -> dict[str, sql.Composable]:
    """Rows that are fetched by the sort key, before the full vectors sort them: more than k only for storage bit."""
    candidates: sql.Composable = sql.Literal(params.search.hybrid_candidates)
    if params.index.storage != "bit" or scan == "exact":
        return {"nearest_rows": k, "nearest_candidates": candidates, "candidates": candidates}
    rows = sql.SQL("{} * {}").format(k, sql.Literal(params.index.rerank))
    deeper = sql.SQL("greatest({}, {})").format(candidates, rows)
    return {"nearest_rows": rows, "nearest_candidates": deeper, "candidates": candidates}


def _function_names(phase: Phase, retired: bool | None = None) -> dict[str, sql.Composable]:
    """What the blocks about the function need beside the common names.

    retired: the function is to be without its legacy branch; as the route has it if not given.
    """
    p, connection = phase.params, phase.connection
    types = column_types(connection, p)
    filter_types = [verbatim(types[c]) for c in p.target.filters]
    arguments = [
        sql.SQL("query_text text"),
        sql.SQL("query_embedding real[] DEFAULT NULL"),
        sql.SQL("k integer DEFAULT {}").format(sql.Literal(DEFAULT_K)),
        *(
            sql.SQL("{} {} DEFAULT NULL").format(identifier(f"filter_{c}"), kind)
            for c, kind in zip(p.target.filters, filter_types, strict=True)
        ),
    ]
    using = ["query_text", "query_embedding", "k", *(f"filter_{c}" for c in p.target.filters)]
    hybrid: Route = "hybrid" if p.search.has_fulltext else "vector"
    return {
        "arguments": sql.SQL(", ").join(arguments),
        "signature": sql.SQL(", ").join([sql.SQL("text, real[], integer"), *filter_types]),
        "key_type": verbatim(types[p.target.key]),
        "using": sql.SQL(", ").join(map(identifier, using)),
        "search_path": sql.SQL(", ").join(map(identifier, function_path(connection, p))),
        # Made again, the function would lose what 70_tune gave it.
        "kept_settings": _set_clauses(carried_settings(phase)),
        "choose_way": _choose_way(p),
        "default_k": sql.Literal(DEFAULT_K),
        "refuse_vector": SQL["refuse_vector"].compose(
            {
                "dimension": sql.Literal(p.vector.dimension),
                # Under l2 a vector of zeros is a place like any other.
                "refuses_zero": sql.Literal(p.vector.distance != "l2"),
            }
        ),
        "vector_query": _as_literal(phase, "vector"),
        "vector_relaxed_query": _as_literal(phase, "vector", "relaxed"),
        "vector_exact_query": _as_literal(phase, "vector", "exact"),
        "hybrid_query": _as_literal(phase, hybrid),
        "hybrid_exact_query": _as_literal(phase, hybrid, "exact"),
        "legacy_answer": _legacy_answer(phase, legacy_is_retired(phase) if retired is None else retired, using),
    }


def _choose_way(params: Params) -> sql.Composable:
    """The part of the function that looks up how to search by the filters that are given."""
    filters = params.target.filters
    if not filters:
        return sql.SQL("NULL")  # there is one way to search
    method = params.index.method
    given = [identifier(f"filter_{c}") for c in filters]
    return SQL["choose_way"].compose(
        names(params)
        | {
            "filter_arguments": sql.SQL(", ").join(given),
            "asked_filter": combined_filters.given_name(filters, given),
            "asked_value": combined_filters.given_value(given),
            "setting": sql.Literal(SETTING[method]),
            "iterative_setting": sql.Literal(ITERATIVE[method][0]),
            "most_scanned_setting": sql.Literal(MOST_SCANNED[method]),
        }
    )


def _set_clauses(settings: Mapping[str, str]) -> sql.Composable:
    clauses = [sql.SQL("SET {} = {}").format(sql.SQL(name), sql.Literal(v)) for name, v in settings.items()]
    return sql.SQL(" ").join(clauses)


def retired_constraint(params: Params) -> str:
    """Name of the constraint that keeps the route from going back to a legacy search that was retired."""
    return f"{params.target.name}_legacy_is_retired"


def legacy_is_retired(phase: Phase) -> bool:
    """Has operate/retire_legacy taken the legacy search away?"""
    p = phase.params
    row = db.one(phase.connection, SQL["legacy_is_retired"], p, route=spelled(p, "route"), name=retired_constraint(p))
    return bool(row["retired"])


def _legacy_answer(phase: Phase, retired: bool, using: Sequence[str]) -> sql.Composable:
    message = f"the legacy search behind {phase.params.function_name} was retired"
    return SQL["refuse_legacy" if retired else "answer_by_legacy"].compose(
        {
            "retired_message": verbatim(sql.Literal(message).as_string()),
            "legacy_query": _as_literal(phase, "legacy"),
            "using": sql.SQL(", ").join(map(identifier, using)),
            "users_path": _users_path(phase),
        }
    )


def _users_path(phase: Phase) -> sql.Composable:
    """Part of the function: the legacy query's names resolve as they do for the application, temporary ones last,
    where the function's own path is narrower. The SET of the function ends it with the call.
    """
    came_with = session.inherited(phase.connection)
    wanted = list(dict.fromkeys([phase.params.target.schema_, *came_with]))
    if set(wanted) <= set(function_path(phase.connection, phase.params)):
        return sql.SQL("")
    path = ", ".join(identifier(schema).as_string() for schema in [*wanted, "pg_temp"])
    return sql.SQL("PERFORM pg_catalog.set_config('search_path', {}, true);\n        ").format(sql.Literal(path))


def function_path(connection: db.Connection, params: Params) -> list[str]:
    """The function's search path: pg_catalog first, pg_temp last. Between them, for an expression, the table's schema
    and those that the session sees; none of them where others may create.
    """
    if not params.search.fulltext_expression:
        return ["pg_catalog", "pg_temp"]
    row = connection.execute("SELECT current_schemas(false) AS seen").fetchone()
    wanted = [params.target.schema_, *(row["seen"] if row else [])]
    closed_off = [row["schema"] for row in session.open_schemas(connection)]
    between = [schema for schema in wanted if schema not in (*closed_off, "pg_catalog", "pg_temp")]
    return ["pg_catalog", *dict.fromkeys(between), "pg_temp"]


def _as_literal(phase: Phase, route: Route, scan: Scan = "index") -> sql.Composable:
    """A route's query as a string for EXECUTE, with the columns that the function returns."""
    p = phase.params
    text = route_statement(phase.connection, p, route, in_function=True, scan=scan)
    key = names(p)["key"] if route == "legacy" else sql.Identifier("key")
    score = sql.SQL("NULL::double precision") if route == "legacy" else sql.SQL("q.score")
    wrapped = sql.SQL("SELECT q.{}, {}, {} FROM (\n{}\n) q").format(
        key, score, sql.SQL(f"'{route}'::pg_catalog.text"), text
    )
    # legacy_statement has doubled its per cent signs for a client; the others hold none.
    return sql.SQL(sql.Literal(wrapped.as_string(phase.connection)).as_string(phase.connection))


def create_statement(
    phase: Phase, settings_of: Mapping[str, str] | None = None, *, retired: bool | None = None
) -> db.Statement:
    """CREATE OR REPLACE of the function, with the index settings that it carries.

    settings_of: by name, in place of those that it carries now. retired: without its legacy branch; as the route has
    it if not given. Raises GateFailed where another target took it over.
    """
    function_ownership.require_own(phase)
    free_names.require_function(phase.connection, phase.params, phase.params.function_name)
    kept = carried_settings(phase) if settings_of is None else settings_of
    return db.statement(
        SQL["create_function"], phase.params, _function_names(phase, retired) | {"kept_settings": _set_clauses(kept)}
    )


def carried_settings(phase: Phase) -> dict[str, str]:
    """The index settings that the function carries; empty where it carries none, or is not there."""
    found = function_state(phase)
    carried = [s.split("=", 1) for s in (found["settings"] or [] if found else [])]
    known = {*SETTING.values(), *MOST_SCANNED.values(), *(name for name, _ in ITERATIVE.values())}
    return {name: value for name, value in carried if name in known}


def is_as_planned(phase: Phase) -> bool:
    """Is the function there, with the very text that these parameters make?"""
    found = function_state(phase)
    if found is None:
        return False
    text = db.statement(SQL["create_function"], phase.params, _function_names(phase)).text(phase.connection)
    # What ends the statement encloses the body; a name may hold another.
    body = text.split(DOLLAR_TAG.findall(text)[-1])[1]
    return bool(found["source"] == hashlib.md5(body.encode(), usedforsecurity=False).hexdigest())


def plan(phase: Phase) -> db.Plan:
    """The tables of routes and strategies, this target's route, the function, and the grants.

    Raises GateFailed where another target took the function over.
    """
    function_ownership.require_own(phase)
    free_names.require_function(phase.connection, phase.params, phase.params.function_name)
    extra = _function_names(phase)
    start = [] if legacy_is_retired(phase) else ["start_with_legacy"]
    blocks = ["create_route", "create_strategy", "create_way_to_search", *start, "create_function"]
    statements = [db.statement(SQL[b], phase.params, extra) for b in blocks]
    grants = [
        db.statement(SQL["grant"], phase.params, extra | {"role": identifier(role)})
        for role in phase.params.search.grant_to
    ]
    return db.Plan((*statements, *grants), phase.connection)


@changes
def apply(phase: Phase) -> Table:
    """Makes the function, answering by the legacy query; made again, it keeps its route and its settings."""
    return phase.carry_out(plan(phase))


def current_route(phase: Phase) -> tuple[Route, int]:
    """Where reads go now: the route, and the share of calls in per cent that it answers."""
    row = db.one(phase.connection, SQL["current_route"], phase.params)
    return row["route"], row["share_percent"]


def force_route(connection: db.Connection, params: Params, route: str) -> None:
    """Names the route of the calls of this transaction, whatever the table says; no row of it is locked."""
    connection.execute(SQL["force_route"].compose(names(params)), {"route": route})


@changes
def move_route(phase: Phase, route: Route, share_percent: int, reason: str) -> db.Done:
    """Moves the reads in one transaction, and writes down why."""
    done = phase.do(db.statement(SQL["move_route"], phase.params, route=route, share_percent=share_percent))
    phase.note("route", {"route": route, "share_percent": share_percent, "reason": reason})
    return done


def smallest_setting(params: Params) -> int:
    """The cheapest ef_search or probes that the parameters name."""
    return min(params.tune.ef_search if params.index.method == "hnsw" else params.tune.probes)


def settings(params: Params, candidates: int | None) -> list[tuple[str, str]]:
    """The index settings that the function has, by name: ef_search or probes, and how an iterative scan goes on."""
    method = params.index.method
    return [
        (SETTING[method], str(candidates)),
        ITERATIVE[method],
        (MOST_SCANNED[method], str(MOST_SCANNED_DEFAULT[method])),
    ]


def set_search_setting(phase: Phase, value: int) -> list[db.Statement]:
    """Statements that carry the tuned setting, and an iterative scan, into the function.

    Where the function still searches what another ``index.storage`` held, it is made anew first. Carry them out
    with pgvector's library loaded: a role that is no superuser may not name a setting that the server does not know
    yet.
    """
    extra = _function_names(phase)
    anew = [] if function_state(phase) is None or is_as_planned(phase) else [create_statement(phase)]
    return [
        *anew,
        *(
            db.statement(
                SQL["set_search_settings"],
                phase.params,
                extra | {"setting": sql.SQL(name), "value": sql.Literal(text)},
            )
            for name, text in settings(phase.params, value)
        ),
    ]


def reset_search_setting(phase: Phase, name: str) -> db.Statement:
    """A statement that takes one index setting from the function."""
    extra = _function_names(phase) | {"setting": sql.SQL(name)}
    return db.statement(SQL["reset_search_settings"], phase.params, extra)


def function_state(phase: Phase) -> db.Row | None:
    """The function as pg_proc has it; None where there is none."""
    schema = spelled(phase.params, "schema")
    function = phase.params.function_name
    found = db.rows(phase.connection, SQL["function_state"], phase.params, schema=schema, function=function)
    return found[0] if found else None


def undo_plan(phase: Phase) -> db.Plan:
    """DROP FUNCTION and the route's row, if they are there."""
    if function_state(phase) is None:
        return db.Plan((), phase.connection)
    return db.Plan((db.statement(SQL["drop_function"], phase.params, _function_names(phase)),), phase.connection)


@changes
def undo(phase: Phase) -> Table:
    """Removes the function. The application must have gone back to its own query first."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """No function of that name is left."""
    found = function_state(phase)
    gone = gate(
        "search.function_is_gone",
        found is None,
        phase.params.function_name,
        found="no such function" if found is None else found["function"],
        needed="no such function",
        danger="the table is not as it was",
        do="run undo/search_function again",
    )
    return collect([gone])


@dataclass(frozen=True)
class Answers:
    """What a search answered: keys as text, best first, by query id; seconds of each query, in the same order.

    routes: which route answered each query, where the search is the function. scores: of each key, None where the
    search gives none.
    """

    keys: dict[str, list[str]]
    seconds: list[float]
    routes: list[str]
    scores: dict[str, list[float | None]] = field(default_factory=dict)

    def rows(self, query_id: str) -> list[tuple[str, float | None]]:
        """Keys with their distances, which the vector route gives as negative scores."""
        scores = self.scores[query_id]
        return [(k, None if s is None else -s) for k, s in zip(self.keys[query_id], scores, strict=True)]

    def answered_by(self, route: str) -> int:
        """Queries that this route answered."""
        return self.routes.count(route)


def ask(
    connection: db.Connection,
    params: Params,
    statement: sql.Composed,
    queries: Sequence[Query],
    vectors: np.ndarray | None,
    k: int,
    given: Mapping[str, str] | None = None,
) -> Answers:
    """Runs a search for every query, one after the other, and times each on the client.

    vectors: shape (len(queries), dimension), or None for a search that needs none. given: values of filters. Never
    prepared: psycopg's automatic prepare would keep an index plan in spite of a setting that forbids it.
    """
    if vectors is not None:
        register_vector(connection)
    filters: dict[str, Any] = dict.fromkeys(params.target.filters) | dict(given or {})
    keys: dict[str, list[str]] = {}
    scores: dict[str, list[float | None]] = {}
    seconds: list[float] = []
    routes: list[str] = []
    # The names of the application's own query resolve as they do for the application.
    its_own = statement == legacy_statement(params)
    with session.users_path(connection) if its_own else nullcontext():
        for i, query in enumerate(queries):
            values = filters | {"query": query.text, "k": k, "embedding": None if vectors is None else vectors[i]}
            started = time.perf_counter()
            rows = connection.execute(statement, values, prepare=False).fetchall()
            seconds.append(time.perf_counter() - started)
            name = params.target.key if rows and params.target.key in rows[0] else "key"
            keys[query.query_id] = [str(row[name]) for row in rows]
            scores[query.query_id] = [row.get("score") for row in rows]
            if rows and "answered_by" in rows[0]:
                routes.append(rows[0]["answered_by"])
    return Answers(keys, seconds, routes, scores)


def call_statement(params: Params) -> sql.Composed:
    """A call of the function, as the application makes it."""
    return SQL["call"].compose(names(params))


def matching_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """Counts the rows, up to k, that the filters let through; bound as in :func:`filtered_call_statement`."""
    filters = _filters(connection, params, _placeholders(params, in_function=False))
    return SQL["count_matching"].compose(names(params) | {"filters": filters})


def filtered_call_statement(connection: db.Connection, params: Params) -> sql.Composed:
    """The same with every filter bound by its column's name; NULL lets every row through."""
    types = column_types(connection, params)
    given = [
        sql.SQL(", {} => {}::{}").format(identifier(f"filter_{c}"), sql.Placeholder(c), verbatim(types[c]))
        for c in params.target.filters
    ]
    return SQL["call_filtered"].compose(names(params) | {"filters": sql.SQL("").join(given)})
