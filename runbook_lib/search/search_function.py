"""The one SQL function that the application calls: made, given its index settings, moved between routes, removed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from psycopg import sql

from runbook_lib.core import closed, db, table_kind
from runbook_lib.core.display import Table
from runbook_lib.core.gates import BadInput, Gates, collect, gate
from runbook_lib.core.names import (
    WAYS_TO_ANSWER,
    function_of,
    identifier,
    literal,
    spelled,
    verbatim,
    words_functions,
)
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.search import free_names, function_ownership, function_text, role_settings, ways, word_statistics
from runbook_lib.search.signature import DEFAULT_K as DEFAULT_K
from runbook_lib.search.signature import Function
from runbook_lib.search.statements import Route
from runbook_lib.sql import load

SQL = load("search")

# By then a call under way has found the function that answers for it.
CALLS_UNDER_WAY_S = 1


def retired_constraint(params: Params) -> str:
    """Name of the constraint that keeps the route from going back to a legacy search that was retired."""
    return f"{params.target.name}_legacy_is_retired"


def legacy_is_retired(connection: db.Connection, params: Params) -> bool:
    """Has operate/retire_legacy taken the legacy search away?"""
    p = params
    row = db.one(connection, SQL["legacy_is_retired"], p, route=spelled(p, "route"), name=retired_constraint(p))
    return bool(row["retired"])


def _wanted(
    connection: db.Connection,
    params: Params,
    settings: Mapping[str, str] | None = None,
    retired: bool | None = None,
) -> list[Function]:
    """The functions that these parameters make. settings, retired: as they are now if not given."""
    in_function = table_kind.of(params).settings_stay
    known = carried_settings(connection, params) if settings is None else settings
    return function_text.functions(
        connection,
        params,
        known if in_function else {},
        legacy_is_retired(connection, params) if retired is None else retired,
    )


def _installed(connection: db.Connection, params: Params, wanted: list[Function]) -> list[db.Row]:
    """This target's functions as the catalogue has them, each with ``fits``, whether CREATE OR REPLACE would do, and
    ``same``, whether that would change nothing.
    """
    return db.rows(
        connection,
        SQL["installed"],
        params,
        wanted=json.dumps([f.wanted(connection) for f in wanted]),
        schema=spelled(params, "schema"),
        function=params.function_name,
        ledger=spelled(params, "ledger"),
        by_route=[
            *(function_of(params, way) for way in WAYS_TO_ANSWER),
            *words_functions(params).values(),
            *(f.name for f in wanted),
        ],
    )


def create_statement(
    connection: db.Connection,
    params: Params,
    settings_of: Mapping[str, str] | None = None,
    *,
    retired: bool | None = None,
) -> db.Statement:
    """Makes the function and those that answer for it, in one transaction, with the index settings that it carries.

    One that has other arguments or results by now is dropped first; who may call it and its comment stay.
    settings_of: by name, in place of those that it carries now. retired: without its legacy branch; as the route has
    it if not given. Raises GateFailed where another target took it over, BadInput where it is needed as it is.
    """
    function_ownership.require_own(connection, params)
    free_names.require_function(connection, params, params.function_name)
    wanted = _wanted(connection, params, settings_of, retired)
    installed = _installed(connection, params, wanted)
    outdated = [row for row in installed if not row["fits"] and not _is_former(row)]
    _require_no_dependents(params, outdated)
    called = [row for row in installed if row["is_called"]]
    everything = sql.SQL(", ").join(f.signature for f in wanted)
    made = [
        *(sql.SQL("DROP FUNCTION {}").format(verbatim(row["function"])) for row in outdated),
        *(f.made for f in reversed(wanted)),
    ]
    if params.search.has_fulltext:
        # A function of an earlier release had none of them.
        made.insert(0, word_statistics.create_tables(params))
    parts, kept = [_in_order(made)], _kept(called, outdated, wanted[0].signature, everything)
    if kept:
        parts.append(sql.SQL("{}\n{}").format(sql.SQL(closed.MARK), _in_order(kept)))
    return db.statement(SQL["create_function"], params, {"parts": sql.SQL(";\n\n").join(parts)})


def _is_former(row: db.Row) -> bool:
    """Does this function answer calls of the one that is replaced, and may it stay for a while?"""
    return bool(row["answers"] and not row["fits"] and not row["is_in_the_way"])


def drop_former(connection: db.Connection, params: Params) -> list[db.Statement]:
    """Drops what answered for a function with other arguments, after :func:`create_statement`: a call under way when
    that committed would not find it otherwise.
    """
    former = [row for row in _installed(connection, params, _wanted(connection, params)) if _is_former(row)]
    if not former:
        return []
    _require_no_dependents(params, former)
    named = sql.SQL(", ").join(verbatim(row["function"]) for row in former)
    own = {"functions": named, "seconds": sql.Literal(CALLS_UNDER_WAY_S)}
    return [db.statement(SQL["drop_former"], params, own)]


def _in_order(statements: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL(";\n\n").join(statements)


def _kept(
    called: list[db.Row], outdated: list[db.Row], function: sql.Composable, everything: sql.Composable
) -> list[sql.Composable]:
    """Statements that give those who may call the function the rest too, and a new one what the old one had."""
    callers = {(c["role"], c["grants"]): None for row in called for c in row["callers"]}
    kept: list[sql.Composable] = [
        sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}{}").format(
            everything,
            sql.SQL("PUBLIC") if role is None else identifier(role),
            sql.SQL(" WITH GRANT OPTION" if grants else ""),
        )
        for role, grants in callers
    ]
    for row in outdated:
        if row["is_called"] and row["comment"]:
            comment = literal(row["comment"])
            kept.append(sql.SQL("COMMENT ON FUNCTION {} IS {}").format(function, comment))
        if row["is_called"] and row["owner"]:
            kept.append(sql.SQL("ALTER FUNCTION {} OWNER TO {}").format(function, identifier(row["owner"])))
    return kept


def _require_no_dependents(params: Params, dropped: list[db.Row]) -> None:
    """Raises BadInput where a view or the like is made on a function that must be dropped."""
    found = [f"{what} needs {row['function']}" for row in dropped for what in row["needed_by"]]
    if found:
        raise BadInput(
            [
                gate(
                    "search.nothing_depends_on_the_function",
                    False,
                    params.function_name,
                    found="; ".join(found),
                    needed="no object that depends on it",
                    danger="with other arguments or columns it must be dropped and recreated, which PostgreSQL"
                    " refuses while something depends on it; DROP … CASCADE would drop that too",
                    do="keep the definition (SELECT pg_get_viewdef of a view), drop the object, run this again, then"
                    " recreate the object; nothing was changed",
                )
            ]
        )


def carried_settings(connection: db.Connection, params: Params) -> dict[str, str]:
    """The index settings that the function carries; empty where it carries none, or is not there."""
    found = function_state(connection, params)
    carried = [s.split("=", 1) for s in (found["settings"] or [] if found else [])]
    known = {*ways.SETTING.values(), *ways.MOST_SCANNED.values(), *(name for name, _ in ways.ITERATIVE.values())}
    return {name: value for name, value in carried if name in known}


def is_as_planned(connection: db.Connection, params: Params) -> bool:
    """Are the function and those that answer for it there, with the very text that these parameters make?"""
    wanted = _wanted(connection, params)
    return sum(bool(row["same"]) for row in _installed(connection, params, wanted)) == len(wanted)


def plan(phase: Phase) -> db.Plan:
    """The tables of routes and strategies, this target's route, the function, and the grants.

    Raises GateFailed where another target took the function over, BadInput where it is needed as it is.
    """
    connection, p = phase.connection, phase.params
    create = create_statement(connection, p)
    start = [] if legacy_is_retired(connection, p) else ["start_with_legacy"]
    tables = [db.statement(SQL[b], p) for b in ("create_route", "create_strategy", "create_way_to_search", *start)]
    everything = sql.SQL(", ").join(f.signature for f in _wanted(connection, p))
    grants = [
        db.statement(SQL["grant"], p, {"functions": everything, "role": identifier(role)})
        for role in p.search.grant_to
    ]
    return db.Plan(
        (*tables, create, *grants, *drop_former(connection, p), *word_statistics.due(connection, p)), connection
    )


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
    """Statements that carry the tuned setting, and an iterative scan, into the function, or to its callers.

    Where the function still searches what another ``index.storage`` held, it is made again first. Carry them out
    with pgvector's library loaded: a role that is no superuser may not name a setting that the server does not know
    yet.
    """
    anew = (
        []
        if function_state(connection, params) is None or is_as_planned(connection, params)
        else [create_statement(connection, params), *drop_former(connection, params)]
    )
    settings = ways.through_the_index(params, value).settings(params.index.method)
    return [*anew, *(s for name, text in settings.items() for s in _setting(connection, params, name, text))]


def _setting(connection: db.Connection, params: Params, name: str, value: str | None) -> list[db.Statement]:
    """Statements that set one index setting of the searches, or reset it where the value is None."""
    if not table_kind.of(params).settings_stay:
        return role_settings.statements(connection, params, name, value)
    block = SQL["reset_search_settings" if value is None else "set_search_settings"]
    signature = _signature(connection, params)
    extra = {"signature": signature, "setting": sql.SQL(name), "value": sql.Literal(value)}
    return [db.statement(block, params, extra)]


def reset_search_setting(connection: db.Connection, params: Params, name: str) -> list[db.Statement]:
    """Statements that take one index setting from the function, or from the roles that call it."""
    return _setting(connection, params, name, None)


def _signature(connection: db.Connection, params: Params) -> sql.Composable:
    """Name and types of the function that the application calls."""
    return _wanted(connection, params)[0].signature


def function_state(connection: db.Connection, params: Params) -> db.Row | None:
    """The function as pg_proc has it, with the settings that its searches have; None where there is none."""
    schema = spelled(params, "schema")
    function = params.function_name
    found = db.rows(connection, SQL["function_state"], params, schema=schema, function=function)
    if found and not table_kind.of(params).settings_stay:
        return found[0] | {"settings": role_settings.of(connection, params)}
    return found[0] if found else None


def undo_plan(phase: Phase) -> db.Plan:
    """DROP of the functions and the route's row, if they are there.

    Raises BadInput where a view or the like is made on one of them.
    """
    installed = _installed(phase.connection, phase.params, [])
    if not installed:
        return db.Plan((), phase.connection)
    _require_no_dependents(phase.params, installed)
    dropped = [verbatim(row["function"]) for row in installed]
    forget = word_statistics.forget_plan(phase.connection, phase.params)
    return db.Plan((drop_statement(phase.params, dropped), *forget), phase.connection)


def drop_statement(params: Params, functions: Sequence[sql.Composable]) -> db.Statement:
    """Drops these functions, with the target's route and strategies."""
    return db.statement(SQL["drop_function"], params, {"functions": sql.SQL(", ").join(functions)})


def answering(connection: db.Connection, params: Params) -> list[sql.Composable]:
    """The functions that answer for the one that the application calls, as DROP wants them."""
    return [verbatim(r["function"]) for r in _installed(connection, params, []) if r["answers"]]


@changes
def undo(phase: Phase) -> Table:
    """Removes the function. The application must have gone back to its own query first."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """No function of that name is left, and none that answered for it."""
    found = function_state(phase.connection, phase.params)
    left = [found["function"]] if found else [r["function"] for r in _installed(phase.connection, phase.params, [])]
    gone = gate(
        "search.function_is_gone",
        not left,
        phase.params.function_name,
        found="; ".join(left) or "no such function",
        needed="no such function",
        danger="the table is not as it was",
        do="run undo/search_function again",
    )
    return collect([gone])
