"""What the catalogue knows of a table's vector indexes: the names, options and state of each.

A vector index is a tree as its table is one: an index on each partition, attached to one on the parent that holds no
row. An ordinary table is the tree with one leaf, so nothing else needs to know which of the two it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from runbook_lib.core import db
from runbook_lib.core.display import Table, size
from runbook_lib.core.names import index_name, operator_class, shortened, spelled, unquoted
from runbook_lib.indexes import partitions, shards
from runbook_lib.indexes.partitions import Part, PartIndex
from runbook_lib.indexes.shards import ShardIndex
from runbook_lib.params import Params

Options = dict[str, int]
Role = Literal["current", "new", "old", "leftover", "other"]

# What the names of an index end with, by what it is to a rebuild.
TAILS: dict[str, Role] = {"": "current", "_new": "new", "_old": "old"}
# What REINDEX CONCURRENTLY calls the index that it builds, and the one that it replaces; a number follows the second.
OF_REINDEX = re.compile(r"_cc(new|old)\d*$")
WHAT_IT_IS = {
    "current": "serves",
    "new": "built, not in its place yet",
    "old": "served before; dropped as the last step",
    "leftover": "left by a REINDEX CONCURRENTLY that did not finish",
    "other": "not the runbook's",
}


@dataclass(frozen=True)
class VectorIndex:
    """One vector index of a table, built, half built or not begun.

    tail: what its names end with. parts: the table and its partitions, parents first. own: by the oid of a relation
    the index on it that is part of this one, attached already or not. shards: where Citus distributes the table, the
    index on each of its shards.
    """

    params: Params
    parts: tuple[Part, ...]
    tail: str = ""
    role: Role = "current"
    own: Mapping[int, PartIndex] = field(default_factory=dict)
    shards: tuple[ShardIndex, ...] = ()

    @property
    def root(self) -> PartIndex | None:
        """The index on the table itself."""
        return self.own.get(self.parts[0].oid)

    @property
    def leaves(self) -> list[Part]:
        """The partitions that hold rows; an ordinary table itself."""
        return partitions.leaves(self.parts)

    @property
    def name(self) -> str:
        """Of the index on the table itself."""
        return self.name_on(self.parts[0])

    def name_on(self, part: Part) -> str:
        """The name of the index on one relation, or the one that it is to get."""
        own = self.own.get(part.oid)
        return own.name if own else planned_name(self.params, part, self.tail)

    def is_attached(self, part: Part) -> bool:
        """Is this relation's index part of its parent's?"""
        own, above = self.own.get(part.oid), self.own.get(part.parent or 0)
        return own is not None and above is not None and own.attached_to == above.oid

    @property
    def lacking(self) -> list[Part]:
        """The leaves whose index is missing, invalid or not attached to that of their parent."""
        return [x for x in self.leaves if not self._serves(x)]

    def _serves(self, leaf: Part) -> bool:
        own = self.own.get(leaf.oid)
        is_top = leaf.oid == self.parts[0].oid
        return own is not None and own.usable and (is_top or self.is_attached(leaf))

    @property
    def usable(self) -> bool:
        """Can every query use it, on every partition?"""
        return self.root is not None and self.root.usable and not self.lacking and not self.lacking_shards

    @property
    def lacking_shards(self) -> list[ShardIndex]:
        """The shards whose index is missing, invalid, or on a node that does not answer."""
        return [x for x in self.shards if not x.usable]

    @property
    def bytes(self) -> int:
        """Of all partitions, or all shards."""
        return sum(own.bytes for own in self.own.values()) + sum(x.bytes for x in self.shards)

    @property
    def oid(self) -> int:
        """Of the index on the table itself; 0 where there is none."""
        return self.root.oid if self.root else 0

    @property
    def builds_under_way(self) -> int:
        """Builds of any index that are at work on a relation of this one."""
        return max((own.builds_under_way for own in self.own.values()), default=0)

    @property
    def storage(self) -> str:
        """What it holds, by the catalogue: a value of ``index.storage``, or "other"."""
        held = {_held(self.params, own) for own in self.own.values()}
        return held.pop() if len(held) == 1 else "other"

    @property
    def rows(self) -> str:
        """Which it holds, by the catalogue: a value of ``index.rows``, or "other"."""
        held = {"always" if own.partial else "all" for own in self.own.values()}
        return held.pop() if len(held) == 1 else "other"

    @property
    def options(self) -> Options:
        """Of the index on the table itself, which later partitions get too; empty where there is none."""
        return stored(self.root.options) if self.root else {}

    @property
    def other_options(self) -> dict[str, Options]:
        """Options of the partitions whose own are others, by partition: IVFFlat's lists follow their rows."""
        own = {part.shown: stored(self.own[part.oid].options) for part in self.leaves if part.oid in self.own}
        return {shown: options for shown, options in own.items() if options != self.options}

    def has_options(self, wanted: Options) -> bool:
        """Has every index in it these options?"""
        return all(wanted.items() <= stored(own.options).items() for own in self.own.values())

    def called(self, tail: str) -> VectorIndex:
        """The same index once each of its names ends with another tail."""
        renamed = {
            part.oid: replace(self.own[part.oid], name=planned_name(self.params, part, tail))
            for part in self.parts
            if part.oid in self.own
        }
        return replace(self, tail=tail, role=TAILS[tail], own=renamed)


def planned_name(params: Params, part: Part, tail: str = "") -> str:
    """The name that an index gets on one relation; where it must be cut, with digits that no other partition has."""
    if part.level == 0:
        return shortened(index_name(params), tail)
    return shortened(part.name, f"_{params.vector.column}_{params.index.method}{tail}", unlike=part.shown)


def find(connection: db.Connection, params: Params, tail: str = "") -> VectorIndex:
    """The index that these parameters name, as the catalogue has it now."""
    parts = _parts(connection, params)
    found = _ours(params, parts, _indexes(connection, params, parts), tail)
    return replace(found, shards=shards.look(connection, params, found.root.shown)) if found.root else found


def every(connection: db.Connection, params: Params) -> list[VectorIndex]:
    """Every vector index on the column, whole or left over, and what each is to a rebuild, by name.

    A partition's index that is part of none comes as one of its own. Another target's on its own column are left out.
    """
    parts = _parts(connection, params)
    found = _indexes(connection, params, parts)
    ours = [index for tail in TAILS if (index := _ours(params, parts, found, tail)).own]
    known = {own.oid for index in ours for own in index.own.values()}
    by_oid = {part.oid: part for part in parts}
    loose = (x for x in found if x.oid not in known and x.attached_to is None and x.on_column)
    others = [_tree(params, _below(parts, by_oid[x.relation]), found, x, _role(x)) for x in loose]
    return sorted([*ours, *others], key=lambda index: index.name)


def one(found: Iterable[VectorIndex], role: Role) -> VectorIndex | None:
    """The index of a role; None where there is none."""
    return next((index for index in found if index.role == role), None)


def shown(connection: db.Connection, params: Params) -> Table:
    """The vector indexes of the table, and what each is to a rebuild."""
    return Table(
        ("index", "what it is", "usable", "holds", "options", "size"),
        [
            (x.name, WHAT_IT_IS[x.role], x.usable, x.storage, listed(x.options), size(x.bytes))
            for x in every(connection, params)
        ],
    )


def _parts(connection: db.Connection, params: Params) -> tuple[Part, ...]:
    table = spelled(params, "vectors")
    return tuple(partitions.tree(connection, params, table)) or (partitions.relation(params),)


def _indexes(connection: db.Connection, params: Params, parts: Sequence[Part]) -> list[PartIndex]:
    return partitions.indexes(connection, params, parts, index_name(params))


def _ours(params: Params, parts: tuple[Part, ...], found: Sequence[PartIndex], tail: str) -> VectorIndex:
    """The index with these names; a partition's own that was built and not attached yet is known by its name."""
    own: dict[int, PartIndex] = {}
    for part in parts:
        above, wanted = own.get(part.parent or 0), planned_name(params, part, tail)
        here = [x for x in found if x.relation == part.oid]
        attached = [x for x in here if above is not None and x.attached_to == above.oid]
        by_name = [x for x in here if x.name == wanted and x.attached_to is None]
        if mine := [*attached, *by_name]:
            own[part.oid] = mine[0]
    return VectorIndex(params, parts, tail, TAILS[tail], own)


def _tree(
    params: Params, parts: tuple[Part, ...], found: Sequence[PartIndex], top: PartIndex, role: Role
) -> VectorIndex:
    """The index on the first of these relations, with those that are attached to it."""
    own = {top.relation: top}
    for part in parts[1:]:
        above = own.get(part.parent or 0)
        own |= {x.relation: x for x in found if x.relation == part.oid and above and x.attached_to == above.oid}
    return VectorIndex(params, parts, role=role, own=own)


def _below(parts: Sequence[Part], top: Part) -> tuple[Part, ...]:
    """A relation and what is below it, parents first."""
    oids = {top.oid}
    for part in parts:
        if part.parent in oids:
            oids.add(part.oid)
    return tuple(part for part in parts if part.oid in oids)


def _role(index: PartIndex) -> Role:
    # A whole index of such a name was never left over: somebody chose the name.
    return "leftover" if OF_REINDEX.search(index.name) and not index.usable else "other"


def _held(params: Params, own: PartIndex) -> str:
    if own.operator_class.startswith("bit_"):
        return "bit"
    if unquoted(params, own.indexed) == params.vector.column:
        return "vector"
    return "halfvec" if own.operator_class.startswith("halfvec_") else "other"


def described(params: Params, own: PartIndex) -> str:
    """Method, operator class and column of an index, as :func:`wanted` writes them."""
    some = ", of some rows" if own.partial else ""
    return f"{own.method} with {own.operator_class} on {unquoted(params, own.indexed)}{some}"


def wanted(params: Params) -> str:
    """Method, operator class and column that the parameters ask for."""
    some = ", of some rows" if params.index.rows == "always" else ""
    column = unquoted(params, spelled(params, "indexed"))
    return f"{params.index.method} with {operator_class(params)} on {column}{some}"


def asked_for(params: Params) -> Options:
    """The options that the parameters ask for; lists only where they are given."""
    i = params.index
    if i.method == "hnsw":
        return {"m": i.m, "ef_construction": i.ef_construction}
    return {"lists": i.lists} if i.lists else {}


def stored(reloptions: Sequence[str]) -> Options:
    """Of an index as pg_class has them; pgvector's defaults are not written there, and the runbook writes its own."""
    return {name: int(value) for name, _, value in (o.partition("=") for o in reloptions) if value.isdigit()}


def listed(options: Options) -> str:
    """As a reader sees them; empty where there are none."""
    return ", ".join(f"{name} {value}" for name, value in options.items())
