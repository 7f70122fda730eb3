"""Recall of one index as the search function uses it, while other indexes on the same column are there too.

Exact answers first; then the same queries through the index that is meant, and the plan of each pass is looked at
before it counts. Fresh connections throughout: nothing prepared earlier can slip in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import psycopg
from psycopg import sql

from runbook_lib.benchmark import explain, loop, query_set, replica
from runbook_lib.benchmark.loop import Answers
from runbook_lib.benchmark.prepared import settled
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.gates import RunbookError
from runbook_lib.core.names import identifier
from runbook_lib.core.thresholds import score
from runbook_lib.indexes import partitions
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from runbook_lib.sql import load

SQL = load("recall")

# Another index is hidden under a lock that readers wait for: so few queries at a time, and none for longer than this.
ASKED_UNDER_LOCK = 5
LONGEST_UNDER_LOCK_MS = 500
TRIES_UNDER_LOCK = 5
ONLY_THE_INDEX = {"enable_seqscan": "off", "enable_sort": "off", "jit": "off"}


@dataclass(frozen=True)
class IndexRecall:
    """One index: recall@k against exact answers, p50 in ms, queries with fewer rows than exact, queries asked."""

    index: str
    recall: float
    p50_ms: float
    short: int
    queries: int

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)

    @classmethod
    def of_data(cls, body: Mapping[str, Any] | None) -> IndexRecall | None:
        """From the ledger row, which may hold other figures as well; None if nothing was measured."""
        return cls(**{k: body[k] for k in cls.__dataclass_fields__}) if body and "recall" in body else None

    def __str__(self) -> str:
        return self.said(score(self.recall))

    def said(self, recall: str) -> str:
        """In words, with the recall as written by :func:`thresholds.apart`."""
        return f"recall {recall} on {self.queries} queries, {self.short} short of rows"


def questions(connection: db.Connection, params: Params) -> list[Query]:
    """The timed sample of the query set, answered without any index."""
    asked = query_set.sample(query_set.read_queries(params), params.queries.sample)
    return answered_exactly(connection, params, query_set.with_vectors(params, asked))


def answered_exactly(connection: db.Connection, params: Params, queries: Sequence[Query]) -> list[Query]:
    """These queries with their exact answers, by SQL; on the replica where one is given.

    Raises RuntimeError where an index would be read.
    """
    all_rows = statements.route_statement(connection, params, "vector", scan="exact")

    def ask() -> Answers:
        with loop.exactly(connection, params) as reader:
            if used := loop.planned(reader, params, all_rows, queries[0]).indexes:
                raise RuntimeError(f"the exact pass was planned with {used}; its answers would not be exact")
            return loop.ask(reader, params, all_rows, queries, params.queries.k)

    return replica.again(params, ask).as_exact(params.vector.distance)


def through(
    connection: db.Connection,
    params: Params,
    asked: Sequence[Query],
    index: str,
    others: Sequence[str] = (),
    settings: Mapping[str, str] | None = None,
) -> IndexRecall | None:
    """The same queries through one index, with these settings, or those that the search function carries.

    others: vector indexes on the same column. Where the planner would read one of them they are hidden, by a DROP
    INDEX that is rolled back after a few queries. None where the planner does not use the index even so.

    Without JIT: a setting that is off adds 1e10 to the price of a plan that has no other way (before PostgreSQL 18),
    and such a price would have every query compiled.
    """
    with db.beside(connection, params, "recall", trial=True) as reader, ExitStack() as exits:
        own = search_function.carried_settings(connection, params) if settings is None else settings
        exits.enter_context(settled(reader, params, {**own, **ONLY_THE_INDEX}))
        search = _Search(reader, params, statements.route_statement(reader, params, "vector"))
        used = search.indexes(asked[0])
        # Each partition's part of a plan may prefer another of the two.
        if others and (index not in used or used & set(others)):
            answers = _ask_without(search, asked, index, others)
        elif index in used:
            answers = search.ask(asked)
        else:
            answers = None
    return _measured(index, answers) if answers else None


def as_the_application(connection: db.Connection, params: Params, queries: Sequence[Query]) -> float:
    """Recall of the vector query with the settings that the search function carries, by whatever plan it gets.

    queries: with vectors. On the replica where one is given, as reads will be.
    """
    asked = answered_exactly(connection, params, queries)
    with explain.as_the_application(connection, params) as reader:
        statement = statements.route_statement(reader, params, "vector")
        return loop.ask(reader, params, statement, asked, params.queries.k).recall().of_the_target


@dataclass(frozen=True)
class _Search:
    """The vector query on one connection."""

    connection: db.Connection
    params: Params
    statement: sql.Composed

    def ask(self, asked: Sequence[Query]) -> Answers:
        return loop.ask(self.connection, self.params, self.statement, asked, self.params.queries.k)

    def indexes(self, query: Query) -> set[str]:
        """The indexes that this query reads, and those that they are part of."""
        used = loop.planned(self.connection, self.params, self.statement, query).indexes
        return partitions.with_their_parents(self.connection, self.params, used)


def _measured(index: str, answers: Answers) -> IndexRecall:
    recall, p50 = answers.recall(), answers.latency()["p50_ms"]
    return IndexRecall(index, round(recall.of_the_target, 4), round(p50, 3), recall.short, len(answers.rows))


def _ask_without(search: _Search, asked: Sequence[Query], index: str, hidden: Sequence[str]) -> Answers | None:
    """A few queries at a time in a transaction that has dropped the other indexes, and is rolled back."""
    connection, schema = search.connection, search.params.target.schema_
    drops = [SQL["hide"].compose({"hidden": identifier(schema, name)}) for name in hidden]
    parts: list[Answers] = []
    for first in range(0, len(asked), ASKED_UNDER_LOCK):

        def look(part: Sequence[Query] = asked[first : first + ASKED_UNDER_LOCK]) -> Answers | None:
            with connection.transaction(force_rollback=True):
                for drop in drops:
                    connection.execute(drop)
                connection.execute(SQL["at_most"].compose({}), {"ms": str(LONGEST_UNDER_LOCK_MS)})
                if not parts and index not in search.indexes(part[0]):
                    return None
                return search.ask(part)

        answers = _in_time(search, look)
        if answers is None:
            return None
        parts.append(answers)
    return loop.together(parts)


def _in_time(search: _Search, look: Callable[[], Answers | None]) -> Answers | None:
    """Looks again where a query took too long under the lock: what it read is in memory by then."""
    for _ in range(TRIES_UNDER_LOCK):
        try:
            answers, _ = db.in_short_tries(search.connection, search.params, SQL["hide"].name, SQL["hide"].lock, look)
            return answers
        except psycopg.errors.QueryCanceled:
            continue
    raise RunbookError(
        found=f"a search through the index took longer than {LONGEST_UNDER_LOCK_MS} ms, {TRIES_UNDER_LOCK} times",
        needed=f"at most {LONGEST_UNDER_LOCK_MS} ms, since readers wait meanwhile",
        danger="nothing has changed; the index was not proved",
        do="run this again at a quieter time, or when the index is in memory",
    )
