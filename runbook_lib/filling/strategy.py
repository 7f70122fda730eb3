"""How the backfill divides the rows into batches: picked from the table's own facts, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psycopg import sql

from runbook_lib import db, versions
from runbook_lib.display import number
from runbook_lib.forecast import PAGE, PAGE_HEADER, TOAST_THRESHOLD, TUPLE_HEADER, vector_bytes
from runbook_lib.gates import BadInput, Gate, Verdict
from runbook_lib.names import identifier, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.phase import Phase
from runbook_lib.schema import added_columns
from runbook_lib.sql import load

SQL = load("backfill")
WINDOWS = load("windows")

Strategy = Literal["page_interleaved", "key_ranges", "side_table"]

# Below this share of updates that stay on their page, ranking the rows of a page costs more than it saves.
LEAST_HOT_SHARE = 0.3
# A TOAST pointer; the timestamp; the hash with its length byte.
TOAST_POINTER = 18
TIME_AND_HASH = 8 + 17


@dataclass(frozen=True)
class Relation:
    """The table, or one leaf of a partitioned table. ``row_bytes`` is its heap divided by its rows."""

    part: str
    blocks: int
    access_method: str
    fillfactor: int
    rows: int
    indexes: int
    slow_indexes: tuple[str, ...]

    @property
    def row_bytes(self) -> float:
        return self.blocks * PAGE * self.fillfactor / 100 / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class Choice:
    """What was picked and why. hot_share: forecast share of updates that stay on their page, 0 to 1."""

    strategy: Strategy
    reason: str
    hot_share: float

    def __str__(self) -> str:
        return f"{self.strategy}: {self.reason}"


def relations(phase: Phase) -> list[Relation]:
    """The table, or the leaves of a partitioned one."""
    found = db.rows(phase.connection, WINDOWS["relations"], phase.params, table=spelled(phase.params, "table"))
    return [Relation(**{**r, "slow_indexes": tuple(r["slow_indexes"])}) for r in found]


def grown_by(params: Params, row_bytes: float) -> float:
    """Bytes that the vector, its time and its hash add to a row on its page; a long vector leaves only a pointer."""
    value = vector_bytes(params.vector.dimension, params.vector.type)
    inline = TUPLE_HEADER + row_bytes + value + TIME_AND_HASH <= TOAST_THRESHOLD
    return TIME_AND_HASH + (value if inline else TOAST_POINTER)


def forecast_hot_share(row_bytes: float, added_bytes: float, fillfactor: int) -> float:
    """Share of a page's rows whose new version fits into the page, when they are updated one after the other.

    A row that does not fit moves away, and leaves its room to the next once its transaction has ended.
    """
    room = float(PAGE - PAGE_HEADER)
    rows = int(room * fillfactor / 100 // row_bytes) if row_bytes else 0
    free, stayed = room - rows * row_bytes, 0
    for _ in range(rows):
        stays = free >= row_bytes + added_bytes
        stayed += stays
        free += -added_bytes if stays else row_bytes
    return stayed / rows if rows else 0.0


def pick(params: Params, server_version: int, found: list[Relation], *, reads_ranges: bool) -> Choice:
    """The strategy for these relations; ``reads_ranges``: the planner reads a range of blocks as such.

    Raises BadInput where the parameters ask for what the server cannot do.
    """
    largest = max(found, key=lambda r: r.blocks) if found else None
    if params.target.distributed:
        return Choice("key_ranges", "the table is distributed: its pages lie on other servers", 0.0)
    if largest is None or not reads_ranges or not versions.scans_ranges_of_blocks(server_version):
        why = _why_no_ranges(server_version, largest)
        if params.backfill.strategy == "page_interleaved":
            raise BadInput([_impossible(why)])
        return Choice("key_ranges", why, 0.0)
    share = forecast_hot_share(largest.row_bytes, grown_by(params, largest.row_bytes), largest.fillfactor)
    forecast = f"{share:.0%} of the updates are forecast to stay on their page and touch no index"
    if params.backfill.strategy != "auto":
        return Choice(params.backfill.strategy, f"asked for by backfill.strategy; {forecast}", share)
    if largest.rows == 0:
        return Choice("key_ranges", "nothing is known about the table's rows; ANALYZE would tell", share)
    if largest.indexes <= 1:
        return Choice("key_ranges", "the table has no index but its key's, so a row that moves costs little", share)
    if share < LEAST_HOT_SHARE:
        return Choice(
            "key_ranges", f"rows of {number(largest.row_bytes)} bytes leave no room: only {forecast}", share
        )
    slow = f", {' and '.join(sorted(set(largest.slow_indexes)))} among them" if largest.slow_indexes else ""
    return Choice("page_interleaved", f"{forecast}, and the table has {largest.indexes} indexes{slow}", share)


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


def choose(phase: Phase) -> Choice:
    """Looks at the table, asks the planner, and picks."""
    found = relations(phase)
    version = phase.connection.info.server_version
    ranges = versions.scans_ranges_of_blocks(version) and all(_reads_ranges(phase, r.part) for r in found)
    return pick(phase.params, version, found, reads_ranges=ranges)


def expected_hot_share(phase: Phase) -> float:
    """The forecast share of updates that touch no index, before the columns are there to ask the planner about."""
    found = relations(phase)
    version = phase.connection.info.server_version
    ranges = versions.scans_ranges_of_blocks(version) and all(r.access_method == "heap" for r in found)
    choice = pick(phase.params, version, found, reads_ranges=ranges)
    return choice.hot_share if choice.strategy == "page_interleaved" else 0.0


def _reads_ranges(phase: Phase, part: str) -> bool:
    query = sql.SQL("EXPLAIN {}").format(ranked(phase.connection, phase.params, part))
    with phase.connection.transaction():
        phase.connection.execute("SET LOCAL enable_seqscan = off")
        values = {"from_tid": "(0,0)", "to_tid": "(1,0)"}
        lines = phase.connection.execute(query, values, prepare=False).fetchall()
    return any("Tid Range Scan" in str(line) for line in lines)


def part_name(part: str) -> sql.Composable:
    """A relation that PostgreSQL has spelled, for a statement with bound values."""
    return verbatim(part)


def ranked(connection: db.Connection, params: Params, part: str) -> sql.Composed:
    """The query that ranks the rows of a range of blocks within their block."""
    extra = {"part": part_name(part), "row_bytes": _row_bytes(connection, params)}
    return SQL["ranked"].compose(names(params) | extra)


def _row_bytes(connection: db.Connection, params: Params) -> sql.Composable:
    """What decides a row's size on its page; a value that stands in TOAST leaves only its pointer."""
    table, added = spelled(params, "table"), added_columns(params)
    wide = db.rows(connection, WINDOWS["wide_columns"], params, table=table, added=added)
    one = "CASE WHEN pg_column_size({c}) > {most} THEN {pointer} ELSE coalesce(pg_column_size({c}), 0) END"
    limits = {"most": sql.Literal(TOAST_THRESHOLD), "pointer": sql.Literal(TOAST_POINTER)}
    parts = [sql.SQL(one).format(c=identifier("t", row["name"]), **limits) for row in wide]
    return sql.SQL(" + ").join(parts) if parts else sql.SQL("0")
