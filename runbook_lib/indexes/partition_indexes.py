"""Phase 60 on a partitioned table: PostgreSQL builds no partitioned index concurrently, so it is put together.

An index on the parent alone is a bracket without rows. Each partition's own is built concurrently and attached; with
the last one the bracket turns valid, and a partition that is made later gets its index from PostgreSQL. Every step is
found in the catalogue, so what was stopped between two goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.display import Table, number, size, some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, index_name, names, operator_class, shortened, spelled, unquoted
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes import forecast, partitions
from runbook_lib.indexes.building import Built, concurrently
from runbook_lib.indexes.partitions import Part, PartIndex
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("index_partitions")

SHOWN_PARTITIONS = 3
# A partition that appears while the last one is built is taken in another round; so many are enough for anybody.
MOST_ROUNDS = 10
# What DDL in a transaction does; everything else runs CONCURRENTLY on a connection of its own.
IN_SHORT_TRIES = ("create_bracket_hnsw", "create_bracket_ivfflat", "attach", "drop_bracket", "set_options")


@dataclass(frozen=True)
class Parent:
    """A partitioned table, as SQL spells it, and the name of the vector index on it."""

    table: str
    index: str


@dataclass(frozen=True)
class Step:
    """A statement, and the partition that it is about."""

    part: Part
    statement: db.Statement


@dataclass(frozen=True)
class Standing:
    """The tree, and of each relation its own index in it: attached to its parent's, or to be attached."""

    parent: Parent
    parts: tuple[Part, ...]
    found: tuple[PartIndex, ...]
    own: dict[int, PartIndex]

    @property
    def root(self) -> PartIndex | None:
        """The bracket on the parent."""
        return self.own.get(self.parts[0].oid) if self.parts else None

    @property
    def leaves(self) -> list[Part]:
        """The partitions that hold rows."""
        return partitions.leaves(self.parts)

    def is_attached(self, part: Part) -> bool:
        """Is this relation's index part of its parent's?"""
        own, above = self.own.get(part.oid), self.own.get(part.parent or 0)
        return own is not None and above is not None and own.attached_to == above.oid

    @property
    def lacking(self) -> list[Part]:
        """The partitions that hold rows and whose index is missing, invalid or not attached."""
        return [
            x for x in self.leaves if x.oid not in self.own or not self.own[x.oid].usable or not self.is_attached(x)
        ]

    @property
    def is_whole(self) -> bool:
        """Is the bracket valid, and so every index in it?"""
        return self.root is not None and self.root.usable and not self.lacking

    @property
    def bytes(self) -> int:
        """Bytes of the indexes of all partitions."""
        return sum(own.bytes for own in self.own.values())


def target(phase: Phase) -> Parent:
    """The relation that holds the vectors, and the index on it by the parameters."""
    return Parent(spelled(phase.params, "vectors"), index_name(phase.params))


def is_needed(phase: Phase) -> bool:
    """Is the relation that holds the vectors partitioned?"""
    return partitions.is_partitioned(phase.connection, phase.params, target(phase).table)


def leaf_index_name(phase: Phase, part: Part) -> str:
    """Name of the index of one partition; where it must be cut, with digits that no other partition has."""
    return shortened(part.name, f"_{phase.params.vector.column}_{phase.params.index.method}", unlike=part.shown)


def standing(phase: Phase, parent: Parent | None = None) -> Standing:
    """The tree and its indexes, as the catalogue has them now."""
    parent = parent or target(phase)
    parts = partitions.tree(phase.connection, phase.params, parent.table)
    found = partitions.indexes(phase.connection, phase.params, parts)
    own: dict[int, PartIndex] = {}
    for part in parts:
        here = [x for x in found if x.relation == part.oid]
        above = own.get(part.parent or 0)
        wanted = parent.index if part.level == 0 else leaf_index_name(phase, part)
        attached = [x for x in here if above is not None and x.attached_to == above.oid]
        by_name = [x for x in here if x.name == wanted and x.attached_to is None]
        if mine := [*attached, *by_name]:
            own[part.oid] = mine[0]
    return Standing(parent, tuple(parts), tuple(found), own)


def _statement(phase: Phase, block: str, part: Part, **extra: sql.Composable) -> db.Statement:
    """A block about one relation; the lock that it shows names that relation."""
    made = db.statement(SQL[block], phase.params, {"relation": identifier(part.schema, part.name), **extra})
    return replace(made, lock=made.lock.replace("{relation}", part.shown))


def step(phase: Phase, block: str, part: Part, **extra: sql.Composable) -> Step:
    """A block of ``index_partitions.sql`` about one partition."""
    return Step(part, _statement(phase, block, part, **extra))


def _qualified(name: str, part: Part) -> sql.Composable:
    """An index stands in the schema of its table."""
    return identifier(part.schema, name)


def _build(phase: Phase, block: str, part: Part, name: str, rows: int) -> db.Statement:
    i = phase.params.index
    return _statement(
        phase,
        f"{block}_{i.method}",
        part,
        new_index=identifier(name),
        m=sql.Literal(i.m),
        ef_construction=sql.Literal(i.ef_construction),
        lists=sql.Literal(i.lists or forecast.lists_rule(rows)),
    )


def _rows(phase: Phase, part: Part) -> int:
    """Rows of a partition with a vector; IVFFlat's lists follow from them, HNSW does without."""
    if phase.params.index.method != "ivfflat" or phase.params.index.lists:
        return 0
    query = SQL["rows"].compose(names(phase.params) | {"relation": identifier(part.schema, part.name)})
    try:
        row = phase.connection.execute(query).fetchone()
    except psycopg.errors.UndefinedColumn:
        # A plan made ahead of 30_expand_schema.
        return part.rows
    return int(row["rows"]) if row else 0


def steps(phase: Phase, parent: Parent | None = None) -> list[Step]:
    """What is left to do: brackets from the top down, then each partition's index, attached once it is whole."""
    now = standing(phase, parent)
    todo: list[Step] = []
    called = {part.oid: _called(phase, now, part) for part in now.parts}
    by_oid = {part.oid: part for part in now.parts}
    most_rows = max((part.rows for part in now.leaves), default=0)
    for part in now.parts:
        if part.kind not in (partitions.PARTITIONED, partitions.TABLE):
            continue
        own, name = now.own.get(part.oid), called[part.oid]
        if own is not None and part.is_leaf and not own.usable:
            # What is part of another index cannot be dropped alone.
            mend = "reindex" if now.is_attached(part) else "drop"
            todo.append(Step(part, _statement(phase, mend, part, part_index=_qualified(name, part))))
            own = own if now.is_attached(part) else None
        if own is None and part.is_leaf:
            todo.append(Step(part, _build(phase, "create", part, name, _rows(phase, part))))
        elif own is None:
            todo.append(Step(part, _build(phase, "create_bracket", part, name, most_rows)))
        above = by_oid.get(part.parent or 0)
        if above is not None and (own is None or not now.is_attached(part)):
            pair = {
                "parent_index": _qualified(called[above.oid], above),
                "part_index": _qualified(name, part),
            }
            todo.append(Step(part, _statement(phase, "attach", part, **pair)))
    # All brackets first: from then on PostgreSQL gives each new partition its index by itself.
    return sorted(todo, key=lambda step: step.part.is_leaf)


def _called(phase: Phase, now: Standing, part: Part) -> str:
    """The name of the index that a relation has, or is to get."""
    own = now.own.get(part.oid)
    if own is not None:
        return own.name
    return now.parent.index if part.level == 0 else leaf_index_name(phase, part)


def plan(phase: Phase, parent: Parent | None = None) -> db.Plan:
    """The statements of :func:`steps`."""
    return db.Plan(tuple(step.statement for step in steps(phase, parent)), phase.connection)


@changes
def apply(phase: Phase, parent: Parent | None = None) -> Table:
    """Builds what is missing, partition by partition, and says which one it is at.

    A partition that appears meanwhile is taken too, one that is gone is passed over. Raises LockNotObtained where a
    partition's index could not be attached; run again, it goes on there.
    """
    if not phase.execute:
        return phase.carry_out(plan(phase, parent))
    rows: list[tuple[Any, ...]] = []
    for _ in range(MOST_ROUNDS):
        todo = steps(phase, parent)
        if not todo:
            break
        rows += [_take(phase, parent, step, where) for step, where in _numbered(todo)]
    _note_whole(phase, standing(phase, parent))
    return Table(("partition", "what", "lock", "seconds"), rows)


def _numbered(todo: Sequence[Step]) -> Iterator[tuple[Step, str]]:
    leaves = list(dict.fromkeys(step.part.oid for step in todo if step.part.is_leaf))
    for step in todo:
        place = f"partition {leaves.index(step.part.oid) + 1} of {len(leaves)}, " if step.part.is_leaf else ""
        yield step, f"{place}{step.part.shown}"


def _take(phase: Phase, parent: Parent | None, step: Step, where: str) -> tuple[Any, ...]:
    """Carries out one step; returns its row of the table."""
    block, part = step.statement.name.rsplit(".", 1)[-1], step.part
    if part.oid not in {x.oid for x in standing(phase, parent).parts}:
        print(f"  {where}: gone meanwhile, passed over")
        return (part.shown, "gone meanwhile, passed over", "none", 0.0)
    print(f"  {where}, about {number(part.rows)} rows" if part.is_leaf else f"  {where}")
    if block in IN_SHORT_TRIES:
        seconds = phase.do(step.statement).seconds
    else:
        built = concurrently(phase, step.statement)
        seconds = built.seconds
        if block != "drop":
            _note_part(phase, part, built, standing(phase, parent).own.get(part.oid))
    return (part.shown, step.statement.purpose, step.statement.lock, round(seconds, 3))


def _note_part(phase: Phase, part: Part, built: Built, own: PartIndex | None) -> None:
    """A ledger row of what the build of one partition's index took, and of what it warned of."""
    phase.note(
        "partition_index",
        {
            "index": own.shown if own else "",
            "partition": part.shown,
            "seconds": round(built.seconds, 3),
            "bytes": own.bytes if own else 0,
            "notices": built.notices,
            "samples": built.samples,
        },
    )


def _note_whole(phase: Phase, now: Standing) -> None:
    """A ledger row of the whole index, in the shape of an ordinary one, once there is nothing left to build.

    Partitions that an earlier, stopped run built count with what it noted.
    """
    if not now.is_whole or not now.leaves:
        return
    ours = {own.shown for own in now.own.values()}
    noted: dict[str, dict[str, Any]] = {}
    for entry in phase.ledger.entries():
        if entry["kind"] == "partition_index" and entry["body"]["index"] in ours:
            noted[entry["body"]["index"]] = entry["body"]
    samples: list[list[float]] = []
    for body in noted.values():
        began, before = (samples[-1][0], samples[-1][2]) if samples else (0.0, 0)
        samples += [[began + s, before + done, before + total] for s, done, total in body["samples"]]
    phase.note(
        "index",
        {
            "name": now.parent.index,
            "method": phase.params.index.method,
            "partitions": len(now.leaves),
            "seconds": round(sum(body["seconds"] for body in noted.values()), 3),
            "bytes": now.bytes,
            "notices": [f"{body['partition']}: {n}" for body in noted.values() for n in body["notices"]],
            "samples": samples,
        },
    )


def is_valid(phase: Phase, now: Standing) -> Gate:
    """Gate: the bracket is valid, and every partition has a valid index in it."""
    lacking, root = now.lacking, now.root
    whole = now.is_whole
    if root is None:
        found = "no such index"
    elif whole:
        found = f"valid, on each of {len(now.leaves)} partitions, {size(now.bytes)}"
    else:
        found = f"invalid: {_listed([_why(now, x) for x in lacking])}; of {len(now.leaves)} partitions"
    return gate(
        "index.is_valid",
        whole,
        f"{now.parent.index} on {now.parent.table}",
        found=found,
        needed="valid, with a valid index on every partition",
        danger="every search reads the partitions that lack theirs whole, yet every write pays for the others",
        do="run 60_build_index again with execute: true; it goes on with the partitions that lack theirs"
        if root
        else "run 60_build_index with execute: true",
        figures={"bytes": now.bytes, "partitions": len(now.leaves), "lacking": len(lacking)},
    )


def _why(now: Standing, part: Part) -> str:
    own = now.own.get(part.oid)
    if part.kind != partitions.TABLE:
        return f"{part.shown} is no table of this server and can have none"
    if own is None:
        return f"{part.shown} has none"
    return f"that of {part.shown} is {'not attached' if own.usable else 'invalid'}"


def _listed(what: Sequence[str]) -> str:
    return some(what, SHOWN_PARTITIONS) or "the index of the parent"


def has_right_class(phase: Phase, now: Standing) -> Gate:
    """Gate: the bracket and every index in it have the method, operator class and column of the parameters."""
    p = phase.params
    indexed = unquoted(p, spelled(p, "indexed"))
    wanted = f"{p.index.method} with {operator_class(p)} on {indexed}"
    by_part = {part.shown: _described(p, now.own[part.oid]) for part in now.parts if part.oid in now.own}
    other = {shown: what for shown, what in by_part.items() if what != wanted}
    return gate(
        "index.has_the_right_operator_class",
        not other,
        f"{now.parent.index} on {now.parent.table}",
        found=_listed([f"{what} on {shown}" for shown, what in other.items()])
        if other
        else f"{wanted}, on each of {len(by_part)}",
        needed=wanted,
        danger="queries with the distance that was asked for cannot use it",
        do="run undo/index, and 60_build_index again",
    )


def _described(params: Params, own: PartIndex) -> str:
    indexed = unquoted(params, own.indexed)
    return f"{own.method} with {own.operator_class} on {indexed}"


def undo_plan(phase: Phase, parent: Parent | None = None) -> db.Plan:
    """What no bracket holds is dropped concurrently; the bracket, with all that it holds, under a short lock."""
    now = standing(phase, parent)
    loose = [
        _statement(phase, "drop", part, part_index=_qualified(now.own[part.oid].name, part))
        for part in now.leaves
        if part.oid in now.own and not now.is_attached(part)
    ]
    brackets = [
        _statement(phase, "drop_bracket", part, part_index=_qualified(now.own[part.oid].name, part))
        for part in reversed(now.parts)
        if not part.is_leaf and part.oid in now.own and not now.is_attached(part)
    ]
    return db.Plan((*loose, *brackets), phase.connection)


@changes
def undo(phase: Phase, parent: Parent | None = None) -> Table:
    """Drops the index of every partition; does nothing where there is none."""
    todo = undo_plan(phase, parent)
    if not phase.execute:
        return phase.carry_out(todo)
    rows: list[tuple[Any, ...]] = []
    for statement in todo:
        in_tries = statement.name.rsplit(".", 1)[-1] in IN_SHORT_TRIES
        seconds = phase.do(statement).seconds if in_tries else concurrently(phase, statement).seconds
        rows.append((statement.purpose, statement.lock, round(seconds, 3)))
    return Table(("what", "lock", "seconds"), rows)


def is_gone(phase: Phase, now: Standing) -> Gate:
    """Gate: neither the bracket nor an index of ours on any partition is left."""
    left = [own.shown for own in now.own.values()]
    return gate(
        "index.is_gone",
        not left,
        f"{now.parent.index} on {now.parent.table}",
        found=f"still there: {_listed(left)}" if left else "no such index, on no partition",
        needed="no such index",
        danger="every write still pays for it",
        do="run undo/index again",
    )
