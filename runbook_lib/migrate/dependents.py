"""Who depends on the table: publications and their subscribers, children, functions; and tables without a way.

Each that would notice a new column or a new table is named, with what it needs. What is only to be known says so and
passes; what somebody else must be ready for is agreed to by name in ``accept.publications``, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import psycopg
from psycopg import sql

from runbook_lib.backfill import vector_store
from runbook_lib.core import db, versions
from runbook_lib.core.display import some
from runbook_lib.core.gates import Gate, gate
from runbook_lib.core.names import identifier, names, spelled, verbatim
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("dependents")

# PostgreSQL manual, "PostgreSQL Limits": columns of a table; dropped ones count.
MOST_COLUMNS = 1600
SHOWN = 5
SIDE_TABLE = "vector.layout: side_table, which adds no column to this table"


def check(connection: db.Connection, params: Params, columns: Mapping[str, db.Row]) -> Iterator[Gate]:
    """The gates of whoever depends on the table. columns: of ``inputs.sql``, by name."""
    facts = db.one(
        connection, SQL["table"], params, table=spelled(params, "table"), key=list(params.target.key_columns)
    )
    yield from _kind_of_table(params, facts, columns)
    yield from _filters(connection, params, columns)
    yield from _publications(connection, params)
    yield from _feeds(connection, params, facts)


def _kind_of_table(params: Params, facts: db.Row, columns: Mapping[str, db.Row]) -> Iterator[Gate]:
    table, store = spelled(params, "table"), vector_store.of(params)
    if facts["children"]:
        yield gate(
            "dependents.table_has_no_children",
            False,
            table,
            found=f"{some(facts['children'], SHOWN)} inherit from it",
            needed="a table of its own, or a partitioned one",
            danger="triggers and indexes do not reach children made by INHERITS: their rows would keep no vector, and"
            " be searched without an index",
            do="make it a partitioned table, or migrate each child as a target of its own",
        )
    if facts["persistence"] == "t" or (facts["persistence"] == "u" and store.table(params)):
        temporary = facts["persistence"] == "t"
        yield gate(
            "dependents.table_is_kept",
            False,
            table,
            found="a temporary table" if temporary else "an unlogged table, with its vectors in a side table",
            needed="a table of every session" if temporary else "a logged table, or vector.layout: column",
            danger="no other session has it"
            if temporary
            else "PostgreSQL refuses a foreign key to an unlogged table",
            do="name a permanent table"
            if temporary
            else f"ALTER TABLE {table} SET LOGGED; or set vector.layout: column",
        )
    if facts["of_type"] and store.columns(params):
        yield gate(
            "dependents.columns_can_be_added",
            False,
            table,
            found=f"a typed table, OF {facts['of_type']}",
            needed="a table that takes a column",
            danger="PostgreSQL adds no column to a typed table",
            do=f"ALTER TABLE {table} NOT OF; or set {SIDE_TABLE}",
        )
    missing = [c for c in store.columns(params) if c not in columns]
    if facts["columns"] + len(missing) > MOST_COLUMNS:
        yield gate(
            "dependents.columns_can_be_added",
            False,
            table,
            found=f"{facts['columns']} columns, {facts['columns'] - len(columns)} of them dropped",
            needed=f"room for {len(missing)} more, of {MOST_COLUMNS} in all; dropped columns count",
            danger="PostgreSQL refuses ADD COLUMN",
            do=f"set {SIDE_TABLE}; only a copy of the table loses its dropped columns",
        )
    if facts["blind_key"]:
        yield gate(
            "dependents.key_is_compared_by_its_bytes",
            False,
            f"{params.target.key_shown} of {table}",
            found=f"collation {facts['blind_key']}, to which different keys can be equal",
            needed="a deterministic collation",
            danger="vectors, judgements and answers are matched by the bytes of the key, and would miss their rows",
            do="name another unique column in target.key, for instance a bigint GENERATED ALWAYS AS IDENTITY",
        )


def _filters(connection: db.Connection, params: Params, columns: Mapping[str, db.Row]) -> Iterator[Gate]:
    """Has PostgreSQL plan what is done with a filter: equality, groups and order. It reads no row."""
    for column in params.target.filter_columns:
        if column not in columns:
            continue
        kind, said = columns[column]["type"], ""
        query = SQL["filter"].compose(names(params) | {"column": identifier(column), "type": verbatim(kind)})
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(query, {})
        except psycopg.Error as error:
            db.raise_if_lost(connection, error)
            said = error.diag.message_primary or str(error)
        if said:
            yield gate(
                "dependents.filter_can_be_compared",
                False,
                f"{column} of {spelled(params, 'table')}",
                found=f"{kind}; PostgreSQL says: {said}",
                needed="a type with equality and an order",
                danger="the search filters by equality, and measures each value of a filter",
                do=f"leave {column} out of target.filters, or name a generated column of type text or integer that"
                " holds what is filtered by",
            )


def _publications(connection: db.Connection, params: Params) -> Iterator[Gate]:
    """A gate for each publication that sends new columns or new tables; and one for those that notice nothing."""
    table, added = spelled(params, "table"), vector_store.of(params).columns(params)
    sent = db.rows(connection, SQL["publications"], params, table=table)
    of_new = {row["name"]: row for row in _of_new_tables(connection, params)}
    readers = _readers(connection, params)
    for row in sent:
        columns = row["columns"] and bool(added)
        yield _publication(params, row, columns, of_new.pop(row["name"], None), readers)
    for row in of_new.values():
        yield _publication(params, row, False, row, readers)


def _of_new_tables(connection: db.Connection, params: Params) -> Sequence[db.Row]:
    schemas = [params.ledger.schema_, *([params.target.schema_] if vector_store.of(params).table(params) else [])]
    any_schema = (
        "ARRAY(SELECT n.nspname::text FROM pg_publication_namespace s JOIN pg_namespace n ON n.oid = s.pnnspid"
        " WHERE s.pnpubid = p.oid AND n.nspname = ANY (%(schemas)s::text[]) ORDER BY 1)"
    )
    # No schema can be published as a whole there; the value is bound all the same.
    none = "ARRAY(SELECT s FROM unnest(%(schemas)s::text[]) s WHERE false)"
    there = versions.publishes_schemas(connection.info.server_version)
    query = SQL["publications_of_new_tables"].compose(
        names(params) | {"in_schemas": sql.SQL(any_schema if there else none)}
    )
    return connection.execute(query, {"schemas": schemas}).fetchall()


def _publication(params: Params, row: db.Row, columns: bool, of_new: db.Row | None, readers: str) -> Gate:
    table, agreed = spelled(params, "table"), row["name"] in params.accept.publications
    facts = [f"sends every column of {table}, and so the new ones"] if columns else []
    if of_new:
        what = (
            "every table of the database" if of_new["all_tables"] else f"each table of {', '.join(of_new['schemas'])}"
        )
        facts.append(f"sends {what}, and so the runbook's own")
    found = "; ".join(facts) or "sends none of the new columns; each UPDATE of the backfill is sent without them"
    return gate(
        "dependents.publication_is_agreed_to",
        agreed or not facts,
        f"publication {row['shown']}",
        found=f"{found}; {readers}" + ("; agreed to in accept.publications" if facts and agreed else ""),
        needed=f"no subscriber that lacks them, agreed to by name: accept.publications: [{row['name']}]"
        if facts
        else "no new column, no new table",
        danger="a subscriber that lacks a column or table stops at the first change of it; its slot then keeps every"
        " WAL file here until the disk is full",
        do="; ".join(_ready(params, row, columns, of_new)),
    )


def _ready(params: Params, row: db.Row, columns: bool, of_new: db.Row | None) -> Iterator[str]:
    n, table = names(params), spelled(params, "table")
    if columns:
        wanted = zip(
            ("embedding", "embedding_updated_at", "embedding_hash"), ("", "timestamptz", "bytea"), strict=True
        )
        kinds = [f"{_plain(n[c])} {kind or _plain(n['vector_type'])}" for c, kind in wanted]
        added = ", ".join(f"ADD COLUMN IF NOT EXISTS {kind}" for kind in kinds)
        yield f"on each subscriber, after CREATE EXTENSION vector there: ALTER TABLE {table} {added};"
        yield f"or set {SIDE_TABLE}"
    if of_new:
        narrower = "FOR TABLE with the application's tables" if of_new["all_tables"] else "FOR TABLE"
        yield f"make a publication {narrower} in place of this one, which sends none of the runbook's tables"
    if columns or of_new:
        yield (
            f"then name {row['name']} in accept.publications"
            if columns
            else (
                f"or name {row['name']} in accept.publications, where every reader takes tables that it does not know"
            )
        )


def _plain(name: sql.Composable) -> str:
    return name.as_string().replace("%%", "%")


def _readers(connection: db.Connection, params: Params) -> str:
    slots = db.rows(connection, SQL["slots"], params)
    shown = [f"{s['name']} ({s['plugin']}, {'active' if s['active'] else 'not active'})" for s in slots]
    return f"logical slots here: {', '.join(shown)}" if shown else "no logical slot here reads it now"


def _feeds(connection: db.Connection, params: Params, facts: db.Row) -> Iterator[Gate]:
    """Rows that arrive by replication are captured, since our triggers fire always; they must also be found again."""
    found = [row["name"] for row in db.rows(connection, SQL["subscriptions"], params, table=spelled(params, "table"))]
    if not found:
        return
    holds = facts["identified"] or not vector_store.of(params).columns(params)
    yield gate(
        "dependents.subscription_finds_its_rows",
        holds,
        spelled(params, "table"),
        found=f"fed by subscription {some(found, SHOWN)}; "
        + ("rows that it brings are captured" if holds else "no primary key and no replica identity here"),
        needed="a primary key or replica identity on this table, or the vectors in a table of their own",
        danger="with REPLICA IDENTITY FULL a row is found by all its columns: one with a vector no longer equals the"
        " publisher's, and its changes are skipped",
        do="add a primary key, or set REPLICA IDENTITY USING INDEX on this table; or set " + SIDE_TABLE,
    )


def validations(connection: db.Connection, params: Params) -> list[db.Statement]:
    """To be carried out where the columns are there, in a transaction that is rolled back: has PostgreSQL check again
    each SQL function whose result is a row of the table. One that lists the columns returns too few of them.
    """
    if not vector_store.of(params).columns(params):
        return []
    found = db.rows(connection, SQL["row_functions"], params, table=spelled(params, "table"))
    return [
        replace(db.statement(SQL["validate"], params, oid=row["oid"]), name=f"function {row['name']}")
        for row in found
    ]
