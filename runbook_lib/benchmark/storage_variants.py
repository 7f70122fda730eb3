"""What an index could hold of a vector, each measured by the very query that would search it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from psycopg import sql

from runbook_lib.benchmark import recall_at_k, relevance_measures
from runbook_lib.benchmark.prepared import use_setting
from runbook_lib.benchmark.recall_at_k import Nearest
from runbook_lib.benchmark.relevance_measures import Query
from runbook_lib.core import db
from runbook_lib.core.names import identifier, indexed, names, of_pgvector
from runbook_lib.core.query_plan import explain
from runbook_lib.core.session import register_vector
from runbook_lib.core.thresholds import at_least
from runbook_lib.params import Params
from runbook_lib.params.data import MAX_INDEXED_DIMENSION
from runbook_lib.search import search_function
from runbook_lib.sql import load

SQL = load("storage")

# Passes over the queries that are timed, once one pass has warmed the cache.
TIMED_PASSES = 3
# The measure is nDCG@10.
JUDGED_K = 10
MOST_CANDIDATES = 1000


@dataclass(frozen=True)
class Shape:
    """What one index holds. dimension: those that it holds, fewer than the vectors' where ``held`` is "first"."""

    held: Literal["vector", "halfvec", "bit", "first"]
    dimension: int
    method: str

    @property
    def ranks_again(self) -> bool:
        """Does it find candidates only, for the full vectors to sort?"""
        return self.held in ("bit", "first")

    @property
    def slug(self) -> str:
        """For the name of an index."""
        return f"{self.held}_{self.dimension}_{self.method}"

    def title(self, params: Params) -> str:
        """For a reader."""
        whole = {"vector": f"{params.vector.type}, as it is", "halfvec": "halfvec", "bit": "bit"}
        what = whole.get(self.held, f"first {self.dimension} dimensions")
        return what if self.method == params.index.method else f"{what}, {self.method}"

    def storage_params(self, params: Params, rerank: int = 1) -> Params:
        """The parameters under which the runbook builds and searches this."""
        change = {"storage": "vector" if self.held == "first" else self.held, "method": self.method, "rerank": rerank}
        return params.model_copy(update={"index": params.index.model_copy(update=change)})

    def part(self, params: Params, vector: sql.Composable) -> sql.Composable:
        """The first dimensions of a vector."""
        form = sql.SQL("{subvector}({v}, 1, {d})::{type}({d})")
        parts = {"subvector": of_pgvector(params, "subvector"), "type": of_pgvector(params, params.vector.type)}
        return form.format(v=vector, d=sql.Literal(self.dimension), **parts)

    def index_names(self, params: Params) -> dict[str, sql.Composable]:
        """``indexed`` and ``operator_class`` for CREATE INDEX."""
        p = self.storage_params(params)
        on = indexed(p)
        if self.held == "first":
            on = sql.SQL("({})").format(self.part(p, identifier(p.vector.column)))
        return {"indexed": on, "operator_class": names(p)["operator_class"]}

    def statement(self, connection: db.Connection, params: Params, rerank: int) -> sql.Composed:
        """The search by this index: for what ``index.storage`` knows, the search function's own."""
        p = self.storage_params(params, rerank)
        if self.held != "first":
            return search_function.route_statement(connection, p, "vector")
        n = names(p)
        vector = sql.SQL("%(embedding)s::{}").format(n["vector_type"])
        return SQL["first_dimensions"].compose(
            n
            | {
                "query_vector": vector,
                "row_part": self.part(p, n["row_embedding"]),
                "query_part": self.part(p, vector),
                "nearest_rows": sql.SQL("%(k)s * {}").format(sql.Literal(rerank)),
            }
        )


def possible(params: Params) -> list[Shape]:
    """What an index on this column could hold, today's first where it is one of them."""
    d, method = params.vector.dimension, params.index.method
    shapes: list[Shape] = []
    if d <= MAX_INDEXED_DIMENSION[params.vector.type]:
        shapes.append(Shape("vector", d, method))
    if params.vector.type == "vector" and d <= MAX_INDEXED_DIMENSION["halfvec"]:
        shapes.append(Shape("halfvec", d, method))
        if params.storage.ivfflat and method != "ivfflat":
            shapes.append(Shape("halfvec", d, "ivfflat"))
    shapes.append(Shape("bit", d, method))
    parts = [d // n for n in (2, 4) if d >= 2 * n]
    shapes += [Shape("first", part, method) for part in parts if part <= MAX_INDEXED_DIMENSION[params.vector.type]]
    return sorted(shapes, key=lambda s: not is_todays(params, s))


def is_todays(params: Params, shape: Shape) -> bool:
    """Is this what the parameters have the runbook build?"""
    return (shape.held, shape.method) == (params.index.storage, params.index.method)


@dataclass(frozen=True)
class Asked:
    """Queries with their vectors, shape (n, dimension), and their exact answers."""

    queries: Sequence[Query]
    vectors: np.ndarray
    exact: Sequence[Nearest]


@dataclass(frozen=True)
class Found:
    """A shape, measured at the smallest setting that reaches the target, or else at the one that finds most.

    rerank: so many times k rows are sorted again; 1 where none are. ndcg: None where nothing is judged. per_query:
    nDCG@10 by query id.
    """

    shape: Shape
    rerank: int
    setting: int
    recall: float
    short: int
    p50_ms: float
    p95_ms: float
    uses_its_index: bool
    ndcg: float | None
    per_query: dict[str, float]


def measure(
    connection: db.Connection,
    params: Params,
    shape: Shape,
    rerank: int,
    index: str,
    asked: Asked,
    judged: tuple[Asked, dict[str, dict[str, int]]],
) -> Found:
    """The settings from the cheapest on, until the target recall is reached; then latency and relevance there.

    connection: of its own, since it keeps the settings. params: of the table that holds the index.
    """
    statement = shape.statement(connection, params, rerank)
    k, target = params.queries.k, params.tune.target_recall
    _prepare(connection, shape.method)
    best: tuple[float, int, int] | None = None
    for value in _settings(params, shape, rerank * k):
        use_setting(connection, search_function.SETTING[shape.method], str(value), local=False)
        answers, _ = _ask(connection, statement, asked, k)
        recall, short = recall_at_k.recall(asked.exact, answers), recall_at_k.short(asked.exact, answers)
        if best is None or recall > best[0]:
            best = (recall, short, value)
        if at_least(recall, target) and not short:
            break
    assert best is not None
    use_setting(connection, search_function.SETTING[shape.method], str(best[2]), local=False)
    seconds = [s for _ in range(TIMED_PASSES) for s in _ask(connection, statement, asked, k)[1]]
    times = relevance_measures.latency(seconds)
    relevance = _relevance(connection, shape, params, rerank, judged)
    return Found(
        shape=shape,
        rerank=rerank,
        setting=best[2],
        recall=best[0],
        short=best[1],
        p50_ms=times["p50_ms"],
        p95_ms=times["p95_ms"],
        uses_its_index=_uses(connection, statement, asked, k, index),
        ndcg=relevance.measures[relevance_measures.PAIRED_MEASURE] if relevance else None,
        per_query=relevance.per_query if relevance else {},
    )


def _settings(params: Params, shape: Shape, depth: int) -> list[int]:
    """Settings to try, cheapest first; as many candidates as are sorted again is one that a search could want."""
    own = params.tune.ef_search if shape.method == "hnsw" else params.tune.probes
    deep = [min(depth, MOST_CANDIDATES)] if shape.ranks_again and shape.method == "hnsw" else []
    return sorted({*own, *deep})


def _prepare(connection: db.Connection, method: str) -> None:
    register_vector(connection)
    name, value = search_function.ITERATIVE[method]
    # The question is what the index finds, whatever the planner thinks of so few rows. Before PostgreSQL 18 the price
    # of what is forbidden would call for a compiler.
    for setting, to in ((name, value), ("enable_seqscan", "off"), ("enable_sort", "off"), ("jit", "off")):
        use_setting(connection, setting, to, local=False)


Answers = list[recall_at_k.Rows]


def _ask(connection: db.Connection, statement: sql.Composed, asked: Asked, k: int) -> tuple[Answers, list[float]]:
    """Keys with their distances, nearest first, and seconds, by query. Never prepared: each is planned anew."""
    answers: Answers = []
    seconds: list[float] = []
    for query, vector in zip(asked.queries, asked.vectors, strict=True):
        values = {"query": query.text, "k": k, "embedding": vector}
        started = time.perf_counter()
        rows = connection.execute(statement, values, prepare=False).fetchall()
        seconds.append(time.perf_counter() - started)
        answers.append([(str(r["key"]), -r["score"]) for r in rows])
    return answers, seconds


def _relevance(
    connection: db.Connection,
    shape: Shape,
    params: Params,
    rerank: int,
    judged: tuple[Asked, dict[str, dict[str, int]]],
) -> relevance_measures.Relevance | None:
    asked, marks = judged
    if not asked.queries:
        return None
    answers, _ = _ask(connection, shape.statement(connection, params, rerank), asked, JUDGED_K)
    keys = {q.query_id: [key for key, _ in rows] for q, rows in zip(asked.queries, answers, strict=True)}
    return relevance_measures.relevance(keys, {q.query_id: marks[q.query_id] for q in asked.queries})


def _uses(connection: db.Connection, statement: sql.Composed, asked: Asked, k: int, index: str) -> bool:
    values: dict[str, Any] = {"query": asked.queries[0].text, "k": k, "embedding": asked.vectors[0]}
    return index in explain(connection, statement, values).indexes
