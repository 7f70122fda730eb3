"""The vector indexes of a table, and what each is to a rebuild."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runbook_lib.core import db
from runbook_lib.core.display import Table, size
from runbook_lib.core.names import index_name, shortened, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.indexes import partition_indexes
from runbook_lib.indexes.building import OF_REINDEX
from runbook_lib.indexes.options import Options, listed, stored
from runbook_lib.operate import rebuild_partitions, storage_switch
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("rebuild")

WHAT_IT_IS = {
    "current": "serves",
    "new": "built beside, not in its place yet",
    "old": "served before; dropped as the last step",
    "leftover": "left by a REINDEX CONCURRENTLY that did not finish",
    "other": "not the runbook's",
}


@dataclass(frozen=True)
class Standing:
    """One vector index of the table: what it is to a rebuild, and whether queries can use it."""

    name: str
    role: str
    usable: bool
    storage: str
    options: Options
    bytes: int
    oid: int
    builds_under_way: int


def new_name(params: Params) -> str:
    """Name of the index while it stands beside the one that serves."""
    return shortened(index_name(params), "_new")


def old_name(params: Params) -> str:
    """Name of the index that served before, until it is dropped."""
    return shortened(index_name(params), "_old")


def standing(phase: Phase) -> list[Standing]:
    """Every vector index of the table, as pg_index has it; those of partitions as one."""
    if partition_indexes.is_needed(phase):
        return _of_partitions(phase)
    values = {"vectors": spelled(phase.params, "vectors"), "column": phase.params.vector.column}
    found = db.rows(phase.connection, SQL["standing"], phase.params, **values)
    return [
        Standing(
            row["name"],
            _role(phase.params, row),
            row["usable"],
            storage_switch.storage_of(phase.params, row),
            stored(row["options"]),
            row["bytes"],
            row["oid"],
            row["builds_under_way"],
        )
        for row in found
    ]


def _of_partitions(phase: Phase) -> list[Standing]:
    """The whole index; while a round is under way, a second entry says so."""
    now = partition_indexes.standing(phase)
    if now.root is None:
        return []
    own = [now.own[part.oid] for part in now.leaves if part.oid in now.own]
    options = stored(own[0].options) if own else {}
    # The youngest of its oids, since REINDEX gives each partition's index another.
    whole = Standing(
        name=now.parent.index,
        role="current",
        usable=now.is_whole,
        storage=phase.params.index.storage,
        options=options,
        bytes=now.bytes,
        oid=max((x.oid for x in own), default=now.root.oid),
        builds_under_way=max((x.builds_under_way for x in now.found), default=0),
    )
    begun = rebuild_partitions.is_under_way(phase)
    return [whole, replace(whole, name=f"{whole.name}, partition by partition", role="new")] if begun else [whole]


def _role(params: Params, row: db.Row) -> str:
    own = {index_name(params): "current", new_name(params): "new", old_name(params): "old"}
    # A whole index of such a name was never left over: somebody chose the name.
    left_over = bool(OF_REINDEX.search(row["name"])) and not row["usable"]
    return own.get(row["name"], "leftover" if left_over else "other")


def shown(phase: Phase) -> Table:
    """The vector indexes of the table, and what each is to this operation."""
    return Table(
        ("index", "what it is", "usable", "holds", "options", "size"),
        [
            (s.name, WHAT_IT_IS[s.role], s.usable, s.storage, listed(s.options), size(s.bytes))
            for s in standing(phase)
        ],
    )


def one(found: list[Standing], role: str) -> Standing | None:
    """The index of a role; None where there is none."""
    return next((s for s in found if s.role == role), None)
