"""The replaced model's column, index, queue and function taken away, once no call brings its vectors any more.

The name that the application calls stays, and answers by the new target alone. Until the copy of the former function
is dropped, ``model_change.undo`` leads back; after that the vectors would have to be made again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from psycopg import sql

from runbook_lib.benchmark.prepared import vector_indexes
from runbook_lib.core import claim, db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, Verdict, collect, gate
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.registry import MIGRATE
from runbook_lib.core.thresholds import apart, plain
from runbook_lib.migrate import backfill, build_index, expand_schema
from runbook_lib.operate import model_change, model_comparison
from runbook_lib.params import Params
from runbook_lib.search import live_shadow, search_function, word_statistics
from runbook_lib.search.function_ownership import BOTH, NEW_ONLY
from runbook_lib.sql import load

SQL = load("retire_model")

NAME = "operate/retire_model"
KIND = "old_searches"
HOUR_S = 3600
# The extension serves the new target too.
STAYS = ("20_extension",)


def _seen(connection: db.Connection, params: Params) -> db.Row:
    oids = [row["oid"] for row in vector_indexes(connection, params)]
    return db.one(connection, SQL["searches"], params, oids=oids)


def note_searches(phase: Phase) -> Table:
    """Writes down how often the old vectors were searched so far; the hours without a search count from here."""
    old = model_change.replaced(phase)
    seen = _seen(old.connection, old.params)
    phase.note(KIND, seen)
    return Table(("searches in the old vectors so far", "at"), [(number(seen["scans"]), seen["at"][:19])])


def check(phase: Phase) -> Gates:
    """Before anything is changed: the function was swapped, the new column is whole, the old one not searched."""
    old, stage = model_change.replaced(phase), model_change.stage(phase.connection, phase.params)
    route, share = search_function.current_route(phase.connection, phase.params)
    swapped = gate(
        "retire_model.new_target_answers",
        stage is not None and (route, share) == (phase.params.cut_over.route, 100),
        old.params.function_name,
        found=f"{stage or 'the replaced target alone'}; route {route} at {share} %",
        needed=f"{BOTH}; route {phase.params.cut_over.route} at 100 %",
        danger="the application would lose the search that it has",
        do="run operate/change_model with execute: true first",
    )
    quiet = [_is_quiet(phase, old)] if stage == BOTH else []
    return collect([swapped, *backfill.verify(phase), *quiet])


def _is_quiet(phase: Phase, old: Phase) -> Gate:
    """The scans of the old index against those of the last look; a look that finds more starts counting again."""
    last, now = phase.ledger.latest(KIND), _seen(old.connection, old.params)
    wanted = phase.params.model_change.quiet_hours
    searched = now["scans"] - (last["scans"] if last else 0)
    if searched or last is None:
        phase.note(KIND, now)
    hours = (now["at_s"] - last["at_s"]) / HOUR_S if last else 0.0
    ago, quiet = apart(hours, wanted, plain)
    return gate(
        "retire_model.old_vectors_are_searched_no_more",
        wanted == 0 or (last is not None and not searched and hours >= wanted),
        f"{old.params.vector.column} of {old.params.target.table}",
        found=f"{number(searched)} searches since {last['at'][:19]}, {ago} hours ago"
        if last
        else "not counted yet; from now on they are",
        needed=f"no search for {quiet} hours",
        danger="a server that still sends the old model's vectors would get an error for each of them",
        do=f"find who still sends {old.params.vector.dimension} dimensions, and stop {old.params.target.name}'s own"
        f" operate/monitor; then run this again after {wanted:g} hours",
        figures={"scans": now["scans"], "hours": round(hours, 2)},
    )


def plan(phase: Phase) -> db.Plan:
    """The function forwarded to the new target; then the copy, the index, the capture and the columns dropped."""
    old = model_change.replaced(phase)
    return db.Plan(
        (
            *_forward(phase.connection, phase.params),
            *_forget(phase.connection, phase.params, old.params),
            *build_index.undo_plan(old),
            *live_shadow.undo_plan(old),
            *expand_schema.undo_plan(old),
        ),
        phase.connection,
    )


def _forward(connection: db.Connection, params: Params) -> list[db.Statement]:
    function = model_change.facts(connection, params, model_change.replaced_params(params).function_name)
    if function is None or model_change.stage(connection, params) != BOTH:
        return []
    return [db.statement(SQL["forward"], params, model_change.names_of_both(params, function))]


def _forget(connection: db.Connection, params: Params, old: Params) -> list[db.Statement]:
    """The copy of the former function goes, and with it the replaced target's route and strategies."""
    copy = model_change.facts(connection, params, model_change.before_name(old))
    if copy is None or model_change.stage(connection, params) is None:
        return []
    extra = model_change.names_of_both(params, copy)
    before = sql.SQL("{}({})").format(extra["before"], extra["identity"])
    own = search_function.answering(connection, old)
    forget = word_statistics.forget_plan(connection, old)
    return [search_function.drop_statement(old, [before, *own]), *forget]


@changes
def apply(phase: Phase) -> Table:
    """Carries the plan out; killed anywhere, a rerun goes on. The replaced target's phases count as undone then."""
    old = model_change.replaced(phase)
    if not phase.execute:
        return phase.carry_out(plan(phase))
    claim.take_for_notebook(phase.ledger.connection, old.params, phase.run_id)
    rows: list[tuple[Any, ...]] = [
        (s.purpose, round(phase.do(s).seconds, 3)) for s in _forward(phase.connection, phase.params)
    ]
    if forget := _forget(phase.connection, phase.params, old.params):
        model_change.let_calls_end(phase.connection, phase.params)
        rows += [(s.purpose, round(phase.do(s).seconds, 3)) for s in forget]
    rows += [(what, seconds) for _, what, _, seconds in build_index.undo(old).rows]
    # Under the old target's name, as its own rollbacks write them down.
    rows += [
        (s.purpose, round(old.do(s).seconds, 3)) for s in (*live_shadow.undo_plan(old), *expand_schema.undo_plan(old))
    ]
    _note_undone(phase, old)
    return Table(("what", "seconds"), rows)


def _note_undone(phase: Phase, old: Phase) -> None:
    for name in MIGRATE:
        if name not in STAYS and old.ledger.phase_verdict(name) == Verdict.PASS:
            replace(old.ledger, phase=name).append("phase", {"verdict": "UNDONE", "by": NAME})
    if state := search_function.function_state(phase.connection, phase.params):
        phase.note("standing", {"settings": state["settings"] or [], "source": state["source"]})


def verify(phase: Phase) -> Gates:
    """The application's function answers by the new target alone, and nothing of the replaced one is left."""
    old = model_change.replaced(phase)
    alone = gate(
        "retire_model.new_target_answers_alone",
        model_change.stage(phase.connection, phase.params) == NEW_ONLY
        and not _forget(phase.connection, phase.params, old.params),
        old.params.function_name,
        found=model_change.stage(phase.connection, phase.params) or "the replaced target alone",
        needed=f"{NEW_ONLY}, and no copy of the former function",
        danger="calls would reach a column that is not there",
        do="run operate/retire_model again with execute: true",
    )
    left = [*build_index.verify_undone(old), *live_shadow.verify_undone(old), *expand_schema.verify_undone(old)]
    return collect([alone, model_comparison.answers_as(phase.connection, phase.params, "new"), *left])
