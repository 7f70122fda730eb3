"""Operate 80: the legacy search retired, once nobody has used it for long enough: its indexes, its branch, its disk.

Afterwards reads cannot go back to it by mistake, since without its indexes it reads the whole table: the route is
kept from it by a constraint. The rollback builds the indexes again, from the definitions in the ledger, first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.benchmark import loop, query_set
from runbook_lib.core import db
from runbook_lib.core.display import Table, number, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes import building
from runbook_lib.migrate import expand_schema
from runbook_lib.operate import retirable
from runbook_lib.operate.retirable import check as check
from runbook_lib.operate.retirable import shown as shown
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from runbook_lib.sql import load

SQL = load("retire")

ASKED = 10
CREATE_INDEX = re.compile(r"^CREATE( UNIQUE)? INDEX ")


def _named(params: Params, block: str, **extra: sql.Composable) -> db.Statement:
    fulltext = {"fulltext": identifier(params.search.fulltext_column or "")}
    own = {"retired": identifier(search_function.retired_constraint(params))}
    return db.statement(SQL[block], params, fulltext | own | extra)


def _drop(params: Params, name: str) -> db.Statement:
    return _named(params, "drop_index", index_to_drop=identifier(params.target.schema_, name))


def plan(phase: Phase) -> db.Plan:
    """The route kept from legacy, the function without it, then each index; capture and column where asked for."""
    connection, params = phase.connection, phase.params
    keep = () if search_function.legacy_is_retired(connection, params) else (_named(params, "keep_reads"),)
    function = (
        ()
        if not keep and search_function.is_as_planned(connection, params)
        else (search_function.create_statement(connection, params, retired=True),)
    )
    drops = [_drop(params, f.name) for f in retirable.chosen(connection, phase.ledger, params)]
    capture = expand_schema.undo_capture_plan(connection, params) if params.retire.remove_capture else ()
    wants_column = params.retire.drop_fulltext_column and retirable.column_is_there(connection, params)
    column = (_named(params, "drop_column"),) if wants_column else ()
    return db.Plan((*keep, *function, *drops, *capture, *column), connection)


@changes
def apply(phase: Phase) -> Table:
    """Retires it, statement by statement; interrupted anywhere, the next run goes on.

    What is to go is written down before the first of it goes: the rollback relies on that.
    """
    todo = plan(phase)
    if not phase.execute:
        return phase.carry_out(todo)
    if todo.statements:
        phase.note(retirable.KIND, _to_go(phase.connection, phase.ledger, phase.params))
    return _carried_out(phase, todo)


def _to_go(connection: db.Connection, ledger: Ledger, params: Params) -> dict[str, Any]:
    """All that is retired once this plan is carried out, with what an earlier run took away."""
    was = retirable.was_retired(ledger)
    now = {f.name: f.as_data() for f in retirable.chosen(connection, ledger, params)}
    # The definition that was written down first is the one of a whole index, with its size.
    indexes = now | {i["name"]: i for i in was.get("indexes", [])}
    made = retirable.generated(connection, params) if params.retire.drop_fulltext_column else None
    return {
        "indexes": list(indexes.values()),
        "capture": bool(was.get("capture")) or params.retire.remove_capture,
        "column": {k: made[k] for k in ("type", "expression")} if made else was.get("column"),
    }


def _carried_out(phase: Phase, todo: db.Plan) -> Table:
    concurrently = (SQL["drop_index"].name, SQL["create_index"].name)
    rows = [
        (
            s.purpose,
            s.lock or "none",
            round((building.concurrently(phase, s) if s.name in concurrently else phase.do(s)).seconds, 3),
        )
        for s in todo
    ]
    return Table(("what", "lock", "seconds"), rows)


def verify(phase: Phase) -> Gates:
    """The indexes are gone, their disk is given back, and no call can reach the legacy search."""
    connection, params = phase.connection, phase.params
    return collect(
        [
            _indexes_are_gone(connection, phase.ledger, params),
            _route_cannot_go_back(connection, params),
            _function_answers_without(connection, params),
        ]
    )


def _indexes_are_gone(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    retired = retirable.was_retired(ledger).get("indexes", [])
    there = {f.name: f.valid for f in retirable.standing(connection, params)}
    left = [i["name"] + ("" if there[i["name"]] else " (invalid)") for i in retired if i["name"] in there]
    given = sum(i["bytes"] for i in retired if i["name"] not in there)
    return gate(
        "retire.indexes_are_gone",
        not left,
        retirable.table_name(params),
        found=f"{', '.join(left)} still there"
        if left
        else f"{len(retired)} indexes gone, {size(given)} given back: {', '.join(i['name'] for i in retired)}",
        needed="none of what was retired",
        danger="every write still pays for it; a drop that timed out leaves an index that no search can use",
        do="run operate/retire_legacy again with execute: true",
        figures={"given_back_bytes": given, "left": len(left)},
    )


def _route_cannot_go_back(connection: db.Connection, params: Params) -> Gate:
    """Tries it, in a transaction that is rolled back."""
    refused = ""
    with db.rolled_back(connection):
        try:
            with connection.transaction():
                moved = db.statement(search_function.SQL["move_route"], params, route="legacy", share_percent=0)
                connection.execute(moved.query, moved.values)
        except psycopg.errors.CheckViolation as error:
            refused = error.diag.constraint_name or "a constraint"
    return gate(
        "retire.route_cannot_go_back_by_mistake",
        bool(refused),
        spelled(params, "route"),
        found=f"moving it is refused by {refused}" if refused else "the row can be set to legacy",
        needed="refused, until the indexes are there again",
        danger="one UPDATE would send every search through the whole table",
        do="run operate/retire_legacy again with execute: true",
    )


def _function_answers_without(connection: db.Connection, params: Params) -> Gate:
    queries = query_set.sample(query_set.read_queries(params), ASKED)
    route = search_function.current_route(connection, params)[0]
    call = statements.call_statement(params)
    answers = loop.ask(connection, params, call, query_set.with_vectors(params, queries), params.queries.k)
    by_new = answers.answered_by(route)
    try:
        with connection.transaction(force_rollback=True):
            loop.ask(connection, params, call, queries[:1], params.queries.k)
        refused = False
    except psycopg.errors.FeatureNotSupported:
        refused = True
    return gate(
        "retire.function_answers_without_legacy",
        by_new == len(queries) and refused,
        params.function_name,
        found=f"{by_new} of {len(queries)} calls answered by {route}; a call without a vector is"
        + (" refused" if refused else " answered by legacy"),
        needed=f"all by {route}, and a call without a vector refused",
        danger="a call would read the whole table, unnoticed",
        do="run operate/retire_legacy again with execute: true",
        figures={"calls": len(queries), "by_new_route": by_new},
    )


def undo_plan(phase: Phase) -> db.Plan:
    """What was retired made again: column and indexes first, then the function with its legacy branch, the route."""
    connection, params = phase.connection, phase.params
    was = retirable.was_retired(phase.ledger)
    statements: list[db.Statement] = []
    if was.get("column") and not retirable.column_is_there(connection, params):
        made = was["column"]
        parts = {"column_type": verbatim(made["type"]), "expression": verbatim(made["expression"])}
        statements.append(_named(params, "add_column", **parts))
    there = {f.name: f.valid for f in retirable.standing(connection, params)}
    for retired in was.get("indexes", []):
        if not there.get(retired["name"], False):
            leftover = [_drop(params, retired["name"])] if retired["name"] in there else []
            statements += [*leftover, *_build(params, retired)]
    if search_function.legacy_is_retired(connection, params):
        statements += [
            search_function.create_statement(connection, params, retired=False),
            _named(params, "let_reads_back"),
        ]
    if was.get("capture"):
        statements += expand_schema.plan(phase)
    return db.Plan(tuple(statements), connection)


def _build(params: Params, retired: dict[str, Any]) -> Iterator[db.Statement]:
    definition = CREATE_INDEX.sub(r"CREATE\1 INDEX CONCURRENTLY ", retired["definition"])
    build = _named(params, "create_index", definition=verbatim(definition))
    was = f"{retired['name']}, {size(retired['bytes'])} when it was dropped"
    yield replace(build, purpose=f"{build.purpose.removesuffix('.')}: {was}.")
    if retired["comment"]:
        name = identifier(params.target.schema_, retired["name"])
        comment = sql.Literal(retired["comment"]).as_string()
        yield _named(params, "comment_on_index", commented=name, comment=verbatim(comment))


@changes
def undo(phase: Phase) -> Table:
    """Rolls back; reads stay where they are until undo/reads moves them."""
    todo = undo_plan(phase)
    if not phase.execute or not todo.statements:
        return phase.carry_out(todo)
    was = retirable.was_retired(phase.ledger)
    done = _carried_out(phase, todo)
    phase.note(retirable.KIND, {**was, "undone": True})
    return done


def verify_undone(phase: Phase) -> Gates:
    """Every index that was retired is there again as it was, and reads can go back."""
    connection, params = phase.connection, phase.params
    noted = phase.ledger.latest_standing(retirable.KIND, "operate/retire_legacy") or {}
    retired = noted.get("indexes", [])
    there = {f.name: f for f in retirable.standing(connection, params) if f.valid}
    right = [i["name"] for i in retired if i["name"] in there and there[i["name"]].definition == i["definition"]]
    wrong = [f"{i['name']} is not as it was" for i in retired if i["name"] not in right]
    if search_function.legacy_is_retired(connection, params):
        wrong.append("the route is kept from it")
    return collect(
        [
            gate(
                "retire.legacy_is_back",
                not wrong,
                retirable.table_name(params),
                found="; ".join(wrong) or f"{number(len(right))} indexes as they were, and the route can go back",
                needed="every index as its definition in the ledger says, and no constraint on the route",
                danger="legacy would read the whole table",
                do="run `runbook operate PARAMS retire_legacy --undo --execute` again",
            )
        ]
    )
