"""The gates of a vector index: valid, of the right kind, built within its memory, and finding known rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycopg import sql

from runbook_lib.core import db, row_counts
from runbook_lib.core.display import size
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.ledger import Ledger
from runbook_lib.core.names import as_indexed, identifier, names
from runbook_lib.core.query_plan import explain
from runbook_lib.core.session import register_vector
from runbook_lib.indexes import partitions, vector_index
from runbook_lib.indexes.partitions import Part
from runbook_lib.indexes.vector_index import VectorIndex
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("index")

SHOWN_PARTITIONS = 3
KNOWN_ROWS = 20
FEWEST_KNOWN_ROWS_A_PARTITION = 2
# Rows looked at for each one that is asked for: pages without a vector are passed over.
SAMPLED_FOR_ONE = 100
# Distances are float4 sums; a row is itself if it comes out this near.
SAME_DISTANCE = 1e-4


def subject(index: VectorIndex) -> str:
    """The index and its table, for a gate."""
    target = index.params.target
    return f"{index.name} on {target.schema_}.{target.table}"


def is_valid(index: VectorIndex) -> Gate:
    """Gate: every query can use it, on every partition."""
    begun, partitioned = bool(index.own), len(index.parts) > 1
    if index.shards:
        danger = "every search reads the shards that lack theirs whole, yet every write pays for the others"
        resume = "it builds those of the shards that lack theirs, on their nodes"
    elif partitioned:
        danger = "every search reads the partitions that lack theirs whole, yet every write pays for the others"
        resume = "it continues with the partitions that lack theirs"
    else:
        danger = "no query can use it, yet every write still pays for it"
        resume = "it drops this index concurrently and builds it again"
    return gate(
        "index.is_valid",
        index.usable,
        subject(index),
        found=validity(index),
        needed="valid, with a valid index on every partition" if partitioned else "valid",
        danger=danger if begun else "every search reads the whole table",
        do=f"run 60_build_index again with execute: true; {resume}"
        if begun
        else "run 60_build_index with execute: true",
        figures=_figures(index),
    )


def _figures(index: VectorIndex) -> dict[str, int]:
    if not index.own:
        return {}
    lacking = len(index.lacking_shards if index.shards else index.lacking)
    return {"bytes": index.bytes, "partitions": len(index.shards or index.leaves), "lacking": lacking}


def validity(index: VectorIndex) -> str:
    """What the catalogue says of it, in words, and which partitions lack theirs."""
    if not index.own:
        return "no such index"
    if index.shards and index.root and (index.lacking_shards or not index.root.usable):
        of_shards = [str(shard) for shard in index.lacking_shards] or ["that of the coordinator alone"]
        return f"invalid: {listed(of_shards)}; of {len(index.shards)} shards"
    if index.shards:
        return f"valid, on each of {len(index.shards)} shards, {size(index.bytes)}"
    if len(index.parts) == 1:
        return (
            f"valid, {size(index.bytes)}" if index.usable else "invalid (an earlier concurrent build did not finish)"
        )
    if index.usable:
        return f"valid, on each of {len(index.leaves)} partitions, {size(index.bytes)}"
    lacking = listed([_why(index, part) for part in index.lacking])
    return f"invalid: {lacking}; of {len(index.leaves)} partitions"


def _why(index: VectorIndex, part: Part) -> str:
    own = index.own.get(part.oid)
    if part.kind != partitions.TABLE:
        return f"{part.shown} is no table of this server and can have none"
    if own is None:
        return f"{part.shown} has none"
    return f"that of {part.shown} is {'not attached' if own.usable else 'invalid'}"


def listed(what: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(what) - SHOWN_PARTITIONS
    return ", ".join(what[:SHOWN_PARTITIONS]) + (f" and {more} more" if more > 0 else "") or "the index of the parent"


def has_right_class(index: VectorIndex) -> Gate:
    """Gate: every index in it has the method, operator class and column of the parameters."""
    params, wanted = index.params, vector_index.wanted(index.params)
    partitioned = len(index.parts) > 1
    by_part = {p.shown: vector_index.described(params, index.own[p.oid]) for p in index.parts if p.oid in index.own}
    other = [f"{what} on {shown}" if partitioned else what for shown, what in by_part.items() if what != wanted]
    of_column = all(what.endswith(wanted.split(" on ", 1)[1]) for what in by_part.values())
    return gate(
        "index.has_the_right_operator_class",
        not other,
        subject(index),
        found=listed(other) if other else wanted + (f", on each of {len(by_part)}" if partitioned else ""),
        needed=wanted,
        danger="queries with the distance that was asked for cannot use it",
        do="drop the index of this name, or name another column, and run 60_build_index again"
        if of_column
        else "put index.storage back, or switch to another one with operate/rebuild_index",
    )


def serves_every_search(connection: db.Connection, index: VectorIndex) -> list[Gate]:
    """Gate: PostgreSQL can use a partial index for a search with target.always, on every partition; none for an index
    of all rows.
    """
    params = index.params
    if not any(own.partial for own in index.own.values()):
        return []
    register_vector(connection)
    unused = [part.shown for part in index.leaves if not _is_used(connection, index, part)]
    return [
        gate(
            "index.serves_every_search",
            not unused,
            subject(index),
            found=f"not used for a search with this condition: {listed(unused)}" if unused else "used",
            needed=f"used wherever {params.target.always or 'true (there is no target.always)'} is asked for",
            danger="searches read the whole table: PostgreSQL uses a partial index only where the condition of the"
            " query implies that of the index",
            do="rebuild the index with operate/rebuild_index, so that its condition is today's target.always",
        )
    ]


def _is_used(connection: db.Connection, index: VectorIndex, part: Part) -> bool:
    """Can the nearest rows of one partition be found by the vector index on it?"""
    own = {x.name for x in partitions.indexes(connection, index.params, [part]) if x.usable}
    here = _names(index.params, identifier(part.schema, part.name))
    axis = [1.0] + [0.0] * (index.params.vector.dimension - 1)
    with connection.transaction():
        connection.execute("SET LOCAL enable_seqscan = off")
        connection.execute("SET LOCAL enable_sort = off")
        plan = explain(connection, SQL["nearest"].compose(here), {"embedding": axis})
    return bool(own & set(plan.indexes))


def was_built_in_memory(index: VectorIndex, ledger: Ledger) -> Gate:
    """Gate: the build that the ledger knows of gave no warning."""
    built = ledger.latest("index") or {"notices": []}
    warned = [n for n in built["notices"] if "no longer fits" in n or "little data" in n]
    return gate(
        "index.was_built_without_warning",
        not warned,
        subject(index),
        found="; ".join(warned) or "no NOTICE about memory or too little data",
        needed="none",
        danger="past maintenance_work_mem a build slows down tenfold; lists made of too little data lose recall",
        do="raise index.maintenance_work_mem_mb to the forecast (or load more rows first), drop the index with"
        " undo/index, and build again",
        figures={"warnings": len(warned)},
    )


def finds_known_rows(connection: db.Connection, index: VectorIndex) -> Gate:
    """Gate: of rows that are known to be there, the nearest row by the index is as near as the row itself.

    Each partition is asked alone, through its own index.
    """
    register_vector(connection)
    known: list[db.Row] = []
    lost: list[Any] = []
    rows_each = max(FEWEST_KNOWN_ROWS_A_PARTITION, KNOWN_ROWS // max(len(index.leaves), 1))
    for part in index.leaves:
        here = _names(index.params, identifier(part.schema, part.name))
        rows = known_rows(connection, index.params, here, rows_each)
        known += rows
        with connection.transaction():
            connection.execute("SET LOCAL enable_seqscan = off")
            lost += [row["key"] for row in rows if not _is_found(connection, here, row)]
    return gate(
        "index.finds_known_rows",
        bool(known) and not lost,
        subject(index),
        found=f"{len(known) - len(lost)} of {len(known)} rows found by their own vector"
        + (f"; not {lost[:3]}" if lost else ""),
        needed=f"all of them, {min(KNOWN_ROWS, len(known)) or 1} at least",
        danger="rows that are in the table are not in the index",
        do="drop the index with undo/index and build it again",
        figures={"asked": len(known), "lost": len(lost)},
    )


def _names(params: Params, relation: sql.Composable) -> dict[str, sql.Composable]:
    n = names(params) | {"vectors": relation}
    value = sql.SQL("%(embedding)s::{}").format(n["vector_type"])
    return n | {"query_indexed": as_indexed(params, value)}


def known_rows(connection: db.Connection, params: Params, n: Mapping[str, sql.Composable], most: int) -> list[db.Row]:
    """So many rows of a sample of pages; of all pages where the relation is small, or the sample holds too few.

    n: names, with ``vectors`` the relation that is asked.
    """
    relation = n["vectors"].as_string(connection).replace("%%", "%")
    believed = row_counts.estimated(connection, params, relation)
    percent = 100 * SAMPLED_FOR_ONE * most / believed if believed else 100
    samples = (
        [sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)").format(sql.Literal(percent))] if percent < 100 else []
    )
    rows: list[db.Row] = []
    for sampled in (*samples, sql.SQL("")):
        query = SQL["known_row"].compose({**n, "sampled": sampled})
        rows = connection.execute(query, {"n": most}).fetchall()
        if len(rows) == most:
            break
    return rows


def _is_found(connection: db.Connection, n: Mapping[str, sql.Composable], row: db.Row) -> bool:
    """Is the nearest row, through the index, as near as the row itself?"""
    asked = {"embedding": row["embedding"]}
    own, near = (connection.execute(SQL[block].compose(n), asked).fetchone() for block in ("own_distance", "nearest"))
    return own is not None and near is not None and near["distance"] <= own["distance"] + SAME_DISTANCE


def is_gone(index: VectorIndex) -> Gate:
    """Gate: no index of these names is left, on any partition, valid or not."""
    left = [own.shown + ("" if own.usable else ", invalid") for own in index.own.values()]
    return gate(
        "index.is_gone",
        not left,
        subject(index),
        found=f"still there: {listed(left)}" if left else "no such index",
        needed="no such index",
        danger="every write still pays for it",
        do="run undo/index again; a drop that timed out leaves an invalid index",
    )
