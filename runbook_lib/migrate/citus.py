"""A table that Citus has distributed: found by its catalogue; what the runbook cannot do with it is refused first.

Its statements were run on Citus 14.0.1, PostgreSQL 18.6 and pgvector 0.8.6 (tests/drills/test_citus.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runbook_lib.backfill import vector_store
from runbook_lib.core import db, table_kind
from runbook_lib.core.display import Table, size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("citus")

# Identity columns of distributed tables, and functions that reach the workers by themselves.
OLDEST_CITUS = 12
HASH = "h"
MB = 1024 * 1024
# What pg_dist_partition says of a table: its method, and where it is cut by none how its copies are kept.
BY_METHOD = {"h": "by hash", "r": "by range", "a": "by append"}
BY_COPIES = {
    "t": "as a reference table, with a copy on every node",
    "s": "as a local table of Citus, or in a single shard",
}
WHY_NOT = {
    "by range": "nothing says which shard a new key belongs to",
    "by append": "Citus updates and indexes tables distributed by append in its own way",
    "as a reference table, with a copy on every node": "a trigger that captures changes makes every UPDATE of the"
    " application fail",
    "as a local table of Citus, or in a single shard": "only tables distributed by hash of their key were tried",
}
# What is left out, or needs no statement of its own.
BY_ITSELF = [
    ("00_preflight", "nothing is tried: Citus does not take these statements in one transaction", ""),
    ("20_extension", "CREATE EXTENSION reaches every node by itself", ""),
    ("30_expand_schema", "ADD COLUMN and CREATE TRIGGER reach every shard by themselves", ""),
    ("40_load_embeddings", "COPY sends each vector to the node of its row", ""),
    ("60_build_index", "CREATE INDEX CONCURRENTLY reaches every shard; one that fails leaves it invalid", ""),
]


@dataclass(frozen=True)
class Distribution:
    """How the table is distributed. column: None for a reference table."""

    version: str
    method: str
    copies: str
    colocation: int
    column: str | None
    shards: int

    @property
    def how(self) -> str:
        """In words."""
        return BY_METHOD.get(self.method) or BY_COPIES.get(self.copies, f"by method {self.method}")


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
    yield from _is_no_columnar_table(connection, params, subject)
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
    yield gate(
        "inputs.distributed_is_named",
        params.target.distributed is not None,
        subject,
        found=f"distributed {found.how}; target.distributed is {params.target.distributed or 'not set'}",
        needed="target.distributed: citus",
        danger="statements for an ordinary table stop half-way on Citus, and settings do not reach its workers",
        do="set target.distributed: citus",
    )
    yield _by_its_key(params, subject, found)
    yield _fits(params, subject, found)
    yield from _nodes(connection, params)


def _is_no_columnar_table(connection: db.Connection, params: Params, subject: str) -> Iterator[Gate]:
    stored = db.rows(connection, SQL["storage"], params, table=subject)
    if stored and stored[0]["method"] == "columnar":
        yield gate(
            "inputs.table_is_not_columnar",
            False,
            subject,
            found="stored in columns (access method columnar)",
            needed="stored in rows",
            danger="columnar tables refuse UPDATE and triggers for each row, so vectors cannot be kept up to date",
            do=f"SELECT alter_table_set_access_method('{subject}', 'heap')",
        )


def _by_its_key(params: Params, subject: str, found: Distribution) -> Gate:
    key, by, hashed = params.target.key_columns[0], found.column, found.method == HASH
    ways_out = (
        f"name {by} in target.key, first of its columns, if it is unique or the others make it so, or SELECT"
        f" alter_distributed_table('{subject}', distribution_column := '{key}')"
    )
    return gate(
        "inputs.distributed_by_its_key",
        hashed and by == key,
        subject,
        found=f"distributed {found.how}" + (f" of {by}" if by else "") + f", in {found.shards} shards",
        needed=f"by hash of {'the first column of ' * (len(params.target.key_columns) > 1)}target.key, {key}",
        danger="Citus updates from a join only where both sides are distributed by the column they are joined on"
        if hashed
        else WHY_NOT.get(found.how, "this was never tried"),
        do=ways_out
        if hashed
        else f"SELECT undistribute_table('{subject}'); migrate it as an ordinary table, or distribute it by {key}",
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
    if words := _of_words(params):
        problems.append((f"{words}, for hybrid", f"leave {words} out, with cut_over.route: vector"))
    if conditions := [f.name for f in params.target.each_filter if f.column is None]:
        named = ", ".join(conditions)
        problems.append((f"target.filters {named}: conditions", f"filter by columns in place of {named}"))
    return gate(
        "inputs.distributed_table_is_supported",
        not problems,
        subject,
        found=", ".join(what for what, _ in problems) or f"Citus {found.version}, vectors in a column, by key ranges",
        needed=f"Citus {OLDEST_CITUS} or newer, vectors in a column, a backfill by key ranges, no hybrid, and columns"
        " as filters",
        danger="a shard cannot be renamed into another's place, and its pages lie on other servers; Citus does not"
        " push the look-up of words down to its shards, nor does it tell how many rows meet a condition",
        do="; ".join(do for _, do in problems),
    )


def _of_words(params: Params) -> str:
    """What the parameters have of hybrid, by name."""
    names = ("fulltext_column", "fulltext_expression", "words_query")
    return ", ".join(f"search.{name}" for name in names if getattr(params.search, name))


def _nodes(connection: db.Connection, params: Params) -> Iterator[Gate]:
    nodes = db.rows(connection, SQL["nodes"], params)
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
    wanted = params.index.maintenance_work_mem_mb
    small = {n["node"]: n["memory"] for n in nodes if n["success"] and n["memory"] < wanted * MB}
    yield gate(
        "inputs.workers_have_the_build_memory",
        not small,
        f"{len(nodes)} workers",
        found=", ".join(f"maintenance_work_mem {size(memory)} on {node}" for node, memory in small.items())
        or f"maintenance_work_mem {wanted} MB or more on each",
        needed=f"index.maintenance_work_mem_mb, {wanted} MB, on each: this session's own setting does not reach them",
        danger="each shard's index would be built in less memory than was forecast, ten times as slowly",
        do=f"on each worker: ALTER SYSTEM SET maintenance_work_mem = '{wanted}MB'; SELECT pg_reload_conf();"
        " or lower index.maintenance_work_mem_mb to what they have",
    )


def plan_table(connection: db.Connection, params: Params) -> Table:
    """What is done otherwise on a distributed table, phase by phase; one line for an ordinary one."""
    if look(connection, params) is None:
        return Table(("distributed by Citus",), [("no: an ordinary table of this server",)])
    kind = table_kind.of(params)
    own = [(name, block.purpose, block.lock or "none") for name, block in kind.blocks.items()]
    return Table(("statement", "on a table that Citus distributes", "lock"), [*own, *BY_ITSELF])
