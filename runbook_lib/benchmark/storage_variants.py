"""What an index could hold of a vector: each measured by the very query that would search it, and one recommended."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from psycopg import sql

from runbook_lib.benchmark import loop, relevance_measures
from runbook_lib.benchmark.prepared import use
from runbook_lib.benchmark.query_set import Query
from runbook_lib.benchmark.recall_at_k import Recall
from runbook_lib.core import db
from runbook_lib.core.display import Table, duration, frame_of, number, size
from runbook_lib.core.names import identifier, indexed, names, of_pgvector
from runbook_lib.core.thresholds import apart, at_least, milliseconds, score
from runbook_lib.params import Params
from runbook_lib.params.data import MAX_INDEXED_DIMENSION
from runbook_lib.search import statements, ways
from runbook_lib.sql import load

if TYPE_CHECKING:
    import pandas

SQL = load("storage")

# Passes over the queries that are timed, once one pass has warmed the cache.
TIMED_PASSES = 3
# The measure is nDCG@10.
JUDGED_K = 10
MOST_CANDIDATES = 1000
# Switching to another storage is worth a build where it saves this share of the bytes, at least.
LEAST_SAVING = 0.2
# Much slower than today's and the users would notice; below so many ms nobody does.
MOST_TIMES_SLOWER, UNNOTICED_MS = 1.5, 5.0
# A difference in nDCG@10 that comes out this often when there is none is no loss.
P_VALUE = 0.05
# The question is what the index finds, whatever the planner thinks of so few rows. Before PostgreSQL 18 the price of
# what is forbidden would call for a compiler.
BY_THE_INDEX = {"enable_seqscan": "off", "enable_sort": "off", "jit": "off"}


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
            return statements.route_statement(connection, p, "vector")
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
class MeasuredShape:
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
    asked: Sequence[Query],
    judged: tuple[Sequence[Query], dict[str, dict[str, int]]],
) -> MeasuredShape:
    """The settings from the cheapest on, until the target recall is reached; then latency and relevance there.

    connection: of its own, since it keeps the settings. params: of the table that holds the index. asked: with exact
    answers. judged: queries, and their judgements.
    """
    statement = shape.statement(connection, params, rerank)
    setting, k = ways.SETTING[shape.method], params.queries.k
    use(connection, dict([ways.ITERATIVE[shape.method]]) | BY_THE_INDEX, local=False)
    best: tuple[Recall, int] | None = None
    for value in _settings(params, shape, rerank * k):
        use(connection, {setting: str(value)}, local=False)
        recall = loop.ask(connection, params, statement, asked, k).recall()
        if best is None or recall.of_the_target > best[0].of_the_target:
            best = (recall, value)
        if at_least(recall.of_the_target, params.tune.target_recall) and not recall.short:
            break
    assert best is not None
    use(connection, {setting: str(best[1])}, local=False)
    timed = [loop.ask(connection, params, statement, asked, k) for _ in range(TIMED_PASSES)]
    times = relevance_measures.latency([s for answers in timed for s in answers.seconds])
    relevance = _relevance(connection, params, statement, *judged)
    return MeasuredShape(
        shape=shape,
        rerank=rerank,
        setting=best[1],
        recall=best[0].of_the_target,
        short=best[0].short,
        p50_ms=times["p50_ms"],
        p95_ms=times["p95_ms"],
        uses_its_index=index in loop.planned(connection, params, statement, asked[0]).indexes,
        ndcg=relevance.measures[relevance_measures.PAIRED_MEASURE] if relevance else None,
        per_query=relevance.per_query if relevance else {},
    )


def _settings(params: Params, shape: Shape, depth: int) -> list[int]:
    """Settings to try, cheapest first; as many candidates as are sorted again is one that a search could want."""
    own = params.tune.ef_search if shape.method == "hnsw" else params.tune.probes
    deep = [min(depth, MOST_CANDIDATES)] if shape.ranks_again and shape.method == "hnsw" else []
    return sorted({*own, *deep})


def _relevance(
    connection: db.Connection,
    params: Params,
    statement: sql.Composed,
    judged: Sequence[Query],
    marks: dict[str, dict[str, int]],
) -> relevance_measures.Relevance | None:
    if not judged:
        return None
    answers = loop.ask(connection, params, statement, judged, JUDGED_K)
    return relevance_measures.relevance(answers.keys, {q.query_id: marks[q.query_id] for q in judged})


@dataclass(frozen=True)
class StorageComparison:
    """Every way to search, with its figures, as the ledger keeps them.

    found: one row a way; ``reaches`` says whether the target is reached with no query short of rows.
    """

    facts: dict[str, Any]
    found: tuple[dict[str, Any], ...]
    recommended: str | None
    recommendation: str

    @classmethod
    def of(cls, params: Params, found: Sequence[dict[str, Any]], facts: dict[str, Any]) -> StorageComparison:
        """Judges the rows and chooses among them."""
        target = params.tune.target_recall
        rows = [r | {"reaches": at_least(r["recall"], target) and not r["short"]} for r in found]
        today = next((r for r in rows if r["todays"]), None)
        rows = [r | {"worse": _loses_relevance(params, today, r)} for r in rows]
        chosen = _choose([r for r in rows if r["method"] == params.index.method], today)
        facts = {"k": params.queries.k, "target_recall": target, "where": params.storage.where} | facts
        return cls(facts, tuple(rows), _key(chosen), _sentence(facts, chosen, today, rows))

    def as_data(self) -> dict[str, Any]:
        """For the ledger: single queries' measures stay out."""
        rows = [{k: v for k, v in r.items() if k != "per_query"} for r in self.found]
        return {**self.facts, "found": rows, "recommended": self.recommended, "recommendation": self.recommendation}

    def table(self) -> Table:
        """One row a way to search, today's first, exact search last."""
        f = self.facts
        heads = (
            "the index holds", "bytes", "a row", "whole table", "build", "setting", f"recall@{f['k']}", "p50", "p95",
            "nDCG@10", "",
        )  # fmt: skip
        exact = (
            "nothing: exact search",
            *[""] * 5,
            score(1.0),
            milliseconds(f["exact_p50_ms"]),
            "",
            _ndcg(f["exact_ndcg"]),
            "",
        )
        caption = (
            f"On {number(f['rows'])} rows, {f['queries']} queries; nDCG@10 on {f['judged']} judged queries; each at"
            f" the smallest setting that reaches recall {f['target_recall']:g}; whole table:"
            f" {number(f['whole_rows'])} rows"
        )
        return Table(heads, [*map(self._row, self.found), exact], caption)

    def _row(self, r: dict[str, Any]) -> tuple[Any, ...]:
        said = "today's" if r["todays"] else ""
        if not r["reaches"]:
            said = "misses the target"
        elif r["worse"]:
            said = "loses relevance"
        elif _key(r) == self.recommended:
            said = "recommended" + (", as today" if r["todays"] else "")
        setting = f"{'ef_search' if r['method'] == 'hnsw' else 'probes'} {r['setting']}"
        return (
            r["title"], size(r["bytes"]), number(r["bytes_a_row"]), size(r["whole_bytes"]),
            "" if r["build_s"] is None else duration(r["build_s"]), setting, score(r["recall"]),
            milliseconds(r["p50_ms"]), milliseconds(r["p95_ms"]), _ndcg(r["ndcg"]), said,
        )  # fmt: skip

    def to_frame(self) -> pandas.DataFrame:
        """One row per index format, with all its figures."""
        return frame_of(self.as_data()["found"])

    def __str__(self) -> str:
        return f"{self.table()}\n{self.recommendation}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        # Here, because matplotlib takes longer to import than most phases take to run.
        from runbook_lib.benchmark import charts
        from runbook_lib.core import pictures

        drawn = [charts.bytes_against_recall(self.as_data())] if self.found else []
        advice = f"<p><strong>{html.escape(self.recommendation)}</strong></p>"
        return self.table()._repr_html_() + advice + pictures.in_a_notebook(drawn)


def _ndcg(value: float | None) -> str:
    return "" if value is None else score(value)


def _key(row: dict[str, Any] | None) -> str | None:
    return row["title"] if row else None


def _loses_relevance(params: Params, today: dict[str, Any] | None, row: dict[str, Any]) -> bool:
    """By more than the parameters allow, and by more than chance would."""
    if today is None or row is today or not row["per_query"]:
        return False
    pair = relevance_measures.paired(today["per_query"], row["per_query"])
    return pair.difference < -params.cut_over.largest_relevance_loss and pair.p_value < P_VALUE


def _choose(rows: Sequence[dict[str, Any]], today: dict[str, Any] | None) -> dict[str, Any] | None:
    """The smallest index that ``index.storage`` knows, reaches the target, keeps relevance and is fast enough.

    Another method is no matter of storage: IVFFlat's lists age, which one look does not show.
    """
    fit = [r for r in rows if r["reaches"] and not r["worse"] and r["held"] != "first" and r["uses_its_index"]]
    if today is None or not today["reaches"]:
        return min(fit, key=lambda r: (r["bytes"], r["p50_ms"]), default=None)
    slowest = max(MOST_TIMES_SLOWER * today["p95_ms"], UNNOTICED_MS)
    fit = [r for r in fit if r["p95_ms"] <= slowest and r["bytes"] <= (1 - LEAST_SAVING) * today["bytes"]]
    # Among depths of one index the shallowest that reaches the target is the fastest.
    return min(fit, key=lambda r: (r["bytes"], r["p50_ms"]), default=today)


def _sentence(
    facts: dict[str, Any], chosen: dict[str, Any] | None, today: dict[str, Any] | None, rows: Sequence[dict[str, Any]]
) -> str:
    if chosen is None:
        best = max(rows, key=lambda r: r["recall"], default=None)
        recall, target = apart(best["recall"] if best else 0.0, facts["target_recall"], score)
        found = f"; {best['title']} comes nearest, with {recall}" if best else ""
        return f"Nothing reaches recall {target}{found}."
    figures = _figures(chosen)
    if chosen is today:
        return f"Keep what the index holds today: {figures}; nothing smaller does as well."
    setting = f"index.storage: {chosen['held']}" + (
        f", index.rerank: {chosen['rerank']}" if chosen["rerank"] > 1 else ""
    )
    if today is None:
        return f"Set {setting}: {figures}."
    return (
        f"Set {setting}: {figures}, {chosen['bytes'] / today['bytes']:.0%} of today's index;"
        f" today's has {_figures(today)}."
    )


def _figures(row: dict[str, Any]) -> str:
    ndcg = f", nDCG@10 {row['ndcg']:.3f}" if row["ndcg"] is not None else ""
    return (
        f"{size(row['whole_bytes'])} for the whole table, recall {row['recall']:.3f}, p50 {row['p50_ms']:.2f} ms,"
        f" p95 {row['p95_ms']:.2f} ms{ndcg}"
    )
