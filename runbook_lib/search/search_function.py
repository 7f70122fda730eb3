"""The one SQL function that the application calls: made, given its index settings, moved between routes, removed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from psycopg import sql

from runbook_lib.core import db, session
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gates, collect, gate
from runbook_lib.core.names import identifier, names, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, free_names, function_ownership, ways
from runbook_lib.search.statements import Route, column_types, route_statement
from runbook_lib.sql import DOLLAR_TAG, load

SQL = load("search")

# Rows that a call gets which does not say how many, or says NULL.
DEFAULT_K = 10


def _function_names(
    connection: db.Connection, params: Params, retired: bool | None = None
) -> dict[str, sql.Composable]:
    """What the blocks about the function need besides the common names.

    retired: the function is to be without its legacy branch; as the route has it if not given.
    """
    p = params
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
        "kept_settings": _set_clauses(carried_settings(connection, params)),
        "choose_way": _choose_way(p),
        "default_k": sql.Literal(DEFAULT_K),
        "refuse_vector": SQL["refuse_vector"].compose(
            {
                "dimension": sql.Literal(p.vector.dimension),
                # Under l2 a vector of zeros is a place like any other.
                "refuses_zero": sql.Literal(p.vector.distance != "l2"),
            }
        ),
        "vector_query": _as_literal(connection, params, "vector"),
        "vector_relaxed_query": _as_literal(connection, params, "vector", "relaxed"),
        "vector_exact_query": _as_literal(connection, params, "vector", "exact"),
        "hybrid_query": _as_literal(connection, params, hybrid),
        "hybrid_exact_query": _as_literal(connection, params, hybrid, "exact"),
        "legacy_answer": _legacy_answer(
            connection, params, legacy_is_retired(connection, params) if retired is None else retired, using
        ),
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
            "setting": sql.Literal(ways.SETTING[method]),
            "iterative_setting": sql.Literal(ways.ITERATIVE[method][0]),
            "most_scanned_setting": sql.Literal(ways.MOST_SCANNED[method]),
        }
    )


def _set_clauses(settings: Mapping[str, str]) -> sql.Composable:
    clauses = [sql.SQL("SET {} = {}").format(sql.SQL(name), sql.Literal(v)) for name, v in settings.items()]
    return sql.SQL(" ").join(clauses)


def retired_constraint(params: Params) -> str:
    """Name of the constraint that keeps the route from going back to a legacy search that was retired."""
    return f"{params.target.name}_legacy_is_retired"


def legacy_is_retired(connection: db.Connection, params: Params) -> bool:
    """Has operate/retire_legacy taken the legacy search away?"""
    p = params
    row = db.one(connection, SQL["legacy_is_retired"], p, route=spelled(p, "route"), name=retired_constraint(p))
    return bool(row["retired"])


def _legacy_answer(connection: db.Connection, params: Params, retired: bool, using: Sequence[str]) -> sql.Composable:
    message = f"the legacy search behind {params.function_name} was retired"
    return SQL["refuse_legacy" if retired else "answer_by_legacy"].compose(
        {
            "retired_message": verbatim(sql.Literal(message).as_string()),
            "legacy_query": _as_literal(connection, params, "legacy"),
            "using": sql.SQL(", ").join(map(identifier, using)),
            "users_path": _users_path(connection, params),
        }
    )


def _users_path(connection: db.Connection, params: Params) -> sql.Composable:
    """Part of the function: the legacy query's names resolve as they do for the application, temporary ones last,
    where the function's own path is narrower. The SET of the function ends it with the call.
    """
    came_with = session.inherited(connection)
    wanted = list(dict.fromkeys([params.target.schema_, *came_with]))
    if set(wanted) <= set(function_path(connection, params)):
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


def _as_literal(connection: db.Connection, params: Params, route: Route, scan: ways.Scan = "index") -> sql.Composable:
    """A route's query as a string for EXECUTE, with the columns that the function returns."""
    p = params
    text = route_statement(connection, p, route, in_function=True, scan=scan)
    key = names(p)["key"] if route == "legacy" else sql.Identifier("key")
    score = sql.SQL("NULL::double precision") if route == "legacy" else sql.SQL("q.score")
    wrapped = sql.SQL("SELECT q.{}, {}, {} FROM (\n{}\n) q").format(
        key, score, sql.SQL(f"'{route}'::pg_catalog.text"), text
    )
    # legacy_statement has doubled its per cent signs for a client; the others hold none.
    return sql.SQL(sql.Literal(wrapped.as_string(connection)).as_string(connection))


def create_statement(
    connection: db.Connection,
    params: Params,
    settings_of: Mapping[str, str] | None = None,
    *,
    retired: bool | None = None,
) -> db.Statement:
    """CREATE OR REPLACE of the function, with the index settings that it carries.

    settings_of: by name, in place of those that it carries now. retired: without its legacy branch; as the route has
    it if not given. Raises GateFailed where another target took it over.
    """
    function_ownership.require_own(connection, params)
    free_names.require_function(connection, params, params.function_name)
    kept = carried_settings(connection, params) if settings_of is None else settings_of
    return db.statement(
        SQL["create_function"],
        params,
        _function_names(connection, params, retired) | {"kept_settings": _set_clauses(kept)},
    )


def carried_settings(connection: db.Connection, params: Params) -> dict[str, str]:
    """The index settings that the function carries; empty where it carries none, or is not there."""
    found = function_state(connection, params)
    carried = [s.split("=", 1) for s in (found["settings"] or [] if found else [])]
    known = {*ways.SETTING.values(), *ways.MOST_SCANNED.values(), *(name for name, _ in ways.ITERATIVE.values())}
    return {name: value for name, value in carried if name in known}


def is_as_planned(connection: db.Connection, params: Params) -> bool:
    """Is the function there, with the very text that these parameters make?"""
    found = function_state(connection, params)
    if found is None:
        return False
    text = db.statement(SQL["create_function"], params, _function_names(connection, params)).text(connection)
    # What ends the statement encloses the body; a name may hold another.
    body = text.split(DOLLAR_TAG.findall(text)[-1])[1]
    return bool(found["source"] == hashlib.md5(body.encode(), usedforsecurity=False).hexdigest())


def plan(phase: Phase) -> db.Plan:
    """The tables of routes and strategies, this target's route, the function, and the grants.

    Raises GateFailed where another target took the function over.
    """
    function_ownership.require_own(phase.connection, phase.params)
    free_names.require_function(phase.connection, phase.params, phase.params.function_name)
    extra = _function_names(phase.connection, phase.params)
    start = [] if legacy_is_retired(phase.connection, phase.params) else ["start_with_legacy"]
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


def current_route(connection: db.Connection, params: Params) -> tuple[Route, int]:
    """Where reads go now: the route, and the share of calls in per cent that it answers."""
    row = db.one(connection, SQL["current_route"], params)
    return row["route"], row["share_percent"]


@changes
def move_route(phase: Phase, route: Route, share_percent: int, reason: str) -> db.Done:
    """Moves the reads in one transaction, and writes down why."""
    done = phase.do(db.statement(SQL["move_route"], phase.params, route=route, share_percent=share_percent))
    phase.note("route", {"route": route, "share_percent": share_percent, "reason": reason})
    return done


def set_search_setting(connection: db.Connection, params: Params, value: int) -> list[db.Statement]:
    """Statements that carry the tuned setting, and an iterative scan, into the function.

    Where the function still searches what another ``index.storage`` held, it is made again first. Carry them out
    with pgvector's library loaded: a role that is no superuser may not name a setting that the server does not know
    yet.
    """
    extra, method = _function_names(connection, params), params.index.method
    anew = (
        []
        if function_state(connection, params) is None or is_as_planned(connection, params)
        else [create_statement(connection, params)]
    )
    return [
        *anew,
        *(
            db.statement(
                SQL["set_search_settings"],
                params,
                extra | {"setting": sql.SQL(name), "value": sql.Literal(text)},
            )
            for name, text in ways.through_the_index(params, value).settings(method).items()
        ),
    ]


def reset_search_setting(connection: db.Connection, params: Params, name: str) -> db.Statement:
    """A statement that takes one index setting from the function."""
    extra = _function_names(connection, params) | {"setting": sql.SQL(name)}
    return db.statement(SQL["reset_search_settings"], params, extra)


def function_state(connection: db.Connection, params: Params) -> db.Row | None:
    """The function as pg_proc has it; None where there is none."""
    schema = spelled(params, "schema")
    function = params.function_name
    found = db.rows(connection, SQL["function_state"], params, schema=schema, function=function)
    return found[0] if found else None


def undo_plan(phase: Phase) -> db.Plan:
    """DROP FUNCTION and the route's row, if they are there."""
    if function_state(phase.connection, phase.params) is None:
        return db.Plan((), phase.connection)
    return db.Plan(
        (db.statement(SQL["drop_function"], phase.params, _function_names(phase.connection, phase.params)),),
        phase.connection,
    )


@changes
def undo(phase: Phase) -> Table:
    """Removes the function. The application must have gone back to its own query first."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """No function of that name is left."""
    found = function_state(phase.connection, phase.params)
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
