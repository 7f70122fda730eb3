"""Operate 50: what an index could hold, compared on the user's own rows before ``index.storage`` is chosen.

Each index is built alone, asked, and dropped; by default on a scratch table with a sample of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.benchmark import comparison, exact, query_set, relevance_measures, storage_variants
from runbook_lib.benchmark.query_set import Query, exact_of
from runbook_lib.benchmark.storage_variants import MeasuredShape, Shape, StorageComparison
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import identifier, shortened, spelled
from runbook_lib.core.names import index_name as serving_name
from runbook_lib.core.phase import Phase, changes
from runbook_lib.indexes import building, forecast, partitions
from runbook_lib.migrate import build_index
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("storage")

# Pages are drawn for so many more rows than are wanted, since pages are not equally full.
DRAWN_TIMES = 1.2
# Of a table that is hardly larger than the sample all pages are drawn: a draw of a few pages may come out short.
MOST_DRAWN_PERCENT = 50.0
KIND = "storage"


def _scratch_table(params: Params) -> str:
    return f"{params.target.name}_storage"


def _scratch(params: Params) -> sql.Composable:
    return identifier(params.ledger.schema_, _scratch_table(params))


def on_column(params: Params) -> bool:
    """Are the indexes built on the real column?"""
    return params.storage.where == "column"


def measured_params(params: Params) -> Params:
    """The parameters of the relation that is measured: the scratch table, or the target; filters play no part."""
    target: dict[str, Any] = {"filters": {}, "always": None}
    vector: dict[str, Any] = {}
    if not on_column(params):
        target |= {"schema_": params.ledger.schema_, "table": _scratch_table(params)}
        vector = {"layout": "column"}
    return params.model_copy(
        update={
            "target": params.target.model_copy(update=target),
            "vector": params.vector.model_copy(update=vector),
            "index": params.index.model_copy(update={"rows": "all"}),
        }
    )


def _prefix(params: Params) -> str:
    return f"runbook_{params.target.name}_compared_"


def index_name(params: Params, shape: Shape) -> str:
    """Name of the index that is built to be measured."""
    return shortened(_prefix(params), shape.slug)


def plan(phase: Phase) -> db.Plan:
    """What is left over dropped; the scratch table; each index built and dropped; the scratch table dropped."""
    connection, params = phase.connection, phase.params
    built = [
        statement
        for shape in storage_variants.possible(params)
        for statement in (_build(connection, params, shape), _drop_index(params, shape))
        if not _stands(connection, params, shape)
    ]
    around = (
        ([], [])
        if on_column(params)
        else (_making(connection, phase.ledger, params), [_drop_scratch(connection, params)])
    )
    return db.Plan((*undo_plan(connection, params), *around[0], *built, *around[1]), connection)


def _statement(connection: db.Connection, params: Params, block: str, **values: Any) -> db.Statement:
    types = db.key_types(connection, params)
    extra = {"scratch": _scratch(params), "key_type": sql.SQL(types[0] if types else "text")}
    return db.statement(SQL[block], params, extra, **values)


def _making(connection: db.Connection, ledger: Ledger, params: Params) -> list[db.Statement]:
    rows = row_counts.of(connection, params, "table").n
    percent = 100.0 * DRAWN_TIMES * params.storage.sample_rows / rows if rows else 100.0
    percent = percent if percent < MOST_DRAWN_PERCENT else 100.0
    values = {
        "judged": _judged_keys(connection, ledger, params),
        "percent": percent,
        "rows": params.storage.sample_rows,
    }
    return [
        _statement(connection, params, "create_scratch"),
        _statement(connection, params, "fill_scratch", **values),
        _statement(connection, params, "analyze"),
    ]


def _judged_keys(connection: db.Connection, ledger: Ledger, params: Params) -> list[str]:
    """Keys that the judgements name and the table holds, so that nDCG has something to find."""
    marks = comparison.judgements(connection, ledger, params)
    unknown = set(query_set.unknown_keys(connection, params, marks))
    keys = {key for judged in marks.values() for key in judged if key not in unknown}
    return sorted(keys)


def _drop_scratch(connection: db.Connection, params: Params) -> db.Statement:
    return _statement(connection, params, "drop_scratch")


def _build(connection: db.Connection, params: Params, shape: Shape) -> db.Statement:
    p = measured_params(params)
    here = _with_lists(connection, params, shape.storage_params(p))
    name, relation = index_name(params, shape), partitions.relation(p)
    return building.create_statement(connection, here, relation, name, other=shape.index_names(p))


def _with_lists(connection: db.Connection, params: Params, measured: Params) -> Params:
    """Lists for the rows that will be compared: the plan is made before their table is there."""
    if measured.index.method != "ivfflat" or measured.index.lists:
        return measured
    rows = row_counts.of(connection, params, "table").n
    compared = rows if on_column(params) else min(rows, params.storage.sample_rows)
    lists = measured.index.model_copy(update={"lists": forecast.lists_rule(compared)})
    return measured.model_copy(update={"index": lists})


def _drop_index(params: Params, shape: Shape) -> db.Statement:
    p = measured_params(params)
    name = identifier(p.target.schema_, index_name(params, shape))
    return db.statement(SQL["drop_index"], p, {"measured_index": name})


def _stands(connection: db.Connection, params: Params, shape: Shape) -> bool:
    """On the real column, the index that serves is measured as it stands."""
    return (
        on_column(params)
        and storage_variants.is_todays(params, shape)
        and bool(build_index.index(connection, params).own)
    )


def check(phase: Phase) -> Gates:
    """Before anything is built: there are vectors, and the real column, where that is asked for, takes an index."""
    connection, params = phase.connection, phase.params
    rows = row_counts.of(connection, params, "vectors").n
    parted = on_column(params) and len(build_index.index(connection, params).parts) > 1
    table, where = spelled(params, "vectors"), params.storage.where
    return collect(
        [
            *vector_store.not_with_chunks(params, phase.name),
            gate(
                "storage.there_are_rows",
                rows > 0,
                table,
                found=f"about {number(rows)} rows",
                needed="some, by the planner's estimate",
                danger="there is nothing to measure",
                do=f"ANALYZE {table}, or finish 50_backfill",
            ),
            gate(
                "storage.can_be_measured_there",
                not parted,
                table,
                found="partitioned, and storage.where: column" if parted else f"storage.where: {where}",
                needed="a table of its own, or storage.where: sample",
                danger="every read and write waits for a moment whenever a compared index is dropped again",
                do="set storage.where: sample",
            ),
        ]
    )


@changes
def apply(phase: Phase) -> StorageComparison | Table:
    """Compares, and leaves nothing behind: not at the end, nor after a failure, nor, once run again, after a kill."""
    if not phase.execute:
        return phase.carry_out(plan(phase))
    undo(phase)
    try:
        if not on_column(phase.params):
            for statement in _making(phase.connection, phase.ledger, phase.params):
                phase.do(statement)
        found = _compare(phase)
    finally:
        undo(phase)
    phase.note(KIND, found.as_data())
    return found


def _compare(phase: Phase) -> StorageComparison:
    params = phase.params
    p, here = params, measured_params(params)
    asked_for, marks = comparison.sampled(phase.connection, phase.ledger, p)
    # The variants' tables have vectors and keys, and nothing to filter by.
    judged, queries = ([replace(q, allowed=()) for q in of] for of in asked_for)
    with db.beside(phase.connection, params, "storage exact") as connection:
        asked = _answered(connection, here, queries, p.queries.k)
        judged = _answered(connection, here, judged, storage_variants.JUDGED_K)
        agrees = exact.stream_agrees_with_sql(connection, here, asked, p.queries.k)
        exact_ms = relevance_measures.latency(exact.seconds_by_sql(connection, here, asked, p.queries.k))
    by_exact = {q.query_id: list(nearest.keys) for q, nearest in zip(judged, exact_of(judged), strict=True)}
    best = relevance_measures.relevance(by_exact, {q.query_id: marks[q.query_id] for q in judged}) if judged else None
    rows = int(db.one(phase.connection, SQL["rows"], here)["rows"])
    whole = row_counts.of(phase.connection, params, "vectors").n
    measured: list[dict[str, Any]] = []
    for shape in storage_variants.possible(p):
        with _standing(phase, shape) as (name, built):
            for rerank in _depths(p, shape):
                with db.beside(phase.connection, params, f"storage {shape.slug}") as connection:
                    found = storage_variants.measure(connection, here, shape, rerank, name, asked, (judged, marks))
                measured.append(_row(p, found, built, rows, max(whole, rows)))
                print(
                    f"  {measured[-1]['title']}: recall {found.recall:.3f} at {found.setting}, {found.p50_ms:.2f} ms"
                )
    return StorageComparison.of(
        p,
        measured,
        {
            "rows": rows,
            "whole_rows": max(whole, rows),
            "queries": len(queries),
            "judged": len(judged),
            "agrees": dict(agrees.figures),
            "exact_p50_ms": round(exact_ms["p50_ms"], 3),
            "exact_ndcg": best.measures[relevance_measures.PAIRED_MEASURE] if best else None,
        },
    )


def _answered(connection: db.Connection, here: Params, queries: list[Query], k: int) -> list[Query]:
    return exact.answered(connection, here, query_set.with_vectors(here, queries), k)


@contextmanager
def _standing(phase: Phase, shape: Shape) -> Iterator[tuple[str, dict[str, Any]]]:
    """One index, for as long as it is measured: its name, and bytes and seconds (None where it stood already)."""
    connection, params = phase.connection, phase.params
    p = measured_params(params)
    if _stands(connection, params, shape):
        yield (serving_name(params), {"bytes": build_index.index(connection, params).bytes, "build_s": None})
        return
    took = building.concurrently(phase, _build(connection, params, shape))
    name = index_name(params, shape)
    found = db.one(connection, SQL["bytes"], p, index=identifier(p.target.schema_, name).as_string())
    yield name, {"bytes": found["bytes"], "build_s": round(took.seconds, 2), "notices": took.notices}
    building.concurrently(phase, _drop_index(params, shape))


def _row(p: Params, found: MeasuredShape, built: dict[str, Any], rows: int, whole: int) -> dict[str, Any]:
    """One row of the table, and of the ledger."""
    shape = found.shape
    figures = asdict(found) | {"shape": None}
    del figures["shape"]
    rounded = {name: round(v, 4) if isinstance(v, float) else v for name, v in figures.items()}
    return {
        "title": shape.title(p) + (f", {found.rerank} × k again" if shape.ranks_again else ""),
        "held": shape.held,
        "dimension": shape.dimension,
        "method": shape.method,
        "todays": storage_variants.is_todays(p, shape) and (not shape.ranks_again or found.rerank == p.index.rerank),
        **built,
        "bytes_a_row": round(built["bytes"] / rows, 1) if rows else None,
        "whole_bytes": round(built["bytes"] / rows * whole) if rows else None,
        **rounded,
    }


def verify(phase: Phase) -> Gates:
    """Every index was measured by its own plan against exact answers, and nothing is left behind."""
    last = phase.ledger.latest(KIND, phase.name)
    figures = last["agrees"] if last else {"asked": 0, "alike": 0}
    return collect(
        [
            exact.agreement(phase.params, figures["alike"], figures["asked"]),
            *_measured(last),
            _is_gone(phase.connection, phase.params),
        ]
    )


def _measured(last: dict[str, Any] | None) -> list[Gate]:
    rows = last["found"] if last else []
    past = [r["title"] for r in rows if not r["uses_its_index"]]
    reached = [r["title"] for r in rows if r["reaches"]]
    needed = f"recall {last['target_recall']}" if last else "the target recall"
    return [
        gate(
            "storage.every_search_read_its_index",
            not past if rows else None,
            f"{len(rows)} ways to search",
            found=f"{len(rows) - len(past)} of {len(rows)}" + (f"; not {', '.join(past)}" if past else ""),
            needed="all of them",
            danger="what was measured is not what the index would answer",
            do="look at EXPLAIN of these searches; report this with the versions of PostgreSQL and pgvector",
            figures={"ways": len(rows), "past": len(past)},
        ),
        gate(
            "storage.something_reaches_the_target",
            bool(reached) if rows else None,
            f"{len(rows)} ways to search",
            found=f"{len(reached)} reach it",
            needed=f"{needed}, no query short of rows, by one of them",
            danger="there is nothing to choose among",
            do="add higher settings to tune.ef_search, or more to storage.rerank"
            if rows
            else "run operate/compare_storage with execute: true",
            figures={"reached": len(reached)},
        ),
    ]


def _left(connection: db.Connection, params: Params) -> db.Row:
    # A pattern of LIKE, in which the underscores of a name stand for any letter unless escaped.
    pattern = _prefix(params).replace("\\", "\\\\").replace("_", "\\_") + "%"
    scratch = _scratch(params).as_string().replace("%%", "%")
    return db.one(
        connection, SQL["leftovers"], params, scratch=scratch, vectors=spelled(params, "vectors"), prefix=pattern
    )


def _is_gone(connection: db.Connection, params: Params) -> Gate:
    left = _left(connection, params)
    found = [*([_scratch_table(params)] if left["scratch"] else []), *left["indexes"]]
    return gate(
        "storage.nothing_is_left",
        not found,
        params.target.name,
        found=", ".join(found) or "nothing",
        needed="nothing",
        danger="disk is taken, and where an index is left, every write pays for it",
        do="run compare_storage.undo(phase), or operate/compare_storage again",
    )


def undo_plan(connection: db.Connection, params: Params) -> db.Plan:
    """Drops what a comparison left that did not come to its end."""
    left = _left(connection, params)
    drops = [
        db.statement(SQL["drop_index"], params, {"measured_index": identifier(params.target.schema_, name)})
        for name in left["indexes"]
    ]
    return db.Plan((*drops, *([_drop_scratch(connection, params)] if left["scratch"] else [])), connection)


@changes
def undo(phase: Phase) -> Table:
    """Carries it out; does nothing where nothing was left."""
    todo = undo_plan(phase.connection, phase.params)
    if not phase.execute:
        return phase.carry_out(todo)
    for statement in todo:
        if statement.name == SQL["drop_index"].name:
            building.concurrently(phase, statement)
        else:
            phase.do(statement)
    return Table(("what",), [(s.purpose,) for s in todo])


def verify_undone(connection: db.Connection, params: Params) -> Gates:
    """Nothing is left."""
    return collect([_is_gone(connection, params)])


def what_is_compared(phase: Phase) -> Table:
    """The candidates, and where they are built."""
    p = phase.params
    n = p.storage.sample_rows
    where = (
        "the column itself" if on_column(p) else f"a scratch table of at most {number(n)} rows, and every judged row"
    )
    titles = [
        (s.title(p), "today's" if storage_variants.is_todays(p, s) else "", _shown(p, s))
        for s in storage_variants.possible(p)
    ]
    return Table(("the index holds", "", "sorted again by the full vectors"), titles, f"Compared on {where}")


def _depths(params: Params, shape: Shape) -> list[int]:
    """How many times k rows are sorted again: each is measured, and today's among them."""
    todays = {params.index.rerank} if shape.held == "bit" and storage_variants.is_todays(params, shape) else set()
    return sorted({*params.storage.rerank, *todays}) if shape.ranks_again else [1]


def _shown(params: Params, shape: Shape) -> str:
    return ", ".join(f"{n} × {params.queries.k}" for n in _depths(params, shape)) if shape.ranks_again else "no"
