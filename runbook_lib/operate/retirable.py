"""What of the legacy search may be retired: its indexes, found and shown; and whether the time has come."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from psycopg import sql

from runbook_lib.benchmark import explain, loop, query_set
from runbook_lib.benchmark.replica import is_given
from runbook_lib.core import db, session
from runbook_lib.core.display import Table, duration, size
from runbook_lib.core.gates import Gate, Gates, collect, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import spelled
from runbook_lib.core.phase import Phase
from runbook_lib.indexes.building import rows_with_vector
from runbook_lib.migrate import build_index
from runbook_lib.operate import legacy_usage
from runbook_lib.params import Params
from runbook_lib.search import search_function, statements
from runbook_lib.sql import load

SQL = load("retire")

# Operator classes that serve LIKE, similarity and full text, and nothing else that an application asks of a table.
SEARCH_CLASSES = frozenset(
    {"gin_trgm_ops", "gist_trgm_ops", "tsvector_ops", "gin_bigm_ops"}
    | {"text_pattern_ops", "varchar_pattern_ops", "bpchar_pattern_ops"}
)
# Rows on which the build of an index is timed.
TIMED_ROWS = 20_000
# What the ledger calls what was retired.
KIND = "retired"


@dataclass(frozen=True)
class Retirable:
    """An index of the table. held: why it cannot be retired, empty where it can."""

    name: str
    definition: str
    comment: str | None
    bytes: int
    valid: bool
    columns: tuple[str, ...]
    classes: frozenset[str]
    held: str

    @property
    def is_of_a_search(self) -> bool:
        return bool(self.classes & SEARCH_CLASSES)

    def as_data(self) -> dict[str, Any]:
        """For the ledger: what undo needs."""
        return {"name": self.name, "definition": self.definition, "comment": self.comment, "bytes": self.bytes}


def table_name(params: Params) -> str:
    """The table as messages name it."""
    return f"{params.target.schema_}.{params.target.table}"


def standing(connection: db.Connection, params: Params) -> list[Retirable]:
    """The table's indexes but the vector indexes, valid or not, each with its definition spelt whole."""
    with session.fixed_path(connection):
        rows = db.rows(connection, SQL["indexes"], params, table=spelled(params, "table"))
    return [
        Retirable(
            r["name"],
            r["definition"],
            r["comment"],
            r["bytes"],
            r["valid"],
            tuple(sorted(r["columns"])),
            frozenset(r["operator_classes"]),
            _held(r),
        )
        for r in rows
    ]


def _held(row: db.Row) -> str:
    reasons = {
        "is_unique": "keeps values unique",
        "is_of_a_constraint": "carries a constraint",
        "is_replica_identity": "is the replica identity",
        "is_clustered": "orders CLUSTER",
        "is_partitioned": "is on a partitioned table, and cannot be dropped concurrently",
        "in_a_tablespace": "lies in a tablespace of its own, which its definition does not say",
    }
    return ", ".join(text for name, text in reasons.items() if row[name])


def was_retired(ledger: Ledger) -> dict[str, Any]:
    """What is retired by the ledger: indexes with their definitions, capture, full-text column; empty if nothing."""
    last = ledger.latest(KIND) or {}
    return {} if last.get("undone") else last


def chosen(connection: db.Connection, ledger: Ledger, params: Params) -> list[Retirable]:
    """The indexes to retire that are there: those named, or those that only a legacy search can have read."""
    named = set(params.retire.indexes) or None
    begun = {i["name"] for i in was_retired(ledger).get("indexes", [])}
    return [
        f
        for f in standing(connection, params)
        if f.name in begun or (f.name in named if named else not f.held and _found(connection, params, f))
    ]


def _found(connection: db.Connection, params: Params, f: Retirable) -> bool:
    if not f.is_of_a_search or (_is_hybrid(connection, params) and "tsvector_ops" in f.classes):
        return False
    searched = {*params.target.text_columns, params.search.fulltext_column}
    return "tsvector_ops" in f.classes or set(f.columns) <= searched


def _is_hybrid(connection: db.Connection, params: Params) -> bool:
    return (
        search_function.function_state(connection, params) is not None
        and search_function.current_route(connection, params)[0] == "hybrid"
    )


def shown(phase: Phase) -> Table:
    """The indexes to retire: what each is, its size, and how long it would take to build it again."""
    connection, params = phase.connection, phase.params
    rows = sum(rows_with_vector(connection, params, leaf) for leaf in build_index.index(connection, params).leaves)
    going = chosen(connection, phase.ledger, params)
    return Table.of(
        (
            {
                "index": f.name,
                "definition": f.definition,
                "size": size(f.bytes),
                "to build it again": f"about {duration(rebuild_seconds(connection, params, f, rows))}",
            }
            for f in going
        ),
        f"what would go, {size(sum(f.bytes for f in going))} in all; build times scaled from a sample",
    )


def rebuild_seconds(connection: db.Connection, params: Params, found: Retirable, rows: int) -> float:
    """Seconds to build an index again: timed on some rows, in a table of this session's own, and scaled to all."""
    percent = min(100.0, 200.0 * TIMED_ROWS / max(rows, 1))
    table = re.escape(found.definition.split(" USING ")[0].rsplit(" ON ", 1)[1])
    of_sample = re.sub(rf" ON {table} USING ", " ON pg_temp.runbook_sample USING ", found.definition, count=1)
    with db.rolled_back(connection):
        parts = {"percent": sql.Literal(percent), "rows": sql.Literal(TIMED_ROWS)}
        made = db.statement(SQL["sample"], params, parts)
        sampled = connection.execute(made.query, {}).rowcount
        started = time.perf_counter()
        connection.execute(of_sample.encode())
        seconds = time.perf_counter() - started
    return seconds * max(rows, 1) / max(sampled, 1)


def check(phase: Phase) -> Gates:
    """Looks, writes the look down, and says whether the legacy search may go."""
    connection, ledger, params = phase.connection, phase.ledger, phase.params
    now = legacy_usage.look(connection, params)
    before = legacy_usage.earlier(ledger, params, now)
    legacy_usage.note(phase, now)
    found = chosen(connection, ledger, params)
    return collect(
        [
            _indexes_can_go(ledger, params, found),
            _reads_have_left(connection, params),
            *legacy_usage.gates(params, now, before, [f.name for f in found]),
            _every_server_was_looked_at(connection, params),
            _new_route_does_without(connection, params, found),
            *_column_can_go(connection, params),
        ]
    )


def _indexes_can_go(ledger: Ledger, params: Params, found: Sequence[Retirable]) -> Gate:
    gone = {i["name"] for i in was_retired(ledger).get("indexes", [])}
    unknown = set(params.retire.indexes) - {f.name for f in found} - gone
    held = [f"{f.name} {f.held}" for f in found if f.held]
    wrong = [*(f"{name} is no index of this table" for name in sorted(unknown)), *held]
    return gate(
        "retire.indexes_can_go",
        not wrong,
        table_name(params),
        found="; ".join(wrong) or ", ".join(f.name for f in found) or "no index is left that only legacy reads",
        needed="indexes of this table that carry no constraint, and that their definition alone brings back",
        danger="more would go than a search, or a rollback would not restore what is there now",
        do="fix retire.indexes; with an empty list the runbook looks for them itself",
        figures={"indexes": [f.name for f in found], "bytes": sum(f.bytes for f in found)},
    )


def _reads_have_left(connection: db.Connection, params: Params) -> Gate:
    days = params.retire.unused_days
    row = db.one(connection, search_function.SQL["current_route"], params)
    since: datetime = row["changed_at"]
    left = row["route"] != "legacy" and row["share_percent"] == 100
    from_then = since + timedelta(days=days)
    return gate(
        "retire.reads_have_left_legacy",
        left and from_then <= row["now"],
        params.target.name,
        found=f"{row['route']} at {row['share_percent']} % since {since.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        needed=f"vector or hybrid at 100 % for {days:g} days",
        danger="the reads may yet have to go back, and without its indexes they cannot go back to legacy",
        do=f"run this again from {from_then.astimezone(UTC):%Y-%m-%d %H:%M} UTC on"
        if left
        else "run 90_cut_over with execute: true first",
    )


def _every_server_was_looked_at(connection: db.Connection, params: Params) -> Gate:
    standbys = db.one(connection, SQL["standbys"], params)["standbys"]
    unseen = max(0, standbys - is_given(params))
    return gate(
        "retire.every_server_was_looked_at",
        True if not unseen or params.retire.accept_unseen_standbys else None,
        "standbys of this server",
        found=f"{standbys} connected, {unseen} of them not looked at"
        + (", accepted by retire.accept_unseen_standbys" if unseen and params.retire.accept_unseen_standbys else ""),
        needed="the counters of each server that takes reads",
        danger="what is read on a standby is counted there alone; its searches would read the whole table",
        do="name the standby that takes reads in search.read_dsn_env, or, where they take none, set"
        " retire.accept_unseen_standbys: true in the open",
        figures={"standbys": standbys, "unseen": unseen},
    )


def _new_route_does_without(connection: db.Connection, params: Params, found: Sequence[Retirable]) -> Gate:
    """PostgreSQL has no invisible indexes, so the plan is asked; and hybrid needs its full-text index at any size."""
    route = search_function.current_route(connection, params)[0]
    read = _read_by(connection, params, route) if route != "legacy" else set[str]()
    hybrid = [f.name for f in found if route == "hybrid" and "tsvector_ops" in f.classes]
    needed = sorted({f.name for f in found if f.name in read} | set(hybrid))
    wanted = params.search.fulltext_column if route == "hybrid" and params.retire.drop_fulltext_column else None
    column = [wanted] if wanted else []
    return gate(
        "retire.new_route_does_without_them",
        not needed and not column,
        f"{params.function_name}, route {route}",
        found=f"it needs {', '.join([*needed, *column])}" if needed or column else "its plan reads none of them",
        needed="none of what is to go",
        danger="every search would read the whole table",
        do="take them out of retire.indexes" if needed else "set retire.drop_fulltext_column: false",
        figures={"read": sorted(read)},
    )


def _read_by(connection: db.Connection, params: Params, route: Any) -> set[str]:
    """The indexes that the route's plan reads, for the first query of the sample."""
    (query,) = query_set.with_vectors(params, query_set.sample(query_set.read_queries(params), 1))
    with explain.as_the_application(connection, params) as reader:
        statement = statements.route_statement(reader, params, route)
        return set(loop.planned(reader, params, statement, query).indexes)


def _column_can_go(connection: db.Connection, params: Params) -> Iterator[Gate]:
    if not params.retire.drop_fulltext_column or not column_is_there(connection, params):
        return
    made = generated(connection, params)
    yield gate(
        "retire.column_can_be_made_again",
        made is not None,
        f"{params.search.fulltext_column} of {table_name(params)}",
        found=f"generated from {made['expression']}" if made else "written by the application or a trigger",
        needed="a generated column, whose expression brings it back",
        danger="its content would be lost",
        do="set retire.drop_fulltext_column: false",
    )


def generated(connection: db.Connection, params: Params) -> db.Row | None:
    """Type and expression of the full-text column; None where PostgreSQL does not make it."""
    found = db.rows(
        connection, SQL["generated"], params, table=spelled(params, "table"), column=params.search.fulltext_column
    )
    return found[0] if found else None


def column_is_there(connection: db.Connection, params: Params) -> bool:
    """Has the table its full-text column?"""
    column = params.search.fulltext_column
    there = db.one(connection, SQL["column_is_there"], params, table=spelled(params, "table"), column=column)["there"]
    return bool(there)
