"""The cheapest way to search that reaches the target recall, per filter class; and advice where every way is slow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.benchmark import filter_classes
from runbook_lib.benchmark.filter_classes import FilterClass
from runbook_lib.benchmark.loop import FIRST_LOOK, Measured, measure
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db
from runbook_lib.core.names import identifier, names, spelled
from runbook_lib.core.thresholds import apart, at_least, score
from runbook_lib.params import Params
from runbook_lib.params.filters import has_subquery
from runbook_lib.search import combined_filters, ways
from runbook_lib.search.ways import Way

# Settings that reach the target without a filter; if the held-out questions refute one, the next is at hand.
ENOUGH_REACH = 3
# Questions that say enough of a way that cannot be chosen, and of exact search, whose recall is known.
SCREENED = 40
# A way that certainly takes this much longer than the cheapest that reaches the target is given up.
HOPELESS = 1.2
# So many seconds of a search whose recall is known, or decides nothing, say how long it takes.
EXACT_S = 3.0
# Of ways that take no longer than this many times the cheapest, the one that finds most is chosen.
AS_CHEAP = 1.1
# An exact search slower than this is worth an index of its own.
SLOW_MS = 5.0
# More values than this call for partitions, not for an index each.
MOST_PARTIAL_INDEXES = 4
SO_SMALL = (
    "PostgreSQL reads the whole table, which is cheaper than the index while it is so small. Run 70_tune again when"
    " it has grown"
)
# What most guides recommend: pgvector's README, "Filtering" and "Iterative Index Scans".
PRACTICE = {
    "hnsw": Way("index", 100, "strict_order", ways.MOST_SCANNED_DEFAULT["hnsw"]),
    "ivfflat": Way("relaxed", 10, "relaxed_order", ways.MOST_SCANNED_DEFAULT["ivfflat"]),
}


@dataclass(frozen=True)
class Choice:
    """One filter class: what was measured on the tuning half of the questions, and the choice on the other half.

    chosen: None where no way reaches the target. practice: common practice on the first held-out questions.
    """

    of: FilterClass
    points: tuple[Measured, ...]
    chosen: Measured | None
    practice: Measured
    advice: str

    def as_data(self) -> dict[str, Any]:
        """For the ledger."""
        return {
            "column": self.of.filter,
            "bucket": self.of.bucket,
            "values": list(self.of.values),
            "shares": self.of.shares,
            "listed": self.of.listed,
            "share": self.of.share,
            "chosen": self.chosen.as_data() if self.chosen else None,
            "practice": self.practice.as_data(),
            "points": [p.as_data() for p in self.points],
            "advice": self.advice,
        }


def unfiltered(connection: db.Connection, params: Params, to_try: Sequence[Way], asked: Sequence[Query]) -> Choice:
    """The cheapest setting that reaches the target. to_try: the cheapest first; each is asked everything, since the
    picture shows them, until enough have reached it.
    """
    tuning, held_out = asked[::2], asked[1::2]
    # Once unseen, so that the first is not the one that reads the index from disk.
    for way in to_try[-1:]:
        measure(connection, params, way, tuning)
    points: list[Measured] = []
    reached: list[Measured] = []
    for way in to_try:
        points.append(measure(connection, params, way, tuning))
        if points[-1].reaches(params.tune.target_recall):
            reached.append(points[-1])
        if len(reached) == ENOUGH_REACH:
            break
    return _choice(connection, params, filter_classes.UNFILTERED, points, reached, held_out)


def filtered(
    connection: db.Connection,
    params: Params,
    of: FilterClass,
    asked: Sequence[Query],
    rows: int,
    served: Sequence[Way] | None = None,
) -> Choice:
    """Every row that the filter lets through, and the index in each of its ways, as long as they can still win.

    rows: of the table; an iterative scan cannot scan more. served: the only ways through the index, where a search
    cannot have settings of its own. A way that PostgreSQL answers without the vector index,
    because it finds the filter's rows sooner, is not chosen: which plan it takes may change with the statistics,
    and ``exact`` says the same for good.

    A way is given up as soon as it cannot win. Only its price is judged by so few questions: what is chosen has been
    put to all of the tuning half, and is confirmed on the other.
    """
    tuning, held_out = asked[::2], asked[1::2]
    target = params.tune.target_recall
    # A few at first: where another way is much faster, the others need not be asked.
    exact = measure(connection, params, ways.exact(params), tuning[:FIRST_LOOK])
    points, reached = [exact], [exact]
    settled: set[tuple[str, str]] = set()
    families = _families(params, rows, every_value_is_known=not of.listed) if served is None else [served]
    for way in chain.from_iterable(families):
        kind = (way.scan, way.iterative_scan)
        if kind in settled:
            continue
        cheapest = min(m.p50_ms for m in reached)
        cannot_win = partial(_cannot_win, cheapest, target, len(tuning))
        m = measure(connection, params, way, tuning, cannot_win)
        points.append(m)
        reaches = m.questions == len(tuning) and m.reaches(target)
        if reaches:
            reached.append(m)
        if reaches or not m.uses_the_index or m.p50_ms > HOPELESS * cheapest:
            # Those that follow look at more rows, and take no less.
            settled.add(kind)
    if exact.p50_at_least_ms <= HOPELESS * min(m.p50_ms for m in reached):
        points[0] = reached[0] = measure(connection, params, exact.way, tuning[: 2 * SCREENED], _is_known_well)
    return _choice(connection, params, of, points, _best_first(reached), held_out)


def _cannot_win(cheapest_ms: float, target: float, questions: int, m: Measured) -> bool:
    """Is it certain that this way misses the target, or takes longer than one that reaches it?

    questions: all that there are. The interval is narrower with all of them, but its lower end has to reach.
    """
    needed = target + (m.recall - m.low) * math.sqrt(m.questions / questions)
    misses = m.rows_short > 0 or not at_least(m.high, min(needed, 1.0))
    return misses or not m.uses_the_index or m.p50_at_least_ms > HOPELESS * cheapest_ms


def _is_known_well(m: Measured) -> bool:
    return m.p50_ms * m.questions > 1000 * EXACT_S


def _best_first(reached: Sequence[Measured]) -> list[Measured]:
    cheapest = min(m.p50_ms for m in reached)
    best = max((m for m in reached if m.p50_ms <= AS_CHEAP * cheapest), key=lambda m: (m.recall, -m.p50_ms))
    return [best, *sorted((m for m in reached if m is not best), key=lambda m: m.p50_ms)]


def _families(params: Params, rows: int, *, every_value_is_known: bool) -> Iterator[list[Way]]:
    """Ways through the index, in lists that grow slower and better. Values to come may let through fewer rows than
    those measured: only an iterative scan fills their pages.
    """
    method = params.index.method
    candidates = ways.candidates(params)
    default = ways.MOST_SCANNED_DEFAULT[method]
    if every_value_is_known:
        yield [Way("index", n, "off", default) for n in candidates]
    limits = sorted(set(params.tune.max_scan_tuples)) if method == "hnsw" else [default]
    # Past the whole table a higher limit changes nothing.
    whole = next((i for i, limit in enumerate(limits) if limit >= rows), len(limits))
    for limit in limits[: whole + 1]:
        if method == "hnsw":
            yield [Way("index", n, "strict_order", limit) for n in candidates]
        yield [Way("relaxed", n, "relaxed_order", limit) for n in candidates]


def _choice(
    connection: db.Connection,
    params: Params,
    of: FilterClass,
    points: Sequence[Measured],
    reached: Sequence[Measured],
    held_out: Sequence[Query],
) -> Choice:
    """The first of ``reached``, best first, that the held-out questions confirm; the first of all where none is."""
    target = params.tune.target_recall
    practice = measure(connection, params, PRACTICE[params.index.method], held_out[:SCREENED], _is_known_well)
    confirmed: list[Measured] = []
    for candidate in reached:
        # Exact search misses nothing, whatever is asked: it is asked until its price is known.
        enough = _is_known_well if candidate.way.scan == "exact" else None
        confirmed.append(measure(connection, params, candidate.way, held_out, enough))
        if at_least(confirmed[-1].recall, target) and not confirmed[-1].rows_short:
            break
    else:
        confirmed = confirmed[:1]
    chosen = confirmed[-1] if confirmed else None
    return Choice(of, tuple(points), chosen, practice, _advice(connection, params, of, points, chosen))


def _advice(
    connection: db.Connection, params: Params, of: FilterClass, points: Sequence[Measured], chosen: Measured | None
) -> str:
    """What would make this class fast, with the measured reason and the statement; empty where nothing is needed."""
    if chosen is None:
        return _denser_index(params, points)
    if of.filter is None and chosen.reads_every_row:
        return SO_SMALL
    if of.filter is None or chosen.way.scan != "exact" or chosen.p50_ms <= SLOW_MS:
        return ""
    through = [p for p in points if p.way.scan != "exact"]
    best = max(through, key=lambda p: p.recall, default=None)
    reason = f"exact takes {chosen.p50_ms:.1f} ms and {chosen.buffers:,} pages"
    if best:
        reason += f"; the index, at {best.way}, finds {best.recall:.3f} in {best.p50_ms:.1f} ms"
    if not of.columns:
        return f"{reason}. An index on what these conditions compare would help"
    if not filter_classes.has_btree(connection, params, of.columns):
        return f"{reason}. Find its rows by an index: {_btree(params, of.columns)}"
    if not vector_store.of(params).knows_filters:
        # Neither a partial index nor a partition of the vectors can know a column of the other table.
        there = f"{spelled(params, 'vectors')}, which lacks {', '.join(of.columns)}"
        return f"{reason}. The vectors are in {there}: an index for these rows alone needs vector.layout: column"
    if not of.shares or len(of.shares) > MOST_PARTIAL_INDEXES:
        return f"{reason}. Partition the table by {', '.join(of.columns)}, with a vector index on each partition"
    return f"{reason}. Give each value its own index: {' '.join(_partial(params, of))}"


def _denser_index(params: Params, points: Sequence[Measured]) -> str:
    best = max(points, key=lambda p: p.recall, default=None)
    recall, _ = apart(best.recall if best else 0.0, params.tune.target_recall, score)
    found = f"the best setting, {best.way}, finds {recall} in {best.p50_ms:.1f} ms. " if best else ""
    i = params.index
    always = params.target.always
    if always and i.rows == "all" and not has_subquery(always) and vector_store.of(params).knows_filters:
        found += (
            "Set index.rows: always, which leaves out of the index what no search may find; run operate/rebuild_index"
            " and 70_tune again. Or: "
        )
    if i.storage == "bit":
        return f"{found}Re-rank more rows, index.rerank: {2 * i.rerank}, or switch to index.storage: halfvec"
    if i.method == "ivfflat":
        return f"{found}Try higher tune.probes, or index.method: hnsw"
    return f"{found}Build again with index.m: {2 * i.m} and index.ef_construction: {2 * i.ef_construction}"


def _btree(params: Params, columns: Sequence[str]) -> str:
    statement = sql.SQL("CREATE INDEX CONCURRENTLY ON {table} ({columns});")
    listed = sql.SQL(", ").join(map(identifier, columns))
    return _pasted(statement.format(table=names(params)["table"], columns=listed))


def _partial(params: Params, of: FilterClass) -> Iterator[str]:
    for value in of.shares:
        parts = zip(of.columns, combined_filters.parts(of.columns, value), strict=True)
        wanted = [sql.SQL("{} = {}").format(identifier(c), sql.Literal(v)) for c, v in parts]
        yield _pasted(_create(params, sql.SQL(" AND ").join(wanted)))


def _create(params: Params, condition: sql.Composable) -> sql.Composed:
    """A partial vector index on a condition."""
    statement = sql.SQL("CREATE INDEX CONCURRENTLY ON {table} USING {method} ({indexed} {ops}) WHERE {condition};")
    n = names(params)
    return statement.format(
        table=n["table"],
        method=sql.SQL(params.index.method),
        indexed=n["indexed"],
        ops=n["operator_class"],
        condition=condition,
    )


def _pasted(statement: sql.Composed) -> str:
    return statement.as_string().replace("%%", "%")
