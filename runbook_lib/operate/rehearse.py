"""The migration rehearsed on samples before it is begun, and what the whole table will take by them.

Only copies in a scratch schema are written to; of the target a few pages are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runbook_lib.backfill import vector_store
from runbook_lib.core import claim, db, thresholds
from runbook_lib.core.display import Table, duration, number, size
from runbook_lib.core.gates import BadInput, Gate, Gates, Verdict, collect, gate
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase, changes
from runbook_lib.core.thresholds import apart
from runbook_lib.indexes import forecast
from runbook_lib.migrate import preflight
from runbook_lib.migrate.preflight import Facts
from runbook_lib.operate import rehearsal_schema, sample, whole_table
from runbook_lib.operate.sample import Sample
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("rehearse")


def plan(phase: Phase) -> db.Plan:
    """The statements that make the largest sample and drop it; none of them writes to the target."""
    connection, params = phase.connection, phase.params
    facts = preflight.facts(phase)
    drop = rehearsal_schema.statement(params, "drop_scratch")
    first = (drop,) if rehearsal_schema.left_over(connection, params)["ours"] else ()
    return db.Plan(
        (*first, *rehearsal_schema.making(connection, params, facts, _sizes(params, facts)[-1]), drop), connection
    )


def _sizes(params: Params, facts: Facts) -> list[int]:
    r = params.rehearse
    return whole_table.sizes(max(facts.rows, 1), r.sample_percents, r.most_rows)


def samples(phase: Phase) -> Table:
    """The samples to be taken, and the room that each takes while it is measured, by the forecast's formulas."""
    facts = preflight.facts(phase)
    rows = []
    for n in _sizes(phase.params, facts):
        own = (facts.heap_bytes + facts.toast_bytes + facts.indexes_bytes) * n / max(facts.rows, 1)
        room = preflight.expected(facts, phase.connection, phase.params, rows=n).disk_bytes + own
        rows.append((number(n), f"{100 * n / max(facts.rows, 1):.3g} %", size(room)))
    return Table(("sample, rows", "of the table", "room while it is measured, about"), rows)


def check(phase: Phase) -> Gates:
    """Before a sample is taken: where it is to stand, and that nobody else is at it."""
    connection, params = phase.connection, phase.params
    at_it = claim.holders(connection, params, _subject(params))
    refused = vector_store.not_with_chunks(params, phase.name)
    return collect([*refused, *_target_gates(connection, params), _nobody_else(params, at_it)])


def _target_gates(connection: db.Connection, params: Params) -> Iterator[Gate]:
    rights, left = db.one(connection, SQL["rights"], params), rehearsal_schema.left_over(connection, params)
    yield gate(
        "rehearse.pgvector_is_there",
        rights["pgvector"] is not None,
        rights["database"],
        found=rights["pgvector"] or "not installed in this database",
        needed="the extension vector",
        danger="no sample could hold a vector",
        do="run CREATE EXTENSION vector; (20_extension does no more)",
    )
    yield gate(
        "rehearse.may_make_schema",
        rights["may_create"],
        rights["database"],
        found=f"{rights['role']} {'may' if rights['may_create'] else 'may not'} create a schema",
        needed="CREATE on the database",
        danger="the sample would have no place apart from the application's tables",
        do=f"GRANT CREATE ON DATABASE {rights['database']} TO {rights['role']};",
    )
    yield gate(
        "rehearse.schema_is_free",
        left["ours"] or not left["there"],
        rehearsal_schema.scratch_name(params),
        found="left by a rehearsal that was killed; it is dropped first"
        if left["ours"]
        else "a schema of this name that no rehearsal made"
        if left["there"]
        else "free",
        needed="no schema of this name, or one that a rehearsal left",
        danger="what is kept there would be dropped with the sample",
        do=f"ALTER SCHEMA {rehearsal_schema.scratch_name(params)} RENAME TO …; if it is wanted, or drop it",
    )


def _subject(params: Params) -> str:
    """What a rehearsal claims."""
    return f"runbook rehearsal {params.target.name}"


def _nobody_else(params: Params, at_it: list[db.Row]) -> Gate:
    """at_it: the sessions that have claimed it; an empty row for one that has ended since."""
    named = [f"pid {r['pid']}, {r['application_name']}, {r['usename']}" for r in at_it if r]
    return gate(
        "rehearse.nobody_else_is_at_it",
        not at_it,
        params.target.name,
        found="; ".join(named) or ("one that has ended since" if at_it else "no other rehearsal"),
        needed="one rehearsal of a target at a time",
        danger="two would measure each other",
        do="wait for it, or end it: SELECT pg_cancel_backend(<pid>);",
    )


@changes
def apply(phase: Phase) -> Table:
    """Takes each sample, carries the migration out on it, measures, and drops it; writes the figures down.

    Raises BadInput where another rehearsal of this target is at work, or no row could be sampled.
    """
    connection, params = phase.connection, phase.params
    if not phase.execute:
        return phase.carry_out(plan(phase))
    facts = preflight.facts(phase)
    measured: list[Sample] = []
    lists = _lists(params, facts.rows)
    with _claimed(connection, params):
        _drop_left_over(phase)
        for rows in _sizes(params, facts):
            with rehearsal_schema.opened(phase, facts, rows) as place:
                if place.rows:
                    measured.append(sample.measure(connection, params, place, lists, memory=True))
                    print(_line(measured[-1]))
    if not any(s.vectors for s in measured):
        raise BadInput([_nothing_sampled(params)])
    phase.note(
        "rehearsal", whole_table.body(connection, phase.ledger, params, facts, [s for s in measured if s.vectors])
    )
    return whole_table.compare(phase.ledger)


def _lists(params: Params, rows: int) -> int | None:
    i = params.index
    return None if i.method == "hnsw" else i.lists or forecast.lists_rule(rows)


def _line(s: Sample) -> str:
    return (
        f"  {number(s.vectors)} vectors: loaded in {duration(s.load_seconds)}, moved in"
        f" {duration(s.backfill_seconds)} ({s.strategy}), index built in {duration(s.build_seconds)},"
        f" {size(s.index_bytes)}"
    )


@contextmanager
def _claimed(connection: db.Connection, params: Params) -> Iterator[None]:
    """One rehearsal of a target at a time; its statements on the target are bounded for as long."""
    with db.beside(connection, params, "rehearses") as holder:
        if at_it := claim.take(holder, params, _subject(params)):
            raise BadInput([_nobody_else(params, at_it)])
        with db.bounded(connection, rehearsal_schema.timeout(params)):
            yield


def _drop_left_over(phase: Phase) -> None:
    for s in undo_plan(phase.connection, phase.params):
        phase.do(s)


def _nothing_sampled(params: Params) -> Gate:
    return Gate(
        "rehearse.rows_were_sampled",
        Verdict.FAIL,
        spelled(params, "table"),
        "no row with text in the pages that were drawn",
        "rows with text",
        "there is nothing to extrapolate from",
        "fill the table first, or raise rehearse.sample_percents",
    )


def verify(phase: Phase) -> Gates:
    """It was measured in this run, the whole build fits by what was measured, and nothing is left of the samples."""
    noted = phase.ledger.latest("rehearsal")
    own = noted if noted and noted["run_id"] == phase.run_id else None
    return collect(
        [
            _was_measured(phase.params, own),
            *([_fits_memory(phase, own)] if own else []),
            _is_gone(phase.connection, phase.params),
        ]
    )


def _was_measured(params: Params, noted: dict[str, Any] | None) -> Gate:
    found = noted["samples"] if noted else []
    return gate(
        "rehearse.samples_were_measured",
        bool(found),
        spelled(params, "table"),
        found=f"samples of {', '.join(number(s['vectors']) for s in found)} vectors" if found else "no sample",
        needed="one sample at least, taken in this run",
        danger="the figures are of another day, or there are none",
        do="run operate/rehearse with execute: true",
        figures={"samples": len(found)},
    )


def _fits_memory(phase: Phase, noted: dict[str, Any]) -> Gate:
    params = phase.params
    ix = params.index
    warned = [n for s in noted["samples"] for n in s["notices"] if sample.NO_LONGER_FITS.search(n)]
    measured = noted["whole"].get("build_memory_bytes")
    facts = preflight.facts(phase)
    expects = preflight.expected(facts, phase.connection, params)
    wanted = measured["high"] if measured else expects.build_memory_bytes
    wants, allowed = apart(wanted, expects.build_budget_bytes, thresholds.size)
    how = "as measured" if measured else "by the formula; the samples are too small to measure it"
    return gate(
        "rehearse.build_fits_memory",
        not warned and wanted <= expects.build_budget_bytes,
        f"{ix.method} on {spelled(params, 'table')}",
        found=f"the whole build wants {wants}, {how}" + (f"; a sample's build: {warned[0]}" if warned else ""),
        needed=f"at most {allowed}, of index.maintenance_work_mem_mb: {ix.maintenance_work_mem_mb}",
        danger="the build would take many times as long as was measured here",
        do=forecast.ways_out(
            round(facts.rows * whole_table.built_at_once(params, facts)), params, wanted_bytes=round(wanted)
        ),
        figures={"wanted_bytes": round(wanted), "allowed_bytes": expects.build_budget_bytes},
    )


def _is_gone(connection: db.Connection, params: Params) -> Gate:
    left = rehearsal_schema.left_over(connection, params)
    return gate(
        "rehearse.nothing_is_left",
        not left["ours"],
        rehearsal_schema.scratch_name(params),
        found="still there" if left["ours"] else "no schema of a rehearsal",
        needed="none",
        danger="copies of rows take room, and are not kept up to date",
        do="rehearse.undo(phase) in a cell of this notebook, or run operate/rehearse again, which drops the schema",
    )


def shown(phase: Phase) -> Table:
    """What each sample took."""
    return whole_table.shown(phase.ledger)


def undo_plan(connection: db.Connection, params: Params) -> db.Plan:
    """DROP SCHEMA of the scratch schema, if a rehearsal left one."""
    left = rehearsal_schema.left_over(connection, params)["ours"]
    return db.Plan((rehearsal_schema.statement(params, "drop_scratch"),) if left else (), connection)


@changes
def undo(phase: Phase) -> Table:
    """Drops what a rehearsal left; does nothing where nothing is left."""
    return phase.carry_out(undo_plan(phase.connection, phase.params))


def verify_undone(connection: db.Connection, params: Params) -> Gates:
    """No scratch schema is left."""
    return collect([_is_gone(connection, params)])
