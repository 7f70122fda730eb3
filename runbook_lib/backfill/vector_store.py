"""Where the vectors are kept: in a column of the table, in a table of their own with the same key, or in one with a
row for each chunk of a text.

What differs between them is answered here, by values of one dataclass, so that callers need not ask which of them it
is. How SQL reads vectors in either is said by :func:`runbook_lib.core.names.names`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg import sql

from runbook_lib.backfill.throttle import first_pace, in_turn
from runbook_lib.core import db
from runbook_lib.core.display import Table, number
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import (
    added_columns,
    has_chunks,
    has_side_table,
    identifier,
    key_of,
    names,
    side_table_name,
    spelled,
    verbatim,
)
from runbook_lib.core.phase import Phase
from runbook_lib.params import Params
from runbook_lib.sql import Block, load

SQL = load("sidetable")
SCHEMA = load("schema")
STAGED = {"create_staging": SCHEMA["create_staging"], "copy": load("staging")["copy"]}
BACKFILL = load("backfill")
PREFLIGHT = load("preflight")

AFTER_PROMOTION = ("delete_orphans", "delete_stale", "validate", "analyze")
# Measured: 100 k rows of 1 kB, 384 dimensions, HNSW with m 16, PostgreSQL 18.6, pgvector 0.8.6, 2 cores. An update
# that is not HOT enters the row into every index again, and the vector's is the dearest.
NOT_HOT_TODAY_US = 100
NOT_HOT_WAL_KB = 4.5
INSERT_US = 900
# From this share of one core on, the dearer updates are worth a join.
WORTH_A_JOIN = 0.01


@dataclass(frozen=True)
class VectorStore:
    """One way to keep the vectors.

    name: as ``vector.layout`` says it. columns: those that it adds to the table; where there are any, the backfill
    updates the table's own rows, so that its triggers, rules, checks and indexes take part. table: the one that it
    makes, with a foreign key to the target's. promoted: that its backfill is one statement, and why; empty where it
    goes row by row. knows_filters: an index on the vectors may name the table's other columns. lock_rows, write_row,
    clear_row: blocks of refresh.sql. blocks: those of its own tables, among them create_staging and copy, of the
    vectors that are to be moved there. places: columns there that say of which part of a text a vector is; empty
    where a row has one vector. create, drop: make it and remove it. write: the statement that moves a batch of staged
    vectors. promotion: what moves all of them at once, as far as it is still to be done. clear_textless:
    removes the vectors of rows without text. not_hot_us: of one core, for an update of the table that is not HOT,
    with the vector index. search_times: p50 of a search against one in the column.
    """

    name: str
    columns: Callable[[Params], list[str]]
    table: Callable[[Params], str | None]
    knows_filters: bool
    promoted: str
    lock_rows: str
    write_row: str
    clear_row: str
    blocks: Mapping[str, Block]
    create: Callable[[db.Connection, Params], db.Statement]
    drop: Callable[[db.Connection, Params], db.Statement]
    write: Callable[[Params, Sequence[Any] | None, str | None], db.Statement]
    promotion: Callable[[Phase], list[db.Statement]]
    clear_textless: Callable[[db.Connection, Params], Iterator[db.Statement]]
    not_hot_us: int
    search_times: float
    places: tuple[str, ...] = ()

    def built_at_once(self, largest_partition: float) -> float:
        """Share of the rows that one build of the index holds in memory: partitions are built one after the other.
        largest_partition: share of the rows in it."""
        return largest_partition if self.knows_filters else 1.0

    def core_share(self, updates_per_s: float) -> float:
        """Share of one core that updates which are not HOT will take beyond today's."""
        return updates_per_s * (self.not_hot_us - NOT_HOT_TODAY_US) / 1e6


def of(params: Params) -> VectorStore:
    """The one that the parameters ask for."""
    return CHUNKS if has_chunks(params) else SIDE_TABLE if has_side_table(params) else COLUMN


def _update(params: Params, keys: Sequence[Any] | None, part: str | None) -> db.Statement:
    """The hash-guarded UPDATE. part: the partition of these keys, as PostgreSQL spells it, where it is known."""
    relation = names(params)["table"] if part is None else verbatim(part)
    values = None if keys is None else list(keys)
    return db.statement(BACKFILL["update"], params, {"part": relation}, keys=values)


def _upsert(params: Params, keys: Sequence[Any] | None, part: str | None) -> db.Statement:
    """The INSERT … ON CONFLICT of one batch."""
    return db.statement(of(params).blocks["upsert"], params, keys=None if keys is None else list(keys))


def _clear_in_batches(connection: db.Connection, params: Params) -> Iterator[db.Statement]:
    """One UPDATE would hold the first row until it has read the last."""
    keys = [row["key"] for row in db.rows(connection, BACKFILL["textless"], params)]
    for batch in in_turn(keys, first_pace(params)):
        yield db.statement(BACKFILL["clear_textless"], params, keys=list(batch))


def _of_side_table(connection: db.Connection, params: Params, name: str) -> db.Statement:
    return db.statement(of(params).blocks[name], params, _extra(connection, params))


def _extra(connection: db.Connection, params: Params) -> dict[str, sql.Composable]:
    return {
        "foreign_key": identifier(f"runbook_{params.target.name}_vector_of_row"),
        "vectors_name": identifier(side_table_name(params)),
        "moved": identifier(params.target.schema_, f"{params.target.name}_staging"),
        "grants": _grants(connection, params),
    }


def _grants(connection: db.Connection, params: Params) -> sql.Composable:
    """Whoever may read the table may read its vectors: the search function runs with the caller's rights."""
    found = db.rows(connection, SQL["readers"], params, table=spelled(params, "table"))
    grant = sql.SQL("GRANT SELECT ON {} TO {}")
    everybody = sql.SQL("PUBLIC")
    vectors = names(params)["vectors"]
    return sql.SQL("; ").join(
        grant.format(vectors, everybody if r["role"] is None else identifier(r["role"])) for r in found
    )


def _promotion(phase: Phase) -> list[db.Statement]:
    """The staging table takes the place of the side table while that is empty; what was begun is finished."""
    p, connection = phase.params, phase.connection
    after = [_of_side_table(connection, p, name) for name in AFTER_PROMOTION]
    state = db.one(connection, SQL["sizes"], p) if phase.execute else {"empty": True, "staged": True}
    if state["empty"] and state["staged"]:
        store, n = of(p), names(p)
        extra = {
            "renames": _renames(connection, p),
            "create_staging": store.blocks["create_staging"].compose(n),
            "staged_places": sql.SQL("").join(sql.SQL(", {}").format(identifier(c)) for c in store.places),
            "places": sql.SQL("").join(sql.SQL(", {}").format(n[c]) for c in store.places),
        }
        return [db.statement(store.blocks["promote"], p, _extra(connection, p) | extra), *after]
    return [] if _is_validated(connection, p) else after


def _renames(connection: db.Connection, params: Params) -> sql.Composable:
    """The staging table's columns and primary key take the names that they have in the side table."""
    n, places = names(params), of(params).places
    # The places first: the key of the table may have the name of one.
    renamed = {
        **{place: n[place] for place in places},
        **key_of(params).names_by_own,
        "text_hash": n["embedding_hash"],
        "embedding": n["embedding"],
        "staged_at": n["embedding_updated_at"],
    }
    rename = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}")
    parts = [rename.format(n["staging"], identifier(a), b) for a, b in renamed.items() if identifier(a) != b]
    key = db.rows(connection, SQL["primary_key"], params, staging=spelled(params, "staging"))
    new = identifier(f"runbook_{params.target.name}_vector_key")
    parts += [
        sql.SQL("ALTER TABLE {} RENAME CONSTRAINT {} TO {}").format(n["staging"], identifier(row["name"]), new)
        for row in key
    ]
    return sql.SQL("; ").join(parts)


def _is_validated(connection: db.Connection, params: Params) -> bool:
    relations = {name: spelled(params, name) for name in ("vectors", "table")}
    found = db.rows(connection, SQL["is_validated"], params, **relations)
    return bool(found) and all(row["validated"] for row in found)


COLUMN = VectorStore(
    name="column",
    columns=added_columns,
    table=lambda _: None,
    knows_filters=True,
    promoted="",
    lock_rows="lock_rows",
    write_row="update",
    clear_row="clear",
    blocks=STAGED,
    create=lambda _, params: db.statement(SCHEMA["add_columns"], params),
    drop=lambda _, params: db.statement(SCHEMA["drop_columns"], params),
    write=_update,
    promotion=lambda _: [],
    clear_textless=_clear_in_batches,
    not_hot_us=830,
    search_times=1.0,
)
SIDE_TABLE = VectorStore(
    name="side_table",
    columns=lambda _: [],
    table=side_table_name,
    knows_filters=False,
    promoted="vector.layout: the staging table becomes the side table",
    lock_rows="lock_rows_beside",
    write_row="update_beside",
    clear_row="clear_beside",
    blocks=STAGED | SQL,
    create=lambda connection, params: _of_side_table(connection, params, "create"),
    drop=lambda connection, params: _of_side_table(connection, params, "drop"),
    write=_upsert,
    promotion=_promotion,
    clear_textless=lambda connection, params: iter([_of_side_table(connection, params, "clear_textless")]),
    not_hot_us=108,
    # p50 3.62 and 3.19 ms, 1,000 alternating calls of each on a busy server, ef_search 40, strict iterative scan
    # (tests/benchmarks/bench_layout.py).
    search_times=1.13,
)
CHUNKS = replace(
    SIDE_TABLE,
    name="chunks",
    promoted="vector.layout: the staging table becomes the table of chunks",
    write_row="update_chunks",
    blocks=STAGED | SQL | load("chunks"),
    places=("chunk", "chunk_start", "chunk_length"),
)
STORES = (COLUMN, SIDE_TABLE)


def not_with_chunks(params: Params, operation: str) -> list[Gate]:
    """Gate: it refuses an operation that compares one vector a row, where a row has several."""
    if not of(params).places:
        return []
    found = gate(
        "operate.rows_have_one_vector",
        False,
        operation,
        found=f"vector.layout: {CHUNKS.name}",
        needed=f"{COLUMN.name} or {SIDE_TABLE.name}; this operation does not work with vector.layout: {CHUNKS.name}",
        danger="it compares one vector a row, and here a row has several",
        do="leave it out: 60_build_index, 70_tune and operate/monitor measure the index in use",
    )
    return [found]


def advice(updates_per_s: float) -> str:
    """The store that the forecast favours, and why. updates_per_s: those that are not HOT."""
    share = COLUMN.core_share(updates_per_s)
    favoured = SIDE_TABLE if share >= WORTH_A_JOIN else COLUMN
    return (
        f"{favoured.name}: in the column, updates that are not HOT would take {share:.1%} of a core more than today"
    )


def compare(phase: Phase) -> Table:
    """What either will cost this very table, by its own counters since the server's last reset of statistics."""
    counted = db.one(phase.connection, PREFLIGHT["table"], phase.params, table=spelled(phase.params, "table"))
    seconds = max(float(counted["counted_for_s"] or 0), 1.0)
    not_hot = (counted["updates"] - counted["hot_updates"]) / seconds
    hot = f"{counted['hot_updates'] / counted['updates']:.0%} HOT" if counted["updates"] else "none counted"
    rows: list[tuple[object, ...]] = [
        ("updates a second today", *(f"{number(counted['updates'] / seconds)}, {hot}" for _ in STORES)),
        (
            "an update that is not HOT, with the index",
            *(f"{s.not_hot_us} µs, today {NOT_HOT_TODAY_US} µs" for s in STORES),
        ),
        ("all of them, of one core, beyond today", *(f"{s.core_share(not_hot):.2%}" for s in STORES)),
        ("an insert, once its vector arrives", *(f"{INSERT_US} µs more, {NOT_HOT_WAL_KB} kB of WAL" for _ in STORES)),
        ("the backfill", "rewrites every row, in batches", "a rename, and the check of a foreign key"),
        ("a search, p50", *(f"{s.search_times:g} ×" for s in STORES)),
        ("the parameters say", *("✔" if s is of(phase.params) else "" for s in STORES)),
        ("this table's figures say", *("✔" if advice(not_hot).startswith(s.name) else "" for s in STORES)),
    ]
    return Table(("measured elsewhere, applied to this table", *(s.name for s in STORES)), rows)
