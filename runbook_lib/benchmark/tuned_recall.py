"""Does the search function still find, filter by filter, what 70_tune measured? Asked as the application asks it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psycopg

from runbook_lib.benchmark import exact, filter_classes, replica
from runbook_lib.benchmark.filter_classes import Asked, FilterClass
from runbook_lib.benchmark.recall_at_k import Nearest, mean, share
from runbook_lib.core import db
from runbook_lib.core.phase import Phase
from runbook_lib.core.session import register_vector
from runbook_lib.search import combined_filters, search_function

NOT_LISTED = "values not listed"


@dataclass(frozen=True)
class Question:
    """A query with its vector. own_key: of the row that it was made from, which counts for none of its answers."""

    text: str
    vector: np.ndarray
    own_key: str | None = None


@dataclass(frozen=True)
class Standing:
    """A filter class as it is found now: recall@k, questions asked, and those with fewer rows than there are."""

    of: FilterClass
    recall: float
    questions: int
    short: int


def strategy_classes(phase: Phase, chosen: random.Random) -> list[FilterClass]:
    """The rows of the strategies as classes, each with a few values drawn anew.

    Values that have no row of their own are those that the table holds now, whatever they were when it was tuned.
    """
    rows = db.rows(phase.connection, search_function.SQL["strategies"], phase.params)
    return [
        c
        for columns in filter_classes.measured_filters(phase.params)
        for c in _of_columns(phase, chosen, columns, rows)
    ]


def _of_columns(
    phase: Phase, chosen: random.Random, columns: tuple[str, ...], rows: Sequence[db.Row]
) -> list[FilterClass]:
    mine = {r["value"]: r["share"] for r in rows if r["filter"] == combined_filters.name(columns)}
    groups: list[tuple[str, dict[str, float]]] = []
    lower = 0.0
    for upper, bucket in filter_classes.BUCKETS:
        groups.append((bucket, {v: s for v, s in mine.items() if v is not None and lower <= s < upper}))
        lower = upper
    if None in mine:
        there = filter_classes.shares(phase, columns)
        groups.append((NOT_LISTED, {v: s for v, s in there.items() if v not in mine}))
    found = []
    for bucket, shares in groups:
        if shares:
            values = chosen.sample(sorted(shares), min(filter_classes.MEASURED_VALUES, len(shares)))
            mean = float(np.mean([shares[v] for v in values]))
            found.append(FilterClass(columns, bucket, tuple(values), {}, mean))
    return found


def measure(phase: Phase, found: Sequence[FilterClass], questions: Sequence[Question]) -> list[Standing]:
    """Puts the questions to every class: one pass over the table for all exact answers, then the function's own."""
    asked = _with_exact_answers(phase, found, questions)
    statement = search_function.filtered_call_statement(phase.connection, phase.params)
    empty: dict[str, object] = dict.fromkeys(phase.params.target.filters)
    result = []
    with replica.connect(phase, "filters") as connection, connection.transaction():
        register_vector(connection)
        search_function.force_route(connection, phase.params, "vector")
        for of, mine in zip(found, asked, strict=True):
            shares, short = [], 0
            for question in mine:
                own = {"query": question.text, "k": phase.params.queries.k, "embedding": question.vector}
                values = empty | dict(question.allowed) | own
                rows = connection.execute(statement, values, prepare=False).fetchall()
                keys = [(str(row[phase.params.target.key]), -row["score"]) for row in rows]
                shares.append(share(question.exact, keys, question.own_key))
                short += len(rows) < len(question.exact.keys)
            result.append(Standing(of, mean(shares), len(mine), short))
    return result


def _with_exact_answers(
    phase: Phase, found: Sequence[FilterClass], questions: Sequence[Question]
) -> list[list[Asked]]:
    vectors = np.array([q.vector for q in questions], np.float32)
    allowed = [[c.allowed(c.values[i % len(c.values)]) for i in range(len(questions))] for c in found]
    keyed = [exact.Question(i, values) for mine in allowed for i, values in enumerate(mine)]

    def look() -> list[Nearest]:
        with replica.connect(phase, "exact") as connection, connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            return exact.nearest(connection, phase.params, vectors, keyed, phase.params.queries.k)

    answers = iter(replica.again(phase.params, look))
    return [
        [Asked(q.text, q.vector, values, next(answers), q.own_key) for q, values in zip(questions, mine, strict=True)]
        for mine in allowed
    ]


@dataclass(frozen=True)
class Called:
    """Calls with filters, one for each value: how many, those that failed, those short of rows; the first error."""

    calls: int
    errors: int
    short: int
    problem: str = ""


NO_CALLS = Called(0, 0, 0)


def call_each(phase: Phase, connection: db.Connection, route: str, questions: Sequence[Question]) -> Called:
    """Calls the function by a route, wherever reads go now, with each value of each class of filters."""
    p = phase.params
    found = strategy_classes(phase, random.Random(phase.run_id))  # noqa: S311 - a sample, not a secret
    asked = [c.allowed(value) for c in found for value in c.values]
    statement, matching = (
        search_function.filtered_call_statement(connection, p),
        search_function.matching_statement(connection, p),
    )
    empty: dict[str, object] = dict.fromkeys(p.target.filters)
    errors = short = 0
    problem = ""
    for i, allowed in enumerate(asked):
        question = questions[i % len(questions)]
        values = empty | dict(allowed) | {"query": question.text, "k": p.queries.k, "embedding": question.vector}
        try:
            with connection.transaction():
                search_function.force_route(connection, p, route)
                rows = connection.execute(statement, values, prepare=False).fetchall()
                there = connection.execute(matching, values, prepare=False).fetchone()
        except psycopg.Error as error:
            errors += 1
            problem = problem or f"{dict(allowed)}: {error.sqlstate} {error}".splitlines()[0]
        else:
            short += there is not None and len(rows) < there["rows"]
    return Called(len(asked), errors, short, problem)
