"""What a partitioned table consists of: its partitions, at any depth, and the vector index that each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runbook_lib.core import db
from runbook_lib.core.names import has_side_table, side_table_name, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("partitions")

# pg_class.relkind of what may stand in a partition tree.
PARTITIONED, TABLE = "p", "r"


@dataclass(frozen=True)
class Part:
    """One relation of the tree. shown: as SQL spells it. parent: oid, None for the root. rows: the planner's."""

    oid: int
    parent: int | None
    level: int
    schema: str
    name: str
    shown: str
    kind: str
    rows: int

    @property
    def is_leaf(self) -> bool:
        """Does it hold rows itself?"""
        return self.kind != PARTITIONED


@dataclass(frozen=True)
class PartIndex:
    """A vector index of one relation. attached_to: oid of the partitioned index that it is part of, or None.

    indexed: its column or expression, as PostgreSQL writes it. on_column: is that of the target's own vectors?
    """

    relation: int
    oid: int
    schema: str
    name: str
    shown: str
    usable: bool
    attached_to: int | None
    method: str
    operator_class: str
    indexed: str
    options: tuple[str, ...]
    partial: bool
    on_column: bool
    bytes: int
    builds_under_way: int


def tree(connection: db.Connection, params: Params, table: str) -> list[Part]:
    """The table and its partitions, parents before children; empty where there is no such table.

    table: as SQL spells it. An ordinary table is the only one in its tree.
    """
    return [Part(**row) for row in db.rows(connection, SQL["tree"], params, table=table)]


def relation(params: Params) -> Part:
    """The relation that holds the vectors, or will, by its name alone: as one leaf, whatever it is."""
    name = side_table_name(params) if has_side_table(params) else params.target.table
    schema = params.target.schema_
    return Part(0, None, 0, schema, name, f"{schema}.{name}", TABLE, 0)


def is_there(connection: db.Connection, params: Params, part: Part) -> bool:
    """Is this still the relation that holds the vectors, or a partition of it?"""
    return part.oid in {x.oid for x in tree(connection, params, spelled(params, "vectors"))}


def leaves(parts: Sequence[Part]) -> list[Part]:
    """Those that hold rows."""
    return [part for part in parts if part.is_leaf]


def indexes(connection: db.Connection, params: Params, parts: Sequence[Part], name: str = "") -> list[PartIndex]:
    """Every vector index on these relations, attached or not, whole or left over; and any index of this name."""
    values = {"relations": [part.oid for part in parts], "column": params.vector.column, "name": name}
    found = db.rows(connection, SQL["indexes"], params, **values)
    return [PartIndex(**row | {"options": tuple(row["options"])}) for row in found]


def with_their_parents(connection: db.Connection, params: Params, names: Sequence[str]) -> set[str]:
    """These indexes, by name, and the partitioned indexes that they are part of: a plan names a partition's own."""
    found = db.rows(connection, SQL["with_their_parents"], params, names=list(names))
    return {row["name"] for row in found}


def without_index(connection: db.Connection, params: Params, table: str) -> list[str]:
    """The partitions of this table, as SQL spells them, that have no usable vector index; none of an ordinary one."""
    parts = tree(connection, params, table)
    if not parts or parts[0].kind != PARTITIONED:
        return []
    usable = {x.relation for x in indexes(connection, params, parts) if x.usable}
    return [part.shown for part in leaves(parts) if part.oid not in usable]
