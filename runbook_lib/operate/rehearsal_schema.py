"""Where a rehearsal works: a schema of its own beside the target, or an embedded server. The target is only read.

A sample is a target of its own to the rest of the library: the same parameters, with another place in them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

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
EMBEDDED_DSN_ENV = "RUNBOOK_REHEARSAL_DSN"


@dataclass(frozen=True)
class Place:
    """A sample to work on. left_out: what of the target could not be made there, and why."""

    phase: Phase
    rows: int
    left_out: Sequence[str] = ()


def scratch_name(params: Params) -> str:
    """Name of the scratch schema of this target."""
    return f"runbook_rehearsal_{params.target.name}"


def statement(phase: Phase, block: str, **extra: sql.Composable) -> db.Statement:
    """A block that knows the scratch schema and the sample in it."""
    scratch = scratch_name(phase.params)
    own = {"scratch": identifier(scratch), "sample": identifier(scratch, SAMPLE), "mark": sql.Literal(MARK)}
    return db.statement(SQL[block], phase.params, own | extra)


def left_over(phase: Phase) -> db.Row:
    """Is there a schema of the scratch schema's name (``there``), and is it a rehearsal's (``ours``)?"""
    query = SQL["scratch"].compose({"mark": sql.Literal(MARK)})
    scratch = identifier(scratch_name(phase.params)).as_string()
    row = phase.connection.execute(query, {"scratch": scratch}).fetchone()
    return row or {"there": False, "ours": False}


def making(phase: Phase, facts: Facts, rows: int) -> list[db.Statement]:
    """The statements that make a sample of about so many rows in the scratch schema."""
    drawn = {"columns": _columns(phase), "percent": _percent(facts, rows), **_draw(rows)}
    return [
        statement(phase, "create_scratch"),
        statement(phase, "create_sample", **_storage(phase, facts)),
        statement(phase, "fill_sample", **drawn),
    ]


def _percent(facts: Facts, rows: int) -> sql.Composable:
    return sql.Literal(min(100.0, 100 * DRAWN * rows / max(facts.rows, 1)))


def _draw(rows: int) -> dict[str, sql.Composable]:
    return {"seed": sql.Literal(SEED), "rows": sql.Literal(rows)}


def _storage(phase: Phase, facts: Facts) -> dict[str, sql.Composable]:
    """How the sample is stored: as full as the target's pages, built with as many workers as the whole would get."""
    workers = preflight.expected(facts, phase).workers
    return {"fillfactor": sql.Literal(facts.fillfactor), "parallel_workers": sql.Literal(workers)}


def columns(phase: Phase) -> list[db.Row]:
    """The target's own columns."""
    table, added = spelled(phase.params, "table"), added_columns(phase.params)
    return db.rows(phase.connection, SQL["columns"], phase.params, table=table, added=added)


def _columns(phase: Phase) -> sql.Composable:
    return sql.SQL(", ").join(identifier(c["name"]) for c in columns(phase))


@contextmanager
def server(params: Params) -> Iterator[str | None]:
    """The embedded server for the length of a block, as its DSN; None where the target's own server is to be used."""
    if params.rehearse.server == "target":
        yield None
        return
    # Only here: it needs a package that no other phase needs.
    from runbook_lib.cli import embedded

    with (
        tempfile.TemporaryDirectory(prefix="runbook-rehearsal-") as folder,
        embedded.running(Path(folder) / "data") as dsn,
    ):
        yield dsn


@contextmanager
def opened(phase: Phase, facts: Facts, rows: int, dsn: str | None) -> Iterator[Place]:
    """A sample of about so many rows, on the server of :func:`server`; it is gone when the block ends."""
    with _in_a_schema(phase, facts, rows) if dsn is None else _on_embedded(phase, facts, rows, dsn) as place:
        place.phase.connection.execute(SQL["vacuum"].compose(names(place.phase.params)))
        yield place


@contextmanager
def _in_a_schema(phase: Phase, facts: Facts, rows: int) -> Iterator[Place]:
    p, scratch = phase.params, scratch_name(phase.params)
    moved = {
        "target": p.target.model_copy(update={"schema_": scratch, "table": SAMPLE}),
        "ledger": p.ledger.model_copy(update={"schema_": scratch}),
    }
    create, table, fill = making(phase, facts, rows)
    # Outside: a schema that could not be made is somebody else's, and not ours to drop.
    phase.do(create)
    try:
        phase.do(table)
        copied = phase.do(fill).rows
        with _phase_on(phase, p.model_copy(update=moved)) as own:
            yield Place(own, copied)
    finally:
        phase.do(statement(phase, "drop_scratch"))


@contextmanager
def _on_embedded(phase: Phase, facts: Facts, rows: int, dsn: str) -> Iterator[Place]:
    name = f"rehearsal_{rows}"
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(identifier(name)))
    os.environ[EMBEDDED_DSN_ENV] = make_conninfo(dsn, dbname=name)
    try:
        there = type(phase.params.connection)(dsn_env=EMBEDDED_DSN_ENV)
        missing = _make_extensions(phase)
        with _phase_on(phase, phase.params.model_copy(update={"connection": there})) as own:
            missing += _make_copy(phase, own, facts)
            yield Place(own, _copy_rows(phase, own, facts, rows), missing)
    finally:
        del os.environ[EMBEDDED_DSN_ENV]


@contextmanager
def _phase_on(phase: Phase, params: Params) -> Iterator[Phase]:
    """A phase like this one on another place, with a ledger of its own there, and at any hour."""
    params = params.model_copy(update={"run": params.run.model_copy(update={"window": None})})
    with (
        db.connect(params, f"runbook {phase.run_id} rehearsal") as connection,
        db.connect(params, f"runbook {phase.run_id} rehearsal ledger") as ledger_connection,
    ):
        limit(connection, params)
        own = Ledger(ledger_connection, params, phase.run_id, phase.name)
        own.create()
        # What is made here is thrown away again; the rehearsal itself has asked.
        asked = Order(phase.name, required=True, recheck=phase.order.recheck)
        yield Phase(phase.name, phase.run_id, True, params, connection, own, asked)


def limit(connection: db.Connection, params: Params) -> None:
    """Lets no statement of this session take longer than ``rehearse.statement_timeout_minutes``."""
    connection.execute(SQL["session"].compose({}), {"timeout": timeout(params)})


def timeout(params: Params) -> str:
    """The same, as PostgreSQL spells it."""
    return f"{round(params.rehearse.statement_timeout_minutes * 60_000)}ms"


def _make_extensions(phase: Phase) -> list[str]:
    """The extensions of the target's database, and pgvector, where the embedded server has them."""
    found = {r["name"]: r["schema"] for r in db.rows(phase.connection, SQL["extensions"], phase.params)}
    found.setdefault("vector", phase.params.extension.schema_)
    missing = []
    with psycopg.connect(os.environ[EMBEDDED_DSN_ENV], autocommit=True) as there:
        for name, in_schema in found.items():
            parts = {"extension": identifier(name), "schema": identifier(in_schema)}
            missing += _tried(there, SQL["create_extension"].compose(parts), f"extension {name}")
    return missing


def _make_copy(phase: Phase, own: Phase, facts: Facts) -> list[str]:
    """The target's table under its own name on the embedded server, with its indexes as far as they can be made."""
    n, there = names(own.params), own.connection
    there.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(n["schema"]))
    parts = {"definitions": _definitions(columns(phase)), **_storage(phase, facts)}
    there.execute(SQL["create_copy"].compose(n | parts), {})
    missing: list[str] = []
    table = spelled(phase.params, "table")
    for index in db.rows(phase.connection, SQL["index_definitions"], phase.params, table=table):
        missing += _tried(there, sql.SQL(index["definition"]), f"index {index['name']}")
    return missing


def _definitions(found: Sequence[db.Row]) -> sql.Composable:
    """Column definitions; a type that the embedded server may lack is kept as text."""
    one = sql.SQL("{} {}{}")
    return sql.SQL(", ").join(
        one.format(
            identifier(c["name"]),
            sql.SQL(c["type"] if c["known"] else "text"),
            sql.SQL(" NOT NULL" if c["not_null"] else ""),
        )
        for c in found
    )


def _tried(there: psycopg.Connection[Any], query: sql.SQL | sql.Composed, what: str) -> list[str]:
    try:
        there.execute(query)
    except psycopg.Error as error:
        return [f"{what}: {error.diag.message_primary or error}"]
    return []


def _copy_rows(phase: Phase, own: Phase, facts: Facts, rows: int) -> int:
    """Streams the sample from the target to the embedded server as text, which every release understands."""
    found = columns(phase)
    as_text = sql.SQL(", ").join(
        identifier(c["name"]) if c["known"] else sql.SQL("{}::text").format(identifier(c["name"])) for c in found
    )
    drawn = {"values": as_text, "percent": _percent(facts, rows), **_draw(rows)}
    into = names(own.params) | {"columns": sql.SQL(", ").join(identifier(c["name"]) for c in found)}
    for connection in (phase.connection, own.connection):
        connection.execute("SET client_encoding = 'UTF8'")
    copy_out, copy_in = SQL["copy_out"].compose(names(phase.params) | drawn), SQL["copy_in"].compose(into)
    with phase.connection.cursor() as source, own.connection.cursor() as target:
        with source.copy(_plain(copy_out)) as out, target.copy(_plain(copy_in)) as taken:
            for block in out:
                taken.write(block)
        return target.rowcount


def _plain(query: sql.Composed) -> sql.SQL:
    """A statement that takes no values, so that nothing halves its per cent signs again."""
    return sql.SQL(query.as_string().replace("%%", "%"))
