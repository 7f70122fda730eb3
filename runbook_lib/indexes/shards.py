"""The vector index on each shard of a table that Citus distributes. The coordinator knows only its own, which has no
row, and takes those of the shards for valid whatever becomes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runbook_lib.core import db, table_kind
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("citus")

State = Literal["valid", "invalid", "missing", "unknown"]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's index. relation, name: as SQL spells them on its node; bare_name: without its schema and quotes.
    state: unknown where the node does not say, and ``said`` is then what it says. coordinator: is it this server that
    holds the shard? heap_bytes: of the shard. blocks_done: of a build that is under way.
    """

    shard: int
    node: str
    port: int
    coordinator: bool
    relation: str
    name: str
    bare_name: str
    state: State
    bytes: int
    heap_bytes: int
    blocks_done: int
    said: str = ""

    def __str__(self) -> str:
        what = self.said if self.state == "unknown" else self.state
        return f"that of {self.relation} on {self.node}:{self.port} is {what}"

    @property
    def usable(self) -> bool:
        """Can every query use it?"""
        return self.state == "valid"


def look(connection: db.Connection, params: Params, index: str) -> tuple[ShardIndex, ...]:
    """That of every shard, by the catalogue of the node that holds it; none of an ordinary table.

    index: the one on the distributed table, as SQL spells it. A shard with several copies comes once for each.
    """
    if table_kind.of(params).has_pages_here:
        return ()
    values = {"table": spelled(params, "table"), "index": index}
    return tuple(ShardIndex(**row) for row in db.rows(connection, SQL["shard_indexes"], params, **values))
