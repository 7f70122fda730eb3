"""The legacy search, asked once a query and within a bound of time: it may take seconds a call on a large table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psycopg

from runbook_lib.benchmark import replica
from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core.display import duration, number
from runbook_lib.core.phase import Phase
from runbook_lib.search import search_function

# After so many calls it can be said how long the rest will take.
CALLS_BEFORE_AN_ESTIMATE = 3


@dataclass(frozen=True)
class Asked:
    """keys: as text, best first, by query id. seconds: by query id. left: not asked, since the time was up."""

    keys: dict[str, list[str]]
    seconds: dict[str, float]
    left: tuple[str, ...] = ()


def ask(phase: Phase, queries: Sequence[Query], depth: Mapping[str, int]) -> Asked:
    """Asks the legacy search each query once, in this order, for at most ``queries.baseline_minutes`` in all.

    depth: rows wanted, by query id. A call that is under way when the time is up is cancelled in the server.
    """
    p, statement = phase.params, search_function.legacy_statement(phase.params)
    keys: dict[str, list[str]] = {}
    seconds: dict[str, float] = {}
    began = time.monotonic()
    until = began + p.queries.baseline_minutes * 60
    with replica.connect(phase, "legacy") as connection:

        def one(query: Query) -> search_function.Answers:
            with connection.transaction():
                left_ms = max(1, round((until - time.monotonic()) * 1000))
                connection.execute("SELECT pg_catalog.set_config('statement_timeout', %s, true)", [f"{left_ms}ms"])
                return search_function.ask(connection, p, statement, [query], None, depth[query.query_id])

        for n, query in enumerate(queries, 1):
            if time.monotonic() >= until:
                break
            try:
                answers = replica.again(p, lambda query=query: one(query))  # type: ignore[misc]
            except psycopg.errors.QueryCanceled:
                if time.monotonic() < until:
                    raise
                break
            keys |= answers.keys
            seconds[query.query_id] = answers.seconds[0]
            if n == CALLS_BEFORE_AN_ESTIMATE and len(queries) > n:
                a_call = (time.monotonic() - began) / n
                bound = f"at most {p.queries.baseline_minutes:g} min (queries.baseline_minutes)"
                print(f"  {number(len(queries))} legacy calls, about {duration(a_call * len(queries))}; {bound}")
    left = tuple(q.query_id for q in queries if q.query_id not in keys)
    if left:
        print(f"  {number(len(left))} of {number(len(queries))} queries were not asked: the time was up")
    return Asked(keys, seconds, left)
