"""Filter classes: values by the share of rows that they let through, what is asked of each, and what is found."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np
import psycopg
from psycopg import sql

from runbook_lib.benchmark import exact, filter_values, loop, query_set, replica
from runbook_lib.benchmark.filter_values import Allowed
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts
from runbook_lib.core.gates import Gate
from runbook_lib.core.names import identifier, names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.session import register_vector
from runbook_lib.params import Params
from runbook_lib.search import combined_filters, search_function, share_classes, statements
from runbook_lib.sql import load

SQL = load("classes")

NOT_LISTED = "values not listed"

# Upper bounds of the share of rows that a value lets through.
BUCKETS = ((0.01, "below 1 %"), (0.1, "1 to 10 %"), (0.5, "10 to 50 %"), (1.01, "above 50 %"))
RARE, RARE_BUCKET = BUCKETS[0]
# Values of one class that are measured: few, since each takes its share of the questions.
MEASURED_VALUES = 4
# Filters that are given together, which are measured: every pair, and all of them. Others are searched exactly.
MOST_TOGETHER = 10
# Up to so many rows the values are counted one by one, above it in a sample of pages of about as many.
COUNTED_ROWS = 1_000_000


@dataclass(frozen=True)
class FilterClass:
    """Values of a filter, or of several filters together, that match a similar share of the rows.

    filter: its name in the strategies; None for searches without one. asked: those measured, each as filters with
    their values. shares: of every value that is listed in the search function's strategies; empty for rare values,
    which are too many to list. listed: the value that stands for a class by the share that is expected; empty for
    others.
    """

    filter: str | None
    bucket: str
    asked: tuple[Allowed, ...]
    shares: dict[str, float] = field(hash=False)
    share: float
    listed: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns, where the class is one of values of columns."""
        return () if self.listed or not self.asked else tuple(name for name, _ in self.asked[0])

    @property
    def values(self) -> tuple[str, ...]:
        """What is measured, as text."""
        if self.listed:
            return tuple(combined_filters.AND.join(f"{name} = {v}" for name, v in each) for each in self.asked)
        return tuple(combined_filters.AND.join(v for _, v in each) for each in self.asked)

    def in_strategies(self) -> dict[str | None, float]:
        """The values of its rows in the strategies with their shares; None for those that are not listed."""
        found: dict[str | None, float] = {}
        return found | self.shares or {self.listed or None: self.share}

    def __str__(self) -> str:
        return f"{self.filter}, {self.bucket}" if self.filter else self.bucket


UNFILTERED = FilterClass(None, "unfiltered", (), {}, 1.0)


def of_values(
    columns: Sequence[str],
    bucket: str,
    there: Mapping[str, float],
    values: Sequence[str],
    listed: Mapping[str, float],
) -> FilterClass:
    """Values of columns, as the strategies write them. there: with their shares. listed: those with a row of their
    own in the strategies.
    """
    asked = tuple(tuple(zip(columns, combined_filters.parts(columns, v), strict=True)) for v in values)
    mean = float(np.mean([there[v] for v in values]))
    return FilterClass(combined_filters.name(columns), bucket, asked, dict(listed), mean)


def measured_filters(params: Params) -> list[tuple[str, ...]]:
    """Each column alone, then pairs, then all together, which match the fewest rows."""
    columns = params.target.filter_columns
    pairs: list[tuple[str, ...]] = list(combinations(columns, 2))
    several = [*pairs[: MOST_TOGETHER - 1], tuple(columns)] if len(columns) > 2 else pairs
    return [*((column,) for column in columns), *several]


def find(connection: db.Connection, params: Params) -> list[FilterClass]:
    """The unfiltered class first, then those of each filter and of filters given together, rarest first."""
    with replica.connect(connection, params, "values") as reader:
        counted = {columns: shares(reader, params, columns) for columns in measured_filters(params)}
        asked = filter_values.by_class(reader, params, query_set.read_queries(params), random.Random(1))  # noqa: S311
    found = [UNFILTERED]
    for columns, there in counted.items():
        for bucket, mine in _by_bucket(there):
            listed = {} if bucket == RARE_BUCKET else mine
            found.append(of_values(columns, bucket, mine, _spread(list(mine), MEASURED_VALUES), listed))
    return [*found, *expected(params, asked)]


def expected(params: Params, asked: Mapping[tuple[str, str], Mapping[Allowed, float]]) -> list[FilterClass]:
    """The classes of conditions, by the share that is expected of them, rarest first."""
    names_of_them = names_of_conditions(params)
    places = sorted(asked, key=lambda place: (names_of_them.index(place[0]), share_classes.NAMES.index(place[1])))
    return [
        FilterClass(name, f"expected {listed}", tuple(mine), {}, float(np.mean(list(mine.values()))), listed)
        for (name, listed), mine in ((place, asked[place]) for place in places)
    ]


def names_of_conditions(params: Params) -> list[str]:
    """The strategies' name for filters without a look-up by value; none if all are columns."""
    conditions = [f.name for f in params.target.each_filter if f.column is None]
    return [*conditions, share_classes.TOGETHER] if conditions else []


def _by_bucket(there: Mapping[str, float]) -> list[tuple[str, dict[str, float]]]:
    """Values with their shares, by the bucket that these are in; none that is empty."""
    found: dict[str, dict[str, float]] = {name: {} for _, name in BUCKETS}
    for value, share in there.items():
        found[next(name for upper, name in BUCKETS if share < upper)][value] = share
    return [(name, mine) for name, mine in found.items() if mine]


def shares(connection: db.Connection, params: Params, columns: Sequence[str]) -> dict[str, float]:
    """Share of the rows by value: every value above RARE, and a few below, spread over their frequencies."""
    percent = min(100.0, 100.0 * COUNTED_ROWS / max(row_counts.of(connection, params).n, 1))
    sampled = sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(sql.Literal(percent))
    own = [sql.SQL("t.{}").format(identifier(c)) for c in columns]
    query = SQL["values"].compose(
        names(params)
        | {
            "columns": sql.SQL(", ").join(own),
            "value": combined_filters.given_value(own),
            "sampled": sampled if percent < 100 else sql.SQL(""),
        }
    )
    found = connection.execute(query, {"rare": RARE, "measured": MEASURED_VALUES}).fetchall()
    return {row["value"]: row["share"] for row in found}


def _spread(values: Sequence[str], n: int) -> list[str]:
    """At most n of them, evenly spread, first and last among them."""
    if len(values) <= n:
        return list(values)
    return [values[i * (len(values) - 1) // (n - 1)] for i in range(n)]


def questions(
    connection: db.Connection, params: Params, found: Sequence[FilterClass]
) -> tuple[dict[FilterClass, list[Query]], Gate, list[float]]:
    """Every query put to every class, with its exact answers; a gate on these; and seconds of exact SQL.

    Each value of a class takes its turn with the queries, whose subject has nothing to do with it: a search for one
    tenant is not near that tenant's rows, which is what an index finds hardest.
    """
    queries = _queries(connection, params)
    asked = [replace(query, allowed=_filter(c, i)) for c in found for i, query in enumerate(queries)]

    def look() -> tuple[list[Query], Gate, list[float]]:
        with exact.snapshot(connection, params) as reader:
            answered = exact.answered(reader, params, asked, params.queries.k)
            agrees = exact.stream_agrees_with_sql(reader, params, answered, params.queries.k)
            return answered, agrees, exact.seconds_by_sql(reader, params, queries, params.queries.k)

    answered, agrees, seconds = replica.again(params, look)
    n = len(queries)
    return {c: answered[i * n : (i + 1) * n] for i, c in enumerate(found)}, agrees, seconds


def _filter(found: FilterClass, i: int) -> Allowed:
    if found.shares:
        # Two successive queries take the same value: one for tuning, one held out.
        return found.asked[i // 2 % len(found.asked)]
    # Searches will use other values than these, so every second value is held out, like every second query.
    even = len(found.asked) // 2 * 2 or len(found.asked)
    return found.asked[i % even] if even else ()


def _queries(connection: db.Connection, params: Params) -> list[Query]:
    """The query sample; where it is small, rows of the table stand in for what is missing."""
    own = query_set.with_vectors(params, query_set.sample(query_set.read_queries(params), params.tune.queries))
    with replica.connect(connection, params, "rows") as reader:
        register_vector(reader)
        rows = db.rows(reader, SQL["rows_as_queries"], params, n=params.tune.queries - len(own))
    return [*own, *query_set.of_rows(rows)]


def has_btree(connection: db.Connection, params: Params, columns: Sequence[str]) -> bool:
    """Does an index of the table start with these columns, so that their rows are found without reading others?"""
    row = db.one(connection, SQL["has_btree"], params, table=spelled(params, "table"), columns=list(columns))
    return bool(row["there"])


def of_strategies(connection: db.Connection, params: Params, chosen: random.Random) -> list[FilterClass]:
    """The rows of the strategies as classes, each with a few values drawn again.

    Values that have no row of their own are those that the table holds now, whatever they were when it was tuned.
    """
    found = []
    rows = db.rows(connection, search_function.SQL["strategies"], params)
    with replica.connect(connection, params, "values") as reader:
        for columns in measured_filters(params):
            mine = {r["value"]: r["share"] for r in rows if r["filter"] == combined_filters.name(columns)}
            groups = _by_bucket({v: s for v, s in mine.items() if v is not None})
            if None in mine:
                there = shares(reader, params, columns).items()
                groups.append((NOT_LISTED, {v: s for v, s in there if v not in mine}))
            for bucket, group in groups:
                if group:
                    values = chosen.sample(sorted(group), min(MEASURED_VALUES, len(group)))
                    found.append(of_values(columns, bucket, group, values, {}))
        asked = filter_values.by_class(reader, params, query_set.read_queries(params), chosen)
    tuned = {(r["filter"], r["value"]) for r in rows}
    return [*found, *expected(params, {place: mine for place, mine in asked.items() if place in tuned})]


@dataclass(frozen=True)
class ClassRecall:
    """A filter class as it is found now: recall@k, questions asked, and those with fewer rows than there are."""

    of: FilterClass
    recall: float
    questions: int
    short: int


def recall_now(
    connection: db.Connection, params: Params, found: Sequence[FilterClass], queries: Sequence[Query]
) -> list[ClassRecall]:
    """Puts the queries to every class: one pass over the table for all exact answers, then the function's own."""
    asked = _with_exact_answers(connection, params, found, queries)
    result = []
    with replica.connect(connection, params, "filters") as reader, reader.transaction():
        statement = statements.filtered_call_statement(reader, params)
        statements.force_route(reader, params, "vector")
        for of, mine in zip(found, asked, strict=True):
            answers = loop.ask(reader, params, statement, mine, params.queries.k)
            recall = answers.up_to_date(reader, params).recall()
            result.append(ClassRecall(of, recall.mean, len(mine), recall.short))
    return result


def _with_exact_answers(
    connection: db.Connection, params: Params, found: Sequence[FilterClass], queries: Sequence[Query]
) -> list[list[Query]]:
    asked = [replace(query, allowed=of.asked[i % len(of.asked)]) for of in found for i, query in enumerate(queries)]

    def look() -> list[Query]:
        with exact.snapshot(connection, params) as reader:
            return exact.answered(reader, params, asked, params.queries.k)

    answered, n = replica.again(params, look), len(queries)
    return [answered[i * n : (i + 1) * n] for i in range(len(found))]


@dataclass(frozen=True)
class Called:
    """Calls with filters, one for each value: how many, those that failed, those short of rows; the first error."""

    calls: int
    errors: int
    short: int
    problem: str = ""


NO_CALLS = Called(0, 0, 0)


def call_each(phase: Phase, connection: db.Connection, route: str, queries: Sequence[Query]) -> Called:
    """Calls the function by a route, wherever reads go now, with each value of each class of filters."""
    p = phase.params
    found = of_strategies(phase.connection, p, random.Random(phase.run_id))  # noqa: S311 - a sample, not a secret
    wanted = [allowed for c in found for allowed in c.asked]
    asked = [replace(queries[i % len(queries)], allowed=allowed) for i, allowed in enumerate(wanted)]
    statement = statements.filtered_call_statement(connection, p)
    matching = statements.matching_statement(connection, p)
    errors = short = 0
    problem = ""
    for query in asked:
        try:
            with connection.transaction():
                statements.force_route(connection, p, route)
                answers = loop.ask(connection, p, statement, [query], p.queries.k)
                values = loop.values(p, query, p.queries.k)
                there = connection.execute(matching, values, prepare=False).fetchone()
        except psycopg.Error as error:
            errors += 1
            problem = problem or f"{dict(query.allowed)}: {error.sqlstate} {error}".splitlines()[0]
        else:
            short += there is not None and len(answers.rows[0]) < there["rows"]
    return Called(len(asked), errors, short, problem)
