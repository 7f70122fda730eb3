"""Filter classes: each filter column's values by how many rows they let through, and the questions asked of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from psycopg import sql

from runbook_lib.benchmark import exact, relevance_measures, replica
from runbook_lib.benchmark.recall_at_k import Nearest
from runbook_lib.core import db, row_counts
from runbook_lib.core.gates import Gate
from runbook_lib.core.names import identifier, names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.core.session import register_vector
from runbook_lib.embeddings import embedding
from runbook_lib.embeddings.sources import as_array
from runbook_lib.params import Params
from runbook_lib.search import combined_filters
from runbook_lib.sql import load

SQL = load("classes")

# Upper bounds of the share of rows that a value lets through.
BUCKETS = ((0.01, "below 1 %"), (0.1, "1 to 10 %"), (0.5, "10 to 50 %"), (1.01, "above 50 %"))
RARE = BUCKETS[0][0]
# Values of one class that are measured: few, since each takes its share of the questions.
MEASURED_VALUES = 4
# Filters that are given together, which are measured: every pair, and all of them. Others are searched exactly.
MOST_TOGETHER = 10
# Up to so many rows the values are counted one by one, above it in a sample of pages of about as many.
COUNTED_ROWS = 1_000_000


@dataclass(frozen=True)
class FilterClass:
    """Values of a filter, or of several given together, that let through a like share of the rows.

    columns: none for searches without a filter. values: those measured, as the strategies write them. shares: of
    every value that is listed in the search function's strategies; empty for rare values, too many to list.
    """

    columns: tuple[str, ...]
    bucket: str
    values: tuple[str, ...]
    shares: dict[str, float] = field(hash=False)
    share: float

    @property
    def filter(self) -> str | None:
        """The filter's name in the strategies; None for searches without one."""
        return combined_filters.name(self.columns) if self.columns else None

    def allowed(self, value: str) -> tuple[tuple[str, str], ...]:
        """What each column must hold for one of the values."""
        return tuple(zip(self.columns, combined_filters.parts(self.columns, value), strict=True))

    def shown(self) -> list[str]:
        """The values measured, for a person to read."""
        return [combined_filters.AND.join(combined_filters.parts(self.columns, value)) for value in self.values]

    def __str__(self) -> str:
        return f"{self.filter}, {self.bucket}" if self.columns else self.bucket


UNFILTERED = FilterClass((), "unfiltered", (), {}, 1.0)


def measured_filters(params: Params) -> list[tuple[str, ...]]:
    """Each filter alone, then pairs, then all of them together, which let through the fewest rows."""
    columns = params.target.filters
    pairs: list[tuple[str, ...]] = list(combinations(columns, 2))
    several = [*pairs[: MOST_TOGETHER - 1], tuple(columns)] if len(columns) > 2 else pairs
    return [*((column,) for column in columns), *several]


@dataclass(frozen=True)
class Asked:
    """A query with its vector, its filter, and its exact answers.

    own_key: the row that the query was made from, which every search finds and which therefore counts for none.
    """

    text: str
    vector: np.ndarray
    allowed: tuple[tuple[str, str], ...]
    exact: Nearest
    own_key: str | None = None


@dataclass(frozen=True)
class _Query:
    text: str
    vector: np.ndarray
    own_key: str | None = None


def find(phase: Phase) -> list[FilterClass]:
    """The unfiltered class first, then those of each filter and of filters given together, rarest first."""
    return [UNFILTERED, *(c for columns in measured_filters(phase.params) for c in _of_columns(phase, columns))]


def _of_columns(phase: Phase, columns: tuple[str, ...]) -> Iterator[FilterClass]:
    counted = shares(phase, columns)
    lower = 0.0
    for upper, name in BUCKETS:
        found = {value: share for value, share in counted.items() if lower <= share < upper}
        lower = upper
        if found:
            values = _spread(list(found), MEASURED_VALUES)
            mean = float(np.mean([found[v] for v in values]))
            yield FilterClass(columns, name, tuple(values), {} if upper == RARE else found, mean)


def shares(phase: Phase, columns: Sequence[str]) -> dict[str, float]:
    """Share of the rows by value: every value above RARE, and a few below, spread over their frequencies."""
    n = names(phase.params)
    percent = min(100.0, 100.0 * COUNTED_ROWS / max(row_counts.of(phase.connection, phase.params).n, 1))
    sampled = sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(sql.Literal(percent))
    own = [sql.SQL("t.{}").format(identifier(c)) for c in columns]
    query = SQL["values"].compose(
        n
        | {
            "columns": sql.SQL(", ").join(own),
            "value": combined_filters.given_value(own),
            "sampled": sampled if percent < 100 else sql.SQL(""),
        }
    )
    with replica.connect(phase, "values") as connection:
        found = connection.execute(query, {"rare": RARE, "measured": MEASURED_VALUES}).fetchall()
    return {row["value"]: row["share"] for row in found}


def _spread(values: Sequence[str], n: int) -> list[str]:
    """At most n of them, evenly spread, first and last among them."""
    if len(values) <= n:
        return list(values)
    return [values[i * (len(values) - 1) // (n - 1)] for i in range(n)]


def questions(phase: Phase, found: Sequence[FilterClass]) -> tuple[dict[FilterClass, list[Asked]], Gate, list[float]]:
    """Every query put to every class, with its exact answers; a gate on these; and seconds of exact SQL.

    Each value of a class takes its turn with the queries, whose subject has nothing to do with it: a search for one
    tenant is not near that tenant's rows, which is what an index finds hardest.
    """
    p = phase.params
    queries = list(_queries(phase))
    vectors = np.array([q.vector for q in queries], np.float32)
    keyed = {c: [exact.Question(i, _filter(c, i)) for i in range(len(queries))] for c in found}
    asked = [question for c in found for question in keyed[c]]

    def look() -> tuple[list[Nearest], Gate, list[float]]:
        with replica.connect(phase, "exact") as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            nearest = exact.nearest(connection, p, vectors, asked, p.queries.k)
            agrees = exact.stream_agrees_with_sql(connection, p, vectors, asked, nearest, p.queries.k)
            return nearest, agrees, exact.seconds_by_sql(connection, p, vectors, p.queries.k)

    nearest, agrees, seconds = replica.again(p, look)
    answers = iter(nearest)
    result = {
        c: [
            Asked(queries[q.query].text, vectors[q.query], q.allowed, next(answers), queries[q.query].own_key)
            for q in keyed[c]
        ]
        for c in found
    }
    return result, agrees, seconds


def _filter(found: FilterClass, i: int) -> tuple[tuple[str, str], ...]:
    # Two queries in a row take the same value: one for tuning, one to be held out.
    return found.allowed(found.values[i // 2 % len(found.values)]) if found.columns else ()


def _queries(phase: Phase) -> Iterator[_Query]:
    """The query sample; where it is small, rows of the table stand in for what is missing."""
    p = phase.params
    own = relevance_measures.sample(relevance_measures.read_queries(p), p.tune.queries)
    yield from map(_Query, (q.text for q in own), embedding.query_vectors(p, own))
    with replica.connect(phase, "rows") as connection:
        register_vector(connection)
        rows = db.rows(connection, SQL["rows_as_queries"], p, n=p.tune.queries - len(own))
    for row in rows:
        yield _Query("", as_array(row["embedding"]), row["key"])


def has_btree(connection: db.Connection, params: Params, columns: Sequence[str]) -> bool:
    """Does an index of the table start with these columns, so that their rows are found without reading others?"""
    row = db.one(connection, SQL["has_btree"], params, table=spelled(params, "table"), columns=list(columns))
    return bool(row["there"])
