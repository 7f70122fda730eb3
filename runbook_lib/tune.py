"""Phase 70: exact answers against the index, over settings; the cheapest that reaches the target is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pgvector.psycopg import register_vector
from psycopg import sql

from runbook_lib import db, embed, evaluate, explain, search
from runbook_lib.display import Table
from runbook_lib.evaluate import Query
from runbook_lib.gates import Gate, Gates, collect, gate
from runbook_lib.names import index_name
from runbook_lib.phase import Phase
from runbook_lib.sql import load

SQL = load("tune")


@dataclass(frozen=True)
class Point:
    """One setting, measured: recall@k against exact answers, latency in ms, queries with fewer rows than exact."""

    setting: str
    value: int
    recall: float
    p50_ms: float
    p95_ms: float
    rows_short: int


@dataclass(frozen=True)
class Tuning:
    """The sweep and its choice; chosen is None where no setting reaches the target."""

    k: int
    queries: int
    target_recall: float
    exact_p50_ms: float
    points: tuple[Point, ...]
    chosen: int | None

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return asdict(self)

    def _repr_html_(self) -> str:
        # Here, because matplotlib takes longer to import than most phases take to run.
        from runbook_lib import pictures

        table = Table.of(asdict(p) | {"chosen": "← chosen" if p.value == self.chosen else ""} for p in self.points)
        return table._repr_html_() + pictures.recall_against_latency(self.as_data())


def settings_to_try(phase: Phase) -> Sequence[int]:
    """ef_search or probes, from the parameters, cheapest first."""
    t = phase.params.tune
    return sorted(set(t.ef_search if phase.params.index.method == "hnsw" else t.probes))


def plan(phase: Phase) -> db.Plan:
    """What is carried into the search function, with the first setting as an example; the sweep only reads."""
    return db.Plan(tuple(search.set_search_setting(phase, settings_to_try(phase)[0])), phase.connection)


@contextmanager
def exactly(phase: Phase) -> Iterator[db.Connection]:
    """A fresh connection in a transaction that may use no index; nothing prepared earlier can slip in."""
    with db.connect(phase.params, f"runbook {phase.run_id} exact") as connection, connection.transaction():
        connection.execute(SQL["exact_only"].compose({}))
        yield connection


@contextmanager
def through_the_index(phase: Phase, value: int) -> Iterator[db.Connection]:
    """A fresh connection in a transaction with one index setting and the iterative scan of the search function."""
    method = phase.params.index.method
    with db.connect(phase.params, f"runbook {phase.run_id} index") as connection, connection.transaction():
        connection.execute(SQL["load_library"].compose({}))
        for name, text in ((search.SETTING[method], str(value)), search.ITERATIVE[method]):
            connection.execute(SQL["index_setting"].compose({}), {"name": name, "value": text})
        yield connection


def uses_index(connection: db.Connection, phase: Phase, statement: sql.Composable, values: dict[str, Any]) -> bool:
    """Does the plan of this statement, with these values, read our index?"""
    explained = sql.SQL("EXPLAIN (FORMAT JSON) {}").format(statement)
    row = connection.execute(explained, values, prepare=False).fetchone()
    return row is not None and index_name(phase.params) in json.dumps(row)


def _values(phase: Phase, query: Query, vector: np.ndarray, k: int) -> dict[str, Any]:
    return {**dict.fromkeys(phase.params.target.filters), "query": query.text, "k": k, "embedding": vector}


def apply(phase: Phase) -> Tuning | Table:
    """Measures every setting on the query sample, keeps the cheapest that reaches the target in the function.

    Both passes run on fresh connections, unprepared, and the plan of each is looked at before it counts.
    """
    if not phase.execute:
        return phase.carry_out(plan(phase))
    p = phase.params
    queries = evaluate.sample(evaluate.read_queries(p), p.tune.queries)
    vectors = embed.query_vectors(p, queries)
    statement = search.route_statement(phase.connection, p, "vector")
    values = _values(phase, queries[0], vectors[0], p.queries.k)
    with exactly(phase) as connection:
        register_vector(connection)
        if uses_index(connection, phase, statement, values):
            raise RuntimeError("the exact pass was planned with the vector index; its answers would not be exact")
        exact = search.ask(connection, p, statement, queries, vectors, p.queries.k)
    points = []
    for value in settings_to_try(phase):
        with through_the_index(phase, value) as connection:
            register_vector(connection)
            connection.execute("SET LOCAL enable_seqscan = off")
            if not uses_index(connection, phase, statement, values):
                break
            answers = search.ask(connection, p, statement, queries, vectors, p.queries.k)
        points.append(_point(phase, value, exact, answers))
    reached = [q.value for q in points if q.recall >= p.tune.target_recall and not q.rows_short]
    exact_p50 = evaluate.latency(exact.seconds)["p50_ms"]
    tuning = Tuning(
        p.queries.k, len(queries), p.tune.target_recall, exact_p50, tuple(points), reached[0] if reached else None
    )
    phase.note("tuning", tuning.as_data())
    if tuning.chosen is not None:
        for s in search.set_search_setting(phase, tuning.chosen):
            phase.do(s)
    return tuning


def _point(phase: Phase, value: int, exact: search.Answers, got: search.Answers) -> Point:
    ids = list(exact.keys)
    times = evaluate.latency(got.seconds)
    return Point(
        setting=search.SETTING[phase.params.index.method],
        value=value,
        recall=evaluate.recall([exact.keys[i] for i in ids], [got.keys[i] for i in ids]),
        p50_ms=times["p50_ms"],
        p95_ms=times["p95_ms"],
        rows_short=sum(len(got.keys[i]) < len(exact.keys[i]) for i in ids),
    )


def verify(phase: Phase) -> Gates:
    """The target is reached, the function carries the setting, and the application's query uses the index."""
    return collect([_target_is_reached(phase), _function_has_setting(phase), *explain.gates(phase)])


def _target_is_reached(phase: Phase) -> Gate:
    tuning = phase.ledger.latest("tuning", phase.name)
    points = tuning["points"] if tuning else []
    best = max(points, key=lambda q: q["recall"], default=None)
    chosen = next((q for q in points if q["value"] == tuning["chosen"]), None) if tuning else None
    shown = chosen or best
    return gate(
        "tune.target_recall_is_reached",
        bool(chosen) if points else None,
        index_name(phase.params),
        found=f"recall@{phase.params.queries.k} {shown['recall']:.3f} at {shown['setting']} {shown['value']},"
        f" p50 {shown['p50_ms']:.2f} ms, {shown['rows_short']} of {tuning['queries'] if tuning else 0} queries short"
        if shown
        else "no setting was measured through the index",
        needed=f"recall {phase.params.tune.target_recall}, no query short of rows",
        danger="the index would hide answers that exact search finds",
        do="try higher settings in tune, or rebuild with a higher m and ef_construction",
        figures=dict(shown) if shown else {},
    )


def _function_has_setting(phase: Phase) -> Gate:
    tuning = phase.ledger.latest("tuning", phase.name) or {"chosen": None}
    found = search.function_state(phase)
    settings = list(found["settings"] or []) if found else []
    wanted = f"{search.SETTING[phase.params.index.method]}={tuning['chosen']}"
    return gate(
        "tune.function_carries_the_setting",
        wanted in settings,
        phase.params.function_name,
        found=", ".join(s for s in settings if not s.startswith("search_path")) or "no index setting",
        needed=wanted,
        danger="the application would search with another setting than the one that was measured",
        do="run 70_tune again",
    )


def undo_plan(phase: Phase) -> db.Plan:
    """RESET of the function's index settings, where it has them."""
    found = search.function_state(phase)
    carried = [s.split("=")[0] for s in (found["settings"] or []) if not s.startswith("search_path")] if found else []
    return db.Plan(tuple(search.reset_search_setting(phase, name) for name in carried), phase.connection)


def undo(phase: Phase) -> Table:
    """Takes the index settings from the function."""
    return phase.carry_out(undo_plan(phase))
