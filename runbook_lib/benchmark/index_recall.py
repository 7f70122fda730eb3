"""Recall of one index as the search function uses it, while other indexes on the same column are there too.

Exact answers first; then the same queries through the index that is meant, and the plan of each pass is looked at
before it counts. Fresh connections throughout: nothing prepared earlier can slip in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from runbook_lib.benchmark import explain, recall_at_k, relevance_measures, replica
from runbook_lib.benchmark.prepared import use_setting
from runbook_lib.benchmark.recall_at_k import Nearest
from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core import db
from runbook_lib.core.gates import RunbookError
from runbook_lib.core.names import identifier
from runbook_lib.core.phase import Phase
from runbook_lib.core.query_plan import explain as plan_of
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import score
from runbook_lib.embeddings import embedding
from runbook_lib.indexes import partitions
from runbook_lib.migrate import tune
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("recall")

# Another index is hidden under a lock that readers wait for: so few queries at a time, and none for longer than this.
ASKED_UNDER_LOCK = 5
LONGEST_UNDER_LOCK_MS = 500
TRIES_UNDER_LOCK = 5


@dataclass(frozen=True)
class Questions:
    """Queries with their vectors, shape (n, dimension), and their exact answers, in the same order."""

    statement: sql.Composed
    queries: Sequence[Query]
    vectors: np.ndarray
    exact: Sequence[Nearest]


@dataclass(frozen=True)
class Measured:
    """One index: recall@k against exact answers, p50 in ms, queries with fewer rows than exact, queries asked."""

    index: str
    recall: float
    p50_ms: float
    short: int
    queries: int

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)

    def __str__(self) -> str:
        return self.said(score(self.recall))

    def said(self, recall: str) -> str:
        """In words, with the recall as written by :func:`thresholds.apart`."""
        return f"recall {recall} on {self.queries} queries, {self.short} short of rows"


def questions(phase: Phase) -> Questions:
    """The timed sample of the query set, answered without any index."""
    p = phase.params
    queries = relevance_measures.sample(relevance_measures.read_queries(p), p.queries.sample)
    vectors = np.asarray(embedding.query_vectors(p, queries))
    statement = search_function.route_statement(phase.connection, p, "vector")
    all_rows = search_function.route_statement(phase.connection, p, "vector", scan="exact")
    with tune.exactly(phase) as connection:
        register_vector(connection)
        if used := _indexes_used(connection, phase, all_rows, queries[0], vectors[0]):
            raise RuntimeError(f"the exact pass was planned with {used}; its answers would not be exact")
        exact = search_function.ask(connection, p, all_rows, queries, vectors, p.queries.k)
    return Questions(statement, queries, vectors, _nearest(phase, queries, exact))


def through(
    phase: Phase,
    asked: Questions,
    index: str,
    others: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> Measured | None:
    """The same queries through one index, with these settings, or those that the search function carries.

    others: vector indexes on the same column. Where the planner would read one of them they are hidden, by a DROP
    INDEX that is rolled back after a few queries. None where the planner does not use the index even so.

    Without JIT: a setting that is off adds 1e10 to the price of a plan that has no other way (before PostgreSQL 18),
    and such a price would have every query compiled.
    """
    p = phase.params
    with phase.another("recall", trial=True) as connection:
        register_vector(connection)
        own = search_function.carried_settings(phase) if settings is None else settings
        for name, value in {**own, "enable_seqscan": "off", "enable_sort": "off", "jit": "off"}.items():
            use_setting(connection, name, value, local=False)
        used = _used(connection, phase, asked)
        # Each partition's part of a plan may prefer another of the two.
        if others and (index not in used or used & set(others)):
            answers = _ask_without(phase, connection, asked, index, others)
        elif index in used:
            answers = search_function.ask(connection, p, asked.statement, asked.queries, asked.vectors, p.queries.k)
        else:
            answers = None
    return _measured(index, asked, answers) if answers else None


def as_the_application(phase: Phase, queries: Sequence[Query], vectors: np.ndarray) -> float:
    """Recall of the vector query with the settings that the search function carries, by whatever plan it gets.

    vectors: of the queries, shape (n, dimension). On the replica where one is given, as reads will be.
    """
    p = phase.params
    statement, all_rows = (
        search_function.route_statement(phase.connection, p, "vector", scan=scan) for scan in ("index", "exact")
    )

    def exactly() -> search_function.Answers:
        with tune.exactly(phase) as connection:
            return search_function.ask(connection, p, all_rows, queries, vectors, p.queries.k)

    exact = replica.again(p, exactly)
    with explain.as_the_application(phase) as connection:
        got = search_function.ask(connection, p, statement, queries, vectors, p.queries.k)
    return recall_at_k.recall(_nearest(phase, queries, exact), [got.rows(q.query_id) for q in queries])


def _nearest(phase: Phase, queries: Sequence[Query], exact: search_function.Answers) -> list[Nearest]:
    return [recall_at_k.of_rows(exact.rows(q.query_id), phase.params.vector.distance) for q in queries]


def _measured(index: str, asked: Questions, got: search_function.Answers) -> Measured:
    rows = [got.rows(q.query_id) for q in asked.queries]
    p50 = relevance_measures.latency(got.seconds)["p50_ms"]
    recall = round(recall_at_k.recall(asked.exact, rows), 4)
    return Measured(index, recall, round(p50, 3), recall_at_k.short(asked.exact, rows), len(rows))


def _used(connection: db.Connection, phase: Phase, asked: Questions) -> set[str]:
    """The indexes that the first query reads, and those that they are part of."""
    used = _indexes_used(connection, phase, asked.statement, asked.queries[0], asked.vectors[0])
    return partitions.with_their_parents(connection, phase.params, used)


def _indexes_used(
    connection: db.Connection, phase: Phase, statement: sql.Composed, query: Query, vector: np.ndarray
) -> list[str]:
    values = dict.fromkeys(phase.params.target.filters) | {"query": query.text, "k": phase.params.queries.k}
    return plan_of(connection, statement, values | {"embedding": vector}).indexes


def _ask_without(
    phase: Phase, connection: db.Connection, asked: Questions, index: str, hidden: Sequence[str]
) -> search_function.Answers | None:
    """A few queries at a time in a transaction that has dropped the other indexes, and is rolled back."""
    schema = phase.params.target.schema_
    drops = [SQL["hide"].compose({"hidden": identifier(schema, name)}) for name in hidden]
    got = search_function.Answers({}, [], [])
    for first in range(0, len(asked.queries), ASKED_UNDER_LOCK):
        part = slice(first, first + ASKED_UNDER_LOCK)

        def look(part: slice = part) -> search_function.Answers | None:
            with connection.transaction(force_rollback=True):
                for drop in drops:
                    connection.execute(drop)
                connection.execute(SQL["at_most"].compose({}), {"ms": str(LONGEST_UNDER_LOCK_MS)})
                if part.start == 0 and index not in _used(connection, phase, asked):
                    return None
                queries, vectors = asked.queries[part], asked.vectors[part]
                return search_function.ask(
                    connection, phase.params, asked.statement, queries, vectors, phase.params.queries.k
                )

        answers = _in_time(phase, connection, look)
        if answers is None:
            return None
        got = search_function.Answers(
            got.keys | answers.keys, got.seconds + answers.seconds, [], got.scores | answers.scores
        )
    return got


def _in_time(phase: Phase, connection: db.Connection, look: Any) -> search_function.Answers | None:
    """Looks again where a query took too long under the lock: what it read is in memory by then."""
    for _ in range(TRIES_UNDER_LOCK):
        try:
            answers, _ = db.in_short_tries(connection, phase.params, SQL["hide"].name, SQL["hide"].lock, look)
            return answers  # type: ignore[no-any-return]
        except psycopg.errors.QueryCanceled:
            continue
    raise RunbookError(
        found=f"a search through the index took longer than {LONGEST_UNDER_LOCK_MS} ms, {TRIES_UNDER_LOCK} times",
        needed=f"at most {LONGEST_UNDER_LOCK_MS} ms, since readers wait meanwhile",
        danger="nothing has changed; the index was not proved",
        do="run this again at a quieter time, or when the index is in memory",
    )
