"""The vector index built again, with other options or because it has aged: built under another name, proved, swapped.

REINDEX CONCURRENTLY would swap first and leave the proof for afterwards; so a second index is built under a name of
its own, on a partitioned table partition by partition. Where both are whole the planner may use either; each is
measured with the other hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import index_recall
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, index_name, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.indexes import building, index_proof, vector_index
from runbook_lib.indexes.building import BuildStep, none_under_way
from runbook_lib.indexes.vector_index import Options, VectorIndex, asked_for, listed, one, planned_name, stored
from runbook_lib.migrate import build_index
from runbook_lib.operate import storage_switch
from runbook_lib.params import Params
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("rebuild")
SHOWN_PARTITIONS = 3


def standing(connection: db.Connection, params: Params) -> list[VectorIndex]:
    """Every vector index of the table, and what each is to a rebuild."""
    return vector_index.every(connection, params)


def shown(phase: Phase) -> Table:
    """The vector indexes of the table, and what each is to this operation."""
    return vector_index.shown(phase.connection, phase.params)


def _may_become(params: Params, found: VectorIndex) -> bool:
    """Is this index, built so far as it is, the one that the parameters ask for?"""
    i = params.index
    return found.storage == i.storage and found.rows == i.rows and found.has_options(asked_for(params))


def _drops(found: Iterable[VectorIndex | None]) -> list[BuildStep]:
    return [step for index in found if index for step in building.drop_steps(index, SQL["drop"])]


def _leftovers(found: list[VectorIndex]) -> list[VectorIndex]:
    return [index for index in found if index.role == "leftover"]


def is_done(connection: db.Connection, ledger: Ledger, params: Params) -> bool:
    """Was the index that these parameters ask for put in place in this very run, and is nothing left of the way?"""
    last, found = ledger.latest("rebuild"), standing(connection, params)
    if not last or last["run_id"] != ledger.run_id or {x.role for x in found} & {"new", "old", "leftover"}:
        return False
    current = one(found, "current")
    return current is None or (current.usable and _may_become(params, current))


def _building(connection: db.Connection, ledger: Ledger, params: Params) -> list[BuildStep]:
    found = standing(connection, params)
    new, drops = one(found, "new"), _leftovers(found)
    if one(found, "old") or is_done(connection, ledger, params):
        return _drops(drops)  # swapped already: only the old one is still to go
    whole = new or vector_index.find(connection, params, "_new")
    if new and not _may_become(params, new):
        drops, whole = [*drops, new], replace(whole, own={})
    return [*_drops(drops), *building.build_steps(connection, whole, drop=SQL["drop"])]


def building_plan(connection: db.Connection, ledger: Ledger, params: Params) -> db.Plan:
    """Leftovers are dropped and a new index is built; nothing where that is done, or it has replaced the old one."""
    return building.plan(connection, _building(connection, ledger, params))


def _swapping(connection: db.Connection, ledger: Ledger, params: Params) -> list[BuildStep]:
    found = standing(connection, params)
    roles, current, old = {x.role for x in found}, one(found, "current"), one(found, "old")
    if old or ("new" not in roles and is_done(connection, ledger, params)):
        return _drops([old])
    # Before the build there is no new index yet, but there will be.
    return [_swap(connection, ledger, params, current), *_drops([current.called("_old") if current else None])]


def swapping_plan(connection: db.Connection, ledger: Ledger, params: Params) -> db.Plan:
    """The new index put into the place of the old one, and the old one dropped."""
    return building.plan(connection, _swapping(connection, ledger, params))


def _swap(connection: db.Connection, ledger: Ledger, params: Params, current: VectorIndex | None) -> BuildStep:
    """The renames; the search function is switched with them where it must be."""
    new = vector_index.find(connection, params, "_new")
    renames = _renames(connection, params, "swap", [(current, "_old"), (new, "")])
    goes_over = current is not None and storage_switch.changes_function(connection, params, current.storage)
    return (
        replace(renames, statement=storage_switch.swap(connection, ledger, params, renames.statement))
        if goes_over
        else renames
    )


def _renames(
    connection: db.Connection, params: Params, block: str, pairs: list[tuple[VectorIndex | None, str]]
) -> BuildStep:
    """Each index of a tree gets the name with another tail, in the order of the pairs, all in one transaction."""
    made = [
        db.statement(SQL[block], params, {"renamed": qualified, "name": identifier(name)})
        for index, tail in pairs
        if index is not None
        for qualified, name in _new_names(index, tail)
    ]
    together = replace(made[0], query=sql.SQL(";\n").join([statement.query for statement in made]))
    return BuildStep(vector_index.find(connection, params).parts[0], together, in_short_tries=True)


def _new_names(index: VectorIndex, tail: str) -> list[tuple[sql.Composable, str]]:
    """Of each of its indexes: as it is called, and as it will be. A new one is whole by the time of its swap."""
    return [
        (identifier(part.schema, index.name_on(part)), planned_name(index.params, part, tail))
        for part in index.parts
        if index.role == "new" or part.oid in index.own
    ]


def plan(phase: Phase) -> db.Plan:
    """All of it: leftovers dropped, the new index built, swapped in once it is proved, the old one dropped."""
    return building.plan(
        phase.connection,
        [
            *_building(phase.connection, phase.ledger, phase.params),
            *_swapping(phase.connection, phase.ledger, phase.params),
        ],
    )


def apply(phase: Phase) -> Table:
    """Builds the new index; the one in use is not touched."""
    return building.build(
        phase,
        lambda: _building(phase.connection, phase.ledger, phase.params),
        lambda: vector_index.find(phase.connection, phase.params, "_new"),
    )


@changes
def swap(phase: Phase) -> Table:
    """Puts the new index into its place and drops the old one, without blocking reads or writes."""
    todo = _swapping(phase.connection, phase.ledger, phase.params)
    if phase.execute and any(step.statement.name == SQL["swap"].name for step in todo):
        # Written down first: undo finds here what served before, and a rerun that there is nothing to prove.
        _note_before(phase)
    return building.carry_out(phase, todo)


def _note_before(phase: Phase) -> None:
    before = one(standing(phase.connection, phase.params), "current")
    goes_over = before is not None and storage_switch.changes_function(phase.connection, phase.params, before.storage)
    phase.note(
        "rebuild",
        {
            "run_id": phase.run_id,
            "before": before.options if before else {},
            "partitions": before.other_options if before else {},
            "storage": before.storage if before else None,
            "rows": before.rows if before else None,
            "function": storage_switch.definition(phase.connection, phase.params) if goes_over else None,
        },
    )


def check(phase: Phase) -> Gates:
    """Before anything is changed: an index serves, and nobody else is building on this table."""
    found = standing(phase.connection, phase.params)
    current = build_index.index(phase.connection, phase.params)
    builds = max((index.builds_under_way for index in found), default=0)
    return collect(
        [
            gate(
                "rebuild.an_index_serves",
                current.usable,
                index_proof.subject(current),
                found=index_proof.validity(current),
                needed="a valid index, which serves until the new one is proved",
                danger="there is nothing to compare the new index with",
                do="run 60_build_index with execute: true",
            ),
            none_under_way("rebuild.no_build_is_under_way", index_proof.subject(current), builds),
        ]
    )


def verify_new(phase: Phase) -> Gates:
    """The new index is whole and finds as much as is asked for, or as much as the one that serves."""
    connection, params = phase.connection, phase.params
    found = standing(connection, params)
    new, current = one(found, "new"), one(found, "current")
    if one(found, "old") or is_done(connection, phase.ledger, params):
        return collect([_is_in_place(params, current)])
    whole = _is_whole(vector_index.find(connection, params, "_new"))
    if not new or not new.usable:
        return collect([whole])
    asked = index_recall.questions(connection, params)
    others = [s.name for s in found if s.usable]
    beside_old, beside_new = ([n for n in others if n != own] for own in (index_name(params), new.name))
    if current and storage_switch.changes_function(connection, params, current.storage):
        # Their queries are not the same, so neither can answer for the other.
        # The index that serves, asked as the function of today asks it.
        before = storage_switch.under(params, current.storage)
        was = index_recall.through(connection, before, asked, current.name, beside_old)
        now = storage_switch.after(phase, asked, new.name, _needed(params, was), beside_new)
    else:
        was = index_recall.through(connection, params, asked, index_name(params), beside_old)
        now = index_recall.through(connection, params, asked, new.name, beside_new)
    for measured in (was, now):
        phase.note("recall", measured.as_data() if measured else {})
    return collect([whole, recall_gate(params, "rebuild.new_index_finds_as_much", new.name, was, now)])


def recall_gate(
    params: Params,
    name: str,
    subject: str,
    was: index_recall.IndexRecall | None,
    now: index_recall.IndexRecall | None,
    do: str = "",
) -> Gate:
    """Recall reaches the target, or what it was before where that was less. do: what to try first."""
    needed = _needed(params, was)
    shown, least = apart(now.recall if now else 0.0, needed, score)
    return gate(
        name,
        None if now is None else at_least(now.recall, needed) and now.short <= (was.short if was else 0),
        subject,
        found=f"{now.said(shown)}; before {was or 'not measured'}" if now else "the planner does not use it",
        needed=f"recall {least}, no more queries short of rows than before",
        danger="the index would hide answers that exact search finds, and that the one before found",
        do=do
        + (
            "raise index.rerank, or change to index.storage: halfvec; nothing else has changed"
            if params.index.storage == "bit"
            else "build with a higher ef_construction or m in index; nothing else has changed"
        ),
        figures={"before": was.recall if was else None, "after": now.recall if now else None},
    )


def _needed(params: Params, was: index_recall.IndexRecall | None) -> float:
    target = params.tune.target_recall
    return min(target, was.recall) if was else target


def _is_whole(new: VectorIndex) -> Gate:
    return gate(
        "rebuild.new_index_is_valid",
        new.usable,
        new.name,
        found=index_proof.validity(new),
        needed="valid",
        danger="nothing can take the place of the index that serves, yet every write pays for what is there",
        do="run operate/rebuild_index again with execute: true; it drops what is left and builds it again",
        figures={"bytes": new.bytes} if new.own else {},
    )


def _is_in_place(params: Params, current: VectorIndex | None) -> Gate:
    return gate(
        "rebuild.new_index_is_in_place",
        bool(current and current.usable),
        index_name(params),
        found="in its place, proved before" if current else "no index of that name",
        needed="the new index, proved before it was put there",
        danger="searches read the whole table",
        do="run 60_build_index with execute: true",
    )


def verify(phase: Phase) -> Gates:
    """The index has the options that were asked for, is whole, finds known rows, and is the only one left."""
    connection, params = phase.connection, phase.params
    gates = [_has_options(connection, params, asked_for(params)), _nothing_is_left(connection, params)]
    if search_function.function_state(connection, params):
        gates.append(storage_switch.function_fits(connection, params))
    return build_index.verify(phase) + collect(gates)


def _has_options(
    connection: db.Connection, params: Params, needed: Options, of_partitions: Mapping[str, Options] | None = None
) -> Gate:
    """of_partitions: what is needed of those partitions instead."""
    index = build_index.index(connection, params)
    own = {part.shown: stored(index.own[part.oid].options) for part in index.leaves if part.oid in index.own}
    wanted = {shown: (of_partitions or {}).get(shown, needed) for shown in own}
    other = [shown for shown, options in own.items() if not wanted[shown].items() <= options.items()]
    return gate(
        "rebuild.index_has_its_options",
        bool(own or not needed) and not other,
        index_name(params),
        found="; ".join(f"{listed(own[shown]) or 'none of its own'} on {shown}" for shown in other[:SHOWN_PARTITIONS])
        or listed(index.options)
        or "none of its own",
        needed=listed(needed) or "any",
        danger="recall and speed are those of another index than the one that was asked for",
        do="run operate/rebuild_index again with execute: true",
    )


def _nothing_is_left(connection: db.Connection, params: Params) -> Gate:
    left = [s.name for s in standing(connection, params) if s.role in ("new", "old", "leftover")]
    return gate(
        "rebuild.nothing_is_left",
        not left,
        spelled(params, "vectors"),
        found=", ".join(left) or "one index",
        needed="one index",
        danger="every write pays for each index that is left",
        do="run operate/rebuild_index again with execute: true",
    )


def _former(ledger: Ledger) -> tuple[Options, dict[str, Options]]:
    """The options of the index before the last swap, empty where there was none; and those of partitions apart."""
    last = storage_switch.last_swap(ledger)
    before, of_partitions = last.get("before", {}), last.get("partitions", {})
    if any(isinstance(options, dict) for options in before.values()):
        # Releases that rebuilt a partitioned index in its place wrote down the options of each partition alone.
        before, of_partitions = next(iter(before.values())), before
    return before, of_partitions


def _undoing(phase: Phase) -> list[BuildStep]:
    found, last = standing(phase.connection, phase.params), storage_switch.last_swap(phase.ledger)
    current, new, old = (one(found, role) for role in ("current", "new", "old"))
    drops = _drops(_leftovers(found))
    if old and not last.get("goes_back"):
        renames = _renames(phase.connection, phase.params, "swap_back", [(current, "_new"), (old, "")])
        back = replace(renames, statement=storage_switch.swap_back(renames.statement, last.get("function")))
        return [*drops, back, *_drops([current.called("_new") if current else None])]
    if new and not last.get("goes_back"):
        return [*drops, *_drops([new])]
    return [*drops, *_built_back(phase, found, last)]


def undo_plan(phase: Phase) -> db.Plan:
    """Back to the index that served before: swapped back while it is there, otherwise built again as it was.

    The search function goes back with it, where it had gone over.
    """
    return building.plan(phase.connection, _undoing(phase))


def _built_back(phase: Phase, found: list[VectorIndex], last: dict[str, Any]) -> list[BuildStep]:
    """The index built again as it was, put into its place, and the other one dropped: what is left of these steps."""
    current, new, old = (one(found, role) for role in ("current", "new", "old"))
    options, of_partitions = _former(phase.ledger)
    storage, rows = (last.get(name) or getattr(phase.params.index, name) for name in ("storage", "rows"))
    if current is None or not options:
        return []

    def may_become_former(index: VectorIndex) -> bool:
        own = {p.shown: stored(index.own[p.oid].options) for p in index.leaves if p.oid in index.own}
        held = (index.storage, index.rows) == (storage, rows)
        return held and all(o == of_partitions.get(p, options) for p, o in own.items())

    if current.usable and may_become_former(current):
        return _drops([new, old])
    keeps = new is not None and may_become_former(new)
    params = storage_switch.under(phase.params, storage, rows)
    former = vector_index.find(phase.connection, params, "_new")
    former = former if keeps else replace(former, own={})
    built = building.build_steps(
        phase.connection, former, options=options, of_partitions=of_partitions, drop=SQL["drop"]
    )
    renames = _renames(phase.connection, phase.params, "swap", [(current, "_old"), (former, "")])
    back = replace(renames, statement=storage_switch.swap_back(renames.statement, last.get("function")))
    return [*_drops([None if keeps else new]), *built, back, *_drops([current.called("_old")])]


@changes
def undo(phase: Phase) -> Table:
    """Rolls back; does nothing where the index is the one that served before."""
    todo = _undoing(phase)
    if phase.execute:
        _note_the_way_back(phase)
    return building.carry_out(phase, todo)


def _note_the_way_back(phase: Phase) -> None:
    """Written down first: interrupted between its steps, the next rollback must not take them for those of a swap."""
    found, last = standing(phase.connection, phase.params), storage_switch.last_swap(phase.ledger)
    current, roles = one(found, "current"), {s.role for s in found}
    if last.get("goes_back") or current is None or "old" in roles:
        return
    if "new" in roles:
        # Nothing was swapped: an earlier swap is not this rollback's to undo, nor to be proved by it.
        phase.note(
            "rebuild", {"run_id": None, "before": current.options, "storage": current.storage, "rows": current.rows}
        )
    elif last:
        phase.note("rebuild", last | {"run_id": None, "goes_back": True})


def verify_undone(phase: Phase) -> Gates:
    """The index has the options that it had before, and is the only one left."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    held = storage_switch.holds_again(
        ledger, params, [s.storage for s in standing(connection, params) if s.role == "current"]
    )
    return collect([_has_options(connection, params, *_former(ledger)), held, _nothing_is_left(connection, params)])
