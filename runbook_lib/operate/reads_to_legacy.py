"""Reads sent back to the legacy query; a legacy search that was retired is built again first."""

from __future__ import annotations

from typing import Any

from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gates, collect, gate
from runbook_lib.core.phase import Phase, changes
from runbook_lib.migrate.cut_over import route_is
from runbook_lib.operate import retire_legacy
from runbook_lib.search import search_function


def undo_plan(phase: Phase) -> db.Plan:
    """One UPDATE of one row, if reads go anywhere but to legacy; where legacy was retired, it is made again first."""
    connection, params = phase.connection, phase.params
    if search_function.function_state(connection, params) is None or search_function.current_route(
        connection, params
    ) == ("legacy", 0):
        return db.Plan((), connection)
    back: dict[str, Any] = {"route": "legacy", "share_percent": 0}
    move = db.statement(search_function.SQL["move_route"], params, **back)
    return db.Plan((*retire_legacy.undo_plan(phase), move), connection)


@changes
def undo(phase: Phase) -> Table:
    """Sends every read back to the legacy query and writes down that it did; where that was retired, builds its
    indexes again first.
    """
    if not phase.execute:
        return phase.carry_out(undo_plan(phase))
    retire_legacy.undo(phase)
    done = phase.carry_out(undo_plan(phase))
    noted = phase.ledger.latest("route")
    if noted and noted["route"] != "legacy":
        phase.note("route", {"route": "legacy", "share_percent": 0, "reason": "rolled back"})
    return done


def verify_undone(phase: Phase) -> Gates:
    """Every read goes to legacy, or there is no function any more."""
    connection, params = phase.connection, phase.params
    if search_function.function_state(connection, params) is None:
        gone = gate("cutover.route_is_set", True, params.target.name, found="no function, so no route", needed="none")
        return collect([gone])
    return collect([route_is(connection, params, "legacy", 0)])
