"""How the backfill divides the rows into batches: picked from the table's own facts, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.backfill.update_effects import Effects, found_room
from runbook_lib.core import db, query_plan, table_kind, versions
from runbook_lib.core.display import number
from runbook_lib.core.gates import BadInput, Gate, Verdict
from runbook_lib.core.names import added_columns, identifier, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("backfill")
WINDOWS = load("windows")

Strategy = Literal["page_interleaved", "key_ranges", "side_table"]

# Below this share of updates that stay on their page, ranking the rows of a page costs more than it saves.
LEAST_HOT_SHARE = 0.3
# PostgreSQL's TOAST_TUPLE_THRESHOLD with pages of eight kilobytes, and what stays in the row of a value beyond it.
TOAST_THRESHOLD, TOAST_POINTER = 2032, 18


@dataclass(frozen=True)
class Relation:
    """The table, or one leaf of a partitioned table."""

    part: str
    blocks: int
    access_method: str
    indexes: int
    slow_indexes: tuple[str, ...]


@dataclass(frozen=True)
class StrategyChoice:
    """What was picked and why."""

    strategy: Strategy
    reason: str

    def __str__(self) -> str:
        return f"{self.strategy}: {self.reason}"


def relations(connection: db.Connection, params: Params) -> list[Relation]:
    """The table, or the leaves of a partitioned one."""
    found = db.rows(connection, WINDOWS["relations"], params, table=spelled(params, "table"))
    return [Relation(**{**r, "slow_indexes": tuple(r["slow_indexes"])}) for r in found]


def pick(
    params: Params, server_version: int, found: list[Relation], *, reads_ranges: bool, tried: Effects | None = None
) -> StrategyChoice:
    """The strategy for these relations. reads_ranges: the planner reads a range of blocks as such. tried: the trial
    of the UPDATE; it only informs, since the first ranges show what stays on its page.

    Raises BadInput where the parameters ask for what the server cannot do.
    """
    if why := vector_store.of(params).promoted:
        return StrategyChoice("side_table", why)
    if not table_kind.of(params).has_pages_here:
        return StrategyChoice("key_ranges", "the table is distributed: its pages lie on other servers")
    largest = max(found, key=lambda r: r.blocks, default=None)
    if largest is None or not reads_ranges:
        why = _why_no_ranges(server_version, largest)
        if params.backfill.strategy == "page_interleaved":
            raise BadInput([_impossible(why)])
        return StrategyChoice("key_ranges", why)
    forecast = f"; {number(tried.rows)} rows tried, {found_room(tried)}" if tried and tried.rows else ""
    if params.backfill.strategy != "auto":
        return StrategyChoice(params.backfill.strategy, f"asked for by backfill.strategy{forecast}")
    if largest.indexes <= 1:
        return StrategyChoice("key_ranges", "the table has no index but its key's, so a row that moves costs little")
    slow = f", {' and '.join(sorted(set(largest.slow_indexes)))} among them" if largest.slow_indexes else ""
    return StrategyChoice(
        "page_interleaved",
        f"the table has {largest.indexes} indexes{slow}{forecast}; the first ranges show how many stay",
    )


def _why_no_ranges(server_version: int, largest: Relation | None) -> str:
    if largest is None:
        return "the target is no ordinary table, so it has no blocks to go through"
    if not versions.scans_ranges_of_blocks(server_version):
        return f"PostgreSQL {versions.readable(server_version)} cannot read a range of blocks; 14 and newer can"
    return f"the planner does not read {largest.part} ({largest.access_method}) by ranges of blocks"


def _impossible(why: str) -> Gate:
    return Gate(
        "backfill.strategy_is_possible",
        Verdict.FAIL,
        "backfill.strategy",
        "page_interleaved",
        "a server and a table that are read by ranges of blocks",
        why,
        "set backfill.strategy: auto",
    )


def choose(connection: db.Connection, params: Params, tried: Effects | None = None) -> StrategyChoice:
    """Looks at the table, asks the planner, and picks."""
    found = relations(connection, params)
    version, p = connection.info.server_version, params
    has_pages = not vector_store.of(p).promoted and table_kind.of(p).has_pages_here
    asks = has_pages and versions.scans_ranges_of_blocks(version)
    ranges = asks and all(_reads_ranges(connection, params, r.part) for r in found)
    return pick(p, version, found, reads_ranges=ranges, tried=tried)


def _reads_ranges(connection: db.Connection, params: Params, part: str) -> bool:
    with connection.transaction():
        connection.execute("SET LOCAL enable_seqscan = off")
        values = {"from_tid": "(0,0)", "to_tid": "(1,0)"}
        plan = query_plan.explain(connection, ranked(connection, params, part), values)
    return plan.has("Tid Range Scan")


def ranked(connection: db.Connection, params: Params, part: str) -> sql.Composed:
    """The query that ranks the rows of a range of blocks within their block."""
    extra = {"part": verbatim(part), "row_bytes": _row_bytes(connection, params)}
    return SQL["ranked"].compose(names(params) | extra)


def _row_bytes(connection: db.Connection, params: Params) -> sql.Composable:
    """What decides a row's size on its page; a value in TOAST leaves only its pointer."""
    table, added = spelled(params, "table"), added_columns(params)
    wide = db.rows(connection, WINDOWS["wide_columns"], params, table=table, added=added)
    one = "CASE WHEN pg_column_size({c}) > {most} THEN {pointer} ELSE coalesce(pg_column_size({c}), 0) END"
    limits = {"most": sql.Literal(TOAST_THRESHOLD), "pointer": sql.Literal(TOAST_POINTER)}
    parts = [sql.SQL(one).format(c=identifier("t", row["name"]), **limits) for row in wide]
    if not parts:
        return sql.SQL("0")
    # Together too long, the longest of them goes to TOAST, whatever its own length.
    together = "{all} - CASE WHEN {all} > {most} THEN greatest({each}) - {pointer} ELSE 0 END"
    return sql.SQL(together).format(all=sql.SQL(" + ").join(parts), each=sql.SQL(", ").join(parts), **limits)
