"""Operate 40 on a partitioned table: REINDEX CONCURRENTLY, a partition at a time.

A partition has room for one index in that of its parent, so nothing can stand beside to be proved first: each new
index takes the place of its old one as it is done. Recall is measured before the first and after the last. A round is
written down, so that one that was stopped goes on with the partitions that are left.
"""

from __future__ import annotations

from typing import Any

from psycopg import sql

from runbook_lib.benchmark import index_recall
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.names import identifier, index_name
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.indexes import forecast, partition_indexes
from runbook_lib.indexes.building import OF_REINDEX, concurrently, none_under_way
from runbook_lib.indexes.options import Options, asked_for, listed, stored
from runbook_lib.indexes.partition_indexes import Step
from runbook_lib.indexes.partitions import Part
from runbook_lib.operate import storage_switch


def _of_build(phase: Phase, part: Part) -> Options:
    """What a partition's next build follows; IVFFlat's lists by its rows today, where they are not given."""
    by_rule = phase.params.index.method == "ivfflat" and not phase.params.index.lists
    return {"lists": forecast.lists_rule(part.rows)} if by_rule else asked_for(phase.params)


def _round(phase: Phase) -> dict[str, Any] | None:
    """The last round; ``open`` says that it is not closed yet."""
    return storage_switch.last_swap(phase) or None


def is_under_way(phase: Phase) -> bool:
    """Was a round begun and not closed?"""
    last = _round(phase)
    return bool(last and last.get("open"))


def _is_done(phase: Phase) -> bool:
    last = _round(phase)
    return bool(last and not last.get("open") and last["run_id"] == phase.run_id)


def _left(phase: Phase, now: partition_indexes.Standing) -> list[Part]:
    """The partitions whose index is still that from before the round."""
    last = _round(phase)
    if not last or not last.get("open"):
        return [] if _is_done(phase) else now.leaves
    # REINDEX CONCURRENTLY gives an index another oid.
    return [p for p in now.leaves if p.oid in now.own and str(now.own[p.oid].oid) in last["oids"]]


def _leftovers(phase: Phase, now: partition_indexes.Standing) -> list[Step]:
    by_oid = {part.oid: part for part in now.parts}
    return [
        partition_indexes.step(phase, "drop", by_oid[x.relation], part_index=identifier(x.schema, x.name))
        for x in now.found
        if OF_REINDEX.search(x.name) and not x.usable
    ]


def _anew(phase: Phase, now: partition_indexes.Standing, part: Part, options: Options) -> list[Step]:
    """The options of the next build where they are others, and the build."""
    own = now.own[part.oid]
    name = {"part_index": identifier(own.schema, own.name)}
    changed = not options.items() <= stored(own.options).items()
    given = sql.SQL(", ").join(
        sql.SQL("{} = {}").format(sql.Identifier(k), sql.Literal(v)) for k, v in options.items()
    )
    wanted = [partition_indexes.step(phase, "set_options", part, options=given, **name)] if changed else []
    return [*wanted, partition_indexes.step(phase, "reindex", part, **name)]


def _steps(phase: Phase, options: Options | None = None) -> list[Step]:
    now = partition_indexes.standing(phase)
    todo = _leftovers(phase, now)
    for part in _left(phase, now):
        if part.oid in now.own:
            todo += _anew(phase, now, part, options or _of_build(phase, part))
    return todo


def plan(phase: Phase, options: Options | None = None) -> db.Plan:
    """What an unfinished build left dropped, then each partition's index anew; nothing where this run did it."""
    return db.Plan(tuple(s.statement for s in _steps(phase, options)), phase.connection)


@changes
def apply(phase: Phase, options: Options | None = None) -> Table:
    """Builds each partition's index anew; the old one serves until its own is done.

    options: in place of those of the parameters. Stopped between two partitions, or in one, it goes on there.
    """
    if not phase.execute:
        return phase.carry_out(plan(phase, options))
    if not is_under_way(phase) and not _is_done(phase):
        _begin(phase)
    todo = _steps(phase, options)
    done = [_take(phase, step, n, len(todo)) for n, step in enumerate(todo)]
    return Table(("partition", "what", "lock", "seconds"), done)


def _begin(phase: Phase) -> None:
    now = partition_indexes.standing(phase)
    measured = index_recall.through(phase, index_recall.questions(phase), index_name(phase.params))
    phase.note(
        "rebuild",
        {
            "run_id": phase.run_id,
            "open": True,
            "oids": {str(now.own[p.oid].oid): p.shown for p in now.leaves if p.oid in now.own},
            "before": {p.shown: stored(now.own[p.oid].options) for p in now.leaves if p.oid in now.own},
            "recall": measured.as_data() if measured else None,
        },
    )


def _take(phase: Phase, step: Step, n: int, of: int) -> tuple[Any, ...]:
    print(f"  step {n + 1} of {of}, {step.part.shown}")
    in_tries = step.statement.name.rsplit(".", 1)[-1] in partition_indexes.IN_SHORT_TRIES
    seconds = phase.do(step.statement).seconds if in_tries else concurrently(phase, step.statement).seconds
    return (step.part.shown, step.statement.purpose, step.statement.lock, round(seconds, 3))


def check(phase: Phase) -> Gates:
    """Before anything is changed: the index serves, holds what the parameters say, and nobody is building."""
    now = partition_indexes.standing(phase)
    builds = max((x.builds_under_way for x in now.found), default=0)
    return collect(
        [
            partition_indexes.is_valid(phase, now),
            partition_indexes.has_right_class(phase, now),
            none_under_way("rebuild.no_build_is_under_way", f"{now.parent.index} on {now.parent.table}", builds),
        ]
    )


def verify_new(phase: Phase) -> Gates:
    """Every partition has its new index, and the whole finds as much as is asked for, or as it did before."""
    now = partition_indexes.standing(phase)
    left = _left(phase, now)
    whole = gate(
        "rebuild.every_partition_is_new",
        not left,
        now.parent.index,
        found=f"{len(now.leaves) - len(left)} of {len(now.leaves)} partitions",
        needed="all of them",
        danger="partitions whose index is from before keep its options and its faults",
        do="run operate/rebuild_index again with execute: true; it goes on with the partitions that are left",
        figures={"partitions": len(now.leaves), "left": len(left)},
    )
    last = _round(phase)
    if left or not last or not last.get("open"):
        return collect([whole])
    was = last["recall"]["recall"] if last["recall"] else None
    measured = index_recall.through(phase, index_recall.questions(phase), index_name(phase.params))
    phase.note("recall", measured.as_data() if measured else {})
    target = phase.params.tune.target_recall
    needed = min(target, was) if was is not None else target
    shown, least = apart(measured.recall if measured else 0.0, needed, score)
    return collect(
        [
            whole,
            gate(
                "rebuild.new_index_finds_as_much",
                None if measured is None else at_least(measured.recall, needed),
                now.parent.index,
                found=f"{measured.said(shown)}; before {was if was is not None else 'not measured'}"
                if measured
                else "the planner does not use it",
                needed=f"recall {least}",
                danger="the index hides answers that exact search finds, and that the one before found",
                do="rebuild_index --undo builds it again as it was; or build with a higher ef_construction or m",
                figures={"before": was, "after": measured.recall if measured else None},
            ),
        ]
    )


def swap(phase: Phase) -> Table:
    """Closes the round: each new index has taken its place already."""
    if phase.execute and (last := _round(phase)) and last.get("open"):
        phase.note("rebuild", last | {"open": False, "run_id": phase.run_id})
    return Table(("what",), [("nothing to swap: the index of each partition took its place as it was done",)])


def has_options(phase: Phase) -> Gate:
    """Gate: each partition's index has the options that it is to have."""
    now = partition_indexes.standing(phase)
    last = _round(phase) or {}
    undone, asked = last.get("undone", False), asked_for(phase.params)
    own = {part.shown: stored(now.own[part.oid].options) for part in now.leaves if part.oid in now.own}
    wanted = {shown: last["before"].get(shown, {}) if undone else asked for shown in own}
    other = {shown: options for shown, options in own.items() if not wanted[shown].items() <= options.items()}
    return gate(
        "rebuild.index_has_its_options",
        not other,
        now.parent.index,
        found="; ".join(f"{shown} {listed(o) or 'none of its own'}" for shown, o in list(other.items())[:3])
        or "on every partition",
        needed="those from before" if undone else "those of index in the parameters",
        danger="recall and speed are those of another index than the one that was asked for",
        do="run operate/rebuild_index again with execute: true",
        figures={"partitions": len(now.leaves), "other": len(other)},
    )


def nothing_is_left(phase: Phase) -> Gate:
    """Gate: no partition carries what a REINDEX CONCURRENTLY left."""
    now = partition_indexes.standing(phase)
    left = [s.part.shown for s in _leftovers(phase, now)]
    return gate(
        "rebuild.nothing_is_left",
        not left,
        now.parent.table,
        found=f"left on {', '.join(left[:3])}" if left else "one index a partition",
        needed="one index a partition",
        danger="every write pays for each index that is left",
        do="run operate/rebuild_index again with execute: true",
    )


def undo_plan(phase: Phase) -> db.Plan:
    """Each partition whose options are others than before the last round, built again with those; and leftovers."""
    return db.Plan(tuple(s.statement for s in _steps_back(phase)), phase.connection)


def _steps_back(phase: Phase) -> list[Step]:
    now, former = partition_indexes.standing(phase), (_round(phase) or {}).get("before", {})
    todo = _leftovers(phase, now)
    for part in now.leaves:
        before = former.get(part.shown)
        if before and part.oid in now.own and not before.items() <= stored(now.own[part.oid].options).items():
            todo += _anew(phase, now, part, before)
    return todo


@changes
def undo(phase: Phase) -> Table:
    """Carries out the way back, and closes the round."""
    todo = _steps_back(phase)
    if not phase.execute:
        return phase.carry_out(undo_plan(phase))
    done = [_take(phase, step, n, len(todo)) for n, step in enumerate(todo)]
    if last := _round(phase):
        phase.note("rebuild", last | {"open": False, "undone": True, "run_id": phase.run_id})
    return Table(("partition", "what", "lock", "seconds"), done)
