"""What a partitioned target must be before anything is started: tables of this server, and a key that is unique."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.core import db
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import spelled
from runbook_lib.indexes import partitions
from runbook_lib.params import Params

SHOWN_PARTITIONS = 3


def check(connection: db.Connection, params: Params, table: db.Row) -> Iterator[Gate]:
    """The gates of a table that is partitioned, or a partition; none for any other. table: the row of that name in
    ``inputs.sql``."""
    subject = spelled(params, "table")
    if table["root"]:
        yield _is_no_partition(subject, table["root"])
    if table["kind"] != partitions.PARTITIONED:
        return
    parts = partitions.tree(connection, params, subject)
    foreign = [p.shown for p in parts if p.kind not in (partitions.PARTITIONED, partitions.TABLE)]
    leaves = partitions.leaves(parts)
    yield gate(
        "inputs.partitions_are_tables",
        bool(leaves) and not foreign,
        subject,
        found=f"{', '.join(foreign[:SHOWN_PARTITIONS])} of {len(leaves)} partitions: foreign"
        if foreign
        else f"{len(leaves)} partitions, each a table of this server",
        needed="one partition at least, and no foreign one",
        danger="no index can be built on a foreign table, so that of the whole table would never turn valid",
        do="detach the foreign partitions, or migrate the partitions of this server as targets of their own"
        if foreign
        else "create its partitions first",
        figures={"partitions": len(leaves), "foreign": len(foreign)},
    )


def _is_no_partition(subject: str, root: str) -> Gate:
    return gate(
        "inputs.table_is_no_partition",
        False,
        subject,
        found=f"a partition of {root}",
        needed="the partitioned table itself",
        danger="PostgreSQL adds no column to a single partition",
        do=f"name {root} in target.table",
    )


def key_is_unique(connection: db.Connection, params: Params, table: db.Row, not_null: bool) -> Gate:
    """Gate: the key, of one column, of a partitioned table that no index holds unique by itself, since it is not
    partitioned by it.

    Each vector goes to the row whose text has the hash that it was made of, so a key that occurs twice would leave a
    row without its vector and never give one the vector of another text. It is asked for all the same: drawn from
    one source, or so by the parameters, counted once, and led by an index.
    """
    subject, (key,) = spelled(params, "table"), params.target.key_columns
    column = sql.Identifier(key).as_string(connection)
    facts = db.one(connection, partitions.SQL["key"], params, oid=table["oid"], key=key)
    one_source = facts["drawn_from"] or ("target.key_from_one_source" if params.target.key_from_one_source else None)
    refers = vector_store.of(params).table(params)
    may_count = not_null and one_source and facts["led_index"] and not refers
    twice = db.rows(connection, partitions.SQL["twice"], params) if may_count else []
    found = [
        "no valid unique index on this column alone",
        f"drawn from {one_source}" if one_source else "no default that draws it from one source",
        f"first in {facts['led_index']}" if facts["led_index"] else "first in no index",
        *([f"{twice[0]['key']} occurs twice"] if twice else ["no value occurs twice"] if may_count else []),
        "NOT NULL" if not_null else "NULL allowed",
    ]
    todo = [
        (not_null, f"ALTER TABLE {subject} ALTER COLUMN {column} SET NOT NULL;"),
        (facts["led_index"], f"make an index that begins with {column} on {subject} and each partition;"),
        (not refers, "set vector.layout: column, since a foreign key needs a unique index on the key alone;"),
        (
            one_source,
            f"PostgreSQL keeps a partitioned table unique only by keys that hold its partition key: if {column} is"
            " drawn from one sequence, or a UUID, say so with target.key_from_one_source: true; otherwise name"
            " another column in target.key;",
        ),
        (not twice, f"give the rows that share a value of {column} values of their own;"),
    ]
    return gate(
        "inputs.key_identifies_rows",
        bool(may_count) and not twice,
        f"{key} of {subject}",
        found=", ".join(found),
        needed="NOT NULL, with its own unique index; or drawn from one source, occurring once, and first in an index",
        danger="a row would get no vector, or every batch would read the whole table",
        do=" ".join(text for held, text in todo if not held).rstrip(";") + ";",
    )


def captures(connection: db.Connection, params: Params, triggers: Sequence[str]) -> Iterator[Gate]:
    """Gate: each of these triggers of a partitioned table is on every partition and enabled; none for another."""
    subject = spelled(params, "table")
    parts = partitions.tree(connection, params, subject)
    if not parts or parts[0].kind != partitions.PARTITIONED:
        return
    leaves = partitions.leaves(parts)
    values = {"relations": [p.oid for p in leaves], "triggers": list(triggers), "wanted": len(triggers)}
    deaf = [row["shown"] for row in db.rows(connection, partitions.SQL["captured"], params, **values)]
    yield gate(
        "schema.every_partition_captures",
        not deaf,
        subject,
        found=f"{', '.join(deaf[:SHOWN_PARTITIONS])} of {len(leaves)} partitions do not"
        if deaf
        else f"{len(leaves)} of {len(leaves)} partitions",
        needed="both triggers on every partition, enabled",
        danger="rows that are written to those partitions keep no vector, or an old one",
        do=f"ALTER TABLE {deaf[0]} ENABLE TRIGGER …, for each trigger of {params.target.table} named runbook_…"
        if deaf
        else "",
        figures={"partitions": len(leaves), "deaf": len(deaf)},
    )
