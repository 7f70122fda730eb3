"""One way to search, measured on many questions: recall with its confidence, rows, latency, pages read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from psycopg import sql

from runbook_lib.benchmark import relevance_measures, replica
from runbook_lib.benchmark.filter_classes import Asked
from runbook_lib.benchmark.prepared import reads_index, use_setting
from runbook_lib.benchmark.recall_at_k import mean, share
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.core.query_plan import CARRIED_OUT, QueryPlan, explain
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import at_least
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("tune")

# Questions that warm the cache and the session before any is timed, and those whose pages are counted.
WARM_UP, EXPLAINED = 3, 3
RESAMPLES, CONFIDENCE, SEED = 2_000, 0.95, 20260225
# The normal distribution's quantile for that confidence, both sides.
Z = 1.959964
VECTOR_INDEX = "vector index"


@dataclass(frozen=True)
class Way:
    """How to search. candidates: ef_search or probes. most_scanned: max_scan_tuples or max_probes."""

    scan: search_function.Scan
    candidates: int
    iterative_scan: str
    most_scanned: int

    def __str__(self) -> str:
        if self.scan == "exact":
            return "exact"
        return f"{self.candidates}, {self.iterative_scan.removesuffix('_order')}, {self.most_scanned:,}"


@dataclass(frozen=True)
class Measured:
    """A way, measured. Latencies in ms on the client, warm.

    recall: recall@k with its 95 % confidence interval. worst: recall of the filter value that it serves worst.
    returned: rows returned of those asked for that exist. rows_short: questions with fewer rows than exist.
    buffers: 8 kB pages touched by a question. plan: how PostgreSQL found the rows.
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


def exact_way(phase: Phase) -> Way:
    """Every row that the filters let through; the settings of the index do not matter."""
    method = phase.params.index.method
    return Way(
        "exact", search_function.smallest_setting(phase.params), "off", search_function.MOST_SCANNED_DEFAULT[method]
    )


@contextmanager
def session(phase: Phase) -> Iterator[db.Connection]:
    """A fresh connection with pgvector's library loaded; nothing prepared earlier can slip in."""
    with replica.connect(phase, "tune") as connection:
        register_vector(connection)
        yield connection


def measure(phase: Phase, connection: db.Connection, way: Way, asked: Sequence[Asked]) -> Measured:
    """Puts the questions, one after the other, as the search function does: planned anew, with its settings."""
    return replica.again(phase.params, lambda: _measure(phase, connection, way, asked))


def _measure(phase: Phase, connection: db.Connection, way: Way, asked: Sequence[Asked]) -> Measured:
    p = phase.params
    statement = search_function.route_statement(phase.connection, p, "vector", scan=way.scan)
    shares: list[float] = []
    seconds: list[float] = []
    returned = wanted = short = 0
    with connection.transaction():
        set_way(phase, connection, way)
        for question in asked[:WARM_UP]:
            connection.execute(statement, _values(phase, question), prepare=False).fetchall()
        for question in asked:
            values = _values(phase, question)
            started = time.perf_counter()
            rows = connection.execute(statement, values, prepare=False).fetchall()
            seconds.append(time.perf_counter() - started)
            expected = len(question.exact.keys)
            returned, wanted, short = returned + len(rows), wanted + expected, short + (len(rows) < expected)
            shares.append(share(question.exact, [(str(r["key"]), -r["score"]) for r in rows], question.own_key))
        buffers, plan = _explain(phase, connection, statement, asked[:EXPLAINED])
    times = relevance_measures.latency(seconds)
    answers = sum(len(q.exact.keys) for q in asked)
    low, high = interval(shares, answers)
    return Measured(
        way=way,
        questions=len(asked),
        recall=mean(shares),
        low=low,
        high=high,
        worst=_worst(shares, asked),
        returned=returned / wanted if wanted else 1.0,
        rows_short=short,
        p50_ms=times["p50_ms"],
        p95_ms=times["p95_ms"],
        p99_ms=times["p99_ms"],
        buffers=buffers,
        plan=plan,
    )


def set_way(phase: Phase, connection: db.Connection, way: Way) -> None:
    """The settings of a way, for the transaction that is open."""
    method = phase.params.index.method
    for name, value in (
        (search_function.SETTING[method], str(way.candidates)),
        (search_function.ITERATIVE[method][0], way.iterative_scan),
        (search_function.MOST_SCANNED[method], str(way.most_scanned)),
    ):
        use_setting(connection, name, value, local=True)


def _values(phase: Phase, question: Asked) -> dict[str, object]:
    filters: dict[str, object] = dict.fromkeys(phase.params.target.filters)
    own = {"query": question.text, "k": phase.params.queries.k, "embedding": question.vector}
    return filters | dict(question.allowed) | own


def _worst(shares: Sequence[float], asked: Sequence[Asked]) -> float:
    by_value: dict[object, list[float]] = {}
    for found, question in zip(shares, asked, strict=True):
        by_value.setdefault(question.allowed, []).append(found)
    return min(mean(s) for s in by_value.values())


def interval(shares: Sequence[float], answers: int) -> tuple[float, float]:
    """The 95 % confidence interval of mean recall.

    The wider end of two: a percentile bootstrap over the queries, which knows that a query's answers are missed
    together, and Wilson's score interval over the answers, which does not turn to certainty where none was missed
    (Wilson, JASA 22, 1927).
    """
    known = np.array([s for s in shares if not math.isnan(s)])
    if not len(known):
        return 0.0, 1.0
    middle = float(known.mean())
    drawn = known[np.random.default_rng(SEED).integers(0, len(known), (RESAMPLES, len(known)))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    n = max(answers, 1)
    centre = (middle + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(middle * (1 - middle) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return min(float(low), centre - half), max(float(high), min(1.0, centre + half))


def _explain(
    phase: Phase, connection: db.Connection, statement: sql.Composed, asked: Sequence[Asked]
) -> tuple[int, str]:
    """Pages touched by a question, a median, and how their rows were found."""
    plans = [explain(connection, statement, _values(phase, question), CARRIED_OUT) for question in asked]
    pages = int(np.median([plan.pages for plan in plans])) if plans else 0
    return pages, ", ".join(dict.fromkeys(_found_by(phase, plan) for plan in plans))


def _found_by(phase: Phase, plan: QueryPlan) -> str:
    if reads_index(phase.connection, phase.params, plan):
        return VECTOR_INDEX
    return "whole table" if plan.has("Seq Scan") else "filter's index"
