"""What a step rests on: the phases before it, asked of the ledger before it begins and again while it is at work."""

from __future__ import annotations

from runbook_lib.core import db
from runbook_lib.core.gates import Gate, Verdict, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.registry import (
    MIGRATE,
    OPERATE,
    STEPS,
    UNDO,
    UNDO_OPERATION,
    names_in_the_ledger,
    operation_of,
    relied_on,
    short,
)
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("predecessors")


def gates(name: str, ledger: Ledger, params: Params) -> list[Gate]:
    """What must hold before a phase, an operation or a rollback may change anything, by the ledger."""
    if name in UNDO:
        return [_nothing_stands_on_it(name, ledger)]
    if name in UNDO_OPERATION:
        return [_no_later_operation_stands_on_it(name, ledger), *_is_as_planned(ledger, params)]
    if name == MIGRATE[0] or name not in (*MIGRATE, *OPERATE):
        return [gate("phase.may_start", True, name, found="needs no phase before it", needed="none")]
    before = relied_on(name)[-1]
    verdict = ledger.phase_verdict(before)
    passed = gate(
        "phase.predecessor_passed",
        verdict == Verdict.PASS,
        before,
        found=f"{verdict} in this database",
        needed="PASS",
        danger="what this phase relies on has not been proved here",
        do=f"run {before} with execute: true first",
    )
    return [passed, *_is_as_planned(ledger, params)]


def _is_as_planned(ledger: Ledger, params: Params) -> list[Gate]:
    """No gate before preflight has planned."""
    planned = ledger.latest("plan", MIGRATE[0])
    if not planned:
        return []
    same = planned["fingerprint"] == params.fingerprint()
    return [
        gate(
            "phase.target_is_as_planned",
            same,
            f"{params.target.schema_}.{params.target.table}",
            found=f"target, vector, model and ledger {'as planned' if same else 'changed since'}",
            needed="the parameters that preflight planned with",
            danger="phases would work on different columns, models or tables",
            do="put the parameters back, or undo the migration and run 00_preflight again",
        )
    ]


def _no_later_operation_stands_on_it(name: str, ledger: Ledger) -> Gate:
    """What an operation made may since have become part of what a later one made."""
    operation, later = operation_of(name), STEPS[name].after
    last, own = (ledger.last_row(n) for n in (later, operation))
    stands = bool(last and own and last["seq"] > own["seq"] and ledger.phase_verdict(later) == Verdict.PASS)
    return gate(
        "phase.no_later_operation_stands_on_it",
        not stands,
        operation,
        found=f"{later} was carried out since" if stands else "no operation since that relies on it",
        needed=f"{later} rolled back, or never carried out" if later else "none that relies on it",
        danger="what is to be rolled back has become part of what the later one made",
        do=f"run `runbook operate PARAMS {short(later)} --undo --execute` first, or leave both as they are",
    )


def _nothing_stands_on_it(name: str, ledger: Ledger) -> Gate:
    """Rollbacks run in order: what an earlier one removes must be gone."""
    earlier = [p for rollback in UNDO[: UNDO.index(name)] for p in STEPS[rollback].rolls_back]
    standing = [p for p in earlier if ledger.phase_verdict(p) == Verdict.PASS]
    ways = [rollback for rollback in UNDO if any(p in STEPS[rollback].rolls_back for p in standing)]
    return gate(
        "phase.nothing_stands_on_it",
        not standing,
        name,
        found=f"{', '.join(standing)} still proved" if standing else "later phases are rolled back, or never ran",
        needed="the phases after it rolled back first",
        danger="what they made would be orphaned",
        do=f"run {ways[0]} first" if ways else "",
    )


def newest_row(ledger: Ledger) -> int:
    """The number of the newest ledger row; 0 where there is none."""
    return int(db.one(ledger.connection, SQL["newest"], ledger.params)["seq"]) if ledger.exists() else 0


def gone(name: str, ledger: Ledger, params: Params, since: int) -> str:
    """Why what a step rests on no longer holds; empty where it does. since: the newest ledger row when it did."""
    if name not in UNDO and ledger.exists():
        phases = [*relied_on(name), name] if name in STEPS else []
        called = [known for phase in phases for known in names_in_the_ledger(phase)]
        undone = db.rows(ledger.connection, SQL["undone_since"], params, phases=called, seq=since)
        if undone:
            return "; ".join(f"{row['phase']} was undone by {row['by']}" for row in undone)
    return "; ".join(f"{g.subject}: {g.found}" for g in gates(name, ledger, params) if g.verdict != Verdict.PASS)
