"""Vectors that stand in another table of the same database, read page by page in key order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from psycopg import sql

from runbook_lib.core import db
from runbook_lib.core.names import HASH_BYTES, identifier, key_of, names, of_pgvector
from runbook_lib.core.session import register_vector
from runbook_lib.embeddings import sources
from runbook_lib.embeddings.sources import EMBEDDING_COLUMN, HASH_COLUMN, TEXT_COLUMN, SourceRows
from runbook_lib.params import Params
from runbook_lib.sql import load

SQL = load("vector_table")
# pgvector's own types, by their unqualified names; all of them can be read as a vector.
VECTOR_TYPES = ("vector", "halfvec", "sparsevec")


def read(connection: db.Connection, params: Params) -> Iterator[SourceRows]:
    """Streams the table ``embeddings.table``; no snapshot is held between two pages.

    Raises BadInput where the table, its key or its column `embedding` is missing, or no index starts with the key.
    """
    register_vector(connection)
    parts, of_key = names(params) | _parts(connection, params), key_of(params)
    after: sql.Composable = sql.SQL("true")
    values, first = {"last": None, "batch_rows": params.embeddings.rows_a_batch}, 1
    while True:
        page = connection.execute(
            SQL["page"].compose(parts | {"after": after}), values, prepare=False, binary=True
        ).fetchall()
        if not page:
            break
        vectors, faults = sources.stack([_array(r["embedding"]) for r in page], params.vector.dimension)
        hashes = [r["text_hash"] for r in page] if parts["hash"] != NO_HASH else None
        yield SourceRows(range(first, first + len(page)), [r["key"] for r in page], vectors, faults, hashes)
        first += len(page)
        values["last"] = page[-1]["key"]
        after = of_key.written("s.key > %last", parts)
    row = connection.execute(SQL["keyless"].compose(parts), {}).fetchone()
    if row and row["rows"]:
        nothing = np.zeros((1, params.vector.dimension), dtype=np.float32)
        yield SourceRows([first], [None], nothing, {0: f"no key, in {row['rows']} rows"}, None)


NO_HASH = sql.SQL("NULL::bytea")


def _parts(connection: db.Connection, params: Params) -> dict[str, sql.Composable]:
    schema, _, table = str(params.embeddings.table).partition(".")
    source, key = identifier(schema, table), params.target.key_columns
    spelled = source.as_string().replace("%%", "%")
    columns = {r["name"]: r for r in db.rows(connection, SQL["columns"], params, source=spelled, columns=len(key))}
    subject = str(params.embeddings.table)
    needed = f"a table with columns {', '.join(key)} and {EMBEDDING_COLUMN}"
    if not {*key, EMBEDDING_COLUMN} <= columns.keys():
        found = f"columns {', '.join(columns)}" if columns else "no such table"
        raise sources.bad_file(subject, found, needed, "rows cannot be told")
    shown = params.target.key_shown
    if list(key) not in columns[key[0]]["indexed"]:
        danger = "each page would sort the whole table again"
        raise sources.bad_file(subject, f"no index on {shown}", f"an index that starts with {shown}", danger)
    is_vector = columns[EMBEDDING_COLUMN]["type"].rsplit(".", 1)[-1] in VECTOR_TYPES
    kind = of_pgvector(params, "vector") if is_vector else sql.SQL("pg_catalog.float8[]")
    value = sql.SQL("s.{}::{}").format(identifier(EMBEDDING_COLUMN), kind)
    return {"source": source, "value": value, "hash": _hash(columns)}


def _hash(columns: dict[str, db.Row]) -> sql.Composable:
    """The hash of the text that each vector was made from, as far as the table says."""
    if HASH_COLUMN in columns:
        kind = columns[HASH_COLUMN]["type"]
        raw = sql.SQL("s.{}" if kind == "bytea" else "decode(s.{}, 'hex')").format(identifier(HASH_COLUMN))
    elif TEXT_COLUMN in columns:
        raw = sql.SQL("sha256(convert_to(s.{}::text, 'UTF8'))").format(identifier(TEXT_COLUMN))
    else:
        return NO_HASH
    return sql.SQL("substring({} from 1 for {})").format(raw, sql.Literal(HASH_BYTES))


def _array(value: Any) -> Any:
    """pgvector's value, or an array of PostgreSQL, as numbers; None where there is none."""
    return value if value is None or isinstance(value, list) else sources.as_array(value)
