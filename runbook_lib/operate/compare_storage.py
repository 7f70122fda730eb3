"""Operate 50: what an index could hold, compared on the user's own rows before ``index.storage`` is chosen.

Each index is built alone, asked, and dropped; by default on a scratch table with a sample of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import comparison, exact, query_set, relevance_measures, storage_variants
from runbook_lib.benchmark.query_set import Query, exact_of
from runbook_lib.benchmark.storage_variants import MeasuredShape, Shape, StorageComparison
from runbook_lib.core import db, row_counts
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, Gates, collect, gate
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
        }
    )


def _prefix(params: Params) -> str:
    return f"runbook_{params.target.name}_compared_"


def index_name(params: Params, shape: Shape) -> str:
    """Name of the index that is built to be measured."""
    return shortened(_prefix(params), shape.slug)


def plan(phase: Phase) -> db.Plan:
    """What is left over dropped; the scratch table; each index built and dropped; the scratch table dropped."""
    built = [
        statement
        for shape in storage_variants.possible(phase.params)
        for statement in (_build(phase, shape), _drop_index(phase, shape))
        if not _stands(phase, shape)
    ]
    around = ([], []) if on_column(phase.params) else (_making(phase), [_drop_scratch(phase)])
    return db.Plan((*undo_plan(phase), *around[0], *built, *around[1]), phase.connection)


def _statement(phase: Phase, block: str, **values: Any) -> db.Statement:
    p = phase.params
    types = db.rows(
        phase.connection,
        query_set.SQL["key_type"],
        p,
        table=spelled(p, "table"),
        key=p.target.key,
    )
    extra = {"scratch": _scratch(p), "key_type": sql.SQL(types[0]["type"] if types else "text")}
    return db.statement(SQL[block], p, extra, **values)


def _making(phase: Phase) -> list[db.Statement]:
    p = phase.params
    rows = row_counts.of(phase.connection, phase.params, "table").n
    percent = 100.0 * DRAWN_TIMES * p.storage.sample_rows / rows if rows else 100.0
    percent = percent if percent < MOST_DRAWN_PERCENT else 100.0
    values = {"judged": _judged_keys(phase), "percent": percent, "rows": p.storage.sample_rows}
    return [
        _statement(phase, "create_scratch"),
        _statement(phase, "fill_scratch", **values),
        _statement(phase, "analyze"),
    ]


def _judged_keys(phase: Phase) -> list[str]:
    """Keys that the judgements name and the table holds, so that nDCG has something to find."""
    marks = comparison.judgements(phase)
    unknown = set(query_set.unknown_keys(phase.connection, phase.params, marks))
    keys = {key for judged in marks.values() for key in judged if key not in unknown}
    return sorted(keys)


def _drop_scratch(phase: Phase) -> db.Statement:
    return _statement(phase, "drop_scratch")


def _build(phase: Phase, shape: Shape) -> db.Statement:
    p = measured_params(phase.params)
    here = _with_lists(phase, shape.storage_params(p))
    name, relation = index_name(phase.params, shape), partitions.relation(p)
    return building.create_statement(phase.connection, here, relation, name, other=shape.index_names(p))


def _with_lists(phase: Phase, params: Params) -> Params:
    """Lists for the rows that will be compared: the plan is made before their table is there."""
    if params.index.method != "ivfflat" or params.index.lists:
        return params
    rows = row_counts.of(phase.connection, phase.params, "table").n
    compared = rows if on_column(phase.params) else min(rows, phase.params.storage.sample_rows)
    lists = params.index.model_copy(update={"lists": forecast.lists_rule(compared)})
    return params.model_copy(update={"index": lists})


def _drop_index(phase: Phase, shape: Shape) -> db.Statement:
    p = measured_params(phase.params)
    name = identifier(p.target.schema_, index_name(phase.params, shape))
    return db.statement(SQL["drop_index"], p, {"measured_index": name})


def _stands(phase: Phase, shape: Shape) -> bool:
    """On the real column, the index that serves is measured as it stands."""
    return (
        on_column(phase.params)
        and storage_variants.is_todays(phase.params, shape)
        and bool(build_index.index(phase).own)
    )


def check(phase: Phase) -> Gates:
    """Before anything is built: there are vectors, and the real column, where that is asked for, takes an index."""
    rows = row_counts.of(phase.connection, phase.params, "vectors").n
    parted = on_column(phase.params) and len(build_index.index(phase).parts) > 1
    table, where = spelled(phase.params, "vectors"), phase.params.storage.where
    return collect(
        [
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
            for statement in _making(phase):
                phase.do(statement)
        found = _compare(phase)
    finally:
        undo(phase)
    phase.note(KIND, found.as_data())
    return found


def _compare(phase: Phase) -> StorageComparison:
    p, here = phase.params, measured_params(phase.params)
    (judged, queries), marks = comparison.sampled(phase)
    with phase.another("storage exact") as connection:
        asked = _answered(connection, here, queries, p.queries.k)
        judged = _answered(connection, here, judged, storage_variants.JUDGED_K)
        agrees = exact.stream_agrees_with_sql(connection, here, asked, p.queries.k)
        exact_ms = relevance_measures.latency(exact.seconds_by_sql(connection, here, asked, p.queries.k))
    by_exact = {q.query_id: list(nearest.keys) for q, nearest in zip(judged, exact_of(judged), strict=True)}
    best = relevance_measures.relevance(by_exact, {q.query_id: marks[q.query_id] for q in judged}) if judged else None
    rows = int(db.one(phase.connection, SQL["rows"], here)["rows"])
    whole = row_counts.of(phase.connection, phase.params, "vectors").n
    measured: list[dict[str, Any]] = []
    for shape in storage_variants.possible(p):
        with _standing(phase, shape) as (name, built):
            for rerank in _depths(p, shape):
                with phase.another(f"storage {shape.slug}") as connection:
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
    p = measured_params(phase.params)
    if _stands(phase, shape):
        yield serving_name(phase.params), {"bytes": build_index.index(phase).bytes, "build_s": None}
        return
    took = building.concurrently(phase, _build(phase, shape))
    name = index_name(phase.params, shape)
    found = db.one(phase.connection, SQL["bytes"], p, index=identifier(p.target.schema_, name).as_string())
    yield name, {"bytes": found["bytes"], "build_s": round(took.seconds, 2), "notices": took.notices}
    building.concurrently(phase, _drop_index(phase, shape))


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
        [exact.agreement(phase.params, figures["alike"], figures["asked"]), *_measured(last), _is_gone(phase)]
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


def _left(phase: Phase) -> db.Row:
    p = phase.params
    # A pattern of LIKE, in which the underscores of a name stand for any letter unless escaped.
    pattern = _prefix(p).replace("\\", "\\\\").replace("_", "\\_") + "%"
    scratch = _scratch(p).as_string().replace("%%", "%")
    return db.one(
        phase.connection, SQL["leftovers"], p, scratch=scratch, vectors=spelled(p, "vectors"), prefix=pattern
    )


def _is_gone(phase: Phase) -> Gate:
    left = _left(phase)
    found = [*([_scratch_table(phase.params)] if left["scratch"] else []), *left["indexes"]]
    return gate(
        "storage.nothing_is_left",
        not found,
        phase.params.target.name,
        found=", ".join(found) or "nothing",
        needed="nothing",
        danger="disk is taken, and where an index is left, every write pays for it",
        do="run compare_storage.undo(phase), or operate/compare_storage again",
    )


def undo_plan(phase: Phase) -> db.Plan:
    """Drops what a comparison left that did not come to its end."""
    p, left = phase.params, _left(phase)
    drops = [
        db.statement(SQL["drop_index"], p, {"measured_index": identifier(p.target.schema_, name)})
        for name in left["indexes"]
    ]
    return db.Plan((*drops, *([_drop_scratch(phase)] if left["scratch"] else [])), phase.connection)


@changes
def undo(phase: Phase) -> Table:
    """Carries it out; does nothing where nothing was left."""
    todo = undo_plan(phase)
    if not phase.execute:
        return phase.carry_out(todo)
    for statement in todo:
        if statement.name == SQL["drop_index"].name:
            building.concurrently(phase, statement)
        else:
            phase.do(statement)
    return Table(("what",), [(s.purpose,) for s in todo])


def verify_undone(phase: Phase) -> Gates:
    """Nothing is left."""
    return collect([_is_gone(phase)])


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
