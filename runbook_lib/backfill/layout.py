"""Vectors in the table or beside it: what each will cost this very table, put before whoever decides."""

from __future__ import annotations

from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import preflight

# Measured: 100 k rows of 1 kB, 384 dimensions, HNSW with m 16, PostgreSQL 18.6, pgvector 0.8.6, 2 cores. An update
# that is not HOT enters the row into every index again, and the vector's is the dearest.
NOT_HOT_US = {"today": 100, "column": 830, "side_table": 108}
NOT_HOT_WAL_KB = 4.5
INSERT_US = 900
# p50 of a search against one in the column: 3.62 and 3.19 ms, 1,000 calls of either in turn on a server that was busy
# with other things, ef_search 40, strict iterative scan (tests/benchmarks/bench_layout.py).
SEARCH_TIMES = {"column": 1.0, "side_table": 1.13}
# From this share of one core on, the dearer updates are worth a join.
WORTH_A_JOIN = 0.01


def core_share(updates_per_s: float, layout: str) -> float:
    """Share of one core that updates which are not HOT will take beyond today's."""
    return updates_per_s * (NOT_HOT_US[layout] - NOT_HOT_US["today"]) / 1e6


def advice(updates_per_s: float) -> str:
    """The layout that the forecast favours, and why. updates_per_s: those that are not HOT."""
    share = core_share(updates_per_s, "column")
    favoured = "side_table" if share >= WORTH_A_JOIN else "column"
    return f"{favoured}: in the column, updates that are not HOT would take {share:.1%} of a core more than today"


def compare(phase: Phase) -> Table:
    """Both layouts on this table, by its own counters since the server's last reset of statistics."""
    shape = db.one(phase.connection, preflight.SQL["table"], phase.params, table=spelled(phase.params, "table"))
    seconds = max(float(shape["counted_for_s"] or 0), 1.0)
    not_hot = (shape["updates"] - shape["hot_updates"]) / seconds
    hot = f"{shape['hot_updates'] / shape['updates']:.0%} HOT" if shape["updates"] else "none counted"
    rows: list[tuple[object, ...]] = [
        ("updates a second today", *[f"{number(shape['updates'] / seconds)}, {hot}"] * 2),
        ("an update that is not HOT, with the index", *(_cost(layout) for layout in ("column", "side_table"))),
        ("all of them, of one core, beyond today", *(_share(not_hot, layout) for layout in ("column", "side_table"))),
        ("an insert, once its vector arrives", *[f"{INSERT_US} µs more, {NOT_HOT_WAL_KB} kB of WAL"] * 2),
        ("the backfill", "rewrites every row, in batches", "a rename, and the check of a foreign key"),
        ("a search, p50", *(f"{SEARCH_TIMES[layout]:g} ×" for layout in ("column", "side_table"))),
        ("the parameters say", *("✔" if phase.params.vector.layout == x else "" for x in ("column", "side_table"))),
        (
            "this table's figures say",
            *("✔" if advice(not_hot).startswith(x) else "" for x in ("column", "side_table")),
        ),
    ]
    return Table(("measured elsewhere, applied to this table", "column", "side_table"), rows)


def _cost(layout: str) -> str:
    return f"{NOT_HOT_US[layout]} µs, today {NOT_HOT_US['today']} µs"


def _share(updates_per_s: float, layout: str) -> str:
    return f"{core_share(updates_per_s, layout):.2%}"
