"""Does the plan fit on each node of Citus: disk, and the memory of the builds that it does at once. Each node is
asked by the coordinator; its share of the plan is its share of the table's bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

from runbook_lib.core import db, thresholds
from runbook_lib.core.display import number, size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import literal, spelled
from runbook_lib.core.thresholds import apart
from runbook_lib.indexes.forecast import Forecast
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("citus")
GB = 1024**3
DANGER = "the disk fills half-way; without room for WAL the node stops, with all that it serves"


@dataclass(frozen=True)
class Node:
    """What a node has of the table, in bytes, and to spare.
    at_once: builds that Citus begins there together.
    """

    name: str
    shards: int
    heap_bytes: int
    memory_bytes: int
    free_disk_bytes: int
    max_wal_bytes: int
    at_once: int


def look(connection: db.Connection, params: Params) -> tuple[list[Node], dict[str, str]]:
    """The nodes that hold shards of the table, and what those say that do not tell."""
    own = {"table_name": literal(spelled(params, "table"))}
    command = SQL["node_sizes"].compose(own).as_string(connection).replace("%%", "%")
    pool = int(db.one(connection, SQL["builds_at_once"], params)["builds"])
    found = db.rows(connection, SQL["on_all_nodes"], params, command=command)
    answers = {row["node"]: json.loads(row["result"]) for row in found if row["success"]}
    silent = {row["node"]: row["result"] for row in found if not row["success"]}
    return [Node(name, at_once=min(a["shards"], pool), **a) for name, a in answers.items() if a["shards"]], silent


def gates(connection: db.Connection, params: Params, expects: Forecast) -> Iterator[Gate]:
    """A gate a node: its disk holds its share of the plan. What memory its builds take at once is said. UNKNOWN for a
    node that does not tell.
    """
    nodes, silent = look(connection, params)
    for name, said in silent.items():
        yield gate(
            "preflight.node_holds_it",
            None,
            name,
            found=said,
            needed="what it has of the table, and its free disk",
            danger=DANGER,
            do="see that the node is up and lets this role in",
        )
    whole = sum(n.heap_bytes for n in nodes) or 1
    for n in nodes:
        yield _holds_it(params, n, n.heap_bytes / whole, expects)


def _holds_it(params: Params, n: Node, share: float, expects: Forecast) -> Gate:
    """expects: of the whole table; its memory is that of the largest shard."""
    parts = [round(share * b) for b in (expects.index_bytes, expects.table_growth_bytes, expects.staging_bytes)]
    wal = min(n.max_wal_bytes, round(share * expects.wal_bytes))
    wanted = sum(parts) + wal
    stated = params.preflight.free_disk_gb
    free = n.free_disk_bytes if stated is None else round(stated * GB)
    there, needed = apart(free, wanted, thresholds.size)
    memory = n.at_once * min(expects.build_memory_bytes, n.memory_bytes)
    index, table, staging = map(size, parts)
    return gate(
        "preflight.node_holds_it",
        wanted <= free,
        n.name,
        found=f"free disk {there}; {n.at_once} of its {number(n.shards)} shards' indexes are built at once, in"
        f" {size(memory)} of memory together",
        needed=f"{needed}: index {index}, table {table}, staging {staging}, WAL at one time {size(wal)}",
        danger=DANGER,
        do=f"free or add {size(max(wanted - free, 0))} there, or move shards: SELECT rebalance_table_shards();",
        figures={"wanted_bytes": wanted, "free_bytes": free, "memory_bytes": memory, "builds_at_once": n.at_once},
    )
