"""Filter values that deserve a vector index of their own, and what such an index does for them, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runbook_lib.benchmark import cheapest_way, explain, filter_classes, replica
from runbook_lib.benchmark.loop import Measured, measure
from runbook_lib.benchmark.prepared import scans
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts, thresholds
from runbook_lib.core.display import Amount, Table, number, share, size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, names
from runbook_lib.core.thresholds import apart, at_least, milliseconds, plain, score
from runbook_lib.indexes import forecast
from runbook_lib.params import Params
from runbook_lib.search import ways
from runbook_lib.search.ways import Way
from runbook_lib.sql import load

SQL = load("filters")


@dataclass(frozen=True)
class Value:
    """A value of a filter column, as text, and why it is to have an index of its own."""

    column: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.column} = {self.value}"


def called_for(ledger: Ledger, params: Params) -> list[Value]:
    """The values that the parameters name; where they name none, those of the classes that 70_tune found wanting."""
    named = params.filters.partial_indexes
    if named:
        return [Value(c, v, "named in the parameters") for c, values in named.items() for v in dict.fromkeys(values)]
    return list(_found_wanting(ledger, params))


def _found_wanting(ledger: Ledger, params: Params) -> Iterator[Value]:
    """At most as many as the parameters allow; those first whose searches would save most time, by rows and p50."""
    f, target = params.filters, params.tune.target_recall
    tuning = ledger.latest("tuning") or {"classes": []}
    found: list[tuple[float, Value]] = []
    for c in tuning["classes"]:
        chosen = c["chosen"]
        if c["column"] not in params.target.filters or chosen is None:
            continue
        missed = not at_least(chosen["recall"], target) or bool(chosen["rows_short"])
        if not missed and chosen["p50_ms"] <= f.slow_ms:
            continue
        recall, needed = apart(chosen["recall"], target, score)
        p50, slow = apart(chosen["p50_ms"], f.slow_ms, plain)
        why = f"recall {recall}, below {needed}" if missed else f"p50 {p50} ms, above {slow} ms"
        found += [
            (share * chosen["p50_ms"], Value(c["column"], value, why))
            for value, share in c["shares"].items()
            if share >= f.smallest_share
        ]
    most_first = sorted(found, key=lambda pair: (-pair[0], pair[1].column, pair[1].value))
    yield from (value for _, value in most_first[: f.most_indexes])


def rows_of(connection: db.Connection, params: Params, values: Sequence[Value]) -> dict[Value, int]:
    """Rows with a vector that each value lets through, counted."""
    found: dict[Value, int] = {}
    for column in dict.fromkeys(v.column for v in values):
        own = [v for v in values if v.column == column]
        query = SQL["rows_of_values"].compose(names(params) | {"column": identifier(column)})
        rows = connection.execute(query, {"values": [v.value for v in own]}).fetchall()
        counted = {row["value"]: int(row["rows"]) for row in rows}
        found |= {v: counted.get(v.value, 0) for v in own}
    return found


def questions(connection: db.Connection, params: Params, values: Mapping[Value, float]) -> dict[Value, list[Query]]:
    """The queries of 70_tune put to each value, with exact answers. values: with the share of rows of each."""
    keyed = {
        v: filter_classes.of_values((v.column,), f"= {v.value}", {v.value: share}, (v.value,), {v.value: share})
        for v, share in values.items()
    }
    asked, _, _ = filter_classes.questions(connection, params, list(keyed.values()))
    return {v: asked[of] for v, of in keyed.items()}


def strategy_of(connection: db.Connection, params: Params, value: Value) -> dict[str, Any] | None:
    """The row by which the function searches this value now; None where it searches it as without a filter."""
    found = db.rows(connection, SQL["strategy_of"], params, filter=value.column, value=value.value)
    return dict(found[0]) if found else None


def way_of(params: Params, strategy: Mapping[str, Any] | None) -> Way:
    """A strategy as a way to search; without one, every row that the filter lets through."""
    if strategy is None:
        return ways.exact(params)
    return Way(*(strategy[name] for name in ("scan", "candidates", "iterative_scan", "most_scanned")))


def measure_now(connection: db.Connection, params: Params, value: Value, asked: Sequence[Query]) -> Measured:
    """The value as the function searches it now, on the held-out half of the questions."""
    with replica.connect(connection, params, "tune") as reader:
        return measure(reader, params, way_of(params, strategy_of(reader, params, value)), asked[1::2])


def cheapest_through_the_index(connection: db.Connection, params: Params, asked: Sequence[Query]) -> Measured:
    """The cheapest way through the index that reaches the target on one half of the questions, measured on the other.

    Where none does, the way that finds most. An iterative scan in every way: it ends early where the index alone
    fills the page, and goes on where a second filter or dead rows take answers away.
    """
    target = params.tune.target_recall
    tried: list[Measured] = []
    with replica.connect(connection, params, "tune") as reader:
        for n in ways.candidates(params):
            way = ways.through_the_index(params, n, "index" if params.index.method == "hnsw" else "relaxed")
            screened = measure(reader, params, way, asked[::2][: cheapest_way.SCREENED])
            if not at_least(screened.high, target) or screened.rows_short:
                tried.append(screened)
                continue
            tried.append(measure(reader, params, way, asked[::2]))
            if tried[-1].reaches(target):
                return measure(reader, params, way, asked[1::2])
        best = max(tried, key=lambda m: m.recall)
        return measure(reader, params, best.way, asked[1::2])


def scans_by_the_function(
    connection: db.Connection, params: Params, value: Value, oid: int, change: Sequence[db.Statement] = ()
) -> int:
    """Scans of one index in :data:`CALLS` calls of the function with this value, prepared, by the server's own count.

    change: statements that the transaction starts with; it is rolled back.
    """
    with db.beside(connection, params, "calls") as reader, db.rolled_back(reader):
        for statement in change:
            reader.execute(statement.query, statement.values)
        explain.call_function(reader, params, "vector", {value.column: value.value})
        return scans(reader, params, [oid])


def fits_in_memory(connection: db.Connection, params: Params, values: Sequence[Value]) -> list[Gate]:
    """A gate for the largest build; the others take less, one after the other."""
    rows = rows_of(connection, params, values)
    if not rows:
        return []
    largest = max(rows, key=lambda v: rows[v])
    cost = forecast.forecast(rows[largest], params)
    wanted, allowed = apart(cost.build_memory_bytes, cost.build_budget_bytes, thresholds.size)
    return [
        gate(
            "filters.largest_build_fits_in_memory",
            cost.build_memory_bytes <= cost.build_budget_bytes,
            str(largest),
            found=f"{number(rows[largest])} rows want {wanted}",
            needed=f"{allowed}, what index.maintenance_work_mem_mb allows",
            danger="past it the build slows down tenfold",
            do="raise index.maintenance_work_mem_mb",
            figures={"rows": rows[largest], "build_memory_bytes": cost.build_memory_bytes},
        )
    ]


def cost_table(connection: db.Connection, params: Params, values: Sequence[Value]) -> Table:
    """What each index will cost: rows, bytes, memory; and the share of the writes that will pay for it."""
    rows = rows_of(connection, params, values)
    whole = row_counts.of(connection, params).n
    shown = []
    for value, n in rows.items():
        cost = forecast.forecast(n, params)
        memory = size(cost.build_memory_bytes)
        shown.append((str(value), value.why, number(n), size(cost.index_bytes), memory, share(n / max(whole, 1), 1)))
    titles = ("value", "why", "rows", "index", "memory of its build", "share of inserts that insert twice")
    return Table(titles, shown, "forecast; a row of another value costs nothing more than today")


def figures(m: Mapping[str, Any]) -> tuple[Any, ...]:
    """Way, recall with its interval, rows returned, p50, p95, pages; from what :meth:`Measured.as_data` gave."""
    way = "exact" if m["scan"] == "exact" else f"{m['candidates']}, {m['iterative_scan'].removesuffix('_order')}"
    recall = f"{m['recall']:.3f} ({m['low']:.3f} to {m['high']:.3f})"
    return (
        way,
        Amount(recall, m["recall"]),
        share(m["returned"]),
        milliseconds(m["p50_ms"]),
        milliseconds(m["p95_ms"]),
        number(m["buffers"]),
    )
