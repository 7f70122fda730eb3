"""Whose vectors a search function answers by, once another target has taken over the name that the application calls.

A function that was handed over is no longer its first target's: made again, tuned or dropped by that target's own
phases, it would take the answers of the other one away.
"""

from __future__ import annotations

from dataclasses import dataclass

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, GateFailed, Gates, collect, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("handover")

BOTH = "both answer"
NEW_ONLY = "the new one answers"
# Ways back that take away what a function reads, and not the function itself.
OF_THE_COLUMN = ("undo/index", "undo/schema")


@dataclass(frozen=True)
class Handover:
    """A function, the target that made it, the target that took it over, and who answers: BOTH or NEW_ONLY."""

    function: str
    old: str
    new: str
    who: str


def standing(connection: db.Connection, params: Params) -> list[Handover]:
    """The functions of the table's schema that were handed over, from or to any target."""
    found = db.rows(connection, SQL["standing"], params, schema=spelled(params, "schema"))
    return [Handover(**row) for row in found]


def check(phase: Phase) -> Gates:
    """Gate of the phases and rollbacks that would change the search function, or take away what it reads."""
    name = phase.params.target.name
    found = [h for h in standing(phase.connection, phase.params) if _in_the_way(h, name, phase.name)]
    return collect([_gate(phase.params, found[0] if found else None)])


def require_own(connection: db.Connection, params: Params) -> None:
    """Raises GateFailed where another target answers under this target's function: it must not be made again."""
    for h in standing(connection, params):
        if (h.old, h.function) == (params.target.name, params.function_name):
            raise GateFailed(collect([_gate(params, h)]))


def _gate(params: Params, one: Handover | None) -> Gate:
    return gate(
        "handover.no_other_target_relies_on_it",
        one is None,
        params.function_name,
        found=f"{one.function} was handed over from {one.old} to {one.new}; {one.who}" if one else "none",
        needed="no function handed over from or to this target",
        danger="calls of the application would fail, or be answered by the other model's vectors",
        do=_way_out(one, params.target.name) if one else "",
    )


def _in_the_way(found: Handover, target: str, phase: str) -> bool:
    if target == found.old:
        return found.who == BOTH or phase not in OF_THE_COLUMN
    if target == found.new:
        return (phase in OF_THE_COLUMN and found.who == BOTH) or phase == "undo/search_function"
    return False


def _way_out(found: Handover, target: str) -> str:
    if found.who == BOTH:
        back = f"take it back first: `runbook operate PARAMS change_model --undo --execute` with {found.new}'s PARAMS"
        return back + ("; or run operate/retire_model there" if target == found.old else "")
    if target == found.old:
        return f"nothing is left to do here: the function is part of {found.new}, and the rest was retired"
    return f"once the application calls it no longer, drop {found.function} by hand, then run this again"
