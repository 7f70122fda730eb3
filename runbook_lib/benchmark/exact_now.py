"""Exact answers that were taken a while ago, brought up to date where rows have been deleted or changed since."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from runbook_lib.benchmark import exact, recall_at_k
from runbook_lib.benchmark.query_set import Query, exact_of
from runbook_lib.benchmark.recall_at_k import Nearest, Rows
from runbook_lib.core import db
from runbook_lib.params import Params


def up_to_date(
    connection: db.Connection, params: Params, queries: Sequence[Query], got: Sequence[Rows]
) -> list[Query]:
    """The queries with the exact answers of now, where ``got`` lacks some of theirs.

    Their nearest rows are read again, by key, with the rows in reserve: one that is gone, or no longer matches the
    filters, is none that a search has missed, and the next nearest takes its place. A row that has come since needs
    no look: it is nearer than what it displaced, and counts for that. Where even the reserve is used up, fewer
    answers are asked for.
    """
    return [
        replace(q, exact=_now(connection, params, q, nearest)) if _lacks(q, nearest, rows) else q
        for q, nearest, rows in zip(queries, exact_of(queries), got, strict=True)
    ]


def _lacks(query: Query, nearest: Nearest, rows: Rows) -> bool:
    found = recall_at_k.share(nearest, rows, query.own_key)
    return found < 1 or math.isnan(found) or len(rows) < len(nearest.keys)


def _now(connection: db.Connection, params: Params, query: Query, nearest: Nearest) -> Nearest:
    known = (*nearest.keys, *nearest.reserve)
    rows = exact.by_sql(connection, params, query, len(nearest.keys), among=known)
    there = [(row["key"], row["distance"]) for row in rows if math.isfinite(row["distance"])]
    keys = tuple(key for key, _ in there)
    return replace(
        nearest,
        keys=keys,
        distances=tuple(distance for _, distance in there),
        reserve=tuple(key for key in known if key not in keys),
    )
