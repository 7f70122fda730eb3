"""Another model or dimension for a table that was migrated before.

The new model is a target of its own on the same table: a column, a queue, an index and a function beside those of the
first. Here its search takes over the name that the application calls, in one transaction. From then on that function
answers by the vectors of either model, whichever a call brings, so that the application's servers can follow one by
one; the old column stays, and stays fresh, until ``retire_model``.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from psycopg import sql

from runbook_lib.benchmark.prepared import use_setting
from runbook_lib.core import claim, db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import BadInput, Gate, GateFailed, Gates, RunbookError, Verdict, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, shortened, spelled, verbatim
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.target import load_params
from runbook_lib.migrate import backfill, build_index
from runbook_lib.params import Params
from runbook_lib.search import free_names, function_ownership, search_function
from runbook_lib.search.function_ownership import BOTH, NEW_ONLY
from runbook_lib.sql import load

SQL = load("model_change")

CUT_OVER = "90_cut_over"
# A search takes milliseconds; what is still at work after this is no search, or hangs.
LONGEST_WAIT_FOR_CALLS_S = 60.0
BETWEEN_LOOKS_S = 0.1
# What 60_build_index proved and what still must be so.
INDEX_GATES = ("index.is_valid", "index.has_the_right_operator_class", "index.finds_known_rows")


def replaced_params(params: Params) -> Params:
    """The parameters of the replaced target. Raises BadInput where none is named, or its file is not sound."""
    path = params.model_change.replaces_params
    if path is None:
        raise BadInput(
            [
                Gate(
                    "model_change.replaced_target_is_named",
                    Verdict.FAIL,
                    "model_change.replaces_params",
                    "not given",
                    "the params file of the target whose search this one takes over",
                    "nothing says which function the application calls, nor which model its vectors are of",
                    "set model_change.replaces_params to the params file that the first migration was run with",
                )
            ]
        )
    return load_params(path)


def replaced(phase: Phase) -> Phase:
    """The phase as the replaced target sees it: its parameters, and its rows of the ledger. Raises BadInput."""
    old = replaced_params(phase.params)
    return replace(phase, params=old, ledger=replace(phase.ledger, params=old))


def before_name(params: Params) -> str:
    """Name under which the replaced target's function is kept."""
    return shortened(params.function_name, "_before")


def setting_name(old: Params) -> str:
    """The setting by which a session says whose vectors it sends, where both have one dimension."""
    return f"{old.ledger.schema_}.{old.target.name}"


def facts(connection: db.Connection, params: Params, function: str, other: str = "") -> db.Row | None:
    """A function as the catalogue has it; None where there is none. other: the name of a copy of it."""
    values = {"schema": spelled(params, "schema"), "function": function, "other": other}
    found = db.rows(connection, SQL["facts"], params, **values)
    return found[0] if found else None


def stage(connection: db.Connection, params: Params) -> str | None:
    """Who answers under the replaced target's name: BOTH, NEW_ONLY, or None, the replaced target alone."""
    old = replaced_params(params)
    for h in function_ownership.standing(connection, params):
        if (h.function, h.old, h.new) == (old.function_name, old.target.name, params.target.name):
            return h.who
    return None


def shown(phase: Phase) -> Table:
    """Both targets side by side: column, model, function, and where calls go now."""
    old = replaced_params(phase.params)
    who = {None: f"{old.target.name} alone", BOTH: "either, by the vector of the call", NEW_ONLY: "the new one alone"}
    rows: list[tuple[str, Any, Any]] = [
        ("target", old.target.name, phase.params.target.name),
        ("column", _column(old), _column(phase.params)),
        ("distance", old.vector.distance, phase.params.vector.distance),
        ("function", old.function_name, phase.params.function_name),
        ("answers under the old name", who[stage(phase.connection, phase.params)], ""),
    ]
    return Table(("", "replaced", "new"), rows)


def _column(params: Params) -> str:
    return f"{params.vector.column} {params.vector.type}({params.vector.dimension})"


def check(phase: Phase) -> Gates:
    """Before anything is changed: both targets are proved, fit each other, and their calls can be told apart."""
    old = replaced(phase)
    fit = _targets_fit(phase.connection, phase.params, old.params)
    if fit.verdict is not Verdict.PASS:
        return collect([fit])
    complete = backfill.verify(phase).gates + tuple(g for g in build_index.verify(phase) if g.name in INDEX_GATES)
    return collect(
        [
            fit,
            _old_serves(old.connection, old.ledger, old.params),
            _told_apart(phase.params, old.params),
            *complete,
            _callers_may(phase.connection, phase.params, old.params),
        ]
    )


def _targets_fit(connection: db.Connection, params: Params, old: Params) -> Gate:
    same = {
        "target.schema": lambda p: p.target.schema_,
        "target.table": lambda p: p.target.table,
        "target.key": lambda p: p.target.key,
        "target.filters": lambda p: p.target.each_filter,
        "target.always": lambda p: p.target.always,
        "ledger.schema": lambda p: p.ledger.schema_,
        "connection": db.dsn,
    }
    wrong = [f"{what} differs" for what, of in same.items() if of(old) != of(params)]
    for what, a, b in (
        ("target.name", old.target.name, params.target.name),
        ("vector.column", old.vector.column, params.vector.column),
        ("search.function", old.function_name, params.function_name),
    ):
        wrong += [f"{what} is the same"] if a == b else []
    was, now = facts(connection, params, old.function_name), facts(connection, params, params.function_name)
    wrong += [f"no function {p.function_name}" for p, f in ((old, was), (params, now)) if f is None]
    if was and now and any(was[key] != now[key] for key in ("arguments", "result")):
        wrong.append("the functions differ in their arguments or results")
    wrong += _somebodys_copy(connection, params, old, was)
    return gate(
        "model_change.targets_fit",
        not wrong,
        f"{old.target.name} and {params.target.name}",
        found="; ".join(wrong)
        or f"one table, {old.vector.column} and {params.vector.column}, the same except for the model",
        needed="the same table, key, filters, database and ledger; a name, a column and a function of its own",
        danger="the function could not answer for the other without the application noticing",
        do="fix the params file of the new target; filters in the same order",
    )


def _somebodys_copy(connection: db.Connection, params: Params, old: Params, was: db.Row | None) -> list[str]:
    """A function of the name that is wanted for the copy, and that is none."""
    copy = facts(connection, params, before_name(old), old.function_name)
    if copy is None or was is None or stage(connection, params):
        return []
    return [] if _renamed(copy) == was["definition"] else [f"a function {before_name(old)} already exists"]


def _old_serves(connection: db.Connection, ledger: Ledger, params: Params) -> Gate:
    verdict, state = ledger.phase_verdict(CUT_OVER), search_function.function_state(connection, params)
    route, share = search_function.current_route(connection, params) if state else ("legacy", 0)
    return gate(
        "model_change.replaced_search_serves",
        verdict == Verdict.PASS and (route, share) == (params.cut_over.route, 100),
        params.target.name,
        found=f"{CUT_OVER} {verdict}, route {route} at {share} %",
        needed=f"{CUT_OVER} PASS, route {params.cut_over.route} at 100 %",
        danger="there is no search in vectors yet to be replaced; this target's own cut-over is enough",
        do=f"run {CUT_OVER} of {params.target.name} first, or of this target and leave the other unused",
    )


def _told_apart(params: Params, old: Params) -> Gate:
    setting = setting_name(old)
    differ, by_setting = old.vector.dimension != params.vector.dimension, params.model_change.tell_apart == "setting"
    found = f"dimensions {old.vector.dimension} and {params.vector.dimension}"
    if by_setting:
        found += f"; the new model's sessions say SET {setting} = '{params.target.name}'"
    return gate(
        "model_change.calls_can_be_told_apart",
        differ or by_setting,
        old.function_name,
        found=found,
        needed="different dimensions, or model_change.tell_apart: setting",
        danger="vectors of one model would be compared with those of the other: answers without meaning, no error",
        do=f"set model_change.tell_apart: setting, and let servers with the new model SET {setting} ="
        f" '{params.target.name}' in each session, or call {params.function_name} by its own name",
        figures={"old_dimension": old.vector.dimension, "new_dimension": params.vector.dimension},
    )


def _callers_may(connection: db.Connection, params: Params, old: Params) -> Gate:
    was, now = facts(connection, params, old.function_name), facts(connection, params, params.function_name)
    callers = was["callers"] if was else []
    values = {"callers": callers, "oid": now["oid"] if now else 0, "column": params.vector.column}
    lacking = db.rows(connection, SQL["callers_without_rights"], params, vectors=spelled(params, "vectors"), **values)
    roles = [row["role"] for row in lacking]
    return gate(
        "model_change.callers_may_call_the_new",
        not roles,
        params.function_name,
        found=f"{', '.join(roles)} may not call it, or not read {params.vector.column}"
        if roles
        else f"{len(callers)} roles beside the owner",
        needed=f"every role that may call {old.function_name}",
        danger="their calls would fail from the swap on",
        do=f"name them in search.grant_to and run 10_baseline again; GRANT SELECT ({params.vector.column}) to them",
    )


def _renamed(function: db.Row) -> str:
    """A function's definition under the other name that it was looked up with."""
    return str(function["other_head"] + function["definition"][len(function["head"]) :])


def names_of_both(params: Params, function: db.Row) -> dict[str, sql.Composable]:
    """What the blocks need besides the names of the replaced target; arguments come from the catalogue."""
    old = replaced_params(params)
    schema, by_setting = old.target.schema_, params.model_change.tell_apart == "setting"
    vector = identifier(function["passed"][1])
    setting = sql.Literal(setting_name(old))
    is_new = sql.SQL("cardinality({}) = {}").format(vector, sql.Literal(params.vector.dimension))
    ways = f"{old.vector.dimension} ({old.target.name}) or {params.vector.dimension} ({params.target.name})"
    hint = f"{old.function_name} takes vectors of dimension {ways}."
    if by_setting:
        is_new += sql.SQL(" AND current_setting({}, true) = {}").format(setting, sql.Literal(params.target.name))
        hint += f" SET {setting_name(old)} says of which model they are."
    parts = {
        "before": identifier(schema, before_name(old)),
        "function": identifier(schema, old.function_name),
        "new_function": identifier(schema, params.function_name),
        "identity": verbatim(function["identity"]),
        "arguments": verbatim(function["arguments"]),
        "result": verbatim(function["result"]),
        "passed": sql.SQL(", ").join(map(identifier, function["passed"])),
        "vector": vector,
        "is_new": is_new,
        "old_name": sql.SQL(old.target.name),
        "new_name": sql.SQL(params.target.name),
        "old_literal": sql.Literal(old.target.name),
        "new_literal": sql.Literal(params.target.name),
        "old_dimension": sql.Literal(old.vector.dimension),
        "setting": setting,
        "hint": sql.Literal(hint),
    }
    asks = SQL["refuse_unknown_setting"].compose(parts) if by_setting else sql.SQL("NULL")
    grants = [
        sql.SQL("GRANT EXECUTE ON FUNCTION {}({}) TO {};").format(
            parts["before"], parts["identity"], sql.SQL("PUBLIC") if role == "public" else identifier(role)
        )
        for role in function["callers"]
    ]
    return parts | {"refuse_unknown_setting": asks, "grants": sql.SQL("\n").join(grants)}


def _swap(connection: db.Connection, params: Params) -> db.Statement | None:
    old = replaced_params(params)
    function = facts(connection, params, old.function_name, before_name(old))
    if function is None or stage(connection, params):
        return None
    extra = names_of_both(params, function) | {"copy": verbatim(_renamed(function))}
    return db.statement(SQL["swap"], params, extra)


def plan(phase: Phase) -> db.Plan:
    """The new target's own route moved, which nobody reads yet, then the swap; nothing where they are in place."""
    connection, params = phase.connection, phase.params
    p, route = params, params.cut_over.route
    move = db.statement(search_function.SQL["move_route"], p, route=route, share_percent=100)
    moved = search_function.function_state(connection, params) is not None and search_function.current_route(
        connection, params
    ) == (route, 100)
    swap = _swap(connection, params)
    if swap:
        old = replaced_params(phase.params)
        for name in (old.function_name, before_name(old)):
            free_names.require_function(connection, old, name)
    return db.Plan((*(() if moved or swap is None else (move,)), *((swap,) if swap else ())), connection)


@changes
def apply(phase: Phase) -> Table:
    """Swaps in one transaction. Killed before it nothing has changed for anybody; killed after it all has."""
    todo = plan(phase)
    if not phase.execute or not todo.statements:
        return phase.carry_out(todo)
    old = replaced(phase)
    claim.take_for_notebook(phase.ledger.connection, old.params, phase.run_id)
    was = facts(phase.connection, phase.params, old.params.function_name)
    # Before the swap: the rollback is proved against this, even where this process ends in between.
    phase.note("model_change", {"function": old.params.function_name, "before": was["definition"] if was else ""})
    done = []
    for statement in todo:
        if statement.name == SQL["swap"].name:
            done.append(phase.do(statement))
        else:
            done.append(
                search_function.move_route(phase, phase.params.cut_over.route, 100, "the change of the model")
            )
    _note_standing(phase)
    return Table(
        ("what", "lock", "seconds", "tries"),
        [(d.statement.purpose, d.statement.lock or "none", round(d.seconds, 4), d.tries) for d in done],
    )


def _note_standing(phase: Phase) -> None:
    """Writes down, for the check that stays, how each target's function is meant to be now."""
    for one in (phase, replaced(phase)):
        if state := search_function.function_state(one.connection, one.params):
            one.note("standing", {"settings": state["settings"] or [], "source": state["source"]})


def check_undo(phase: Phase) -> Gates:
    """Before the rollback: the former function is kept, unless the replaced target answers alone already."""
    old = replaced_params(phase.params)
    gone = (
        stage(phase.connection, phase.params) is not None
        and facts(phase.connection, phase.params, before_name(old)) is None
    )
    return collect(
        [
            gate(
                "model_change.former_function_is_kept",
                not gone,
                old.function_name,
                found=f"it answers by {phase.params.target.name}, and {before_name(old)} is gone"
                if gone
                else "kept, or in its place",
                needed=f"the function of {old.target.name}, kept under that name",
                danger="nothing is left to go back to: nothing was changed",
                do=f"make {old.target.name} again by its own phases, with this target as the one that it replaces",
            )
        ]
    )


def undo_plan(phase: Phase) -> db.Plan:
    """The function as it was before, from the copy that was kept; then the copy dropped.

    Nothing where it is so already. Raises GateFailed where the replaced target was retired since.
    """
    connection, params = phase.connection, phase.params
    old, now = replaced_params(phase.params), stage(connection, params)
    copy = facts(connection, params, before_name(old), old.function_name)
    if (kept := check_undo(phase)).failed:
        raise GateFailed(kept)
    if copy is None:
        return db.Plan((), connection)
    if now is None and _somebodys_copy(connection, params, old, facts(connection, params, old.function_name)):
        return db.Plan((), connection)  # the swap refuses it, and nothing is to be undone
    extra = names_of_both(params, copy) | {"original": verbatim(_renamed(copy))}
    blocks = ("swap_back", "drop_before") if now else ("drop_before",)
    return db.Plan(tuple(db.statement(SQL[b], params, extra) for b in blocks), connection)


@changes
def undo(phase: Phase) -> Table:
    """Gives the application its former function back in one transaction, then tidies up; once undone, does nothing.

    The new target stays as it is, and can take over again.
    """
    todo = undo_plan(phase)
    if not phase.execute or not todo.statements:
        return phase.carry_out(todo)
    claim.take_for_notebook(phase.ledger.connection, replaced_params(phase.params), phase.run_id)
    rows = []
    for statement in todo:
        if statement.name == SQL["drop_before"].name:
            let_calls_end(phase.connection, phase.params)
        rows.append((statement.purpose, round(phase.do(statement).seconds, 4)))
    _note_standing(phase)
    return Table(("what", "seconds"), rows)


def let_calls_end(connection: db.Connection, params: Params) -> None:
    """Waits for the statements that began before now, which may be about to call what is dropped next.

    Raises RunbookError where one is still at work after LONGEST_WAIT_FOR_CALLS_S.
    """
    since = db.one(connection, SQL["now"], params)["at"]
    ends = time.monotonic() + LONGEST_WAIT_FOR_CALLS_S
    while calls := db.one(connection, SQL["older_calls"], params, since=since)["calls"]:
        if time.monotonic() > ends:
            raise RunbookError(
                found=f"{calls} statements older than {LONGEST_WAIT_FOR_CALLS_S:g} s are at work",
                needed="none, so that no call finds its function gone",
                danger="the function that answers is in place; only the one that is not used any more is left",
                do="run this again when they have ended",
            )
        time.sleep(BETWEEN_LOOKS_S)


def say_new(connection: db.Connection, params: Params, old: Params) -> None:
    """Lets a session say that its vectors are the new model's, where the parameters tell models apart by that."""
    if params.model_change.tell_apart == "setting":
        use_setting(connection, setting_name(old), params.target.name, local=False)


def verify_undone(phase: Phase) -> Gates:
    """The application's function is to the letter what it was before the swap, and nothing is left of it.

    Where the ledger has no swap that stands there is no text to compare with: the function must be there, and answer
    for the replaced target alone.
    """
    old, who = replaced_params(phase.params), stage(phase.connection, phase.params)
    noted, now = (
        phase.ledger.latest_standing("model_change", "operate/change_model"),
        facts(phase.connection, phase.params, old.function_name),
    )
    left = facts(phase.connection, phase.params, before_name(old)) is not None and (
        noted is not None or not _somebodys_copy(phase.connection, phase.params, old, now)
    )
    if now is None:
        same, found = False, "no such function"
    elif noted is None:
        same, found = who is None, f"no swap on record; {who or f'it answers for {old.target.name} alone'}"
    else:
        same = now["definition"] == noted["before"]
        found = "as it was" if same else "another text than before"
    return collect(
        [
            gate(
                "model_change.function_is_as_before",
                same and not left and who is None,
                old.function_name,
                found=found + (f"; {before_name(old)} is left" if left else ""),
                needed="the definition from before the swap, and no copy",
                danger="the application calls a function that was never judged",
                do="run model_change.undo(phase) again; compare with the definition in the ledger, kind model_change",
            )
        ]
    )
