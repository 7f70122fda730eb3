"""The plan of a statement, as EXPLAIN gives it in JSON. Every plan that this project reads is read here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from runbook_lib.core import session

Node = Mapping[str, Any]
# The number of its shard that ends the name of each table and index on a worker of Citus.
SHARD = re.compile(r"_\d+$")
PAGES = ("Shared Hit Blocks", "Shared Read Blocks")
# So few rows are read sooner than an index is entered, so the planner is right to.
SMALL_PARTITION_ROWS = 1000
# What the planner would do, and what it did do, counted.
PLANNED = sql.SQL("EXPLAIN (FORMAT JSON) {}")
CARRIED_OUT = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {}")


@dataclass(frozen=True)
class QueryPlan:
    """A plan. top: its uppermost node, empty where the server gave none. triggers: those that were called."""

    top: Node
    triggers: frozenset[str] = frozenset()

    def nodes(self) -> list[tuple[Node, bool]]:
        """Every node, from the top, and whether a LIMIT is above it."""
        return list(_below(self.top))

    @property
    def indexes(self) -> list[str]:
        """The names of the indexes that are read."""
        return list(dict.fromkeys(n["Index Name"] for n, _ in self.nodes() if "Index Name" in n))

    @property
    def read_whole(self) -> list[str]:
        """The relations of which every row is read, however the plan comes to them."""
        return [n["Relation Name"] for n, _ in self.nodes() if "Relation Name" in n and not _is_looked_up(n)]

    def has(self, node_type: str) -> bool:
        """Is there a node of this type, or of one that contains its name?"""
        return any(node_type in n.get("Node Type", "") for n, _ in self.nodes())

    @property
    def cost(self) -> float:
        """The planner's price of all of it."""
        return float(self.top.get("Total Cost", 0))

    @property
    def pages(self) -> int:
        """Pages of 8 kB that were touched; 0 where the statement was not carried out."""
        touched = [(self.top, 1), *((n, n["Tasks"]) for n, _ in self.nodes() if "Tasks" in n)]
        return int(sum(n.get(name, 0) * tasks for n, tasks in touched for name in PAGES))

    def _scan(self) -> tuple[Node, bool]:
        """The scan that orders by distance, else the first that reads a relation; and whether it is limited."""
        found = self.nodes()
        ordered = (pair for pair in found if "Order By" in pair[0])
        reading = (pair for pair in found if "Relation Name" in pair[0])
        return next(ordered, next(reading, ({}, False)))

    @property
    def limited(self) -> bool:
        """Is there a LIMIT above the scan?"""
        return self._scan()[1]

    @property
    def scan(self) -> str:
        """The scan in words: its kind and what it reads, and the partitions that are read whole."""
        scan, _ = self._scan()
        # A bitmap's heap scan does not say by which index it finds its rows; the scan below it does.
        reads = next((n for n, _ in _below(scan) if "Index Name" in n), scan)
        described = f"{reads.get('Node Type', 'no scan')} {reads.get('Index Name') or reads.get('Relation Name', '')}"
        ordered = sum("Order By" in n for n, _ in self.nodes())
        if ordered > 1:
            described = f"Merge Append of {ordered} index scans, {described} the first"
        if self.sorted_whole:
            whole = ", ".join(f"{name} ({rows} rows)" for name, rows in self.sorted_whole)
            described += f"; read whole: {whole}"
        return described.strip()

    @property
    def sorted_whole(self) -> list[tuple[str, int]]:
        """Partitions, with their rows, that a Merge Append reads whole and sorts, beside others that an index gives
        in order.
        """
        return [pair for node, _ in self.nodes() if node.get("Node Type") == "Merge Append" for pair in _sorted(node)]

    @property
    def by_index(self) -> str:
        """The index that orders by distance, unless a partition that is not small is read without it."""
        large = any(rows > SMALL_PARTITION_ROWS for _, rows in self.sorted_whole)
        scan, _ = self._scan()
        return "" if large or "Order By" not in scan else str(scan.get("Index Name", ""))

    @property
    def by_another_index(self) -> bool:
        """Are the rows found by an index that knows nothing of their distance, and sorted afterwards?"""
        scan, _ = self._scan()
        return "Order By" not in scan and any("Index Name" in n for n, _ in _below(scan))


def explain(
    connection: session.Connection,
    statement: sql.Composable,
    values: Mapping[str, Any] | None = None,
    how: sql.SQL = PLANNED,
) -> QueryPlan:
    """The plan of a statement with these values; never prepared, so that it is planned by the settings of now.

    how: :data:`CARRIED_OUT` runs the statement and counts pages.
    """
    # A worker of Citus explains no parameter of type vector; from an array it makes one.
    bound = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in (values or {}).items()}
    row = connection.execute(how.format(statement), bound, prepare=False).fetchone()
    # A rule makes several statements of one, or none.
    found = [plan for plan in next(iter(row.values())) if isinstance(plan, dict)] if row else []
    called = frozenset(t["Trigger Name"] for plan in found for t in plan.get("Triggers", ()))
    return QueryPlan(_with_remote_parts(found[0].get("Plan", {})) if found else {}, called)


def _with_remote_parts(node: Node) -> Node:
    """The plan with what Citus shows of its workers' plans in place: below the scan that collects their rows, with
    the names that the coordinator has for their tables and indexes.
    """
    below = [_with_remote_parts(child) for child in node.get("Plans", [])]
    job = node.get("Distributed Query", {}).get("Job", {})
    for task in (tasks := job.get("Tasks", [])):
        shown = [plan for part in task.get("Remote Plan", []) for plan in part if isinstance(plan, dict)]
        # One task stands for those that Citus does not show.
        alike = {"Tasks": job.get("Task Count", 1) / len(tasks)}
        below += [_without_shard(plan["Plan"]) | alike for plan in shown if "Plan" in plan]
    return {**node, "Plans": below} if below else node


def _without_shard(node: Node) -> dict[str, Any]:
    named = {name: SHARD.sub("", node[name]) for name in ("Index Name", "Relation Name") if name in node}
    return {**node, **named, "Plans": [_without_shard(child) for child in node.get("Plans", [])]}


def _below(node: Node, limited: bool = False) -> Iterator[tuple[Node, bool]]:
    yield node, limited
    for child in node.get("Plans", []):
        yield from _below(child, limited or node.get("Node Type") == "Limit")


def _is_looked_up(node: Node) -> bool:
    # The condition of a bitmap's heap scan is that of the index scan below it.
    return any("Index Cond" in n for n, _ in _below(node))


def _sorted(append: Node) -> Iterator[tuple[str, int]]:
    branches = [[n for n, _ in _below(child)] for child in append.get("Plans", [])]
    if not any("Order By" in n for branch in branches for n in branch):
        return
    for branch in branches:
        if not any("Order By" in n for n in branch):
            yield from ((n["Relation Name"], n["Plan Rows"]) for n in branch if "Relation Name" in n)
