"""Classes of the share of the rows that filters let through, by which a call that no value can be looked up for is
searched: by the planner's estimate, when it is tuned and when it is called.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise

from psycopg import sql

from runbook_lib.core.names import literal

# Where the cheapest way changes is measured; half a decade is as near as an estimate usually is.
EDGES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
# What the strategies call filters given together of which one at least is a condition.
TOGETHER = "several filters"


def _names() -> list[str]:
    shown = [f"{100 * edge:g}" for edge in EDGES]
    between = [f"{low} to {high} %" for low, high in pairwise(shown)]
    return [f"below {shown[0]} %", *between, f"above {shown[-1]} %"]


NAMES = _names()


def of(share: float) -> str:
    """The class of a share, 0 to 1."""
    return NAMES[bisect_right(EDGES, share)]


def expression(share: sql.Composable) -> sql.Composed:
    """The same as SQL."""
    named = sql.SQL(", ").join(literal(name) for name in NAMES)
    edges = sql.SQL(", ").join(map(sql.Literal, EDGES))
    return sql.SQL(
        "(ARRAY[{}])[1 + pg_catalog.width_bucket(({})::pg_catalog.float8, ARRAY[{}]::pg_catalog.float8[])]"
    ).format(named, share, edges)
