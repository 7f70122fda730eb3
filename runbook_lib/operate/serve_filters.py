"""Partial vector indexes for filter values that are slow or have low recall: measured, built, used or rolled back.

The search function plans its inner statement again in each call, with the value as a constant, so the planner knows
that a partial index holds every row that is asked for. What sends a value to its index is its row in the strategy
table; the function itself stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.benchmark import partial_index_candidates
from runbook_lib.benchmark.loop import Measured
from runbook_lib.benchmark.partial_index_candidates import Value
from runbook_lib.benchmark.prepared import CALLS
from runbook_lib.benchmark.query_set import Query
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import Table, share, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, literal, spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart, at_least, plain, score
from runbook_lib.indexes import building, forecast, partitions
from runbook_lib.indexes.building import none_under_way
from runbook_lib.operate.filter_indexes import is_searched_as, is_served, made, remember, remembered, wanted
from runbook_lib.operate.filter_indexes import standing as standing
from runbook_lib.params import Params
from runbook_lib.search import conditions, search_function
from runbook_lib.sql import load

SQL = load("filters")


def check(phase: Phase) -> Gates:
    """Before anything is changed: such an index can be made here, the function can use it, its build fits."""
    connection, params = phase.connection, phase.params
    p, values = params, list(wanted(connection, phase.ledger, params).values())
    table = spelled(p, "table")
    kind = db.one(connection, SQL["table_kind"], p, table=table)
    knows_filters, partitioned = vector_store.of(p).knows_filters, bool(kind["partitioned"])
    builds = db.one(connection, SQL["builds_under_way"], p, vectors=spelled(p, "vectors"))["builds"]
    return collect(
        [
            gate(
                "filters.table_takes_partial_indexes",
                knows_filters and not partitioned,
                f"{p.target.schema_}.{p.target.table}",
                found="the vectors are in a table of their own, without the filters"
                if not knows_filters
                else "partitioned"
                if partitioned
                else "an ordinary table that holds vectors and filters",
                needed="an ordinary table that holds vectors and filters",
                danger="the condition of an index may name columns of its own table only, and a concurrent build"
                " takes no partitioned table",
                do="partition by the filter (operate/partition_by_filter), with a vector index on each partition",
            ),
            gate(
                "filters.function_holds_the_query",
                p.search.mode == "function",
                p.function_name,
                found=f"search.mode: {p.search.mode}",
                needed="search.mode: function, which knows the value when it plans",
                danger="a statement of the application that binds its filter uses no partial index once its plan is"
                " generic: every write would pay for an index that no search uses",
                do="move reads to the search function, or write the value into the application's statement and make"
                " the index by hand",
            ),
            gate(
                "filters.indexes_are_few",
                len(values) <= p.filters.most_indexes,
                ", ".join(dict.fromkeys(v.column for v in values)) or "no value",
                found=f"{len(values)} values",
                needed=f"{p.filters.most_indexes} at most",
                danger="each index takes memory from the others, and planning a search looks at all of them",
                do="name fewer values in filters.partial_indexes, or partition by it (operate/partition_by_filter)",
            ),
            none_under_way("filters.no_build_is_under_way", spelled(p, "vectors"), builds),
            *partial_index_candidates.fits_in_memory(connection, params, values),
        ]
    )


def expected(phase: Phase) -> Table:
    """What each index will cost, before it is built."""
    return partial_index_candidates.cost_table(
        phase.connection, phase.params, list(wanted(phase.connection, phase.ledger, phase.params).values())
    )


def _create(connection: db.Connection, params: Params, name: str, value: Value) -> db.Statement:
    rows = partial_index_candidates.rows_of(connection, params, [value])[value]
    lists = {"lists": params.index.lists or forecast.lists_rule(rows)}
    # A search for this value has the condition of every search too.
    of_rows = {"of_rows": sql.SQL("")}
    build = building.create_statement(connection, params, partitions.relation(params), name, lists, of_rows)
    condition = conditions.filter_is(connection, params, value.column, literal(value.value))
    extra = {"build": build.query, "condition": condition}
    return replace(db.statement(SQL["create"], params, extra), values=build.values)


def _drop(params: Params, name: str) -> db.Statement:
    qualified = identifier(params.target.schema_, name)
    return db.statement(SQL["drop"], params, {"partial_index": qualified})


def _route(params: Params, value: Value, strategy: Mapping[str, Any]) -> list[db.Statement]:
    """Statements that make the function search this value so."""
    way = {
        name: strategy[name] for name in ("scan", "candidates", "iterative_scan", "most_scanned", "recall", "p50_ms")
    }
    return [
        _forget(params, value),
        db.statement(
            search_function.SQL["learn_strategy"],
            params,
            filter=value.column,
            values=[value.value],
            shares=[strategy["share"]],
            **way,
        ),
    ]


def _forget(params: Params, value: Value) -> db.Statement:
    return db.statement(SQL["forget_strategy"], params, filter=value.column, value=value.value)


def plan(phase: Phase) -> db.Plan:
    """What is left over or no longer wanted dropped, after its value is searched as before; then the builds."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    values, own = (wanted(connection, ledger, params), made(connection, ledger, params))
    todo: list[db.Statement] = []
    for name, row in own.items():
        if name not in values:
            todo += [*_back(connection, ledger, params, name), _drop(params, name)]
        elif not row["usable"]:
            todo.append(_drop(params, name))
    todo += [
        _create(connection, params, name, v)
        for name, v in values.items()
        if name not in own or not own[name]["usable"]
    ]
    return db.Plan(tuple(todo), connection)


@changes
def apply(phase: Phase) -> Table:
    """Measures each value, builds its index, measures again, and sends the function there.

    An index that the function does not use, that misses the target, or that gains too little, is dropped again.
    """
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    if not phase.execute:
        return phase.carry_out(plan(phase))
    values = wanted(connection, ledger, params)
    for name in made(connection, ledger, params):
        if name not in values:
            _take_back(phase, name)
    todo = {name: v for name, v in values.items() if not is_served(connection, ledger, params, name, v)}
    shares = {
        v: n / max(row_counts.of(connection, params).n, 1)
        for v, n in partial_index_candidates.rows_of(connection, params, list(todo.values())).items()
    }
    asked = partial_index_candidates.questions(connection, params, shares) if todo else {}
    for name, value in todo.items():
        _measure_before(phase, name, value, asked[value], shares[value])
        _build(phase, name, value)
        _use_or_drop(
            phase, name, value, partial_index_candidates.cheapest_through_the_index(connection, params, asked[value])
        )
    return shown(ledger, params)


def _measure_before(phase: Phase, name: str, value: Value, asked: list[Query], share: float) -> None:
    """Written down before the build: a rerun after an interruption would measure with the new index there."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    if name in made(connection, ledger, params) and "before" in remembered(ledger).get(name, {}):
        return
    before = partial_index_candidates.measure_now(connection, params, value, asked)
    row = partial_index_candidates.strategy_of(connection, params, value)
    remember(
        phase,
        name,
        column=value.column,
        value=value.value,
        share=share,
        strategy=row if row and row["value"] is not None else None,
        before=before.as_data(),
        served=False,
    )


def _build(phase: Phase, name: str, value: Value) -> None:
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    row = made(connection, ledger, params).get(name)
    if row and row["usable"]:
        return
    if row:
        building.concurrently(phase, _drop(params, name))
    built = building.concurrently(phase, _create(connection, params, name, value))
    remember(
        phase,
        name,
        seconds=round(built.seconds, 3),
        notices=built.notices,
        bytes=made(connection, ledger, params)[name]["bytes"],
    )


def _use_or_drop(phase: Phase, name: str, value: Value, after: Measured) -> None:
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    known = remembered(ledger)[name]
    through = after.as_data() | {"share": known["share"]}
    change = _route(params, value, through)
    scans = partial_index_candidates.scans_by_the_function(
        connection, params, value, made(connection, ledger, params)[name]["oid"], change
    )
    why_not = _why_not(params, known["before"], after, scans)
    if why_not:
        remember(phase, name, after=through, scans=scans, served=False, why_not=why_not)
        building.concurrently(phase, _drop(params, name))
        return
    # The ledger first: interrupted between the two, undo finds what to take back and a rerun proves it again.
    remember(phase, name, after=through, scans=scans, served=True, why_not="")
    with connection.transaction():
        for statement in change:
            phase.do(statement)


def _why_not(params: Params, before: Mapping[str, Any], after: Measured, scans: int) -> str:
    """Why an index is not kept; empty where it is."""
    target, gain = params.tune.target_recall, params.filters.smallest_gain
    if scans < CALLS:
        return f"the function uses it in {scans} of {CALLS} calls"
    if not at_least(after.recall, target) or after.rows_short:
        recall, _ = apart(after.recall, target, score)
        return f"recall {recall}, {after.rows_short} questions short of rows"
    was_good = at_least(before["recall"], target) and not before["rows_short"]
    times = before["p50_ms"] / max(after.p50_ms, 1e-6)
    return f"{apart(times, gain, plain)[0]} times as fast as before" if was_good and not at_least(times, gain) else ""


def shown(ledger: Ledger, params: Params) -> Table:
    """Before and after, a row a value: recall with its confidence, latency, rows returned, pages."""
    rows = [
        (
            f"{m['column']} = {m['value']}",
            share(m["share"], 1),
            when,
            *partial_index_candidates.figures(m[when]),
            _verdict(m) if i else "",
        )
        for m in remembered(ledger).values()
        for i, when in enumerate(("before", "after"))
        if when in m
    ]
    k = params.queries.k
    titles = ("value", "rows", "", "way", f"recall@{k}", "rows returned", "p50", "p95", "pages", "")
    return Table(titles, rows, "The same held-out questions before and after, warm")


def _verdict(m: Mapping[str, Any]) -> str:
    return "served by its index" if m.get("served") else f"dropped again: {m.get('why_not') or 'rolled back'}"


def verify(phase: Phase) -> Gates:
    """Each value: its index is whole, the function searches by it, and it does what it was built for."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    values = wanted(connection, ledger, params)
    gates = [g for name, value in values.items() for g in _value_gates(connection, ledger, params, name, value)]
    return collect([*gates, _nothing_is_left(connection, ledger, params, values)])


def _value_gates(connection: db.Connection, ledger: Ledger, params: Params, name: str, value: Value) -> list[Gate]:
    known, row = remembered(ledger).get(name, {}), made(connection, ledger, params).get(name)
    kept = bool(known.get("served"))
    f, target = params.filters, params.tune.target_recall
    after = known.get("after")
    recall, needed = apart(after["recall"] if after else 0.0, target, score)
    found = f"recall {recall}, p50 {after['p50_ms']:.2f} ms" if after else ""
    before = f"before recall {known['before']['recall']:.3f}, p50 {known['before']['p50_ms']:.2f} ms" if known else ""
    gates = [
        gate(
            "filters.index_serves_its_value",
            kept,
            str(value),
            found=f"{found}; {before}" + ("" if kept else f"; {_verdict(known)}") if found else "not measured",
            needed=f"recall {needed}, used in each call, {f.smallest_gain:g} times as fast where it was good before",
            danger="every write to rows of this value would pay for an index that gains nothing",
            do="leave the value out of filters, or raise index.m or tune.ef_search; nothing was changed for it",
            figures={when: known[when] for when in ("before", "after") if when in known},
        )
    ]
    return gates + ([_is_valid(name, value, row), _is_used(connection, params, name, value, row)] if kept else [])


def _is_valid(name: str, value: Value, row: db.Row | None) -> Gate:
    return gate(
        "filters.index_is_valid",
        bool(row and row["usable"]),
        f"{name} for {value}",
        found="no such index" if row is None else f"valid, {size(row['bytes'])}" if row["usable"] else "invalid",
        needed="valid",
        danger="searches with this value read through the index of all rows, with settings made for this one",
        do="run operate/serve_filters again with execute: true",
        figures={"bytes": row["bytes"]} if row else {},
    )


def _is_used(connection: db.Connection, params: Params, name: str, value: Value, row: db.Row | None) -> Gate:
    scans = partial_index_candidates.scans_by_the_function(connection, params, value, row["oid"]) if row else 0
    return gate(
        "filters.function_uses_the_index",
        scans >= CALLS,
        f"{params.function_name}, {value}",
        found=f"{scans} scans of {name} in {CALLS} calls",
        needed=f"one in each of {CALLS} calls, prepared, half with a custom and half with a generic plan",
        danger="the index is paid for and not used",
        do="run ANALYZE on the table; if it comes back: `runbook operate PARAMS serve_filters --undo --execute`",
        figures={"scans": scans, "calls": CALLS},
    )


def _nothing_is_left(connection: db.Connection, ledger: Ledger, params: Params, values: Mapping[str, Value]) -> Gate:
    left = [name for name, row in made(connection, ledger, params).items() if name not in values or not row["usable"]]
    return gate(
        "filters.nothing_is_left",
        not left,
        spelled(params, "vectors"),
        found=", ".join(left) or f"{len(values)} values have an index" if values else "no value calls for an index",
        needed="no index that is left over or no longer wanted",
        danger="every write to its rows pays for it",
        do="run operate/serve_filters again with execute: true",
    )


def _back(connection: db.Connection, ledger: Ledger, params: Params, name: str) -> list[db.Statement]:
    """Statements that make the function search a value as before its index, or exactly where it was tuned since."""
    known = remembered(ledger).get(name)
    if not known or not known.get("served"):
        return []
    value = Value(known["column"], known["value"], "")
    row = partial_index_candidates.strategy_of(connection, params, value)
    if row is None or row["value"] is None or row["scan"] == "exact":
        return []  # forgotten or tuned again: it needs no index
    if not is_searched_as(row, known):
        # What was measured with the index says nothing without it, and exact is never wrong.
        return _route(params, value, row | {"scan": "exact", "iterative_scan": "off"})
    return _route(params, value, known["strategy"]) if known["strategy"] else [_forget(params, value)]


def _take_back(phase: Phase, name: str) -> list[tuple[str, float]]:
    """The value searched as before first, its index dropped after; returns purposes and seconds."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    with connection.transaction():
        rows = [(s.purpose, phase.do(s).seconds) for s in _back(connection, ledger, params, name)]
    if name in remembered(ledger):
        remember(phase, name, served=False)
    drop = _drop(params, name)
    return [*rows, (drop.purpose, round(building.concurrently(phase, drop).seconds, 3))]


def undo_plan(phase: Phase) -> db.Plan:
    """Every value searched as before, and its index dropped."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    todo = [
        s
        for name in made(connection, ledger, params)
        for s in (*_back(connection, ledger, params, name), _drop(params, name))
    ]
    return db.Plan(tuple(todo), connection)


@changes
def undo(phase: Phase) -> Table:
    """Rolls back without blocking reads or writes; does nothing where there is no such index."""
    if not phase.execute:
        return phase.carry_out(undo_plan(phase))
    return Table(
        ("what", "seconds"),
        [row for name in list(made(phase.connection, phase.ledger, phase.params)) for row in _take_back(phase, name)],
    )


def verify_undone(phase: Phase) -> Gates:
    """No index of this operation is left, valid or not."""
    left = list(made(phase.connection, phase.ledger, phase.params))
    return collect(
        [
            gate(
                "filters.indexes_are_gone",
                not left,
                spelled(phase.params, "vectors"),
                found=", ".join(left) or "none",
                needed="none",
                danger="every write to their rows still pays for them",
                do="run the rollback again; a drop that timed out leaves an invalid index",
            )
        ]
    )
