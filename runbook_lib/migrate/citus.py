"""A table that Citus has distributed: found by its catalogue, refused or planned for, never run on silently.

The statements that Citus refuses are replaced by ones that it takes (its documentation and regression tests, release
12 to 14). They were checked as text, and against stand-ins for its functions on one server. No cluster has run them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.core import db
from runbook_lib.core.display import Table
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import HASH_BYTES, literal, names, spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("citus")
SCHEMA = load("schema")

# Identity columns of distributed tables, and functions that reach the workers by themselves.
OLDEST_CITUS = 12
HASH = "h"
KINDS = {"h": "by hash", "r": "by range", "a": "by append", "n": "as a copy on every node, or on one"}
REPLACED = ("create_staging", "create_rejected", "create_queue")


@dataclass(frozen=True)
class Distribution:
    """How the table is distributed. column: None for a reference table."""

    version: str
    method: str
    colocation: int
    column: str | None
    shards: int


def look(connection: db.Connection, params: Params) -> Distribution | None:
    """What Citus has made of the target; None where it is an ordinary table, or there is no Citus."""
    extension = db.rows(connection, SQL["extension"], params)
    if not extension:
        return None
    found = db.rows(connection, SQL["distribution"], params, table=spelled(params, "table"))
    return Distribution(extension[0]["version"], **found[0]) if found else None


def check(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """The gates of a distributed target; of an ordinary one only that the parameters do not say otherwise."""
    found, subject = look(connection, params), spelled(params, "table")
    if found is None:
        if params.target.distributed:
            yield gate(
                "inputs.table_is_distributed",
                False,
                subject,
                found="an ordinary table of this server",
                needed="a table that Citus has distributed, as target.distributed says",
                danger="statements for Citus would fail on this server",
                do="take target.distributed out of the parameters",
            )
        return
    yield _by_its_key(params, subject, found)
    yield _fits(params, subject, found)
    yield from _nodes(connection, params)
    yield gate(
        "inputs.distributed_is_accepted",
        params.target.distributed == "accept_untested",
        subject,
        found="distributed by Citus; the runbook's statements for it have run on no cluster",
        needed="target.distributed: accept_untested, after a rehearsal on a copy of the cluster",
        danger="a statement that Citus refuses stops the migration half-way; 70_tune does not read its plans yet",
        do="run the phases on a copy of the cluster first; then set target.distributed: accept_untested",
    )


def _by_its_key(params: Params, subject: str, found: Distribution) -> Gate:
    key, by = params.target.key, found.column
    good = found.method == HASH and by == key
    return gate(
        "inputs.distributed_by_its_key",
        good,
        subject,
        found=f"distributed {KINDS.get(found.method, found.method)}"
        + (f" of {by}" if by else "")
        + f", in {found.shards} shards",
        needed=f"by hash of target.key, {key}",
        danger="Citus updates from a join only where both sides are distributed by the column they are joined on",
        do=f"name {by} in target.key if it is unique, or SELECT alter_distributed_table('{subject}',"
        f" distribution_column := '{key}')"
        if found.method == HASH
        else f"SELECT undistribute_table('{subject}'); migrate it as a local table, or distribute it by {key}",
        figures={"shards": found.shards, "colocation": found.colocation},
    )


def _fits(params: Params, subject: str, found: Distribution) -> Gate:
    problems = []
    if int(found.version.split(".")[0]) < OLDEST_CITUS:
        problems.append((f"Citus {found.version}", f"update Citus to {OLDEST_CITUS} or newer"))
    if (store := vector_store.of(params)) is not vector_store.COLUMN:
        problems.append((f"vector.layout: {store.name}", f"set vector.layout: {vector_store.COLUMN.name}"))
    if params.backfill.strategy == "page_interleaved":
        problems.append(("backfill.strategy: page_interleaved", "set backfill.strategy: auto"))
    return gate(
        "inputs.distributed_table_is_supported",
        not problems,
        subject,
        found=", ".join(what for what, _ in problems) or f"Citus {found.version}, vectors in a column, by key ranges",
        needed=f"Citus {OLDEST_CITUS} or newer, vectors in a column, a backfill by key ranges",
        danger="a shard cannot be renamed into another's place, and its pages lie on other servers",
        do="; ".join(do for _, do in problems),
    )


def _nodes(connection: db.Connection, params: Params) -> Iterator[Gate]:
    nodes = db.rows(connection, SQL["nodes"], params)
    here = db.one(connection, SQL["triggers_here"], params)["triggers"]
    lost = [n["node"] for n in nodes if not n["success"]]
    offered = sorted({n["pgvector"] for n in nodes if n["success"]})
    yield gate(
        "inputs.workers_have_pgvector",
        not lost and len(offered) == 1 and offered != ["none"],
        f"{len(nodes)} workers",
        found=f"{', '.join(lost)} cannot be reached" if lost else f"they offer {', '.join(offered) or 'nothing'}",
        needed="the same release of pgvector on every worker",
        danger="CREATE EXTENSION reaches every node, and fails on those without the files",
        do="install the same package of pgvector on every worker as on the coordinator",
        figures={"workers": len(nodes)},
    )
    off = [*(["the coordinator"] if here != "on" else []), *(n["node"] for n in nodes if n["triggers"] != "on")]
    yield gate(
        "inputs.capture_may_run_on_shards",
        not off,
        spelled(params, "table"),
        found=f"citus.enable_unsafe_triggers is off on {', '.join(off)}"
        if off
        else "citus.enable_unsafe_triggers is on",
        needed="on, on the coordinator and every worker",
        danger="rows that change during the migration would keep the vector of their old text",
        do="ALTER SYSTEM SET citus.enable_unsafe_triggers = on on every node, and reload: the runbook's trigger only"
        " writes to the queue's shard beside its row",
    )


def names_of(params: Params) -> dict[str, sql.Composable]:
    """What the blocks of ``citus.sql`` name besides :func:`runbook_lib.core.names.names`."""
    n = names(params)
    quoted = {f"{name}_name": literal(spelled(params, name)) for name in ("staging", "rejected", "queue", "table")}
    parts = {name: SCHEMA[name].compose(n) for name in ("create_staging", "create_rejected")}
    return {**quoted, **parts, "hash_bytes": sql.Literal(HASH_BYTES)}


def statement(params: Params, block: str) -> db.Statement:
    """One of the changing blocks."""
    return db.statement(SQL[block], params, names_of(params))


def plan_table(connection: db.Connection, params: Params) -> Table:
    """What is done otherwise on a distributed table, phase by phase; one line for an ordinary one."""
    if look(connection, params) is None:
        return Table(("distributed by Citus",), [("no: an ordinary table of this server",)])
    own = [
        ("30_expand_schema", s.purpose, s.lock or "none", s.text(connection))
        for s in (statement(params, b) for b in ("create_text_functions", *REPLACED))
    ]
    rest = [
        ("20_extension", "CREATE EXTENSION reaches every node by itself", "", ""),
        ("30_expand_schema", "ADD COLUMN and CREATE TRIGGER reach every shard by themselves", "", ""),
        ("40_load_embeddings", "COPY sends each vector to the node of its row", "", ""),
        (
            "50_backfill",
            "by key ranges: each UPDATE joins shard with shard, on the key; no lock ahead",
            "",
            "",
        ),
        (
            "60_build_index",
            "CREATE INDEX CONCURRENTLY reaches every shard; one that fails leaves it invalid",
            "",
            "",
        ),
        ("70_tune", "not supported from here on: the plans of Citus are not read, TABLESAMPLE is refused", "", ""),
    ]
    return Table(("phase", "on a distributed table (not run on a cluster)", "lock", "statement"), [*own, *rest])
