"""The loop that asks and times: queries are put to a search one after the other, and their answers judged.

Whatever is measured here is asked by :func:`ask`: other statements, other settings, other sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from psycopg import sql

from runbook_lib.benchmark import exact_now, query_set, recall_at_k, relevance_measures, replica
from runbook_lib.benchmark.prepared import reads_index, use
from runbook_lib.benchmark.query_set import Query
from runbook_lib.benchmark.recall_at_k import Recall, Rows
from runbook_lib.core import db, session
from runbook_lib.core.names import key_of
from runbook_lib.core.query_plan import CARRIED_OUT, QueryPlan, explain
from runbook_lib.core.thresholds import at_least
from runbook_lib.params import Params
from runbook_lib.search import statements, ways
from runbook_lib.search.ways import Way
from runbook_lib.sql import load

SQL = load("tune")

# Queries that are explained before any is timed, which warms the cache and the session; fewer where they take longer
# than so many seconds in all.
EXPLAINED, EXPLAINED_S = 3, 0.3
# From so many queries on, and whenever their number has doubled, it is asked whether the others can be left; sooner
# says nothing, and costs nothing where they took less than so many seconds.
FIRST_LOOK, FIRST_LOOK_S = 8, 0.1
VECTOR_INDEX = "vector index"
# Under these no index is read, so that the answers are exact.
EXACT_ONLY = dict.fromkeys(("enable_indexscan", "enable_bitmapscan", "enable_indexonlyscan"), "off")


@dataclass(frozen=True)
class Answers:
    """What a search answered to queries, in their order.

    rows: keys as text with their distances, best first; a distance is None where the search gives no score. seconds:
    of each query, on the client. routes: which route answered, where the search is the function.
    """

    queries: Sequence[Query] = ()
    rows: list[Rows] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, list[str]]:
        """Keys, best first, by query id."""
        return {q.query_id: [key for key, _ in rows] for q, rows in zip(self.queries, self.rows, strict=True)}

    def only(self, queries: Sequence[Query], k: int) -> Answers:
        """The first k answers to some of the queries."""
        place = {q.query_id: i for i, q in enumerate(self.queries)}
        chosen = [place[q.query_id] for q in queries]
        return Answers(queries, [self.rows[i][:k] for i in chosen], [self.seconds[i] for i in chosen])

    def recall(self) -> Recall:
        """Against the exact answers of the queries, each filter by itself."""
        exact = query_set.exact_of(self.queries)
        return recall_at_k.of(exact, self.rows, [q.own_key for q in self.queries], [q.allowed for q in self.queries])

    def up_to_date(self, connection: db.Connection, params: Params) -> Answers:
        """The same answers, with the exact ones as they are now: other sessions may have written since."""
        return replace(self, queries=exact_now.up_to_date(connection, params, self.queries, self.rows))

    def as_exact(self, distance: str) -> list[Query]:
        """The queries with these as their exact answers. distance: the kind, as the parameters have it."""
        return query_set.with_exact(self.queries, [recall_at_k.of_rows(rows, distance) for rows in self.rows])

    def latency(self) -> dict[str, float]:
        """p50_ms, p95_ms and p99_ms, and n. Raises ValueError where nothing was timed."""
        return relevance_measures.latency(self.seconds)

    def answered_by(self, route: str) -> int:
        """Queries that this route answered."""
        return self.routes.count(route)


def together(parts: Iterable[Answers]) -> Answers:
    """Answers to different queries as one."""
    found = list(parts)
    return Answers(
        [q for part in found for q in part.queries],
        [rows for part in found for rows in part.rows],
        [s for part in found for s in part.seconds],
        [route for part in found for route in part.routes],
    )


def by_filters(make: Callable[[tuple[str, ...]], sql.Composed]) -> Callable[[Query], sql.Composed]:
    """The statement of a query with the conditions of its given filters only, as the search function has it. make:
    takes their names.
    """
    made: dict[tuple[str, ...], sql.Composed] = {}

    def statement(query: Query) -> sql.Composed:
        given = tuple(name for name, _ in query.allowed)
        if given not in made:
            made[given] = make(given)
        return made[given]

    return statement


def values(params: Params, query: Query, k: int) -> dict[str, Any]:
    """What the statements of :mod:`runbook_lib.search.statements` bind."""
    filters: dict[str, Any] = dict.fromkeys(params.target.filters) | dict(query.allowed)
    return filters | {"query": query.text, "k": k, "embedding": query.vector}


def ask(
    connection: db.Connection,
    params: Params,
    statement: sql.Composed | Callable[[Query], sql.Composed],
    queries: Sequence[Query],
    k: int,
    enough: Callable[[Answers], bool] | None = None,
) -> Answers:
    """Runs a search for every query, one after the other, and times each on the client.

    statement: one for all, or what makes that of a query. enough: looks at the answers so far, and says whether the
    remaining queries can be left.

    Never prepared: psycopg's automatic prepare would keep an index plan in spite of a setting that forbids it.
    """
    answers = Answers(queries)
    know_vectors(connection, queries)
    # The names of the application's own query resolve as they do for the application.
    its_own = statement == statements.legacy_statement(connection, params)
    with session.users_path(connection) if its_own else nullcontext():
        for query in queries:
            bound, own = values(params, query, k), statement(query) if callable(statement) else statement
            started = time.perf_counter()
            rows = connection.execute(own, bound, prepare=False).fetchall()
            answers.seconds.append(time.perf_counter() - started)
            answers.rows.append([(key_of(params).text_in(row), _distance(row)) for row in rows])
            if rows and "answered_by" in rows[0]:
                answers.routes.append(rows[0]["answered_by"])
            if enough and enough(so_far := replace(answers, queries=queries[: len(answers.rows)])):
                return so_far
    return answers


def know_vectors(connection: db.Connection, queries: Sequence[Query]) -> None:
    """Has this connection send the vectors of the queries as pgvector's type, once for all."""
    if any(q.vector is not None for q in queries) and connection.adapters.types.get("vector") is None:
        session.register_vector(connection)


def _distance(row: db.Row) -> float | None:
    """The vector route gives distances as negative scores."""
    score = row.get("score")
    return None if score is None else -score


@dataclass(frozen=True)
class Variant:
    """A search that is compared with others.

    statement: one for all queries, or what makes that of a query. connected: opens a session set up for this search.
    """

    params: Params
    statement: sql.Composed | Callable[[Query], sql.Composed]
    queries: Sequence[Query]
    connected: Callable[[], AbstractContextManager[db.Connection]]

    def ask(self, k: int, queries: Sequence[Query] | None = None) -> Answers:
        """On a session of its own. queries: other than those that are timed."""

        def on_a_session() -> Answers:
            with self.connected() as connection:
                return ask(connection, self.params, self.statement, self.queries if queries is None else queries, k)

        return replica.again(self.params, on_a_session)


def in_rounds(variants: Mapping[str, Variant], k: int, rounds: int) -> dict[str, Answers]:
    """Every variant answers its queries once a round, so that a slow moment hits all of them alike.

    Returns the answers of the last round, with the seconds of all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, Answers] = {}
    for _ in range(rounds):
        for name, variant in variants.items():
            found[name] = variant.ask(k)
            seconds[name] += found[name].seconds
    return {name: Answers(a.queries, a.rows, seconds[name], a.routes) for name, a in found.items()}


@dataclass(frozen=True)
class Measured:
    """A way, measured. Latencies in ms on the client, warm.

    recall: recall@k with its 95 % confidence interval. worst: recall of the filter value that it serves worst.
    returned: rows returned of those asked for that exist. rows_short: questions with fewer rows than exist.
    buffers: 8 kB pages touched by a question. plan: how PostgreSQL found the rows. p50_at_least_ms: what the median
    certainly exceeds; 0 where too few were asked to tell.
    """

    way: Way
    questions: int
    recall: float
    low: float
    high: float
    worst: float
    returned: float
    rows_short: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    buffers: int
    plan: str
    p50_at_least_ms: float = 0.0

    @property
    def uses_the_index(self) -> bool:
        """Were the explained questions answered by the vector index, all of them?"""
        return self.plan == VECTOR_INDEX

    @property
    def reads_every_row(self) -> bool:
        """Was no explained question answered by the vector index? Then the answers are exact, however few they be."""
        return VECTOR_INDEX not in self.plan

    def reaches(self, target: float) -> bool:
        """Is the target reached with confidence, for every value, and no question short of rows?"""
        sure = self.recall if self.reads_every_row else self.low
        return at_least(sure, target) and at_least(self.worst, target) and not self.rows_short

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        figures = {
            name: round(v, 4) if isinstance(v, float) else v for name, v in vars(self).items() if name != "way"
        }
        return {**vars(self.way), **figures}


# Looks at what was measured so far, and says whether the remaining queries can be left.
Enough = Callable[[Measured], bool]


def measure(
    connection: db.Connection, params: Params, way: Way, queries: Sequence[Query], enough: Enough | None = None
) -> Measured:
    """Puts queries with exact answers as the search function does: planned again, with the settings of the way."""
    return replica.again(params, lambda: _measure(connection, params, way, queries, enough))


def _measure(
    connection: db.Connection, params: Params, way: Way, queries: Sequence[Query], enough: Enough | None
) -> Measured:
    k = params.queries.k
    statement = by_filters(
        lambda given: statements.route_statement(connection, params, "vector", scan=way.scan, given=given)
    )

    def so_far(answers: Answers) -> Measured:
        return _judged(way, answers.up_to_date(connection, params), plans, found_by)

    def ends_here(answers: Answers) -> bool:
        return enough is not None and _is_looked_at(answers) and enough(so_far(answers))

    with connection.transaction():
        use(connection, way.settings(params.index.method))
        know_vectors(connection, queries)
        plans = list(_explained(connection, params, statement, queries))
        found_by = ", ".join(dict.fromkeys(_found_by(connection, params, plan) for plan in plans))
        return so_far(ask(connection, params, statement, queries, k, ends_here))


def _explained(
    connection: db.Connection, params: Params, statement: Callable[[Query], sql.Composed], queries: Sequence[Query]
) -> Iterator[QueryPlan]:
    until = time.perf_counter() + EXPLAINED_S
    for query in queries[:EXPLAINED]:
        yield explain(connection, statement(query), values(params, query, params.queries.k), CARRIED_OUT)
        if time.perf_counter() > until:
            return


def _is_looked_at(answers: Answers) -> bool:
    n = len(answers.rows)
    return n >= FIRST_LOOK and n & (n - 1) == 0 and sum(answers.seconds) >= FIRST_LOOK_S


def _judged(way: Way, answers: Answers, plans: Sequence[QueryPlan], found_by: str) -> Measured:
    recall, times = answers.recall(), answers.latency()
    return Measured(
        way=way,
        questions=len(answers.rows),
        recall=recall.mean,
        low=recall.low,
        high=recall.high,
        worst=recall.worst,
        returned=recall.returned,
        rows_short=recall.short,
        p50_ms=times["p50_ms"],
        p95_ms=times["p95_ms"],
        p99_ms=times["p99_ms"],
        buffers=int(np.median([plan.pages for plan in plans])) if plans else 0,
        plan=found_by,
        p50_at_least_ms=relevance_measures.p50_at_least(answers.seconds) or 0.0,
    )


def _found_by(connection: db.Connection, params: Params, plan: QueryPlan) -> str:
    if reads_index(connection, params, plan):
        return VECTOR_INDEX
    return "whole table" if plan.has("Seq Scan") else "filter's index"


def planned(
    connection: db.Connection, params: Params, statement: sql.Composed, query: Query, k: int | None = None
) -> QueryPlan:
    """The plan that this query would get by the settings of now. k: that of the parameters if not given."""
    know_vectors(connection, [query])
    return explain(connection, statement, values(params, query, k or params.queries.k))


@contextmanager
def exactly(connection: db.Connection, params: Params) -> Iterator[db.Connection]:
    """A fresh connection in a transaction that may use no index; nothing prepared earlier can slip in."""
    with replica.connect(connection, params, "exact") as reader, reader.transaction():
        use(reader, EXACT_ONLY)
        yield reader


@contextmanager
def through_the_index(connection: db.Connection, params: Params, n: int) -> Iterator[db.Connection]:
    """A fresh connection in a transaction with the settings of the search function. n: ef_search or probes."""
    with replica.connect(connection, params, "index") as reader, reader.transaction():
        use(reader, ways.through_the_index(params, n).settings(params.index.method))
        yield reader
