"""The vector index built again, with other options or because it has aged: built beside, proved, swapped.

REINDEX CONCURRENTLY would swap first and leave the proof for afterwards; so a second index is built under a name of
its own. Where both are whole the planner may use either; each is measured with the other hidden.
"""

from __future__ import annotations

from typing import Any

from psycopg import sql

from runbook_lib.benchmark import index_recall
from runbook_lib.core import db
from runbook_lib.core.display import Table, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import identifier, index_name, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.indexes import partition_indexes
from runbook_lib.indexes.building import none_under_way
from runbook_lib.indexes.index_roles import Standing, new_name, old_name, one
from runbook_lib.indexes.index_roles import shown as shown
from runbook_lib.indexes.index_roles import standing as standing
from runbook_lib.indexes.options import Options, asked_for, listed
from runbook_lib.migrate import build_index
from runbook_lib.operate import rebuild_partitions, storage_switch
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("rebuild")


def _fits(phase: Phase, found: Standing, options: Options | None) -> bool:
    asked = asked_for(phase.params) if options is None else options
    same = found.storage == phase.params.index.storage
    return found.usable and same and asked.items() <= found.options.items()


def _drop(phase: Phase, name: str) -> db.Statement:
    return db.statement(SQL["drop"], phase.params, {"leftover": identifier(phase.params.target.schema_, name)})


def _named(phase: Phase, block: str) -> db.Statement:
    p, schema = phase.params, phase.params.target.schema_
    return db.statement(
        SQL[block],
        p,
        {
            "old_index": identifier(old_name(p)),
            "new_index": identifier(new_name(p)),
            "qualified_old_index": identifier(schema, old_name(p)),
            "qualified_new_index": identifier(schema, new_name(p)),
        },
    )


def _build(phase: Phase, options: Options | None) -> db.Statement:
    other: dict[str, sql.Composable] = {name: sql.Literal(value) for name, value in (options or {}).items()}
    return build_index.build_statement(phase, {"index": identifier(new_name(phase.params))} | other)


def is_done(phase: Phase) -> bool:
    """Was the index that these parameters ask for put in place in this very run, and is nothing left of the way?"""
    last, found = phase.ledger.latest("rebuild"), standing(phase)
    if not last or last["run_id"] != phase.run_id or {s.role for s in found} & {"new", "old", "leftover"}:
        return False
    current = one(found, "current")
    return current is None or _fits(phase, current, None)


def building_plan(phase: Phase, options: Options | None = None) -> db.Plan:
    """What is left over dropped, and a new index built beside; nothing where one stands there, or replaced it."""
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.plan(phase, options)
    found = standing(phase)
    new, old = one(found, "new"), one(found, "old")
    drops = [_drop(phase, s.name) for s in found if s.role == "leftover"]
    if old or (options is None and is_done(phase)):
        return db.Plan(tuple(drops), phase.connection)  # swapped already: only the old one is still to go
    if new and not _fits(phase, new, options):
        drops.append(_drop(phase, new.name))
        new = None
    return db.Plan((*drops, *(() if new else (_build(phase, options),))), phase.connection)


def swapping_plan(phase: Phase) -> db.Plan:
    """The new index put into the place of the old one, and the old one dropped."""
    if partition_indexes.is_needed(phase):
        return db.Plan((), phase.connection)
    found = standing(phase)
    roles = {s.role for s in found}
    # Before the build there is no new index yet, but there will be.
    swap = () if "old" in roles or ("new" not in roles and is_done(phase)) else (_swap(phase, found),)
    drop = (_drop(phase, old_name(phase.params)),) if swap or "old" in roles else ()
    return db.Plan((*swap, *drop), phase.connection)


def _swap(phase: Phase, found: list[Standing]) -> db.Statement:
    """The renames; the search function goes over with them where it must."""
    renames = _named(phase, "swap")
    current = one(found, "current")
    goes_over = current is not None and storage_switch.changes_function(phase, current.storage)
    return storage_switch.swap(phase, renames) if goes_over else renames


def plan(phase: Phase) -> db.Plan:
    """All of it: leftovers dropped, the new index built, swapped in once it is proved, the old one dropped."""
    return db.Plan((*building_plan(phase), *swapping_plan(phase)), phase.connection)


@changes
def apply(phase: Phase, options: Options | None = None) -> Table:
    """Builds the new index beside the one that serves; the one that serves is not touched.

    options: in place of those of the parameters.
    """
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.apply(phase, options)
    todo = building_plan(phase, options)
    if not phase.execute:
        return phase.carry_out(todo)
    rows = []
    for statement in todo:
        built = build_index.concurrently(phase, statement)
        rows.append((statement.purpose, statement.lock, round(built.seconds, 2)))
        new = one(standing(phase), "new")
        if statement.name != SQL["drop"].name and new:
            build_index.note_built(phase, built, new.bytes)
    return Table(("what", "lock", "seconds"), rows)


@changes
def swap(phase: Phase) -> Table:
    """Puts the new index into its place and drops the old one, without blocking reads or writes."""
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.swap(phase)
    todo = swapping_plan(phase)
    if not phase.execute:
        return phase.carry_out(todo)
    rows: list[tuple[Any, ...]] = []
    for statement in todo:
        if statement.name == SQL["swap"].name:
            # Written down first: undo finds here what served before, and a rerun that there is nothing to prove.
            _note_before(phase)
            seconds = phase.do(statement).seconds
        else:
            seconds = build_index.concurrently(phase, statement).seconds
        rows.append((statement.purpose, statement.lock, round(seconds, 3)))
    return Table(("what", "lock", "seconds"), rows)


def _note_before(phase: Phase) -> None:
    before = one(standing(phase), "current")
    goes_over = before is not None and storage_switch.changes_function(phase, before.storage)
    phase.note(
        "rebuild",
        {
            "run_id": phase.run_id,
            "before": before.options if before else {},
            "storage": before.storage if before else None,
            "function": storage_switch.definition(phase) if goes_over else None,
        },
    )


def check(phase: Phase) -> Gates:
    """Before anything is changed: an index serves, and nobody else is building on this table."""
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.check(phase)
    found = standing(phase)
    current = one(found, "current")
    subject = f"{index_name(phase.params)} on {phase.params.target.schema_}.{phase.params.target.table}"
    builds = max((s.builds_under_way for s in found), default=0)
    return collect(
        [
            gate(
                "rebuild.an_index_serves",
                bool(current and current.usable),
                subject,
                found="no such index" if current is None else "valid" if current.usable else "invalid",
                needed="a valid index, which serves until the new one is proved",
                danger="there is nothing to compare the new index with",
                do="run 60_build_index with execute: true",
            ),
            none_under_way("rebuild.no_build_is_under_way", subject, builds),
        ]
    )


def verify_new(phase: Phase) -> Gates:
    """The new index is whole and finds as much as is asked for, or as much as the one that serves."""
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.verify_new(phase)
    found = standing(phase)
    new, current = one(found, "new"), one(found, "current")
    whole = _is_whole(phase, new) if not one(found, "old") and not is_done(phase) else None
    if whole is None:
        return collect([_is_in_place(phase, current)])
    if not new or not new.usable:
        return collect([whole])
    asked = index_recall.questions(phase)
    others = [s.name for s in found if s.usable]
    beside_old, beside_new = ([n for n in others if n != own] for own in (index_name(phase.params), new.name))
    if current and storage_switch.changes_function(phase, current.storage):
        # Their queries are not the same, so neither can answer for the other.
        was = storage_switch.before(phase, asked, current.name, current.storage, beside_old)
        now = storage_switch.after(phase, asked, new.name, _needed(phase, was), beside_new)
    else:
        was = index_recall.through(phase, asked, index_name(phase.params), beside_old)
        now = index_recall.through(phase, asked, new.name, beside_new)
    for measured in (was, now):
        phase.note("recall", measured.as_data() if measured else {})
    return collect([whole, recall_gate(phase, "rebuild.new_index_finds_as_much", new.name, was, now)])


def recall_gate(
    phase: Phase, name: str, subject: str, was: index_recall.Measured | None, now: index_recall.Measured | None
) -> Gate:
    """Recall reaches the target, or what it was before where that was less."""
    needed = _needed(phase, was)
    shown, least = apart(now.recall if now else 0.0, needed, score)
    return gate(
        name,
        None if now is None else at_least(now.recall, needed) and now.short <= (was.short if was else 0),
        subject,
        found=f"{now.said(shown)}; before {was or 'not measured'}" if now else "the planner does not use it",
        needed=f"recall {least}, no more queries short of rows than before",
        danger="the index would hide answers that exact search finds, and that the one before found",
        do="raise index.rerank, or go over to index.storage: halfvec; nothing else has changed"
        if phase.params.index.storage == "bit"
        else "build with a higher ef_construction or m in index; nothing else has changed",
        figures={"before": was.recall if was else None, "after": now.recall if now else None},
    )


def _needed(phase: Phase, was: index_recall.Measured | None) -> float:
    target = phase.params.tune.target_recall
    return min(target, was.recall) if was else target


def _is_whole(phase: Phase, new: Standing | None) -> Gate:
    return gate(
        "rebuild.new_index_is_valid",
        bool(new and new.usable),
        new_name(phase.params),
        found="no such index" if new is None else f"valid, {size(new.bytes)}" if new.usable else "invalid",
        needed="valid",
        danger="nothing can take the place of the index that serves, yet every write pays for what is there",
        do="run operate/rebuild_index again with execute: true; it drops what is left and builds anew",
        figures={"bytes": new.bytes} if new else {},
    )


def _is_in_place(phase: Phase, current: Standing | None) -> Gate:
    return gate(
        "rebuild.new_index_is_in_place",
        bool(current and current.usable),
        index_name(phase.params),
        found="in its place, proved before" if current else "no index of that name",
        needed="the new index, proved before it was put there",
        danger="searches read the whole table",
        do="run 60_build_index with execute: true",
    )


def verify(phase: Phase) -> Gates:
    """The index has the options that were asked for, is whole, finds known rows, and nothing is left beside it."""
    if partition_indexes.is_needed(phase):
        of_parts = [rebuild_partitions.has_options(phase), rebuild_partitions.nothing_is_left(phase)]
        return build_index.verify(phase) + collect(of_parts)
    gates = [_has_options(phase, asked_for(phase.params)), _nothing_is_left(phase)]
    if search_function.function_state(phase):
        gates.append(storage_switch.function_fits(phase))
    return build_index.verify(phase) + collect(gates)


def _has_options(phase: Phase, needed: Options) -> Gate:
    current = one(standing(phase), "current")
    options = current.options if current else {}
    return gate(
        "rebuild.index_has_its_options",
        needed.items() <= options.items(),
        index_name(phase.params),
        found=listed(options) or "none of its own",
        needed=listed(needed) or "any",
        danger="recall and speed are those of another index than the one that was asked for",
        do="run operate/rebuild_index again with execute: true",
    )


def _nothing_is_left(phase: Phase) -> Gate:
    left = [s.name for s in standing(phase) if s.role in ("new", "old", "leftover")]
    return gate(
        "rebuild.nothing_is_left",
        not left,
        spelled(phase.params, "vectors"),
        found=", ".join(left) or "one index",
        needed="one index",
        danger="every write pays for each index that is left",
        do="run operate/rebuild_index again with execute: true",
    )


def former_options(phase: Phase) -> dict[str, int]:
    """The options of the index before the last swap; empty where there was none."""
    return {k: int(v) for k, v in storage_switch.last_swap(phase).get("before", {}).items()}


def undo_plan(phase: Phase) -> db.Plan:
    """Back to the index that served before: swapped back while it is there, otherwise built again as it was.

    The search function goes back with it, where it had gone over.
    """
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.undo_plan(phase)
    found = standing(phase)
    roles, last = {s.role for s in found}, storage_switch.last_swap(phase)
    drops = [_drop(phase, s.name) for s in found if s.role == "leftover"]
    if "old" in roles and not last.get("goes_back"):
        renames = storage_switch.swap_back(phase, _named(phase, "swap_back"), last.get("function"))
        back = [renames, _drop(phase, new_name(phase.params))]
    elif "new" in roles and not last.get("goes_back"):
        back = [_drop(phase, new_name(phase.params))]
    else:
        back = _built_back(phase, found, last)
    return db.Plan((*drops, *back), phase.connection)


def _built_back(phase: Phase, found: list[Standing], last: dict[str, Any]) -> list[db.Statement]:
    """The index built again as it was, put into its place, and the other one dropped: what is left of these steps."""
    current, new, old = (one(found, role) for role in ("current", "new", "old"))
    options, storage = former_options(phase), last.get("storage") or phase.params.index.storage
    if current is None or not options:
        return []
    is_former = [s.usable and (s.options, s.storage) == (options, storage) for s in (current, new) if s]
    if is_former[0]:
        return [_drop(phase, s.name) for s in (new, old) if s]
    if new and is_former[1]:
        steps = []
    else:
        former = _build(storage_switch.under(phase, storage), options)
        steps = [*([_drop(phase, new.name)] if new else []), former]
    renames = storage_switch.swap_back(phase, _named(phase, "swap"), last.get("function"))
    return [*steps, renames, _drop(phase, old_name(phase.params))]


@changes
def undo(phase: Phase) -> Table:
    """Carries out the way back; does nothing where the index is the one that served before."""
    if partition_indexes.is_needed(phase):
        return rebuild_partitions.undo(phase)
    todo = undo_plan(phase)
    if not phase.execute:
        return phase.carry_out(todo)
    _note_the_way_back(phase)
    in_a_transaction = (SQL["swap"].name, SQL["swap_back"].name)
    rows = [
        (s.purpose, (phase.do(s) if s.name in in_a_transaction else build_index.concurrently(phase, s)).seconds)
        for s in todo
    ]
    return Table(("what", "seconds"), rows)


def _note_the_way_back(phase: Phase) -> None:
    """Written down first: interrupted between its steps, the next way back must not take them for those of a swap."""
    found, last = standing(phase), storage_switch.last_swap(phase)
    current, roles = one(found, "current"), {s.role for s in found}
    if last.get("goes_back") or current is None or "old" in roles:
        return
    if "new" in roles:
        # Nothing was swapped: an earlier swap is not this way back's to undo, nor to be proved by it.
        phase.note("rebuild", {"run_id": None, "before": current.options, "storage": current.storage})
    elif last:
        phase.note("rebuild", last | {"run_id": None, "goes_back": True})


def verify_undone(phase: Phase) -> Gates:
    """The index has the options that it had before, and nothing is left beside it."""
    if partition_indexes.is_needed(phase):
        return collect([rebuild_partitions.has_options(phase), rebuild_partitions.nothing_is_left(phase)])
    held = storage_switch.holds_again(phase, [s.storage for s in standing(phase) if s.role == "current"])
    return collect([_has_options(phase, former_options(phase)), held, _nothing_is_left(phase)])
