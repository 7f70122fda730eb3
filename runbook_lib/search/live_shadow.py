"""Shadow of live calls: a second function lets the other search answer a share as well.

The application calls it for a while instead of the search function: same arguments, same answers. A sampled call
takes the time of both searches; ``shadow.calls_per_minute`` bounds what that may cost. What the other search does
can neither fail the call nor change its answer.
"""

from __future__ import annotations

from datetime import datetime

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gates, collect, gate
from runbook_lib.core.names import identifier, literal, names, shortened, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.params import Params
from runbook_lib.search import free_names, function_text, search_function
from runbook_lib.sql import load

SQL = load("live")

# So many are read into memory at most.
MOST_CALLS = 100_000
ROUTES = ("legacy", "vector", "hybrid")


def function_name(params: Params) -> str:
    """The function that the application calls for the time of the shadow."""
    return shortened(params.function_name, "_shadow", unlike=params.function_name)


def log_name(params: Params) -> str:
    """The table of sampled calls, in the ledger's schema."""
    return f"{params.target.name}_shadow_log"


def _log(params: Params) -> sql.Composable:
    return identifier(params.ledger.schema_, log_name(params))


def _function(params: Params) -> sql.Composable:
    return identifier(params.target.schema_, function_name(params))


def _facts(connection: db.Connection, params: Params, function: str) -> db.Row:
    """Of the search function, or of its shadow, from the catalogue."""
    return db.one(connection, SQL["function_facts"], params, schema=spelled(params, "schema"), function=function)


def _names(connection: db.Connection, params: Params) -> dict[str, sql.Composable]:
    """What the blocks need besides the common names; arguments and settings come from the catalogue."""
    p = params
    facts = _facts(connection, p, p.function_name)
    passed = [identifier(name) for name in facts["passed"]]
    filters = [
        sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(argument, literal(column))
        for column, argument in zip(p.target.filters, passed[3:-1], strict=True)
    ]
    # By the function's own name: a variable in it may be called as a column is.
    results = [(identifier(function_name(p), name), identifier("answer", name)) for name in facts["results"]]
    overloads = function_text.overloads(connection, p, function_name(p))
    more = [f.signature for f in overloads]
    return names(p) | {
        "log": _log(p),
        "log_name": literal(_log(p).as_string(connection).replace("%%", "%")),
        "log_index": identifier(f"{p.target.name}_shadow_log_at"),
        "shadow_function": _function(p),
        "arguments": verbatim(facts["arguments"]),
        "functions": sql.SQL(", ").join([sql.SQL("{}({})").format(_function(p), verbatim(facts["identity"])), *more]),
        "overloads": sql.SQL(";\n\n").join(f.made for f in overloads),
        "result": verbatim(facts["result"]),
        "settings": sql.SQL(" ").join(_setting(s) for s in facts["settings"]),
        "passed": sql.SQL(", ").join(passed),
        "take_over": sql.SQL("\n        ").join(sql.SQL("{} := {};").format(*pair) for pair in results),
        "drop_outdated": _drop_outdated(connection, p, facts),
        "filters_given": sql.SQL(", ").join(filters),
        "new_route": sql.Literal(p.cut_over.route),
        "sample_percent": sql.Literal(p.shadow.sample_percent),
        "most_calls": sql.Literal(p.shadow.calls_per_minute),
    }


def _drop_outdated(connection: db.Connection, params: Params, facts: db.Row) -> sql.Composable:
    """Part of the statement that makes the function: one of an earlier release has other arguments or columns."""
    own = {"schema": spelled(params, "schema"), "function": function_name(params)}
    shadow = next(iter(db.rows(connection, SQL["function_facts"], params, **own)), facts)
    if all(shadow[fact] == facts[fact] for fact in ("arguments", "result")):
        return sql.SQL("")
    return sql.SQL("DROP FUNCTION {};\n").format(_all_there(connection, params))


def _all_there(connection: db.Connection, params: Params) -> sql.Composable:
    """The function and its overloads as they are there now, as DROP wants them."""
    own = {"schema": spelled(params, "schema"), "function": function_name(params)}
    return sql.SQL(", ").join(
        verbatim(row["function"]) for row in db.rows(connection, SQL["functions"], params, **own)
    )


def _setting(setting: str) -> sql.Composable:
    """``SET name = value`` from pg_proc.proconfig, which holds a search_path as the list that it is."""
    name, _, value = setting.partition("=")
    spelt = value if name == "search_path" else sql.Literal(value).as_string()
    return verbatim(f"SET {name} = {spelt}")


def plan(phase: Phase) -> db.Plan:
    """The log, the function and its grants; nothing where ``shadow.sample_percent`` is 0."""
    if (
        not phase.params.shadow.sample_percent
        or search_function.function_state(phase.connection, phase.params) is None
    ):
        return db.Plan((), phase.connection)
    free_names.require_function(phase.connection, phase.params, function_name(phase.params))
    extra = _names(phase.connection, phase.params)
    statements = [
        db.statement(SQL[b], phase.params, extra) for b in ("create_log", "create_function", "create_overloads")
    ]
    grants = [
        db.statement(SQL["grant"], phase.params, extra | {"role": identifier(role)})
        for role in phase.params.search.grant_to
    ]
    return db.Plan((*statements, *grants), phase.connection)


@changes
def apply(phase: Phase) -> Table:
    """Makes the function and its log; made again, it takes over what 70_tune has set since, and keeps the log."""
    return phase.carry_out(plan(phase))


def _what_is_there(connection: db.Connection, params: Params) -> db.Row:
    p = params
    log = _log(p).as_string(connection).replace("%%", "%")
    return db.one(
        connection, SQL["what_is_there"], p, schema=spelled(p, "schema"), function=function_name(p), log=log
    )


def has_log(connection: db.Connection, params: Params) -> bool:
    """Is there a log of sampled calls?"""
    return bool(_what_is_there(connection, params)["log"])


def logged(connection: db.Connection, params: Params, since: datetime | None = None) -> list[db.Row]:
    """The newest sampled calls, oldest first; none where there is no log."""
    if not has_log(connection, params):
        return []
    known = {"filters": list(params.target.filters), "routes": list(ROUTES), "most": MOST_CALLS}
    query = SQL["logged"].compose({"log": _log(params)})
    return connection.execute(query, {"since": since, **known}).fetchall()


def undo_plan(phase: Phase) -> db.Plan:
    """DROP of the function and of its log, each where it is there, whether the search function still is or not."""
    there = _what_is_there(phase.connection, phase.params)
    statements = []
    if there["function"]:
        own = {"functions": _all_there(phase.connection, phase.params)}
        statements.append(db.statement(SQL["drop_function"], phase.params, own))
    if there["log"]:
        statements.append(db.statement(SQL["drop_log"], phase.params, {"log": _log(phase.params)}))
    return db.Plan(tuple(statements), phase.connection)


@changes
def undo(phase: Phase) -> Table:
    """Removes both. The application must have gone back to the search function first."""
    return phase.carry_out(undo_plan(phase))


def verify_undone(phase: Phase) -> Gates:
    """Neither the sampling function nor its log is left."""
    there = _what_is_there(phase.connection, phase.params)
    left = [name for name, is_there in there.items() if is_there]
    gone = gate(
        "live.nothing_is_left",
        not left,
        function_name(phase.params),
        found=", ".join(left) or "neither function nor log",
        needed="neither function nor log",
        danger="the database is not as it was",
        do="run undo/search_function again",
    )
    return collect([gone])
