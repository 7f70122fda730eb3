"""Where a rehearsal works: a scratch schema in the target's database. The target itself is only read.

A sample is a target of its own to the rest of the library: the same parameters, with another place in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.cell_order import Order
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import added_columns, identifier, names, spelled
from runbook_lib.core.phase import Phase
from runbook_lib.migrate import preflight
from runbook_lib.migrate.preflight import Facts
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("rehearse")

# Tells the schema of a rehearsal from one that somebody else gave this name.
MARK = "made by a rehearsal of the runbook, which drops it"
SAMPLE = "sample"
# Pages are not equally full, so more of them are drawn than the rows would need; LIMIT cuts the rest.
DRAWN = 1.3
# The same pages each time, so that two rehearsals can be compared.
SEED = 4


@dataclass(frozen=True)
class Place:
    """A sample to work on: a phase whose target is the sample, and how many rows it has."""

    phase: Phase
    rows: int


def scratch_name(params: Params) -> str:
    """Name of the scratch schema of this target."""
    return f"runbook_rehearsal_{params.target.name}"


def statement(params: Params, block: str, **extra: sql.Composable) -> db.Statement:
    """A block that knows the scratch schema and the sample in it."""
    scratch = scratch_name(params)
    own = {"scratch": identifier(scratch), "sample": identifier(scratch, SAMPLE), "mark": sql.Literal(MARK)}
    return db.statement(SQL[block], params, own | extra)


def left_over(connection: db.Connection, params: Params) -> db.Row:
    """Is there a schema of the scratch schema's name (``there``), and is it a rehearsal's (``ours``)?"""
    query = SQL["scratch"].compose({"mark": sql.Literal(MARK)})
    scratch = identifier(scratch_name(params)).as_string()
    row = connection.execute(query, {"scratch": scratch}).fetchone()
    return row or {"there": False, "ours": False}


def making(connection: db.Connection, params: Params, facts: Facts, rows: int) -> list[db.Statement]:
    """The statements that make a sample of about so many rows in the scratch schema."""
    percent = min(100.0, 100 * DRAWN * rows / max(facts.rows, 1))
    drawn = {"percent": sql.Literal(percent), "seed": sql.Literal(SEED), "rows": sql.Literal(rows)}
    return [
        statement(params, "create_scratch"),
        statement(params, "create_sample", **_storage(connection, params, facts)),
        statement(params, "fill_sample", columns=_columns(connection, params), **drawn),
    ]


def _storage(connection: db.Connection, params: Params, facts: Facts) -> dict[str, sql.Composable]:
    """How the sample is stored: as full as the target's pages, built with as many workers as the whole would get."""
    workers = preflight.expected(facts, connection, params).workers
    return {"fillfactor": sql.Literal(facts.fillfactor), "parallel_workers": sql.Literal(workers)}


def _columns(connection: db.Connection, params: Params) -> sql.Composable:
    """The target's columns without the runbook's own."""
    table, added = spelled(params, "table"), added_columns(params)
    found = db.rows(connection, SQL["columns"], params, table=table, added=added)
    return sql.SQL(", ").join(identifier(c["name"]) for c in found)


@contextmanager
def opened(phase: Phase, facts: Facts, rows: int) -> Iterator[Place]:
    """A sample of about so many rows; it is gone when the block ends."""
    p, scratch = phase.params, scratch_name(phase.params)
    moved = {
        "target": p.target.model_copy(update={"schema_": scratch, "table": SAMPLE}),
        "ledger": p.ledger.model_copy(update={"schema_": scratch}),
    }
    create, table, fill = making(phase.connection, p, facts, rows)
    # Outside the try: a schema that could not be made belongs to somebody else and must not be dropped.
    phase.do(create)
    try:
        phase.do(table)
        copied = phase.do(fill).rows
        with _phase_on(phase, p.model_copy(update=moved)) as own:
            own.connection.execute(SQL["vacuum"].compose(names(own.params)))
            yield Place(own, copied)
    finally:
        phase.do(statement(p, "drop_scratch"))


@contextmanager
def _phase_on(phase: Phase, params: Params) -> Iterator[Phase]:
    """A phase like this one on another place, with a ledger of its own there, and at any hour."""
    params = params.model_copy(update={"run": params.run.model_copy(update={"window": None})})
    with (
        db.connect(params, f"runbook {phase.run_id} rehearsal") as connection,
        db.connect(params, f"runbook {phase.run_id} rehearsal ledger") as ledger_connection,
        db.bounded(connection, timeout(params)),
    ):
        own = Ledger(ledger_connection, params, phase.run_id, phase.name)
        own.create()
        # What is made here is thrown away again; the rehearsal itself has asked.
        asked = Order(phase.name, required=True, recheck=phase.order.recheck)
        yield Phase(phase.name, phase.run_id, True, params, connection, own, asked)


def timeout(params: Params) -> str:
    """``rehearse.statement_timeout_minutes``, as PostgreSQL spells it."""
    return f"{round(params.rehearse.statement_timeout_minutes * 60_000)}ms"
