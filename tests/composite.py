"""Tables whose rows are told apart by several columns together, as other people have them."""

from __future__ import annotations

import csv
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
from psycopg import sql
from pyarrow import feather

from runbook_lib.core.names import identifier
from runbook_lib.sql.key import text_of
from tests import toy
from tests.conftest import write_params
from tests.test_server_versions import SECTIONS

# What a text in a key may hold that notations of lists, of rows and of JSON use for themselves.
ODD = ("a,b", 'say "so"', "back\\slash", "{curly}", "(round)", "it's", "ünïcode ", "line\nbreak", "%s %(k)s", "NULL")
TEXTS = [(f"{s} {v}", f"the {s} {v} {p}") for s in toy.SUBJECTS for v in toy.VERBS for p in toy.PLACES]


@dataclass(frozen=True)
class Shape:
    """A table. key: its columns, in the order of the primary key. value: that of the i-th row."""

    table: str
    create: str
    key: tuple[str, ...]
    value: Callable[[int], tuple[Any, ...]]

    @property
    def name(self) -> sql.Identifier:
        return sql.Identifier("public", self.table)

    @property
    def columns(self) -> sql.Composed:
        return sql.SQL(", ").join(map(identifier, self.key))

    def one_row(self) -> sql.Composed:
        """The condition on one row, whose key is bound by place."""
        return sql.SQL(" AND ").join(sql.SQL("{} = %s").format(identifier(c)) for c in self.key)


# The search of today, of a table of tenants.
OF_TENANTS = """
SELECT t.tenant_id, t.id FROM articles t
WHERE (t.title ILIKE '%' || :query || '%' OR t.body ILIKE '%' || :query || '%')
  AND (:tenant_id::bigint IS NULL OR t.tenant_id = :tenant_id)
ORDER BY t.tenant_id, t.id LIMIT :k
"""


def _ids(i: int) -> tuple[int, int]:
    return i % 7, 2**40 + i // 7


SHAPES = {
    # The columns of the key are apart from each other, in another order than that of the key.
    "text and bigint": Shape(
        "notes",
        'CREATE TABLE notes (id bigint, title text, body text, "Label" text, PRIMARY KEY ("Label", id))',
        ("Label", "id"),
        lambda i: (ODD[i % len(ODD)], i // len(ODD)),
    ),
    "uuid and integer": Shape(
        "Order Lines",
        'CREATE TABLE "Order Lines" (title text, "line no" integer, body text, "Order %" uuid,'
        ' PRIMARY KEY ("Order %", "line no"))',
        ("Order %", "line no"),
        lambda i: (uuid.UUID(int=(i // 3) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128), i % 3),
    ),
    "partitioned by tenant": Shape(
        "docs",
        "CREATE TABLE docs (tenant_id bigint, id bigint, title text, body text, PRIMARY KEY (tenant_id, id))"
        " PARTITION BY HASH (tenant_id);"
        "CREATE TABLE docs_0 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        ("tenant_id", "id"),
        _ids,
    ),
    "tenants": Shape(
        "articles",
        "CREATE TABLE articles (id bigint, title text, body text, tenant_id bigint, PRIMARY KEY (tenant_id, id))",
        ("tenant_id", "id"),
        _ids,
    ),
    "varchar and integer": Shape(
        "lines",
        "CREATE TABLE lines (shop varchar(20), day integer, n smallint, title text, body text,"
        " CONSTRAINT lines_pk PRIMARY KEY (shop, day))",
        ("shop", "day"),
        lambda i: (f"shop {i % 5}", i // 5),
    ),
}


def create(connection: psycopg.Connection[Any], shape: Shape) -> None:
    """The table with the toy's texts, one row without text, and many rows of a length of their own."""
    connection.execute(shape.create)  # type: ignore[call-overload]
    insert = sql.SQL("INSERT INTO {} ({}, title, body) VALUES ({}, %s, %s)").format(
        shape.name, shape.columns, sql.SQL(", ").join(sql.SQL("%s") for _ in shape.key)
    )
    rows = [(*shape.value(i), *text) for i, text in enumerate([*TEXTS, (None, "  ")])]
    with connection.cursor() as cursor:
        cursor.executemany(insert, rows)
    connection.execute(sql.SQL("ANALYZE {}").format(shape.name))


def params_file(folder: Path, shape: Shape, **sections: dict[str, Any]) -> Path:
    """A params file for it, with queries and judgements that name its keys."""
    names = {"name": "composite", "table": shape.table, "key": list(shape.key)}
    legacy = sql.SQL(
        "SELECT {columns} FROM {table} WHERE title ILIKE '%' || :query || '%' OR body ILIKE '%' || :query || '%'"
        " ORDER BY (title ILIKE '%' || :query || '%')::int DESC, {columns} LIMIT :k"
    ).format(columns=shape.columns, table=shape.name)
    given = {
        "target": names,
        "legacy": {"query": legacy.as_string().replace("%%", "%")},
        "search": {"fulltext_column": None},
    } | SECTIONS
    path = write_params(folder, **{s: given.get(s, {}) | sections.get(s, {}) for s in {*given, *sections}})
    judgements = folder / "judgements.jsonl"
    lines = [json.loads(line) for line in judgements.read_text().splitlines()]
    judged = [line | {"key": json.loads(text_of(shape.value(int(line["key"]) - 1)))} for line in lines]
    judgements.write_text("".join(json.dumps(line) + "\n" for line in judged))
    return path


def own_rows(connection: psycopg.Connection[Any], shape: Shape) -> list[tuple[Any, ...]]:
    """Every row as it was before the runbook came."""
    query = sql.SQL("SELECT {0}, title, body FROM {1} ORDER BY {0}").format(shape.columns, shape.name)
    return connection.execute(query, []).fetchall()


def rows(connection: psycopg.Connection[Any], shape: Shape, beside: str = "") -> list[tuple[Any, ...]]:
    """Every row: its key, its text, its vector and the hash of the text that was made of. beside: the side table."""
    same = sql.SQL(" AND ").join(sql.SQL("e.{0} = t.{0}").format(identifier(c)) for c in shape.key)
    joined = sql.SQL(" LEFT JOIN {} e ON {}").format(sql.Identifier(beside), same) if beside else sql.SQL("")
    query = sql.SQL("SELECT {}, concat_ws(E'\\n', title, body), {}.embedding::real[] FROM {} t{} ORDER BY 1, 2")
    key = sql.SQL(", ").join(identifier("t", c) for c in shape.key)
    return connection.execute(query.format(key, sql.SQL("e" if beside else "t"), shape.name, joined), []).fetchall()


def assert_every_row_has_the_vector_of_its_text(
    connection: psycopg.Connection[Any], shape: Shape, beside: str = ""
) -> int:
    """Embeds every text again, outside the runbook, and compares; returns the rows with text."""
    found = rows(connection, shape, beside)
    with_text = [r for r in found if r[-2].strip()]
    assert [r[:-2] for r in with_text if r[-1] is None] == []
    vectors = toy.embed([r[-2] for r in with_text])
    wrong = [r[:-2] for r, v in zip(with_text, vectors, strict=True) if not np.allclose(r[-1], v, atol=1e-6)]
    assert wrong == []
    assert [r[:-2] for r in found if not r[-2].strip() and r[-1] is not None] == []
    return len(with_text)


def call(connection: psycopg.Connection[Any], query: str, k: int) -> list[tuple[Any, ...]]:
    """What the application gets: the key's columns, score, route, similarity and rank."""
    vector = toy.embed([query])[0].tolist()
    return connection.execute("SELECT * FROM search_composite(%s, %s::real[], %s)", [query, vector, k]).fetchall()


def nearest(found: Sequence[tuple[Any, ...]], query: str, k: int) -> tuple[float, set[tuple[Any, ...]]]:
    """By numpy: the similarity of the k-th nearest row, and the keys of all rows as near as that."""
    with_vector = [r for r in found if r[-1] is not None]
    alike = np.array([r[-1] for r in with_vector], np.float32) @ toy.embed([query])[0]
    least = np.sort(alike)[-k]
    return float(least), {r[:-2] for r, a in zip(with_vector, alike, strict=True) if a >= least - 1e-6}


def rows_before(connection: psycopg.Connection[Any], shape: Shape) -> list[tuple[Any, ...]]:
    """Every row: its key and its text."""
    query = sql.SQL("SELECT {0}, concat_ws(E'\\n', title, body) FROM {1} ORDER BY {0}")
    return connection.execute(query.format(shape.columns, shape.name), []).fetchall()


def of_alias(shape: Shape, alias: str) -> sql.Composed:
    """The columns of the key of a row by this alias."""
    return sql.SQL(", ").join(identifier(alias, c) for c in shape.key)


def write_vectors(
    folder: Path, connection: psycopg.Connection[Any], kind: str, shape: Shape, texts: Sequence[tuple[Any, ...]]
) -> None:
    """The vectors of these rows as vectors.<kind>, or in the table ``vectors``. texts: as of :func:`rows_before`."""
    vectors = toy.embed([r[-1] for r in texts])
    plain = [[v if isinstance(v, int) else str(v) for v in r[:-1]] for r in texts]
    columns = {c: [r[i] for r in plain] for i, c in enumerate(shape.key)} | {"embedding": vectors.tolist()}
    path = folder / f"vectors.{kind}"
    if kind in ("parquet", "arrow"):
        table = pa.table({**columns, "embedding": pa.array(columns["embedding"], pa.list_(pa.float32()))})
        (pq.write_table if kind == "parquet" else feather.write_feather)(table, path)
    elif kind == "jsonl":
        each = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in each))
    elif kind == "csv":
        with path.open("w", newline="") as lines:
            csv.writer(lines).writerows([list(columns), *zip(*columns.values(), strict=True)])
    elif kind == "npy":
        np.save(path, vectors)
        (folder / "ids.txt").write_text("".join(json.dumps(row) + "\n" for row in plain))
    else:
        make = "CREATE TABLE vectors AS SELECT {}, NULL::real[] AS embedding FROM {} WITH NO DATA"
        connection.execute(sql.SQL(make).format(shape.columns, shape.name), [])
        connection.execute(sql.SQL("CREATE INDEX ON vectors ({})").format(shape.columns), [])
        places = sql.SQL(", ").join(sql.SQL("%s") for _ in columns)
        with connection.cursor() as cursor:
            insert = sql.SQL("INSERT INTO vectors VALUES ({})").format(places)
            cursor.executemany(insert, [(*r[:-1], v.tolist()) for r, v in zip(texts, vectors, strict=True)])


@contextmanager
def writers(dsn: str, shape: Shape) -> Iterator[list[int]]:
    """One writer beside the block: new texts, changed keys, deleted and new rows; yields which rows it wrote."""
    stop, written = threading.Event(), list[int]()
    last = identifier(shape.key[-1])
    statements = [
        (sql.SQL("UPDATE {} SET body = body || ' again' WHERE {}"), lambda i: shape.value(i)),
        (sql.SQL("UPDATE {} SET {last} = {last} + 50000 WHERE {}"), lambda i: shape.value(i)),
        (sql.SQL("DELETE FROM {} WHERE {}"), lambda i: shape.value(i)),
    ]

    def go() -> None:
        draw = random.Random(1)
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.wait(0.005):
                i = draw.randrange(len(TEXTS))
                statement, values = draw.choices(statements, weights=[5, 4, 1])[0]
                connection.execute(statement.format(shape.name, shape.one_row(), last=last), values(i))
                written.append(i)

    thread = threading.Thread(target=go, daemon=True)
    thread.start()
    try:
        yield written
    finally:
        stop.set()
        thread.join()
